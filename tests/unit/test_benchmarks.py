"""What the benchmark computes: samples, floors, load, ratios, tables; and its checkpoints, scans and baseline."""

from __future__ import annotations

import copy
import itertools
import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from transformers import BertTokenizer

from benchmarks import (
    compare,
    cpu_roofline,
    decode,
    encoders,
    latency,
    load,
    machine,
    preprocessing,
    report,
    roofline,
    scans,
    triton_trace,
)
from benchmarks.baseline import Baseline
from benchmarks.latency import TEXTS
from benchmarks.make_checkpoint import PUBLISHED_CLIP, config_of, write_clip
from benchmarks.timings import Timing, ratios, summary
from engine.cli import console
from engine.errors import InvalidInput
from engine.models.checkpoint import load_clip, load_lamed
from engine.models.config import ClipConfig, LamedConfig
from engine.processor import has_bf16
from engine.runtime.decoder import llm_engine
from engine.scan import pack_scan, read_scan
from engine.volume import prepare
from tests.conftest import ROOT
from tests.tiny import IMAGE_SIZE, PATCH_SIZE, VIT
from tests.tiny_bench import write_tiny_checkpoint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["135m", "7b"])
def checkpoint(request, tmp_path_factory):
    """With tied embeddings (135m) and untied ones."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param)


# --- samples ---------------------------------------------------------------------------------------------------------
def test_a_summary_has_median_percentiles_and_extremes():
    assert summary(range(1, 102)) == {"n": 101, "median": 51, "p90": 91, "p99": 100, "min": 1, "max": 101}


def test_the_time_per_token_leaves_the_first_token_out():
    assert Timing(3.0, 1.0, 5).per_token_s == 0.5
    assert Timing(3.0, 1.0, 1).per_token_s is None and Timing(3.0, None, 5).per_token_s is None


def test_ratios_are_taken_pair_by_pair():
    assert ratios([1, 4], [2, 2]) == [0.5, 2]
    with pytest.raises(ValueError, match="2 .* 1"):
        ratios([1, 2], [1])


# --- the floor -------------------------------------------------------------------------------------------------------
def test_the_encoders_flops_are_those_of_its_formula():
    config = LamedConfig.from_dict(config_of("135m"))
    found = cpu_roofline.stages(config, llm="bf16", graphs="fp32", question_tokens=12, answer_tokens=64)
    patches, width, mlp, layers = 2048, 768, 3072, 12

    def vit(n):  # products of n rows: qkv, output, two of the MLP; scores and their product with the values
        return 2 * patches * 1024 * width + layers * (2 * n * width * (4 * width + 2 * mlp) + 4 * n * n * width)

    projector = 2 * 256 * (width * 576 + 576 * 576)
    assert found["segmentation_encoder"].flops == vit(patches)
    assert found["vision_encoder"].flops == vit(patches + 1) + projector
    assert 0.5e12 < found["vision_encoder"].flops < 0.55e12


@pytest.mark.parametrize("llm", ["135m", "7b"])
def test_the_language_models_flops_and_bytes_are_those_of_its_formula(llm):
    values = config_of(llm)
    found = cpu_roofline.stages(
        LamedConfig.from_dict(values), llm="bf16", graphs="fp32", question_tokens=12, answer_tokens=64
    )
    h, layers, vocabulary = values["hidden_size"], values["num_hidden_layers"], values["vocab_size"]
    kv = h // values["num_attention_heads"] * values["num_key_value_heads"]
    layer = 2 * h * h + 2 * h * kv + 3 * h * values["intermediate_size"]
    rows, context = 1 + 256 + 12, 1 + 256 + 12 + 32
    prefill = layers * (2 * rows * layer + 4 * rows * rows * h) + 2 * h * vocabulary
    assert found["prefill"].flops == pytest.approx(prefill, rel=1e-3)
    assert found["decode"].flops == pytest.approx(layers * (2 * layer + 4 * context * h) + 2 * h * vocabulary, rel=1e-3)
    norms = (2 * layers + 1) * h
    weights = layers * layer + norms + h * vocabulary
    assert found["prefill"].bytes == 2 * weights
    assert found["decode"].bytes == 2 * (weights + 2 * context * kv * layers)


def test_answers_decoded_together_read_the_weights_once():
    config = LamedConfig.from_dict(config_of("135m"))
    one, eight = (
        cpu_roofline.stages(config, llm="bf16", graphs="fp32", question_tokens=12, answer_tokens=64, at_once=n)[
            "decode"
        ]
        for n in (1, 8)
    )
    assert eight.flops == 8 * one.flops and one.bytes < eight.bytes < 2 * one.bytes


def test_a_stage_takes_what_is_scarcer():
    stage = cpu_roofline.Stage("x", flops=100, bytes=10, precision="bf16")
    compute, memory = cpu_roofline.Rates({"bf16": 10}, 10), cpu_roofline.Rates({"bf16": 1000}, 10)
    assert (stage.seconds(compute), stage.bound(compute)) == (10, "compute")
    assert (stage.seconds(memory), stage.bound(memory)) == (1, "memory")


def test_a_machine_is_as_fast_as_the_better_of_two_measurements():
    first, second = cpu_roofline.Rates({"fp32": 1, "bf16": 4}, 10, 7), cpu_roofline.Rates({"fp32": 2, "bf16": 3}, 20, 6)
    assert first.or_better(second) == cpu_roofline.Rates({"fp32": 2, "bf16": 4}, 20, 7)


def test_what_other_virtual_machines_took_is_a_number_of_seconds():
    assert machine.stolen_s() == pytest.approx(psutil.cpu_times().steal, abs=0.5)


def test_the_machine_has_rates():
    rates = cpu_roofline.measure(seconds=0.01)
    assert all(rate > 1e8 for rate in rates.matmul.values()) and rates.memory > 1e8 and rates.wire > 1e6


def test_without_bf16_in_the_processor_its_products_are_those_of_fp32_and_nothing_waits_for_emulated_ones(monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.precisions() == ("fp32",)
    monkeypatch.setattr(cpu_roofline, "_product_rate", lambda shape, dtype, *_: {torch.float32: 7.0}[dtype])
    assert cpu_roofline.measure(seconds=0.01).matmul == {"fp32": 7.0, "bf16": 7.0, "fp16": 7.0}


def test_the_roofline_names_every_gpu_and_stage(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["roofline.py"])
    roofline.main()
    said = capsys.readouterr().out
    assert all(name in said for name in (*roofline.GPUS, "vision_encoder", "segmentation_head", "prefill", "decode"))


@pytest.mark.parametrize("precision, seconds", [("fp32", 10.0), ("bf16", 5.0)])
def test_a_stage_in_another_precision_has_its_rate_and_its_bytes(precision, seconds):
    stage = cpu_roofline.Stage("x", flops=100, bytes=40, precision="fp32").at(precision)
    assert stage.seconds(cpu_roofline.Rates({"fp32": 10, "bf16": 20}, 100)) == seconds
    assert stage.bytes == {"fp32": 40, "bf16": 20}[precision]


# --- load ------------------------------------------------------------------------------------------------------------
def answer(index):
    yield 1
    yield 3


def test_questions_arrive_as_a_poisson_process():
    done = load.run("Server", answer, 20, rate=200.0, seconds=3)
    gaps = np.diff(done.arrivals_s)
    assert len(done.samples) == len(done.arrivals_s) == pytest.approx(200 * 3, rel=0.15)
    # Exponential gaps spread as widely as they are long; regular ones do not spread. A busy machine only adds to it.
    assert gaps.std() / gaps.mean() > 0.7


@pytest.mark.parametrize("scenario", ["SingleStream", "Offline"])
def test_every_question_is_answered_with_its_first_token_and_tokens(scenario):
    done = load.run(scenario, answer, 20, seconds=0.2)
    assert len(done.samples) == len(done.arrivals_s) >= (20 if scenario == "Offline" else 1)
    assert all(s.tokens == 4 and 0 < s.first_s <= s.total_s for s in done.samples)
    assert f"Scenario : {scenario}" in done.summary and done.verdict in ("VALID", "INVALID")


def test_an_answer_that_fails_fails_the_load():
    def fail(index):
        yield 1
        raise OSError("the server went away")

    with pytest.raises(OSError, match="went away"):
        load.run("Offline", fail, 3, seconds=0.2)


INTERRUPTED_LOAD = """
import sys, time
from benchmarks import command, load
from engine.cli import console

