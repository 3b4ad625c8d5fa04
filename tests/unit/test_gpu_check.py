"""The GPU check: its steps run here at small sizes, on a machine that has PyTorch alone, and find what is wrong."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import floor, latency
from benchmarks.samples import Sample
from deploy import gpu_check
from deploy.checks import encoders, language_model, order, plans, reference, runner, served
from deploy.checks.context import Context, Failed
from deploy.checks.geometry import lamed_config, made
from deploy.checks.report import Report
from deploy.checks.steps import STEPS, Step, has_package
from engine import gpu
from engine.gpu_memory import LanguageModel, Plan
from engine.models.checkpoint import load_clip, load_lamed
from engine.models.lamed import Lamed
from tests.conftest import ROOT

STEP = Step("", "tests/unit/gpu_check_steps.py", "", "something", 1)
CONTEXT = Context("cpu", True, "", "training/demo", "", {})
BARE = ("torch", "numpy", "transformers", "onnxruntime")
# A machine with PyTorch and transformers has none of these, whatever brings them here.
ABSENT = {"pydantic", "pydantic_core", "nibabel", "blake3", "vllm", "tritonclient", "scipy", "h5py", "pydicom", "grpc"}
BASIC = [step.name for step in STEPS if step.basic]


def table(text: str, first: str) -> list[list[str]]:
    """The cells of a Markdown table whose first column is called `first`, without its head."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][1:]


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


# --- on a machine with PyTorch alone ---------------------------------------------------------------------------------
@pytest.mark.integration
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


@pytest.mark.integration
def test_the_basic_steps_pass_with_pytorch_and_transformers_alone_and_the_others_say_what_is_missing(bare, tmp_path):
    command = [sys.executable, ROOT / "deploy" / "gpu_check.py", "--out", tmp_path, "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu-check.log").read_text()
    steps = {step["name"]: step for step in json.loads((tmp_path / "gpu-check.json").read_text())["steps"]}
    assert [name for name, step in steps.items() if step["state"] == "passed"] == BASIC
    assert all(step["state"] == "not run" and step["why"] for name, step in steps.items() if name not in BASIC)
    assert steps["decoder"]["why"] == "no package vllm" and "no tritonclient" in steps["served"]["why"]

    checked = [row for row in steps["reference"]["rows"] if row["precision"] == "fp32" and "error" in row]
    assert len(checked) == 16 and all(row["ok"] for row in checked)
    timed = {(row["what"], row["batch"]) for row in steps["encoders"]["rows"] if "least ms" in row}
    parts = ("vision encoder", "mask encoder", "mask head", "CLIP, scans", "CLIP, texts")
    assert {(part, batch) for part in parts for batch in (1, 8)} <= timed
    decoded = {(row["what"], row["batch"]) for row in steps["language-model"]["rows"] if "least ms" in row}
    assert {(what, batch) for what in ("prefill", "decode, a token") for batch in (1, 8, 64)} <= decoded
    markdown = (tmp_path / "gpu-check.md").read_text()
    assert "## Not run" in markdown and "- decoder: no package vllm" in markdown


@pytest.mark.integration
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


@pytest.mark.integration
def test_a_machine_whose_facts_are_not_known_is_not_said_to_have_no_gpu(tmp_path, monkeypatch, capsys):
    broken = tuple(replace(s, function="no_such") if s.name == "machine" else s for s in STEPS)
    monkeypatch.setattr(gpu_check, "STEPS", broken)
    assert gpu_check.main(["--out", str(tmp_path), "--steps", "machine,roofline"]) == 1
    assert "the step machine has not passed" in capsys.readouterr().err
    steps = json.loads((tmp_path / "gpu-check.json").read_text())["steps"]
    assert [step["state"] for step in steps] == ["failed", "not run"] and "no_such" in steps[0]["why"]


def test_a_step_that_is_unknown_is_refused_with_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--steps", "machine,masks"])
    assert "masks: no such step; there are machine, reference" in capsys.readouterr().err


def test_what_travels_to_such_a_machine_fits_into_64_mib():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in filter(None, names.split("\0"))]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 60 << 20  # and what git adds


