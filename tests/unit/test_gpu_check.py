"""What the GPU check asks, computes and compares, without a process; tests/functional/test_gpu_check.py runs it."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cpu_roofline, latency
from benchmarks.timings import Timing
from deploy import gpu_check
from deploy.checks import encoders, language_model, order, plans, reference, runner, served
from deploy.checks.context import Context, Failed
from deploy.checks.geometry import lamed_config, made
from deploy.checks.report import Report
from deploy.checks.steps import STEPS, has_package
from engine import gpu, gpu_memory
from engine.gpu_memory import LanguageModel, Plan
from engine.models.lamed import Lamed
from tests.conftest import ROOT

CONTEXT = Context("cpu", True, "", "training/demo", "", {})
BASIC = [step.name for step in STEPS if step.basic]


def table(text: str, first: str) -> list[list[str]]:
    """The cells of a Markdown table whose first column is called `first`, without its head."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.startswith(f"| {first} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][1:]


# --- the command -----------------------------------------------------------------------------------------------------
def test_a_step_that_is_unknown_is_refused_with_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path), "--steps", "machine,masks"])
    assert "masks: no such step; there are machine, reference" in capsys.readouterr().err


def test_what_travels_to_a_bare_machine_fits_into_64_mb():
    """As `git archive` packs it: a block of 512 bytes for each file's name, and whole blocks of its content."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in filter(None, names.split("\0")) if (ROOT / name).is_file()]
    assert len(files) > 300 and sum(512 + -(-file.stat().st_size // 512) * 512 for file in files) < 64e6


@pytest.mark.parametrize(
    ("given", "taken"), [("mine", "{here}/mine"), ("training/demo", "training/demo"), ("owner/name", "owner/name")]
)
def test_a_checkpoints_folder_is_the_callers_own_before_it_is_the_checkouts(tmp_path, monkeypatch, given, taken):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert gpu_check._parser().parse_args(["--checkpoint", given]).checkpoint == taken.format(here=tmp_path)


def test_a_package_that_serving_needs_and_that_does_not_import_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "engine.doctor", None)
    monkeypatch.delattr("engine.doctor", raising=False)  # another test may have imported it
    assert "no package engine.doctor" in gpu_check.what_serving_lacks.__wrapped__()


def test_a_checkpoint_of_another_size_has_the_whole_budget(monkeypatch, tmp_path):
    limits = []
    monkeypatch.setattr(runner, "_run_step", lambda step, context, report, limit, say: limits.append(limit))
    step = next(step for step in STEPS if step.serves)
    for checkpoint in ("training/demo", "owner/other"):
        report = Report(tmp_path, [step], {})
        runner.run([step], replace(CONTEXT, checkpoint=checkpoint), report, 1e6, list, lambda text: None)
    assert limits[0] == step.limit and limits[1] > 9e5


# --- the steps -------------------------------------------------------------------------------------------------------
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


def test_the_readme_lists_what_holds_each_finding_of_the_audit():
    """Tests that there are, and the steps that say of themselves that they decide it."""
    text = (ROOT / "deploy" / "README.md").read_text()
    rows = table(text, "finding")
    assert [int(number) for number, *_ in rows] == list(range(1, 15))
    for number, _, tests, steps, decided in rows:
        for path, name in (test.split("::") for test in re.findall(r"`([^`]+)`", tests)):
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / path).read_text(), re.M), name
        assert "::" in tests and decided == "not yet"
        assert re.findall(r"`([^`]+)`", steps) == [step.name for step in STEPS if int(number) in step.findings], number


def test_packages_that_cannot_be_imported_are_not_there():
    assert has_package("torch") and not has_package("no_such_package") and not has_package("torch.no.such")


# --- the reference ---------------------------------------------------------------------------------------------------


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
    def stages(at_once: int) -> dict[str, cpu_roofline.Stage]:
        return cpu_roofline.stages(
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


@pytest.mark.parametrize(("free", "fits"), [(2, True), (1, False), (0, False)])
def test_the_memory_is_told_by_process_and_must_not_be_more_than_planned(monkeypatch, free, fits):
    gib = 2**30
    found = gpu.Gpu("L4", "580", "8.9", memory=22 * gib, free=free * gib)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [found])
    said = "/opt/tritonserver/bin/tritonserver, 2048\nVLLM::EngineCore, 15360\nVLLM::EngineCore, 512\n[N/A], [N/A]"
    monkeypatch.setattr(served, "said", lambda *command: said)
    llm = LanguageModel(weights=13 * gib, working=gib, row=1 << 19, context=4096, chat=512)
    plan = Plan(found, {"Triton": gib, "vision_encoder": 3 * gib}, frozenset(), llm, most=0.75)
    reserve, context = gpu_memory.RESERVE_BYTES / gib, gpu_memory.CONTEXT_BYTES / gib
    whole, *processes = served.memory("now", 0.5, plan)
    assert (whole["held"], whole["of"]) == (21.5 - free, 22) and whole["ok"] is fits
    assert (whole["planned"], whole["of that the language model"]) == (20.5 - reserve, 16.5)
    assert [(row["what"], row["held"], row["planned"], row["ok"]) for row in processes] == [
        ("GPU memory of tritonserver now, GiB", 2, 4 - reserve - context, True),
        ("GPU memory of VLLM::EngineCore now, GiB", 15.5, 16.5 + context, True),
    ]
    # What one holds too much must not hide behind the other.
    monkeypatch.setattr(served, "said", lambda *command: said.replace("2048", "4096").replace("15360", "4096"))
    assert [row["ok"] for row in served.memory("now", 0.5, plan)][1:] == [False, True]


def test_a_latency_of_answers_without_tokens_is_refused():
    row = served._waited("", 8, [Timing(1.0, 0.1, 10)] * 16, 0.05)
    assert row["ms a token"] == pytest.approx(100) and row["of the roofline"] == "50%"
    with pytest.raises(Failed, match="nothing to measure"):
        served._waited("", 1, [Timing(1.0, None, 0)], 0.05)


class Chats:
    """A server whose answers of 10 tokens take a second for each client that asks beside them."""

    def __init__(self):
        self.asked = []

    def chats(self, studies, questions, tokens, clients):
        self.asked.append((clients, len(questions), len(studies[:clients])))
        return float(clients), [Timing(clients + 0.1, 0.1, 11)] * (clients * len(questions))

    def cold(self, scan, question, tokens):
        parts = {"prepare": 0.1, "vision_encoder": 0.2, "prefill": 0.01}
        return Timing(2.0, 1.0 + 0.1 * scan, 11, parts=parts), None


RATES = cpu_roofline.Rates({"fp32": 1e12, "fp16": 2e12, "bf16": 2e12}, 1e11)


def test_clients_ask_at_the_same_time_and_the_tokens_of_all_of_them_count():
    server = Chats()
    rows = list(served.latency(server, list(range(64)), lamed_config(True), "fp16", RATES, served.LOAD))
    assert server.asked == [(64, 1, 64), (1, 4, 1), (8, 4, 8), (64, 4, 64)]
    assert [(row["clients"], row["tokens/s"], round(row["ms a token"])) for row in rows] == [
        (1, 44, 100),
        (8, 44, 800),
        (64, 44, 6400),
    ]


@pytest.mark.parametrize("graphs", ["fp16", "fp8"])
def test_a_new_scan_is_told_with_its_parts_beside_the_least_time(graphs):
    manifest = SimpleNamespace(plans={"precision": graphs}, precision="bf16")
    row = served.new_scans(Chats(), iter(range(5)), lamed_config(True), manifest, RATES, served.LOAD)
    assert (row["first token ms"], row["worst first token ms"]) == (pytest.approx(1200), pytest.approx(1400))
    assert (row["prepare ms"], row["vision_encoder ms"], row["prefill ms"]) == (100, 200, 10)
    assert 0 < row["least first token ms"] < 1