def answer(index):
    sys.stdout.write("asked\\n")  # whole, from whichever thread
    sys.stdout.flush()
    while True:
        time.sleep(0.01)
        yield 1

sys.exit(console.run(lambda: load.run(sys.argv[1], answer, 4, rate=50.0, seconds=60), command.SIGNALS))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("scenario", load.SCENARIOS)
def test_a_load_that_is_interrupted_ends_in_order(scenario, number):
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_LOAD, scenario],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout.readline() == "asked\n"
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, said) == (console.INTERRUPTED, "interrupted\n")


# --- the report ------------------------------------------------------------------------------------------------------
def sample(total, first=None, tokens=5, **parts):
    return Timing(total, first, tokens, 100, parts).to_dict()


def chats(concurrency, rate, **baselines):
    return {
        "concurrency": concurrency,
        "tokens_per_s": rate,
        "samples": [sample(1.0, 0.5), sample(1.2, 0.6)],
        "baselines": {f"baseline {name}": value for name, value in baselines.items()},
    }


def result() -> dict:
    cold = [
        sample(2.0, 1.0, prepare=0.3, vision_encoder=1.0, prefill=0.1, decode=0.5),
        sample(4.0, 2.0, prepare=0.6, vision_encoder=2.0, prefill=0.2, decode=1.0),
    ]
    return {
        "conditions": {
            "date": "2026-11-22",
            "cpu": "a processor",
            "gpu": None,
            "cores": 2,
            "load_average_before": 0.0,
            "scan": {"shape": [4, 4, 4], "dtype": "int16", "bytes": 1000},
            "tokens": 5,
            "repeats": 2,
        },
        "rates": {"matmul": {"fp32": 1e9, "bf16": 2e9}, "memory": 1e6, "wire": 1e5},
        "rates_measured": [{"matmul": {"fp32": 1e9, "bf16": 1e9}}, {"matmul": {"fp32": 0.9e9, "bf16": 2e9}}],
        "manifest": {"precision": "bf16", "files": {"a": 2_000_000_000}},
        "samples": {
            "served": {
                "cold": cold,
                "follow_up": [sample(1.0, 0.1, prefill=0.1, decode=0.88)] * 2,
                "segment": [sample(2.0, segmentation_encoder=1.0)] * 2,
                "upload_again": [sample(0.02, tokens=0)],
                "during_upload": [sample(1.0, 0.4)],
                "during_products": [sample(1.0, 0.2)],
            },
            "baseline fp32": {"cold": [sample(8.0, 4.0), sample(8.0, 4.0)], "segment": [sample(10.0), sample(10.0)]},
            "baseline bf16": {"cold": [sample(4.0, 2.0), sample(4.0, 2.0)], "segment": [sample(5.0), sample(5.0)]},
        },
        "closed_loop": [chats(1, 10.0), chats(8, 40.0, fp32=5.0, bf16=8.0), chats(8, 60.0, fp32=6.0, bf16=10.0)],
        "open_loop": [
            {"scenario": "Server", "rate": 2.0, "verdict": "VALID", "samples": [sample(1.0, 0.5)]},
            {"scenario": "Offline", "rate": None, "verdict": "VALID", "samples": [sample(1.0, 0.5)]},
        ],
        "wire": {
            "scan": 900,
            "mask": 100,
            "logits": 3200,
            "upload": 910,
            "answer": 20,
            "follow_up": 20,
            "segment": 110,
        },
        "seconds": {"one at a time": 100.0, "the report": 1.0},
        "stolen_s": {"one at a time": 20.0, "the report": 0.0},
        "limits": {"ttft_s": 0.5, "tpot_s": 0.03},
        "start_s": 50.0,
        "server_memory_bytes": 4.5e9,
        "preprocessing": {"seconds": [2.0, 4.0, 3.5], "extra_bytes": 5, "scan_bytes": 2},
    }