# --- the run ---------------------------------------------------------------------------------------------------------
def run(folder: Path, *steps: Step, budget: float = 60, serving: list[str] | None = None) -> Report:
    report = Report(folder, steps, {"command": "a test"})
    runner.run(steps, CONTEXT, report, budget, lambda: serving or [], lambda text: None)
    return report


def named(name: str, function: str | None = None, **changes) -> Step:
    return replace(STEP, name=name, function=function or name.replace(" ", "_"), **changes)


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
def test_no_step_begins_that_would_outlast_the_budget(tmp_path):
    report = run(tmp_path, named("passes", seconds=50), named("long", "passes", seconds=61), budget=60)
    assert report.states == {"passes": "passed", "long": "not run"}
    assert re.fullmatch(
        r"(59|60) of 60 s were left, and it takes 61: give a larger --budget", report.results["long"].why
    )
    assert report.ok and not run(tmp_path, named("long", "passes", seconds=61, basic=True)).ok


@pytest.mark.integration
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


@pytest.mark.integration
def test_later_steps_are_given_the_rates_that_were_measured(tmp_path):
    report = run(tmp_path, named("roofline", "rates"), named("tells its rates"))
    assert report.results["tells its rates"].rows == [{"rates": {"copy": 2.0}}]


def test_the_steps_are_files_and_functions_that_exist_and_the_basic_ones_fit_into_half_of_the_budget():
    for step in STEPS:
        assert f"def {step.function}(context: Context)" in (ROOT / step.module).read_text()
        assert step.after is None or step.after in [other.name for other in STEPS[: STEPS.index(step)]]
    assert [step.name for step in STEPS[: len(BASIC)]] == BASIC
    assert sum(step.seconds for step in STEPS if step.basic) <= gpu_check.BUDGET_S / 2
    # What an image for serving adds, up to the precisions that are not served.
    assert sum(step.seconds for step in STEPS[: STEPS.index(next(s for s in STEPS if s.name == "precisions"))]) <= 480


def test_the_readme_lists_the_steps_with_their_seconds_and_findings():
    text = (ROOT / "deploy" / "README.md").read_text()
    told = [(row[0], row[1], row[3]) for row in table(text, "step")]
    assert told == [(f"`{s.name}`", str(s.seconds), ", ".join(map(str, s.findings)) or "–") for s in STEPS]
    decided = {number for step in STEPS for number in step.findings}
    assert decided <= {int(row[0]) for row in table(text, "finding")}


def test_packages_that_cannot_be_imported_are_not_there():
    assert has_package("torch") and not has_package("no_such_package") and not has_package("torch.no.such")


# --- the reference ---------------------------------------------------------------------------------------------------
def wrong(values, precision: str) -> list[str]:
    return [value.what for value in values if not value.error <= reference.bound(precision, value)]


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
def test_clip_without_its_normalisation_is_found(dev_clip):
    model, _ = load_clip(dev_clip.folder)
    assert wrong(reference.clip_values(dev_clip, model, "cpu", torch.float32), "fp32") == []
    with torch.no_grad():
        model.logit_scale.copy_(model.logit_scale.exp())
    assert wrong(reference.clip_values(dev_clip, model, "cpu", torch.float32), "fp32") == ["clip logits_per_image"]


def test_a_value_that_is_not_a_number_is_an_error():
    value = reference.Value("x", np.array([np.nan, 1]), np.array([1.0, 1.0]), 1e-3)
    assert not value.error <= reference.bound("bf16", value)


# --- whose result is it? ---------------------------------------------------------------------------------------------
OWN = [np.full((4, 4), float(n + 1)) for n in range(8)]


def test_right_results_pass_in_every_order():
    for row in (
        order.in_a_row(OWN.__getitem__, OWN, 1e-3),
        order.at_once(OWN.__getitem__, OWN, 1e-3),
        order.as_a_batch(np.stack(OWN), OWN, 1e-3),
    ):
        assert row["ok"] and row["error"] == 0 and row["to another's"] == pytest.approx(1 / 7)


