"""The GPU check on the CPU: its steps run in their processes, on what a bare machine has, and against a real server."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn
from tritonclient.utils import InferenceServerException

from deploy import gpu_check
from deploy.checks import plans, reference, runner, served
from deploy.checks.context import Context
from deploy.checks.fixtures import Case
from deploy.checks.geometry import volumes
from deploy.checks.order import TELLS_APART
from deploy.checks.report import Report
from deploy.checks.steps import STEPS, Step
from engine.contract import MODELS
from engine.manifest import Manifest
from engine.models.checkpoint import load_clip, load_lamed
from engine.runtime.onnx_session import OnnxGraph
from export.plans import BOUNDS
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

STEP = Step("", "tests/functional/gpu_check_steps.py", "", "something", 1)
CONTEXT = Context("cpu", True, "", "training/demo", "", {})
BARE = ("torch", "numpy", "transformers", "onnxruntime")
# A machine with PyTorch and transformers has none of these, whatever brings them here.
ABSENT = {"pydantic", "pydantic_core", "nibabel", "blake3", "vllm", "tritonclient", "scipy", "h5py", "pydicom", "grpc"}
BASIC = [step.name for step in STEPS if step.basic]


def brought_by(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require."""
    todo, brought = [canonicalize_name(name) for name in names], set()
    while todo:
        name = todo.pop()
        if name in brought:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        brought.add(name)
        needed = [Requirement(line) for line in lines]
        todo += [canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return brought


# --- on a machine with PyTorch alone ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[str, str]:
    """The environment of a Python that has BARE and what they require, and finds nothing else."""
    brought = brought_by(BARE)
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if brought & set(map(canonicalize_name, owners))
    }
    ours = {"engine", "deploy", "benchmarks", "export", "weights", "write_checkpoint"}
    known = sorted((modules | sys.stdlib_module_names | ours) - ABSENT)
    folder = tmp_path_factory.mktemp("bare")
    # Python imports a module of this name when it starts. What is not known is not found, as if it were not installed.
    (folder / "sitecustomize.py").write_text(
        f"""import sys


class OnlyKnown:
    KNOWN = {set(known)!r}
    BROUGHT = {brought!r}

    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.KNOWN and not name.startswith("_sysconfigdata"):
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                found = finder.find_distributions(*context)
                yield from (one for one in found if one.name.lower().replace("_", "-") in self.BROUGHT)


sys.meta_path[:] = [OnlyKnown(list(sys.meta_path))]
"""
    )
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_every_module_of_the_models_imports_with_pytorch_and_transformers_alone(bare):
    program = """
import importlib, pkgutil, sys
sys.path.insert(0, "")
import engine.models
for module in pkgutil.iter_modules(engine.models.__path__):
    importlib.import_module(f"engine.models.{module.name}")
try:
    import pydantic
except ModuleNotFoundError:
    print(engine.models.__file__)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(ROOT / "engine" / "models" / "__init__.py"), "")


def test_the_basic_steps_pass_with_pytorch_and_transformers_alone_and_the_others_say_what_is_missing(bare, tmp_path):
    command = [sys.executable, ROOT / "deploy" / "gpu_check.py", "--out", tmp_path, "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu-check.log").read_text()
    steps = {step["name"]: step for step in json.loads((tmp_path / "gpu-check.json").read_text())["steps"]}
    assert [name for name, step in steps.items() if step["state"] == "passed"] == BASIC
    assert all(step["state"] == "not run" and step["why"] for name, step in steps.items() if name not in BASIC)
    assert steps["decoder"]["why"] == "no package vllm" and "no package pydantic" in steps["served"]["why"]

    checked = [row for row in steps["reference"]["rows"] if row["precision"] == "fp32" and "error" in row]
    assert len(checked) == 16 and all(row["ok"] for row in checked)
    timed = {(row["what"], row["batch"]) for row in steps["encoders"]["rows"] if "least ms" in row}
    parts = ("vision encoder", "mask encoder", "mask head", "CLIP, scans", "CLIP, texts")
    assert {(part, batch) for part in parts for batch in (1, 8)} <= timed
    decoded = {(row["what"], row["batch"]) for row in steps["language-model"]["rows"] if "least ms" in row}
    assert {(what, batch) for what in ("prefill", "decode, a token") for batch in (1, 8, 64)} <= decoded
    markdown = (tmp_path / "gpu-check.md").read_text()
    assert "## Not run" in markdown and "- decoder: no package vllm" in markdown


def test_a_machine_without_a_gpu_runs_nothing_else_and_says_what_is_missing(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "PyTorch finds no GPU: --device cpu --tiny" in said and "-- reference: nothing but a GPU is missing" in said
    assert "-- plans: " in said and "no TensorRT" in said
    steps = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    assert [step["name"] for step in steps] == [step.name for step in STEPS]
    assert [step["state"] for step in steps] == ["passed"] + ["not run"] * (len(STEPS) - 1)


def test_a_machine_whose_facts_are_not_known_is_not_said_to_have_no_gpu(tmp_path, monkeypatch, capsys):
    broken = tuple(replace(s, function="no_such") if s.name == "machine" else s for s in STEPS)
    monkeypatch.setattr(gpu_check, "STEPS", broken)
    assert gpu_check.main(["--out", str(tmp_path), "--steps", "machine,roofline"]) == 1
    assert "the step machine has not passed" in capsys.readouterr().err
    steps = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    assert [step["state"] for step in steps] == ["failed", "not run"] and "no_such" in steps[0]["why"]


# --- the run ---------------------------------------------------------------------------------------------------------
def run(folder: Path, *steps: Step, budget: float = 60, serving: list[str] | None = None) -> Report:
    report = Report(folder, steps, {"command": "a test"})
    runner.run(steps, CONTEXT, report, budget, lambda: serving or [], lambda text: None)
    return report


def named(name: str, function: str | None = None, **changes) -> Step:
    return replace(STEP, name=name, function=function or name.replace(" ", "_"), **changes)


def test_a_step_may_end_in_any_way_and_the_next_ones_run_all_the_same(tmp_path):
    ways = ("is wrong", "is wrong by numpy", "raises", "crashes", "leaves", "tells nothing", "passes")
    report = run(tmp_path, *map(named, ways))
    assert report.states == dict.fromkeys(ways[:-1], "failed") | {"passes": "passed"} and not report.ok
    why = {name: result.why for name, result in report.results.items()}
    assert why["is wrong"] == "not as it should be: another"
    assert why["is wrong by numpy"] == "not as it should be: far off"
    assert why["raises"] == "Failed: too far off (first in the log: RootError: what an engine's process said)"
    assert why["crashes"].startswith("its process was ended by SIGSEGV")
    assert why["leaves"].startswith("its process ended with status 3")
    assert why["tells nothing"] == "it told nothing"
    assert all(report.results[name].rows[0] == {"what": "before"} for name in ("raises", "crashes", "leaves"))
    text = (tmp_path / "gpu-check.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [step["state"] for step in written["steps"]] == list(report.states.values()) and written["ok"] is False
    assert "too far off" in (tmp_path / "gpu-check.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check.json", "gpu-check.md", "gpu-check.log"}


def test_a_step_that_hangs_is_ended_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr("deploy.checks.steps.LEAST_LIMIT_S", 0)
    monkeypatch.setattr(runner, "GRACE_S", 1)
    report = run(tmp_path, named("hangs"), named("passes"))
    assert report.states == {"hangs": "failed", "passes": "passed"}
    assert report.results["hangs"].why.startswith("not done after 3 s")
    (row,) = report.results["hangs"].rows
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, row["value"])) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in row["value"])


def test_rows_are_in_the_report_before_their_step_ends(tmp_path):
    seen = []

    def say(text: str) -> None:
        if "pids" in text:
            seen.append(json.loads((tmp_path / "gpu-check.json").read_text())["steps"][0])
            raise KeyboardInterrupt

    steps = [named("hangs"), named("passes")]
    report = Report(tmp_path, steps, {})
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "GRACE_S", 1)
        runner.run(steps, CONTEXT, report, 60, list, say)
    assert seen[0]["state"] == "running" and seen[0]["rows"][0]["what"] == "pids"
    left = {step["name"]: step for step in json.loads((tmp_path / "gpu-check.json").read_text())["steps"]}
    assert left["hangs"]["state"] == "failed" and left["hangs"]["why"] == "interrupted"
    assert left["passes"]["state"] == "waiting" and not report.ok


def test_no_step_begins_that_would_outlast_the_budget(tmp_path):
    report = run(tmp_path, named("passes", seconds=50), named("long", "passes", seconds=61), budget=60)
    assert report.states == {"passes": "passed", "long": "not run"}
    assert re.fullmatch(
        r"(59|60) of 60 s were left, and it takes 61: give a larger --budget", report.results["long"].why
    )
    assert report.ok and not run(tmp_path, named("long", "passes", seconds=61, basic=True)).ok


def test_a_step_waits_for_packages_programs_another_step_and_all_that_serving_needs(tmp_path):
    report = run(
        tmp_path,
        named("is wrong"),
        named("a", "passes", packages=("no_such_package",), programs=("no-such-program",)),
        named("b", "passes", after="is wrong", serves=True),
        named("c", "passes", after="a"),
        serving=["no Triton"],
    )
    assert [result.why for result in report.results.values()][1:] == [
        "no package no_such_package; no program no-such-program",
        "the step is wrong has not passed; no Triton",
        "the step a has not passed",
    ]


def test_later_steps_are_given_the_rates_that_were_measured(tmp_path):
    report = run(tmp_path, named("roofline", "rates"), named("tells its rates"))
    assert report.results["tells its rates"].rows == [{"rates": {"copy": 2.0}}]


# --- the reference ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dev_small(tmp_path_factory) -> Case:
    return Case.write("dev_small", tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def dev_clip(tmp_path_factory) -> Case:
    return Case.write("dev_clip", tmp_path_factory.mktemp("case"))


def wrong(values, precision: str) -> list[str]:
    return [value.what for value in values if not value.error <= reference.bound(precision, value)]


def test_the_subtlest_mistakes_of_the_modules_are_found_in_fp32(dev_small):
    model, _ = load_lamed(dev_small.folder)

    def found() -> list[str]:
        return wrong(reference.lamed_values(dev_small, model, "cpu", torch.float32), "fp32")

    (gelu,) = [part for part in model.mm_projector.projector if isinstance(part, nn.GELU)]
    gelu.approximate = "tanh"
    assert {"proj_first"} == {"proj_first", "vision_first"} & set(found())
    gelu.approximate = "none"
    for norm in (part for part in model.vision_tower.modules() if isinstance(part, nn.LayerNorm)):
        norm.eps = 1e-6
    assert {"vision_first"} == {"vision_first", "seg_image_first"} & set(found())


def test_a_state_or_a_term_of_the_mask_that_is_wrong_is_found_in_bf16(dev_small, monkeypatch):
    model, _ = load_lamed(dev_small.folder, torch.bfloat16)

    def found(case=dev_small) -> list[str]:
        return wrong(reference.lamed_values(case, model, "cpu", torch.bfloat16), "bf16")

    # The state of [SEG] itself, not the one that predicts it.
    spec = {**dev_small.spec, "seg_positions": [dev_small.spec["seg_positions"][0] + 1]}
    assert "seg_prompt" in found(replace(dev_small, spec=spec))
    text_term = model.seg_module.mask_decoder.txt_align_upscaled_embedding
    monkeypatch.setattr(text_term, "forward", lambda prompt: torch.zeros_like(prompt[:, : text_term.out_features]))
    assert set(found()) == {"seg_low_res", "seg_logits", "seg_logits_mid"}


def test_clip_without_its_normalisation_is_found(dev_clip):
    model, _ = load_clip(dev_clip.folder)
    assert wrong(reference.clip_values(dev_clip, model, "cpu", torch.float32), "fp32") == []
    with torch.no_grad():
        model.logit_scale.copy_(model.logit_scale.exp())
    assert wrong(reference.clip_values(dev_clip, model, "cpu", torch.float32), "fp32") == ["clip logits_per_image"]


# --- servers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def own(demo_server) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of each volume, in the place of a plan's own results."""
    manifest, found = Manifest.read(demo_server.repository), {}
    for name, output in plans.ENCODERS.items():
        graph = OnnxGraph(demo_server.repository / name / "1" / "model.onnx", MODELS[name])
        images = volumes(plans.VOLUMES, manifest.image_size).numpy()
        found[name] = np.stack([graph({"IMAGE": image[None]})[output][0] for image in images])
    return found