RATES = cpu_roofline.Rates({"fp32": 1e9, "bf16": 2e9}, 1e6, 1e5)
FLOORS = {
    name: cpu_roofline.Stage(name, flops, size, precision)
    for name, flops, size, precision in (
        ("vision_encoder", 1e9, 0, "fp32"),
        ("prefill", 2e8, 0, "bf16"),
        ("decode", 0, 1e5, "bf16"),
        ("segmentation_encoder", 5e8, 0, "fp32"),
        ("segmentation_head", 5e8, 0, "fp32"),
    )
}


def reported(of: dict, floors: dict | None = None) -> dict:
    """`of` with what the benchmark's report adds to it."""
    of["stages"] = report.stages(of, floors or {}, RATES)
    of["ratios"] = report.ratios_of(of)
    of["least"] = report.least(of, floors, RATES)
    of["targets"] = report.targets(of)
    return of


def test_the_ratios_are_medians_over_pairs_against_both_precisions():
    assert report.ratios_of(result()) == pytest.approx(
        {
            "cold_e2e": 0.375,
            "cold_e2e_equal_precision": 0.75,
            "followup_ttft": 0.025,
            "followup_ttft_equal_precision": 0.05,
            "segment_warm": 0.2,
            "segment_warm_equal_precision": 0.4,
            "throughput_c8": 9.0,
            "throughput_c8_equal_precision": 5.5,
            "overhead_cold": 0.05,
            "overhead_followup_s": 0.02,
            "interference": 2.0,
            "wire_per_mask": 1 / 32,
            "wire_per_study": 1.06,
            "prepare_large_s": 3.5,
            "prepare_large_memory": 2.5,
            "start_s": 50.0,
            "memory": 0.5,
        }
    )


def test_a_server_that_is_slow_on_follow_ups_misses_that_target():
    slow = result()
    slow["samples"]["served"]["follow_up"] = slow["samples"]["served"]["cold"]
    for measured, met in ((result(), True), (slow, False)):
        measured |= {"least": {}}
        found = {target["name"]: target["met"] for target in report.targets(measured)}
        assert found["followup_ttft"] is met
        assert found["throughput_c8"] and found["cold_e2e"] and not found["overhead_cold"]


def test_without_baselines_and_manifest_what_was_measured_is_reported():
    bare = result()
    bare["samples"] = {"served": bare["samples"]["served"]}
    bare |= {"manifest": None, "start_s": None, "closed_loop": [chats(1, 10.0)], "open_loop": []}
    reported(bare)
    assert set(bare["ratios"]) == {
        "overhead_cold",
        "overhead_followup_s",
        "interference",
        "wire_per_mask",
        "wire_per_study",
        "prepare_large_s",
        "prepare_large_memory",
    }
    assert "| served | cold |" in report.text(bare)


def test_a_follow_up_that_was_encoded_again_is_a_miss_and_no_overhead():
    forgetful = result()
    forgetful["samples"]["served"]["follow_up"][0] = sample(2.0, 1.1, prefill=0.1, decode=0.88, vision_encoder=1.0)
    assert "| served | follow up | 1 of 2 missed | 2 |" in report.text(reported(forgetful))
    assert forgetful["ratios"]["overhead_followup_s"] == pytest.approx(0.02)


def test_what_a_failed_section_did_not_measure_is_left_out(tmp_path):
    broken = result()
    for name in ("closed_loop", "open_loop", "wire", "preprocessing"):
        del broken[name]
    for kind in ("during_upload", "during_products"):
        del broken["samples"]["served"][kind]
    reported(broken, FLOORS)
    assert "throughput_c8" not in broken["ratios"] and "cold_e2e" in broken["ratios"]
    assert "| met |" in report.text(broken)
    assert [path.name for path in report.plots(broken, tmp_path)] == ["waterfall.png"]


def test_a_target_that_the_floor_rules_out_is_no_miss():
    # Eager PyTorch takes 8 s for a new scan in fp32: 0.5 of that is 4 s.
    for encoder_s, best, verdict in ((1.0, "possible", "MISSED"), (6.0, "impossible", "ruled out by the floor")):
        slow = result()
        for sample_ in slow["samples"]["served"]["cold"]:
            sample_["total_s"] = 7.0
        floors = FLOORS | {"vision_encoder": cpu_roofline.Stage("vision_encoder", 2e9 * encoder_s, 0, "fp32")}
        reported(slow, floors)
        found = {target["name"]: target for target in slow["targets"]}["cold_e2e"]
        assert (found["verdict"], found["least"] > found["limit"]) == (verdict, best == "impossible")
        assert f"| {verdict} |" in report.text(slow)