def test_a_server_that_gives_the_previous_scans_result_first_is_found():
    """As triton-inference-server/server#8550 describes it."""
    before = [0]

    def stale(number: int) -> np.ndarray:
        result, before[0] = OWN[before[0]], number
        return result

    row = order.in_a_row(stale, OWN, 1e-3)
    assert not row["ok"] and row["wrong requests"] == "4, 8, 9"


def test_results_that_are_exchanged_among_requests_at_the_same_time_are_found():
    row = order.at_once(lambda number: OWN[number ^ (number == 5)], OWN, 1e-3, rounds=2)
    assert not row["ok"] and row["wrong requests"] == "5, 13"
    assert not order.as_a_batch(np.stack(OWN[::-1]), OWN, 1e-3)["ok"]


@pytest.mark.parametrize("result", [np.full((4, 4), np.nan), np.zeros((4, 4)), np.ones(4)])
def test_results_that_are_no_numbers_or_of_another_shape_are_found(result):
    assert not order.in_a_row(lambda number: result, OWN, 1e-3)["ok"]


def test_volumes_whose_results_are_alike_prove_nothing():
    alike = [np.ones(3), np.ones(3) + 1e-3]
    assert not order.in_a_row(alike.__getitem__, alike, 1e-3)["ok"]


def test_an_encoder_that_reads_the_first_volume_of_a_batch_only_is_found(monkeypatch):
    whole = Lamed.encode_images

    def first_only(self, image):
        return whole(self, image[:1].expand_as(image))

    monkeypatch.setattr(Lamed, "encode_images", first_only)
    context = replace(CONTEXT, rates={"copy": 1e10, "read": 1e10, "fp32": 1e11, "bf16": 1e11})
    rows = {(row["what"], row.get("precision")): row for row in encoders.measure(context) if "ok" in row}
    assert not rows["vision encoder, a batch of 8", "fp32"]["ok"]
    assert rows["mask encoder, a batch of 8", "fp32"]["ok"]


# --- the language model ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny_lamed() -> Lamed:
    return made(lambda: Lamed(lamed_config(True)), "cpu", torch.float32)


