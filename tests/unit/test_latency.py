"""The benchmark's command, from its arguments to its table, against a server that is none."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from benchmarks import latency, load, scans
from benchmarks.served import Served
from engine.errors import InvalidInput
from engine.models.checkpoint import sha256
from tests.tiny import IMAGE_SIZE
from tests.tiny_bench import write_tiny_checkpoint
from tests.unit.fake_triton import ANSWER, MODEL, FakeTriton

pytestmark = pytest.mark.integration

QUICK = ("--repeats", "2", "--warm-up", "1", "--floor-seconds", "0.01", "--large-ct", "32,32,16")


class Serving(FakeTriton):
    """Counts a second of computing for each scan that was uploaded and each mask that was drawn."""

    def __init__(self):
        super().__init__()
        self.mask[0, 1, 2] = True
        self.answer_info["prompt_tokens"] = 300

    def ModelStatistics(self, request, context):
        stats = service_pb2.ModelStatisticsResponse()
        masks = sum(model == "segmentation" for model, _ in self.asked)
        for name, count in (("vision_encoder", len(self.uploads)), ("segmentation_head", masks), ("study", 5)):
            stats.model_stats.add(name=name).inference_stats.compute_infer.ns = count * 1_000_000_000
        return stats


@pytest.fixture
def triton():
    triton = Serving()
    yield triton
    triton.stop()


@pytest.fixture
def served(triton):
    served = Served(triton.url)
    yield served
    served.close()


@pytest.fixture
def scan(tmp_path):
    np.save(tmp_path / "scan.npy", np.random.default_rng(0).random(IMAGE_SIZE, np.float32))
    return tmp_path / "scan.npy"


def test_a_cold_request_holds_the_upload_and_says_where_its_time_went(served, triton):
    sample, study = served.cold(scans.phantom((8, 8, 8)), "What is it?", 5)
    assert study.handle == triton.handle and len(triton.uploads) == 1
    assert sample.tokens == len(ANSWER) and sample.prompt_tokens == 300 and 0 < sample.first_s <= sample.total_s
    assert sample.parts == pytest.approx({"prepare": 0.25, "vision_encoder": 1.0, "prefill": 1e-5, "decode": 2e-5})


def test_a_new_scan_that_the_server_knows_is_no_measurement(served, triton):
    triton.study_info["cached"] = True
    with pytest.raises(InvalidInput, match="knows a scan that should be new"):
        served.cold(scans.phantom((8, 8, 8)), "What is it?", 5)


def test_a_follow_up_sends_the_question_only(served, triton):
    _, study = served.cold(scans.phantom((8, 8, 8)), "What is it?", 5)
    sample = served.follow_up(study, "Is it large?", 5)
    assert len(triton.uploads) == 1 and "VOLUME" not in triton.asked[-1][1]
    assert sample.parts == pytest.approx({"prefill": 1e-5, "decode": 2e-5})


def test_a_follow_up_says_that_its_scan_was_encoded_again(served, triton):
    _, study = served.cold(scans.phantom((8, 8, 8)), "What is it?", 5)
    triton.evicted = True
    sample = served.follow_up(study, "Is it large?", 5)
    assert len(triton.uploads) == 2 and sample.parts["vision_encoder"] == 1.0


def test_a_scan_that_is_sent_again_says_whether_it_was_known(served, triton):
    scan = scans.phantom((8, 8, 8))
    assert served.upload_again(scan).parts == {"prepare": 0.25}
    triton.study_info["cached"] = True
    assert served.upload_again(scan).parts == {}


def test_a_mask_has_the_parts_that_ran_for_it(served):
    _, study = served.cold(scans.phantom((8, 8, 8)), "What is it?", 5)
    sample, found = served.segment(study, "Segment it", 5)
    assert found.mask.any() and sample.first_s is None
    assert sample.parts == pytest.approx({"prefill": 1e-5, "decode": 2e-5, "segmentation_head": 1.0})


def test_chats_ask_all_their_questions_at_the_same_time(served, triton):
    studies = [served.upload(scans.phantom((8, 8, 8))) for _ in range(3)]
    seconds, samples = served.chats(studies, ["a?", "b?"], 5, 3)
    assert len(samples) == len(triton.asked) == 6 and seconds > 0


def test_a_chat_that_fails_fails_the_measurement(served, triton):
    study = served.upload(scans.phantom((8, 8, 8)))
    triton.stream_error = "UNAVAILABLE: the language model is restarting"
    with pytest.raises(Exception, match="restarting"):
        served.chats([study], ["a?"], 5, 1)


def test_the_pieces_of_an_answer_add_up_to_its_tokens(served):
    study = served.upload(scans.phantom((8, 8, 8)))
    assert sum(served.pieces(study, "a?", 5)) == len(ANSWER)


def test_questions_are_asked_until_the_work_is_done(served, triton):
    study, asked = served.upload(scans.phantom((8, 8, 8))), threading.Event()

    def question():
        yield "first?"
        yield "second?"
        asked.set()
        while True:
            yield "more?"

    samples = served.during(lambda: asked.wait(60), study, question(), 5)
    assert len(samples) == len(triton.asked) >= 3
    with pytest.raises(ZeroDivisionError):
        served.during(lambda: 1 / 0, study, question(), 5)


def test_bytes_on_the_wire_are_those_of_the_messages(served):
    scan = scans.phantom((8, 8, 8))
    found = served.on_the_wire(scan, iter("abc"), "segment", 5)
    assert found["scan"] == 8**3 * 2 + 128 and 0 < found["upload"] - found["scan"] < 1000
    assert found["logits"] == 4 * 30 and 4 < found["mask"] < 700 and found["segment"] > found["mask"]
    assert "mask" not in served.on_the_wire(scan, iter("abc"), None, 5)


def test_a_section_that_fails_leaves_the_others_standing(triton, scan, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no more of that")

    monkeypatch.setattr(latency.Run, "closed_loop", fail)
    out = tmp_path / "new" / "latency.json"
    assert (
        latency.main(
            [
                *QUICK,
                "--server",
                triton.url,
                "--scan",
                str(scan),
                "--tokens",
                "4",
                "--concurrency",
                "1",
                "--seconds",
                "0",
                "--json",
                str(out),
                "--plots",
                str(tmp_path / "plots"),
            ]
        )
        == 1
    )
    found, said = json.loads(out.read_text()), capsys.readouterr()
    assert found["failures"] == {"clients at the same time": "RuntimeError: no more of that"}
    assert {"overhead_cold", "interference", "wire_per_mask"} <= set(found["ratios"])
    assert "not measured, clients at the same time: RuntimeError" in said.err and "| served | cold |" in said.out


def test_the_command_measures_a_server_and_its_baseline(triton, scan, tmp_path, capsys, monkeypatch):
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    triton.study_info["model"] = {**MODEL, "checkpoint_sha256": sha256(checkpoint)}
    monkeypatch.setattr(load, "MAX_IN_FLIGHT", 8)
    out = tmp_path / "latency.json"
    assert (
        latency.main(
            [
                *QUICK,
                "--server",
                triton.url,
                "--checkpoint",
                str(checkpoint),
                "--scan",
                str(scan),
                "--baseline",
                "fp32",
                "--tokens",
                "4",
                "--concurrency",
                "1,8",
                "--rates",
                "20",
                "--seconds",
                "0.3",
                "--json",
                str(out),
                "--plots",
                str(tmp_path),
            ]
        )
        == 0
    )
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert {"cold_e2e", "followup_ttft", "throughput_c8", "segment_warm", "overhead_cold"} <= set(found["ratios"])
    assert {name: len(kinds["cold"]) for name, kinds in found["samples"].items()} == {"served": 2, "baseline fp32": 2}
    assert {name: len(kinds["cold"]) for name, kinds in found["warm_up"].items()} == {"served": 1, "baseline fp32": 1}
    assert [row["concurrency"] for row in found["closed_loop"]] == [1, 8, 1, 8]
    assert [row["baselines"] != {} for row in found["closed_loop"]] == [False, True, False, True]
    assert [run["scenario"] for run in found["open_loop"]] == ["SingleStream", "Offline", "Server"]
    # What was sent of the scan and a question, and a mask of 30 voxels in 4 bytes, beside what else the messages hold.
    assert found["wire"]["upload"] > found["wire"]["scan"] and found["wire"]["logits"] == 4 * 30
    assert 4 < found["wire"]["mask"] < found["wire"]["segment"] and found["wire"]["follow_up"] < 1000
    assert not found["failures"] and set(found["seconds"]) >= {"one at a time", "arrivals at random"}
    assert "| served | cold |" in said and "| baseline fp32 | segment |" in said and "LoadGen scenario" in said
    # Three rounds' scans, somebody else's in each, the one that is weighed, seven known ones, and those during the
    # follow-ups: none twice.
    sent = [upload["VOLUME"].tobytes() for upload in triton.uploads]
    assert len(set(sent)) == 3 * 2 + 1 + 7 + 2 and len(sent) - len(set(sent)) == 3  # each round sends its own again


def test_a_server_that_is_not_there_is_a_clear_failure_at_once(scan, capsys):
    assert latency.main([*QUICK, "--server", "127.0.0.1:1", "--scan", str(scan)]) == 1
    assert "127.0.0.1:1" in (said := capsys.readouterr()).err and "rates" not in said.out


def test_a_run_that_fails_leaves_earlier_results_and_says_where_its_own_are(
    triton, scan, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise InvalidInput("not like this")

    monkeypatch.setattr(latency.Run, "closed_loop", fail)
    (tmp_path / "out.json").write_text("earlier")
    command = [
        *QUICK,
        "--server",
        triton.url,
        "--scan",
        str(scan),
        "--tokens",
        "4",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert latency.main(command) == 2
    assert (tmp_path / "out.json").read_text() == "earlier" and "out.json.part" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json.part").read_text())["samples"]["served"]["cold"]


def test_nothing_to_measure_is_a_clear_failure(capsys):
    assert latency.main([]) == 2
    assert "--checkpoint, --repository or --server" in capsys.readouterr().err


def test_results_below_a_file_are_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert latency.main(["--checkpoint", "none", "--json", str(tmp_path / "file" / "out.json")]) == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_a_run_that_cannot_begin_leaves_what_an_interrupted_one_has_left(tmp_path, capsys):
    (tmp_path / "out.json.part").write_text("earlier")
    for name in ("out.json", "other.json"):
        assert latency.main(["--checkpoint", str(tmp_path / "none"), "--json", str(tmp_path / name)]) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.json.part", "earlier")]


def test_a_device_is_no_file_for_results(capsys):
    assert latency.main(["--checkpoint", "none", "--json", "/dev/null"]) == 2
    assert "/dev/null is no file" in capsys.readouterr().err


def test_an_answer_without_a_mask_names_the_option(triton, scan, capsys):
    triton.mask[:] = False
    assert latency.main([*QUICK, "--server", triton.url, "--scan", str(scan)]) == 2
    assert "--segment-question" in capsys.readouterr().err