def test_the_least_values_are_those_of_the_floors_alone():
    # Scan 1000 bytes by wire and memory; encoder 1e9 FLOP, prefill 2e8, decode 1e5 bytes: bf16 is the faster.
    assert report.least(result(), FLOORS, RATES) == pytest.approx(
        {
            "cold_e2e": (0.01 + 0.001 + 0.5 + 0.1 + 4 * 0.1) / 8,
            "cold_e2e_equal_precision": 1.011 / 4,
            "followup_ttft": 0.1 / 4,
            "followup_ttft_equal_precision": 0.1 / 2,
            "throughput_c8": 8 / 0.1 / 5.5,
            "throughput_c8_equal_precision": 8 / 0.1 / 9,
            "segment_warm": (0.25 + 0.25 + 5 * 0.1) / 10,
            "segment_warm_equal_precision": (0.25 + 0.25 + 5 * 0.1) / 5,
        }
    )
    ended_early = result()
    ended_early["samples"]["served"]["cold"] = [{**s, "tokens": 3} for s in ended_early["samples"]["served"]["cold"]]
    assert report.least(ended_early, FLOORS, RATES)["cold_e2e"] == pytest.approx((0.011 + 0.6 + 2 * 0.1) / 8)


def test_the_caches_that_a_request_could_use_stand_beside_it():
    known = result()
    known["samples"]["served"]["follow_up"] = [{**sample(1.0, 0.1), "cached_tokens": 96}] * 2
    reported(known)
    said = report.text(known)
    assert "| served | cold | miss |" in said and "| served | follow up | hit, 96 of 100 rows |" in said
    assert "| served | segment | miss |" in said and "| baseline fp32 | cold | none |" in said


# --- Triton's trace --------------------------------------------------------------------------------------------------
def test_a_trace_is_read_from_all_its_files(tmp_path):
    def stamps(id_, **ns):
        return {"id": id_, "timestamps": [{"name": name, "ns": value} for name, value in ns.items()]}

    (tmp_path / "trace.json.0").write_text(
        json.dumps(
            [
                {"id": 1, "model_name": "study", "model_version": 1},
                stamps(1, GRPC_WAITREAD_START=0, GRPC_WAITREAD_END=5_000_000_000, REQUEST_START=5_500_000_000),
                stamps(1, QUEUE_START=6_000_000_000),
                stamps(1, COMPUTE_START=6_000_000_001, COMPUTE_END=9_000_000_000),
                {"id": 2, "parent_id": 1, "model_name": "vision_encoder", "model_version": 1},
            ]
        )
    )
    (tmp_path / "trace.json.1").write_text(
        json.dumps([stamps(2, COMPUTE_START=7_000_000_000, COMPUTE_END=8_000_000_000)])
    )
    spans = triton_trace.read(tmp_path / "trace.json")
    assert [(s.model, s.step, s.called) for s in spans] == [
        ("study", "read", False),
        ("study", "queue", False),
        ("study", "compute", False),
        ("vision_encoder", "compute", True),
    ]
    (inner,) = triton_trace.within(spans, 6.5, 2.0)
    assert inner == {"model": "vision_encoder", "step": "compute", "start_s": 0.5, "end_s": 1.5, "called": True}
    assert triton_trace.read(tmp_path / "none.json") == []


@pytest.mark.parametrize("sent, ends", [(4, 4), (3, 3), (None, 2)])
def test_a_decoupled_model_works_until_it_answers(tmp_path, sent, ends):
    stamps = {"COMPUTE_START": 1, "COMPUTE_END": 2, **({"GRPC_SEND_START": sent} if sent else {})}
    (tmp_path / "trace.json.0").write_text(
        json.dumps([{"id": 1, "timestamps": [{"name": name, "ns": s * 10**9} for name, s in stamps.items()]}])
    )
    (span,) = triton_trace.read(tmp_path / "trace.json")
    assert (span.step, span.start_s, span.end_s) == ("compute", 1, ends)


def test_stages_stand_beside_their_floors():
    floors = {
        "vision_encoder": cpu_roofline.Stage("vision_encoder", 1e9, 0, "fp32"),
        "decode": cpu_roofline.Stage("decode", 0, 1e5, "bf16"),
        "segmentation_encoder": cpu_roofline.Stage("segmentation_encoder", 5e8, 0, "fp32"),
        "segmentation_head": cpu_roofline.Stage("segmentation_head", 5e8, 0, "fp32"),
    }
    found = {
        s["stage"]: (s["measured_s"], s["floor_s"])
        for s in report.stages(result(), floors, cpu_roofline.Rates({"fp32": 1e9, "bf16": 2e9}, 1e6, 1e5))
    }
    assert found == {
        "transport": (0.02, 0.01),
        "prepare": (pytest.approx(0.45), 0.001),
        "vision_encoder": (1.5, 1.0),
        "decode": (0.75 / 4, 0.1),
        "segmentation_encoder": (1.0, 0.5),
    }


def test_a_step_of_decoding_is_each_answers_own():
    whole = result()
    whole["samples"]["served"]["cold"] = [
        sample(1.0, 0.5, tokens=2, decode=0.1),
        sample(2.0, 0.5, tokens=11, decode=1.0),
        sample(1.0, 1.0, tokens=1, decode=0.0),
    ]
    found = {s["stage"]: s["measured_s"] for s in report.stages(whole, FLOORS, RATES)}
    assert found["decode"] == pytest.approx(0.1)
    whole["samples"]["served"]["cold"] = [sample(1.0, 1.0, tokens=1, decode=0.0)]
    assert "decode" not in {s["stage"] for s in report.stages(whole, FLOORS, RATES)}