def test_all_that_is_asked_of_a_server_is_asked_of_one_on_the_cpu(demo_server, own, tmp_path):
    context = replace(
        CONTEXT,
        work=str(tmp_path),
        segment_question=gpu_check._parser().parse_args([]).segment_question,
        rates={"copy": 1e10, "read": 1e10, "fp32": 1e11, "bf16": 1e11},
    )
    rows = list(served.asked(demo_server, context, Manifest.read(demo_server.repository), own))
    mixed = [row for row in rows if "to another's" in row]
    assert [row["what"] for row in mixed] == [
        f"{name}, {what}" for name in plans.ENCODERS for what in ("A A A A B B B B A B", "8 at a time, 1 rounds")
    ]
    assert all(row["ok"] for row in mixed)
    # In fp16 the bound is 50 times as wide, and would still tell the volumes apart.
    assert all(row["to another's"] > TELLS_APART * BOUNDS["fp16"] for row in mixed)
    known = [row for row in rows if row["what"] == "questions about known scans"]
    assert [row["clients"] for row in known] == list(served.TINY_LOAD.clients)
    assert all(row["tokens/s"] > 0 and row["ms a token"] > 0 for row in known)
    (new,) = [row for row in rows if row["what"] == "a question about a new scan"]
    assert 0 < new["vision_encoder ms"] < new["first token ms"] and new["prepare ms"] > 0
    masks = rows[-1]
    assert masks["what"].startswith("masks of 4 scans at the same time") and masks["ok"]


