"""M3D-Bench on what is really served: all eight tasks by a server, and a run of an engine that is killed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import m3d_bench
from benchmarks.bench.metrics.choices import LETTERS
from benchmarks.bench.rows import read_rows
from benchmarks.bench.runner import decoded
from benchmarks.bench.samples import TASKS
from tests.conftest import ROOT
from tests.functional.conftest import DEMO
from tests.m3d_data import write_root

NEW_TOKENS = "8"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """In the demonstration model's size: the tiny one's tokenizer has no capital letters to choose from."""
    size = tuple(json.loads((DEMO / "config.json").read_text())["image_size"])
    return write_root(tmp_path_factory.mktemp("bench") / "root", size)


@pytest.mark.integration
def test_a_server_is_asked_all_eight_tasks_and_its_answers_are_the_rows(demo_client, demo_server, root, tmp_path):
    arguments = ["--data", str(root), "--out", str(tmp_path), "--new-tokens", NEW_TOKENS, "--server", demo_server.url]
    assert m3d_bench.main(arguments) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["tasks"]) == list(TASKS) and not found["not_run"]
    assert found["model"]["manifest_sha256"] == demo_client.info().model.manifest_sha256
    rows = {task: read_rows(tmp_path / f"rows/{task}.jsonl")[1] for task in TASKS}
    for task in ("report", "rec", "seg-semantic"):
        for row in rows[task]:
            assert row["prediction"] == demo_client.ask(row["image"], row["question"], max_new_tokens=8).text
    (closed,) = rows["vqa-closed"]
    likely = demo_client.ask(closed["image"], closed["question"], max_new_tokens=1, choices=LETTERS).choices
    assert closed["logprobs"] == pytest.approx(dict(likely), abs=1e-4) and set(likely) == set(LETTERS)
    (pair,) = rows["retrieval"]
    score = decoded(pair["scan_embedding"]) @ decoded(pair["text_embedding"])
    np.testing.assert_allclose(score, demo_client.rank(pair["image"], [pair["answer"]]).scores[0], atol=1e-6)


@pytest.mark.slow(group="faults")
def test_a_run_of_an_engine_that_is_killed_goes_on_and_ends_with_the_same_figures(demo_repository, root, tmp_path):
    def arguments(out):
        return [
            "--data",
            str(root),
            "--new-tokens",
            NEW_TOKENS,
            "--repository",
            str(demo_repository),
            "--out",
            tmp_path / out,
        ]

    def run(*command):
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)

    killed = run("-m", "tests.m3d_bench", "7", *arguments("cut"))
    assert killed.returncode == -9, killed.stderr
    kept = sum(len(read_rows(path)[1]) for path in (tmp_path / "cut/rows").glob("*.jsonl"))
    assert kept and not (tmp_path / "cut/bench.json").exists()
    for out in ("cut", "whole"):
        ended = run("benchmarks/m3d_bench.py", *arguments(out))
        assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "cut/bench.json").read_bytes() == (tmp_path / "whole/bench.json").read_bytes()