def test_answers_of_one_token_have_no_time_per_token_and_are_reported():
    whole = result()
    whole["open_loop"][0]["samples"] = [sample(0.1, 0.1, tokens=1)]
    assert "| Server | 2/s | 1 | 100 ms | 100 ms | 100 ms |  |  |  | VALID | yes |" in report.text(reported(whole))


def test_answers_of_other_lengths_are_said():
    whole = reported(result())
    assert "differ in length" not in report.text(whole)
    whole["samples"]["baseline fp32"]["cold"] = [sample(8.0, 4.0, tokens=3)] * 2
    assert "served 5, baseline fp32 3, baseline bf16 5" in report.text(whole)


def test_the_report_has_every_table_and_picture(tmp_path):
    whole = result()
    spans = [
        {"model": "study", "step": step, "start_s": 0.1, "end_s": 0.5, "called": False}
        for _, _, step in triton_trace.STEPS
    ]
    whole["trace"] = {kind: {**sample(1.0), "spans": spans} for kind in ("cold", "segment")}
    reported(whole)
    said = report.text(whole)
    for words in (
        "a processor, 2 cores",
        "the other had 0.50 of a matrix rate",
        "| baseline fp32 | cold | none | 2 | 8.00 s |",
        "| transport |",
        "Server ready after 50 s, 4.5 GB after the load; other virtual machines took up to 10 % of the cores",
        "| served | cold | miss | 2 |",
        "| served | follow up | hit | 2 |",
        "| served | segment | miss | 2 |",
        "| 8 | 50 | 40 to 60 |",
        "| Server | 2/s |",
        "| VALID | no |",
        "| MISSED |",
        "| met |",
    ):
        assert words in said
    assert all(path.stat().st_size > 10_000 for path in report.plots(whole, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"load.png", "waterfall.png", "trace.png"}
    json.dumps(whole)


# --- two results side by side ----------------------------------------------------------------------------------------
CONDITIONS = {"scan": {"shape": [4, 4, 4]}, "tokens": 5, "cpu": "a processor", "cores": 2, "gpu": None, "versions": {}}


def measured(cold, baseline=(), **others) -> dict:
    """A result whose new scans took `cold` seconds, and as long to the first token."""
    sides = {"served": cold} | ({"baseline fp32": baseline} if len(baseline) else {})
    return {
        "conditions": CONDITIONS,
        "manifest": {"precision": "bf16"},
        "samples": {side: {"cold": [sample(t, t / 2) for t in times]} for side, times in sides.items()},
        **others,
    }


def rows_of(old: dict, new: dict) -> dict:
    return {row.what: row for row in compare.compare(old, new).rows}


def compared(old: dict, new: dict, folder, monkeypatch) -> int:
    for name, result in (("old", old), ("new", new)):
        (folder / name).write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["compare.py", str(folder / "old"), str(folder / "new")])
    return compare.main()


NOISY = 1 + 0.1 * np.random.default_rng(0).standard_normal(20)


def test_only_what_is_slower_beyond_its_noise_is_marked():
    again = 1 + 0.1 * np.random.default_rng(1).standard_normal(20)
    assert not any(row.mark() for row in compare.compare(measured(NOISY), measured(again)).rows)
    slower = measured(NOISY)
    for one in slower["samples"]["served"]["cold"]:
        one["total_s"] *= 1.5
    found = rows_of(measured(NOISY), slower)
    assert found["served, cold, total"].low > 1.3 and found["served, cold, total"].mark() == "SLOWER"
    assert found["served, cold, first"].low <= 1 <= found["served, cold, first"].high
    assert rows_of(measured(1.5 * NOISY), measured(NOISY))["served, cold, total"].mark() == "faster"


def test_one_or_two_samples_say_nothing_of_their_noise():
    row = rows_of(measured([2.0, 2.0]), measured([4.0, 4.0]))["served, cold, total"]
    assert (row.ratio, row.low, row.mark()) == (2, None, "")


def test_a_slower_machine_is_not_held_against_the_server(tmp_path, monkeypatch, capsys):
    old, new = measured(NOISY, NOISY), measured(1.1 * NOISY, 1.3 * NOISY)
    assert rows_of(old, measured(1.3 * NOISY, NOISY))["served, cold, total"].mark() == "SLOWER"
    assert compared(old, new, tmp_path, monkeypatch) == 0
    assert "baseline fp32, cold, total" in capsys.readouterr().out
    assert compared(old, measured(2 * NOISY, 1.3 * NOISY), tmp_path, monkeypatch) == 1
    assert "SLOWER" in capsys.readouterr().out


def test_throughput_arrivals_parts_sizes_and_times_of_start_are_compared_too():
    def of(factor):
        whole = measured([1.0] * 3)
        whole["samples"]["served"]["cold"] = [sample(factor * 2.0, factor * 1.0, prepare=factor * 0.5)] * 3
        return {
            **whole,
            "closed_loop": [{"concurrency": 8, "tokens_per_s": 100 / factor}] * 3,
            "open_loop": [{"scenario": "Server", "rate": 2.0, "samples": [sample(factor, factor / 2)] * 3}],
            "preprocessing": {"seconds": [factor] * 3, "shape": [8, 8, 4], "extra_bytes": 100 * factor},
            "start_s": 10 * factor,
            "wire": {"mask": 100 * factor},
            "server_memory_bytes": 1e9 * factor,
        }

    rows = rows_of(of(1), of(2))
    assert {row.ratio for row in rows.values()} == {2.0}
    assert {what for what, row in rows.items() if not row.mark()} == {"start"}  # measured once
    assert not any(
        row.mark() for row in rows_of(of(1), of(1.0005)).values() if row.what.startswith(("bytes", "memory"))
    )
    assert not rows_of(of(1), of(1.09))["memory of the server"].mark()
    assert set(rows) >= {
        "8 clients, per token",
        "Server 2/s, total",
        "served, cold, prepare",
        "served, cold, overhead",
        "preprocessing of a CT of 8 x 8 x 4",
        "memory of preprocessing a CT of 8 x 8 x 4",
        "bytes of mask",
    }