def test_results_of_other_volumes_are_found_behind_the_front(demo_server, own):
    manifest = Manifest.read(demo_server.repository)
    images = volumes(plans.VOLUMES, manifest.image_size).numpy()
    others = {name: results[::-1] for name, results in own.items()}
    rows = list(served.not_mixed_up(demo_server.inside_url, images, others, manifest, 1))
    assert len(rows) == 4 and not any(row["ok"] for row in rows)


def test_clients_of_the_front_reach_no_encoder(demo_server):
    images = np.zeros((1, 1, *Manifest.read(demo_server.repository).image_size), np.float32)
    with pytest.raises(InferenceServerException, match="vision_encoder"):
        served.encoder(demo_server.url, "vision_encoder", images)(0)


def test_vllms_engine_starts_and_answers_as_recorded(tmp_path):
    command = [sys.executable, ROOT / "deploy" / "gpu_check.py", "--out", tmp_path, "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--steps", "decoder"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu-check.log").read_text()[-4000:]
    ((step,),) = [json.loads((tmp_path / "gpu-check.json").read_text())["steps"]]
    assert [row["what"] for row in step["rows"]] == [
        "the engine starts",
        "an answer",
        "8 answers at the same time",
        "the engine starts again, with full caches",
    ]
    assert step["rows"][2]["as recorded"] == "8 of 8" and step["rows"][2]["error of [SEG] states"] < 1e-5