def prompts(model: Lamed) -> torch.Tensor:
    return 0.1 * torch.randn(3, 21, model.config.llm_width, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_steps_say_what_generate_says(tiny_lamed):
    rows = prompts(tiny_lamed)
    answering = language_model.Answering(tiny_lamed, rows, 64)
    answering.prefill()
    said = [answering.tokens.clone()]
    for _ in range(8):
        answering.step()
        said.append(answering.tokens.clone())
    wanted = tiny_lamed.llm.generate(
        inputs_embeds=rows,
        attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.cat(said, dim=1).tolist() == wanted.tolist()


class NothingIsRead(TorchDispatchMode):
    """Raises where the host reads a value of a tensor or makes one from its own: neither can be in a CUDA graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "lift_fresh")):
            raise RuntimeError(f"{name} cannot be captured")
        return function(*args, **(kwargs or {}))


@torch.no_grad()  # inference_mode would show composite operations as they are called
def test_a_step_can_be_captured_into_a_cuda_graph():
    model = made(lambda: Lamed(lamed_config(True)), "cpu", torch.bfloat16)
    answering = language_model.Answering(model, prompts(model).bfloat16(), 64)
    answering.prefill()
    answering.step()
    with NothingIsRead():
        answering.step()
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            answering.position.item()
        with pytest.raises(RuntimeError, match="lift_fresh"):
            torch.tensor([1])


@pytest.mark.parametrize("batch", language_model.BATCHES)
def test_the_floor_of_many_answers_is_that_of_the_benchmark(batch):
    def stages(at_once: int) -> dict[str, floor.Stage]:
        return floor.stages(
            lamed_config(True), llm="bf16", graphs="bf16", question_tokens=16, answer_tokens=64, at_once=at_once
        )

    prefill, decode, _ = language_model._stages(lamed_config(True), batch, stages(1))
    wanted = stages(batch)["decode"]
    assert (decode.flops, decode.bytes) == pytest.approx((wanted.flops, wanted.bytes))
    assert prefill.flops == batch * stages(1)["prefill"].flops and prefill.bytes == stages(1)["prefill"].bytes


@torch.inference_mode()
def test_a_cache_that_forgets_a_row_is_found(tiny_lamed, monkeypatch):
    config = lamed_config(True)
    monkeypatch.setattr(language_model, "DTYPE", torch.float32)
    assert language_model._cache_changes_nothing(tiny_lamed, config, "cpu")["ok"]
    right = language_model.Answering.step

    def forgetful(self) -> None:
        for layer in self.cache.layers:
            layer.values[:, :, : self.asked] = 0
        right(self)

    monkeypatch.setattr(language_model.Answering, "step", forgetful)
    assert not language_model._cache_changes_nothing(tiny_lamed, config, "cpu")["ok"]


# --- the server ------------------------------------------------------------------------------------------------------
@pytest.fixture
def started(monkeypatch):
    """What the step would start, beside a server that is none."""
    commands = []
    monkeypatch.setattr(plans, "python", lambda command: commands.append(list(command)))
    monkeypatch.setattr(served, "Server", lambda *_, **__: nullcontext(SimpleNamespace(url="localhost:8001")))
    return commands


def test_the_benchmark_loads_no_second_model_beside_the_server_and_asks_for_a_mask(started, tmp_path):
    given = gpu_check._parser().parse_args([])
    context = replace(CONTEXT, work=str(tmp_path), segment_question=given.segment_question)
    rows = list(served.benchmark(context))
    ((program, *arguments),) = started
    asked = latency._parser().parse_args(arguments)
    example = runpy.run_path(str(ROOT / "examples" / "first_answer.py"))
    assert program == "benchmarks/latency.py" and asked.segment_question == example["SEGMENT"]
    assert asked.baseline == () and rows[0]["ok"] is False  # the benchmark that was not run wrote nothing


def test_serving_without_rates_is_refused_before_a_server_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(served.Manifest, "read", lambda repository: None)
    with pytest.raises(Failed, match="run the step roofline before"):
        next(served.serve(replace(CONTEXT, work=str(tmp_path))))


def test_masks_of_scans_in_company_are_those_of_each_alone(monkeypatch):
    def segmented(number, exchanged=False):
        mask = np.zeros((8, 8, 8))
        mask[: 1 + (number ^ 1 if exchanged else number)] = 1
        return SimpleNamespace(mask=mask, answer=SimpleNamespace(text="no"))

    class Fake:
        def __init__(self):
            self.uploaded, self.asked, self.exchanged, self.masked = 0, 0, False, True

        def upload(self, scan):
            self.uploaded += 1
            return self.uploaded - 1

        def segment(self, study, question, tokens):
            self.asked += 1
            found = segmented(study, self.exchanged and self.asked > len(served.CROPPED))
            return None, found if self.masked else SimpleNamespace(mask=None, answer=found.answer)

    scan = served.BenchmarkScan(np.zeros((4, 4, 32)), np.eye(4))
    assert served.masks(Fake(), scan, "")["ok"]
    for name, value in (("exchanged", True), ("masked", False)):
        fake = Fake()
        setattr(fake, name, value)
        assert not served.masks(fake, scan, "")["ok"]


def test_the_memory_is_told_against_the_plan(monkeypatch):
    gib = 2**30
    found = gpu.Gpu("L4", "580", "8.9", memory=22 * gib, free=2 * gib)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [found])
    llm = LanguageModel(weights=13 * gib, working=gib, row=1 << 19, context=4096, chat=512)
    plan = Plan(found, {"Triton": gib, "vision_encoder": 3 * gib}, frozenset(), llm, most=0.9)
    (row,) = served.memory("now", 1.0, plan)
    assert (row["held"], row["of"], row["planned"], row["of that the language model"]) == (19, 22, 22, 18)


def test_a_latency_of_answers_without_tokens_is_refused():
    row = served._waited(8, 2.0, [Sample(1.0, 0.1, 10)] * 16, 0.05)
    assert row["ms a token"] == pytest.approx(100) and row["tokens/s"] == 80 and row["of the roofline"] == "50%"
    with pytest.raises(Failed, match="nothing to measure"):
        served._waited(1, 1.0, [Sample(1.0, None, 0)], 0.05)