def test_what_is_missing_in_the_newer_result_fails(tmp_path, monkeypatch, capsys):
    old = measured(NOISY, closed_loop=[{"concurrency": 8, "tokens_per_s": 100}] * 3, wire={"mask": 100})
    assert compared(old, measured(NOISY), tmp_path, monkeypatch) == 1
    said = capsys.readouterr().out
    assert "8 clients, per token" in said and "bytes of mask" in said and "missing" in said
    assert compared(old, old, tmp_path, monkeypatch) == 0
    assert compared(old, {**old, "failures": {"arrivals at random": "it broke"}}, tmp_path, monkeypatch) == 1
    assert "arrivals at random" in (said := capsys.readouterr().out) and "it broke" in said


def test_a_step_that_one_request_takes_anew_is_marked_and_one_that_none_takes_now_is_not(tmp_path, monkeypatch, capsys):
    without, with_ = measured([1.0] * 3), measured([1.0] * 3)
    without["samples"]["served"]["follow_up"] = [sample(1.0, 0.5)] * 3
    with_["samples"]["served"]["follow_up"] = [sample(1.0, 0.5)] * 2 + [sample(1.0, 0.5, vision_encoder=0.4)]
    assert compared(without, with_, tmp_path, monkeypatch) == 1
    assert "served, follow_up, vision_encoder" in capsys.readouterr().out
    assert compared(with_, without, tmp_path, monkeypatch) == 0
    assert "vision_encoder" not in capsys.readouterr().out


def test_results_too_few_to_be_judged_and_another_model_are_said(tmp_path, monkeypatch, capsys):
    other = {**measured([1.0]), "graph_precision": {"vision_encoder": "fp32"}}
    compared(measured([1.0]), other, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "none is judged" in said and "graph_precision was None and is {'vision_encoder': 'fp32'}" in said
    compared(measured(NOISY), measured(NOISY), tmp_path, monkeypatch)
    assert "judged" not in capsys.readouterr().out


def test_another_machine_is_said(tmp_path, monkeypatch, capsys):
    other = measured(NOISY)
    other["conditions"] = {**CONDITIONS, "cpu": "another processor"}
    compared(measured(NOISY), other, tmp_path, monkeypatch)
    assert "cpu was a processor and is another processor" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, cause",
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "no samples"),
        ('{"samples": {}}', "no samples"),
        ("tokens", "other work: tokens"),
        ('{"samples": [1], "conditions": {}}', "no whole result"),
        ("rate", "no whole result"),
        ("[NaN]", "has no NaN"),
        ("nothing", "nothing was measured in both"),
        ("precision", "other work: the precision"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_its_own(tmp_path, monkeypatch, capsys, text, cause):
    other = measured(NOISY)
    if text == "tokens":
        text = json.dumps({**other, "conditions": {**CONDITIONS, "tokens": 64}})
    elif text == "rate":
        text = json.dumps({**other, "closed_loop": [{"concurrency": 8, "tokens_per_s": 0}]})
    elif text == "nothing":
        text = json.dumps({"samples": {"served": {}}, "conditions": CONDITIONS, "manifest": other["manifest"]})
    elif text == "precision":
        text = json.dumps({**other, "manifest": {"precision": "fp32"}})
    (tmp_path / "old").write_text(json.dumps(other))
    if text is not None:
        (tmp_path / "new").write_text(text)
    monkeypatch.setattr("sys.argv", ["compare.py", str(tmp_path / "old"), str(tmp_path / "new")])
    assert compare.main() == 2 and cause in capsys.readouterr().err


# --- checkpoints, scans, baseline ------------------------------------------------------------------------------------
@torch.inference_mode()
def test_a_made_checkpoint_repeats_the_last_token_and_draws_a_mask_after_seg(checkpoint):
    model, tokenizer = load_lamed(checkpoint)
    prompt = model.config.prompt(tokenizer)
    image = torch.rand(1, 1, *IMAGE_SIZE)
    for question in ("What does this scan show?", "Segment it: [SEG]"):
        ids = prompt.input_ids(question)
        said, _, logits = model.generate(image, torch.tensor([ids]), len(prompt.head), max_new_tokens=12)
        assert said.tolist() == [ids[-1]] * 12
        assert (logits is not None) == question.endswith("[SEG]")
    assert 0.01 < (logits > 0).float().mean() < 0.99


def test_made_checkpoints_have_published_vision_and_the_named_language_model():
    for name, hidden, layers in (("135m", 576, 30), ("1b", 2048, 22), ("7b", 4096, 32)):
        config = LamedConfig.from_dict(config_of(name))
        assert (config.llm_width, config.llm["num_hidden_layers"]) == (hidden, layers)
        assert config.vision.hidden_size == config.segmentation.hidden_size == 768 and config.num_visual_tokens == 256


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_copies_of_a_scan_differ_and_keep_its_range(dtype):
    base = scans.BenchmarkScan((100 * np.random.default_rng(0).random((8, 16, 24))).astype(dtype), np.eye(4))
    copies = list(itertools.islice(scans.different(base), 300))
    copies.append(next(scans.different(base)))  # in another run
    assert len({copy.array.tobytes() for copy in copies}) == 301
    assert all(base.array.min() <= c.array.min() and c.array.max() <= base.array.max() for c in copies)
    assert all((c.array != base.array).mean() < 1 / 500 for c in copies)


def test_copies_of_a_scan_differ_in_what_the_model_sees_too():
    """Else the second one's prompt is in vLLM's prefix cache, and a scan that counts as new is not."""
    copies = itertools.islice(scans.different(scans.phantom((64, 64, 16))), 2)
    first, second = (
        prepare(read_scan(pack_scan(c.array)[0], affine=c.affine), (8, 32, 32), "auto").image for c in copies
    )
    assert np.abs(first - second).max() > 0.05


def test_the_phantom_is_a_ct_with_lungs():
    array = scans.phantom((64, 64, 16)).array
    assert array.dtype == np.int16 and array.min() < -900 and -10 < array[32, 45, 8] < 90 and array[16, 32, 8] < -700


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_baseline_answers_as_the_reference_does(checkpoint, precision):
    baseline, scan = Baseline(str(checkpoint), precision), scans.phantom((40, 40, 20))
    asked = baseline.ask(scan, "What is it?", 6)
    assert 0 < asked.parts["prepare"] + asked.parts["encode"] < asked.first_s < asked.total_s and asked.tokens == 6
    drawn, mask = baseline.segment(scan, "Segment it: [SEG]", 3)
    assert drawn.tokens == 3 and mask.shape == scan.array.shape and mask.dtype == bool
    assert baseline.segment(scan, "What is it?", 3)[1] is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_baseline_ranks_texts_by_m3d_clip(checkpoint, tmp_path, precision):
    values = {
        **PUBLISHED_CLIP,
        "img_size": list(IMAGE_SIZE),
        "patch_size": list(PATCH_SIZE),
        **VIT,
        "bert_config": dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64),
    }
    folder, scan = write_clip(tmp_path / "clip", values), scans.phantom((40, 40, 20))
    sample, scores = Baseline(str(checkpoint), precision, str(folder)).rank(scan, TEXTS)
    clip, _ = load_clip(folder)
    image = prepare(read_scan(pack_scan(scan.array)[0], affine=scan.affine), IMAGE_SIZE).image
    tokenizer = BertTokenizer.from_pretrained(folder)
    for text, score in zip(TEXTS, scores, strict=True):  # without padding, one by one
        tokens = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            exact = clip.logits_per_image(torch.from_numpy(image)[None], tokens["input_ids"], tokens["attention_mask"])
        assert score == pytest.approx(exact.item(), abs=1e-4 if precision == "fp32" else 0.1)
    assert sample.total_s > 0


