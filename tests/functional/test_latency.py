"""The whole benchmark, tiny: against a server that runs, and from a checkpoint alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import latency, machine
from engine.manifest import Manifest
from tests.conftest import ROOT
from tests.tiny import QUESTION, volume
from tests.tiny_bench import write_tiny_checkpoint

pytestmark = pytest.mark.integration

QUICK = ["--repeats", "1", "--floor-seconds", "0.01", "--large-ct", "64,64,32"]


@pytest.fixture
def scan(tmp_path):
    np.save(tmp_path / "scan.npy", volume())
    return tmp_path / "scan.npy"


def test_it_measures_a_running_server_against_both_baselines_and_the_floor(
    server, repository, fixture_checkpoint, clip_checkpoint, scan, tmp_path, capsys
):
    out = tmp_path / "latency.json"
    assert (
        latency.main(
            [
                *QUICK,
                "--server",
                server.url,
                "--repository",
                str(repository),
                "--checkpoint",
                str(fixture_checkpoint),
                "--clip-checkpoint",
                str(clip_checkpoint),
                "--scan",
                str(scan),
                "--segment-question",
                QUESTION,
                "--segment-tokens",
                "24",
                "--tokens",
                "6",
                "--baseline",
                "fp32,bf16",
                "--concurrency",
                "1,8",
                "--rates",
                "5",
                "--seconds",
                "1",
                "--json",
                str(out),
                "--plots",
                str(tmp_path),
            ]
        )
        == 0
    )
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert {"cold_e2e", "followup_ttft", "throughput_c8", "segment_warm", "rank_warm", "overhead_cold"} <= set(
        found["ratios"]
    )
    assert all(np.isfinite(value) for value in found["ratios"].values())
    served = found["samples"]["served"]
    assert {"cold", "follow_up", "segment", "segment_again", "rank", "rank_again", "during_upload"} <= set(served)
    assert {"prepare", "vision_encoder", "prefill", "decode"} <= set(served["cold"][0]["parts"])
    assert "vision_encoder" not in served["follow_up"][0]["parts"]
    # A packed bit a voxel, and not a float of the model's logits beside it; the scan once, as it is.
    wire = found["wire"]
    assert wire["mask"] < wire["logits"] / 32 + 1000 and wire["upload"] < wire["scan"] + 1000
    assert wire["follow_up"] < 10_000
    assert found["warm_up"].keys() == found["samples"].keys() == {"served", "baseline fp32", "baseline bf16"}
    assert [row["concurrency"] for row in found["closed_loop"]] == [1, 8]
    assert [run["scenario"] for run in found["open_loop"]] == ["SingleStream", "Offline", "Server"]
    assert {
        "transport",
        "prepare",
        "vision_encoder",
        "prefill",
        "decode",
        "segmentation_encoder",
        "segmentation_head",
    } == {stage["stage"] for stage in found["stages"]}
    assert found["manifest"]["num_visual_tokens"] == 8 and found["conditions"]["versions"]["torch"]
    assert "| follow-up, time to first token, ÷ baseline fp32 | ≤ 0.05 |" in said
    assert (tmp_path / "waterfall.png").is_file() and (tmp_path / "load.png").is_file()


@pytest.mark.slow(group="matrix")
def test_it_exports_and_serves_a_checkpoint_by_itself(tmp_path, capsys):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    out = tmp_path / "latency.json"
    assert (
        latency.main(
            [
                *QUICK,
                "--checkpoint",
                str(checkpoint),
                "--baseline",
                "",
                "--tokens",
                "4",
                "--concurrency",
                "1",
                "--seconds",
                "0",
                "--warm-up",
                "0",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert all(found[name] > 0 for name in ("export_s", "start_s"))
    assert all(found[name] > 1e8 for name in ("export_peak_bytes", "server_memory_bytes"))
    # Its answers have the length that was asked for.
    assert [s["tokens"] for s in found["samples"]["served"]["cold"]] == [4]
    assert found["manifest"]["precision"] == machine.precisions()[-1] and "server start" in capsys.readouterr().out


def test_another_model_than_the_servers_is_refused(server, repository, fixture_checkpoint, scan, tmp_path, capsys):
    other_checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    other_export = shutil.copytree(repository, tmp_path / "model_repository", symlinks=True)
    replace(Manifest.read(other_export), precision="bf16").write(other_export)
    for wrong in (["--repository", str(other_export)], ["--checkpoint", str(other_checkpoint), "--baseline", ""]):
        assert latency.main([*QUICK, "--server", server.url, "--scan", str(scan), "--warm-up", "0", *wrong]) == 2
        assert "serves another" in capsys.readouterr().err


@pytest.mark.slow(group="faults")
def test_ended_amid_its_export_it_leaves_no_export_running(tmp_path):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "benchmarks/latency.py", *QUICK, "--checkpoint", str(checkpoint)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "language model for vLLM" in line)  # words of the export
        process.send_signal(signal.SIGTERM)
        # Ends when nobody is left who could write.
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert "the server starts" not in rest
