"""What the GPU check asks of a server and of vLLM's engine, on the CPU: both answer rightly, and mistakes show."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from deploy.checks import plans, served
from engine.contract import MODELS
from engine.manifest import Manifest
from engine.runtime.onnx_session import OnnxGraph
from tests.conftest import ROOT
from tests.tiny import volume

pytestmark = pytest.mark.integration


def test_volumes_in_a_row_and_at_the_same_time_get_their_own_results_from_triton(server, repository):
    images = np.stack([volume(f"gpu-check {n}") for n in range(plans.VOLUMES)])
    own = {}
    for name, output in plans.ENCODERS.items():
        graph = OnnxGraph(repository / name / "1" / "model.onnx", MODELS[name])
        own[name] = np.stack([graph({"IMAGE": image[None]})[output][0] for image in images])
    manifest = Manifest.read(repository)
    rows = list(served.not_mixed_up(server.url, images, own, manifest))
    assert len(rows) == 4 and all(row["ok"] for row in rows)
    others = {name: results[::-1] for name, results in own.items()}
    assert not any(row["ok"] for row in served.not_mixed_up(server.url, images, others, manifest))


def test_vllms_engine_starts_and_answers_as_recorded(tmp_path):
    command = [sys.executable, ROOT / "deploy" / "gpu_check.py", "--out", tmp_path, "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--steps", "decoder"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu-check.log").read_text()[-4000:]
    ((step,),) = [json.loads((tmp_path / "gpu-check.json").read_text())["steps"]]
    assert [row["what"] for row in step["rows"]] == [
        "the engine starts",
        "an answer",
        "8 answers at the same time",
    ]
    assert step["rows"][-1]["as recorded"] == "8 of 8" and step["rows"][-1]["error of [SEG] states"] < 1e-5