def test_the_benchmarks_clip_has_the_published_geometry():
    assert ClipConfig.from_dict(PUBLISHED_CLIP) == ClipConfig.from_dict({"model_type": "m3d_clip"})


def test_preprocessing_is_measured_in_a_process_of_its_own():
    found = preprocessing.measure((256, 256, 64), repeats=2)
    assert found["scan_bytes"] == 2 * 256 * 256 * 64 and found["file_bytes"] > 0 and len(found["seconds"]) == 2
    # Not the peak of this process, which is larger.
    assert found["scan_bytes"] / 2 < found["extra_bytes"] < 20 * found["scan_bytes"]


@pytest.mark.parametrize(
    "words, cause",
    [
        (("--repeats", "0"), "0 is not between 1 and"),
        (("--tokens", "1"), "1 is not between 2 and"),
        (("--seconds", "nan"), "nan is not between"),
        (("--rates", "1,1e9"), "1e9 is not between 0.001 and 1,000"),
        (("--concurrency", "1,0"), "0 is not between 1 and"),
        (("--concurrency", "1,x"), "invalid list with commas value"),
        (("--baseline", "fp16"), "'fp16' is none of fp32, bf16"),
        (("--large-ct", "8,8"), "not the voxels of three axes"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_runs(capsys, words, cause):
    with pytest.raises(SystemExit):
        latency.main(["--server", "localhost:1", *words])
    assert cause in capsys.readouterr().err


def test_a_scan_or_checkpoint_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    assert latency.main(["--server", "localhost:1", "--scan", str(tmp_path / "none.nii")]) == 2
    assert "none.nii cannot be read" in capsys.readouterr().err
    for option, path, words in (
        ("--checkpoint", tmp_path, "no config.json"),
        ("--repository", tmp_path, "manifest.json"),
        ("--clip-checkpoint", tmp_path / "none", "neither a folder nor a Hugging Face id"),
    ):
        assert latency.main(["--server", "localhost:1", option, str(path)]) == 1
        assert words in (said := capsys.readouterr()).err and "rates" not in said.out
    monkeypatch.setattr("sys.argv", ["roofline.py", "--checkpoint", str(tmp_path)])
    assert roofline.main() == 1 and "no floors: " in capsys.readouterr().err


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    for option, path in (("--json", "file/out.json"), ("--plots", "file"), ("--json", "")):
        assert latency.main(["--server", "localhost:1", option, str(tmp_path / path)]) == 2
        assert str(tmp_path) in (said := capsys.readouterr()).err and "rates" not in said.out


def test_the_most_of_the_memory_in_use_is_seen():
    with machine.PeakMemory() as peak:
        pass
    assert 0 < peak.bytes < psutil.virtual_memory().total


def test_a_result_is_not_changed_by_reporting():
    whole = result()
    before = copy.deepcopy(whole)
    report.ratios_of(whole)
    assert whole == before


# --- encoders --------------------------------------------------------------------------------------------------------
def test_the_overlap_of_two_masks_is_their_dice():
    a, b = np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    assert encoders.dice(a, b) == 0.5 and encoders.dice(a, a) == 1 and encoders.dice(~(a | ~a), ~(a | ~a)) == 1
    assert encoders.dice(a, None) == 0


def test_encoders_are_compared_with_fp32_and_the_fastest_within_bounds_is_named(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    out = tmp_path / "encoders.json"
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).random(IMAGE_SIZE, np.float32))
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "encoders.py",
            "--checkpoint",
            checkpoint,
            "--scan",
            tmp_path / "scan.npy",
            "--runs",
            "1",
            "--tokens",
            "4",
            "--no-fixture",
            "--floor-seconds",
            "0.01",
            "--json",
            out,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["runs"]) == {"vision_encoder", "segmentation_encoder"}
    (exact,) = (e for e in found["exactness"] if (e["vision"], e["segmentation"]) == ("fp32", "fp32"))
    assert exact["dice"] == 1 and exact["same_tokens"] is None and exact["within_bounds"]
    assert len(found["exactness"]) == len(found["precisions"]) ** 2
    errors = {p: row["error"] for p, row in found["runs"]["vision_encoder"].items()}
    assert errors["fp32"] == 0 and all(error > 1e-5 for p, error in errors.items() if p != "fp32")
    assert "Fastest within bounds: vision encoder in" in done.stdout


@pytest.mark.slow(group="matrix")
@pytest.mark.skipif(not has_bf16(), reason="this processor does not multiply bf16")
def test_the_fixture_s_answer_and_mask_survive_a_vision_encoder_in_bf16(tmp_path):
    """Which is why the CPU's configuration takes it."""
    checkpoint, image, question, tokens = encoders._fixture(tmp_path)
    compared = encoders.Encoders(
        *encoders._open(str(checkpoint)), ["fp32", "bf16"], tmp_path / "graphs", "cpu", [image]
    )
    found = {(e.vision, e.segmentation): e for e in compared.exactness("fixture", image, [question], tokens)}
    assert found["bf16", "fp32"].within_bounds and found["bf16", "fp32"].dice < 1


@pytest.mark.slow(group="matrix")
def test_the_precisions_of_a_gpu_are_compared_without_one(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).random(IMAGE_SIZE, np.float32))
    arguments = encoders._parser().parse_args(
        [
            "--target",
            "tensorrt",
            "--checkpoint",
            str(checkpoint),
            "--scan",
            str(tmp_path / "scan.npy"),
            "--runs",
            "1",
            "--tokens",
            "4",
            "--no-fixture",
            "--floor-seconds",
            "0.01",
        ]
    )
    found = encoders.measure(arguments)
    assert found["precisions"] == ["fp32", "fp16", "bf16", "fp8"] and len(found["exactness"]) == 16
    for by_precision in found["runs"].values():
        errors = [by_precision[p]["error"] for p in found["precisions"]]
        assert errors[0] == 0 and 0 < errors[1] < errors[2] and errors[1] < errors[3] < 0.2
    assert "median" not in encoders.text(found)


def test_a_precision_of_another_target_is_refused(tmp_path):
    arguments = encoders._parser().parse_args(["--checkpoint", str(tmp_path), "--precisions", "fp32,fp8"])
    with pytest.raises(InvalidInput, match="target cpu"):
        encoders.measure(arguments)


def test_a_faster_pair_out_of_bounds_on_one_case_is_not_chosen():
    def exactness(case, vision, within):
        return {"case": case, "vision": vision, "segmentation": "fp32", "within_bounds": within}

    runs = {
        name: {"fp32": {"seconds": [2.0]}, "bf16": {"seconds": [1.0]}, "int8": {"seconds": [0.5]}}
        for name in ("vision_encoder", "segmentation_encoder")
    }
    found = [exactness("checkpoint", p, True) for p in ("fp32", "bf16", "int8")]
    assert encoders.fastest({"runs": runs, "exactness": found}) == ("int8", "fp32")
    assert encoders.fastest({"runs": runs, "exactness": [*found, exactness("fixture", "int8", False)]}) == (
        "bf16",
        "fp32",
    )


# --- ways to decode --------------------------------------------------------------------------------------------------
def test_every_way_to_decode_differs_from_the_shipped_configuration():
    shipped = decode.configured(ROOT / "model_repository")
    assert shipped.enforce_eager and shipped.block_size == 32
    ways = [
        (replace(shipped, **way.settings), tuple(way.environment.items()), way.furthest) for way in decode.WAYS.values()
    ]
    assert len(set(ways)) == len(ways) and ways[0] == (shipped, (), llm_engine.FURTHEST_PASS)


def test_ways_to_decode_stand_beside_the_floor_and_failures_are_named():
    way = {"start_s": 20.0, "new": [[0.2, 0.83]], "known": [[0.05, 0.68]], "together": [100.0, 200.0, 150.0]}
    said = decode.text(
        {
            "ways": {"as configured": way},
            "failures": {"compiled": "not done after 300 s"},
            "tokens": 64,
            "precision": "bf16",
            "rates": {"memory": 4e10},
            "floor": {"per_token_s": 0.005, "tokens_per_s": 600.0},
        }
    )
    assert (
        "| as configured | 20 s | 200 ms | 50 ms | 10.0 ms | 10.0 to 10.0 ms | 2.0 | 150 | 100 to 200 | 4.0 |" in said
    )
    assert "compiled: not done after 300 s" in said and "memory 40.0 GB/s" in said


def test_an_unknown_way_to_decode_is_refused(capsys):
    assert decode.main(["--repository", "nowhere", "--ways", "as configured,faster"]) == 2
    assert "unknown: faster; the ways are as configured" in capsys.readouterr().err
