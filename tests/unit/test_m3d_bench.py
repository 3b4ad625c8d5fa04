"""M3D-Bench as a whole: intervals, rows that survive a crash, a run over all tasks, the report, the comparison."""

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import m3d_bench
from benchmarks.bench import compare, preflight, runner, scoring, speed
from benchmarks.bench.layouts import samples_of
from benchmarks.bench.report import PUBLISHED, written
from benchmarks.bench.rows import RowStore, read_rows
from benchmarks.bench.runner import Run, encoded, run
from benchmarks.bench.samples import TASKS, read_truth
from benchmarks.bench.statistics import LEAST_SCANS, as_statistics, interval, paired
from benchmarks.bench.summary import summarise
from benchmarks.timings import Timing as Timed
from engine.errors import InvalidInput, Unavailable
from tests.conftest import ROOT
from tests.m3d_bench import REPORT, Answerer, Model, bench, embedding
from tests.m3d_data import SIZE, mask, save, write_root

WITHOUT_TEXTS = "retrieval,vqa-closed,rec,seg-semantic,seg-referring"


@pytest.fixture
def root(tmp_path):
    return write_root(tmp_path / "root")


# --- intervals -------------------------------------------------------------------------------------------------------
def test_an_interval_is_of_scans_not_of_samples():
    """A hundred answers about one scan are one observation: copying samples makes no interval narrower."""
    rng = np.random.default_rng(0)
    values = rng.random(20)
    scans = [str(n) for n in range(20)]
    narrow = interval(as_statistics(values), scans)
    copied = interval(as_statistics(np.repeat(values, 100)), np.repeat(scans, 100).tolist())
    assert copied == pytest.approx(narrow)
    assert narrow[0] < values.mean() < narrow[1]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(20), rel=0.15)


def test_there_is_no_interval_of_fewer_than_ten_scans():
    values = as_statistics(np.arange(100.0))
    assert interval(values, [str(n % (LEAST_SCANS - 1)) for n in range(100)]) is None
    assert interval(values, [str(n % LEAST_SCANS) for n in range(100)]) is not None


def test_scans_to_which_a_metric_does_not_apply_do_not_count():
    values = [0.5, 1.0] + [None] * 20
    assert interval(as_statistics(values), [str(n) for n in range(22)]) is None


def test_a_paired_interval_takes_the_same_scans_for_both():
    """Runs that differ little between scans that differ much: only the pairs show it."""
    rng = np.random.default_rng(0)
    a = rng.random(40)
    b = a + 0.01 + rng.normal(scale=0.005, size=40)
    scans = [str(n) for n in range(40)]
    difference, (low, high) = paired(as_statistics(a), as_statistics(b), scans)
    assert difference == pytest.approx((b - a).mean())
    assert 0 < low < difference < high < 0.02
    alone = interval(as_statistics(a), scans)
    assert alone[1] - alone[0] > 0.1
    assert paired(as_statistics(a[:9]), as_statistics(b[:9]), scans[:9])[1] is None


# --- rows ------------------------------------------------------------------------------------------------------------
HEADER = {"task": "rec", "model": {"manifest_sha256": "a"}}


def test_rows_are_there_when_the_file_is_opened_again(tmp_path):
    with RowStore(tmp_path / "rows.jsonl", HEADER) as store:
        store.append({"key": "b", "value": 0.1})
        store.append({"key": "a", "text": "ä \u2028 line"})
    with RowStore(tmp_path / "rows.jsonl", HEADER) as store:
        assert store.rows == [{"key": "a", "text": "ä \u2028 line"}, {"key": "b", "value": 0.1}]
        assert "a" in store and "c" not in store and len(store) == 2
    assert read_rows(tmp_path / "rows.jsonl") == (HEADER, store.rows)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_removed_and_its_row_can_be_written_again(cut, tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowStore(path, HEADER) as store:
        store.append({"key": "a", "value": 1})
        store.append({"key": "b", "value": 22222222})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [row["key"] for row in read_rows(path)[1]] == ["a"]
    with RowStore(path, HEADER) as store:
        assert [row["key"] for row in store.rows] == ["a"]
        store.append({"key": "b", "value": 22222222})
    assert path.read_bytes() == whole


def test_a_torn_header_is_written_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "re')
    with RowStore(path, HEADER) as store:
        store.append({"key": "a"})
    assert read_rows(path) == (HEADER, [{"key": "a"}])


def test_a_row_is_written_once(tmp_path):
    with RowStore(tmp_path / "rows.jsonl", HEADER) as store:
        store.append({"key": "a"})
        with pytest.raises(InvalidInput, match="has a row 'a' already"):
            store.append({"key": "a"})


def test_rows_of_another_model_are_not_resumed(tmp_path):
    RowStore(tmp_path / "rows.jsonl", HEADER).close()
    other = {**HEADER, "model": {"manifest_sha256": "b"}}
    with pytest.raises(InvalidInput, match="(?s)made by another run.*'a'.* there, .*'b'.* now.*--out"):
        RowStore(tmp_path / "rows.jsonl", other)


def test_two_runs_do_not_write_one_file(tmp_path):
    with RowStore(tmp_path / "rows.jsonl", HEADER), pytest.raises(InvalidInput, match="open in another run"):
        RowStore(tmp_path / "rows.jsonl", HEADER)


@pytest.mark.parametrize(
    ("line", "cause"),
    [("{broken}", "line 2 is no JSON object"), ('{"value": 1}', "line 2 has no key"), ('{"key": "a"}', "line 3")],
)
def test_a_damaged_file_is_refused(line, cause, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(HEADER), line, '{"key": "a"}', ""]))
    with pytest.raises(InvalidInput, match=cause):
        RowStore(tmp_path / "rows.jsonl", HEADER)


# --- asking ----------------------------------------------------------------------------------------------------------
def asked(task, root, tmp_path, answerer, **settings):
    with RowStore(tmp_path / f"{task}.jsonl", HEADER) as store:
        samples = {task: samples_of(task, root)}
        failed = run(samples, {task: store}, Run(answerer, tmp_path / "predictions", **settings))
        return store.rows, failed[task]


def test_a_scan_is_uploaded_once_for_all_of_its_questions(root, tmp_path):
    answerer = Answerer()
    rows, failed = asked("rec", root, tmp_path, answerer)
    assert len(rows) == len(answerer.questions) == 6 and not failed
    assert len(answerer.uploads) == len(set(answerer.uploads)) == 2


def test_several_questions_are_in_flight_and_not_more_than_allowed(root, tmp_path):
    together, counted = threading.Barrier(3, timeout=60), []

    class Waiting(Answerer):
        def ask(self, *args, **sampling):
            with self._lock:
                self.in_flight += 1
                counted.append(self.in_flight)
            together.wait()  # fails unless three ask at the same time
            with self._lock:
                self.in_flight -= 1
            return super().ask(*args, **sampling)

    asked("rec", root, tmp_path, Waiting(), concurrency=3)
    assert max(counted) == 3


def test_rows_that_are_there_are_not_asked_for_again(root, tmp_path):
    asked("rec", root, tmp_path, Answerer())
    again = Answerer()
    rows, _ = asked("rec", root, tmp_path, again)
    assert len(rows) == 6 and not again.questions and not again.uploads


def test_a_sample_that_fails_is_said_and_gets_no_row(root, tmp_path):
    class Refusing(Answerer):
        def upload(self, scan):
            if "0000" in str(scan):
                raise InvalidInput("this scan cannot be used")
            return super().upload(scan)

    rows, failed = asked("rec", root, tmp_path, Refusing(), failed_share=0.4)
    assert len(rows) == 4 and len(failed) == 2 and "this scan cannot be used" in failed[0]
    (tmp_path / "rec.jsonl").unlink()
    with pytest.raises(InvalidInput, match="this scan cannot be used"):
        asked("rec", root, tmp_path, Refusing(), failed_share=0.2)


def test_a_server_that_is_gone_stops_the_run_at_once_and_keeps_the_rows(root, tmp_path):
    class Gone(Answerer):
        def ask(self, study, question, **sampling):
            if len(self.questions) == 3:
                raise Unavailable("gone")
            return super().ask(study, question, **sampling)

    with pytest.raises(Unavailable, match="gone"):
        asked("rec", root, tmp_path, Gone(), concurrency=1, failed_share=1)
    assert len(read_rows(tmp_path / "rec.jsonl")[1]) == 3


def test_logits_of_another_shape_than_the_true_mask_are_refused(root, tmp_path):
    """A data root whose images do not have the model's size."""

    class Small(Answerer):
        def segment(self, study, question, return_logits=False, **sampling):
            found = super().segment(study, question, return_logits, **sampling)
            return replace(found, logits=found.logits[1:])

    with pytest.raises(InvalidInput, match=r"has shape \(8, 32, 32\).*model's volume \(7, 32, 32\)"):
        asked("seg-semantic", root, tmp_path, Small())


def test_a_scan_is_uploaded_once_for_all_tasks(root, tmp_path):
    answerer = Answerer()
    bench(["--data", str(root), "--task", WITHOUT_TEXTS, "--out", str(tmp_path)], answerer)
    assert len(answerer.uploads) == len(set(answerer.uploads)) == 4


def test_reports_are_embedded_in_batches_once(root, tmp_path, monkeypatch):
    batches = []

    class Counting(Answerer):
        def embed_texts(self, texts):
            batches.append(len(texts))
            return super().embed_texts(texts)

    index = root / "M3D_Cap_npy/M3D_Cap.json"
    splits = json.loads(index.read_text())
    pairs = [pair for split in ("train", "validation", "test") for pair in splits[split]]
    index.write_text(json.dumps({"train": [], "validation": [], "test": pairs}))
    monkeypatch.setattr(runner, "_TEXT_BATCH", 4)
    rows, _ = asked("retrieval", root, tmp_path, Counting())
    assert len(rows) == 6 and sorted(batches) == [2, 4]


def pairs_of(index) -> list[dict]:
    """The pairs of all splits of M3D_Cap.json, each once."""
    return list({pair["image"]: pair for split in json.loads(index.read_text()).values() for pair in split}.values())


def test_a_report_that_cannot_be_read_fails_alone(root, tmp_path):
    index = root / "M3D_Cap_npy/M3D_Cap.json"
    pairs = pairs_of(index)
    index.write_text(json.dumps({"train": [], "validation": [], "test": pairs}))
    (root / pairs[2]["text"]).write_text("")
    rows, failed = asked("retrieval", root, tmp_path, Answerer(), failed_share=0.5)
    assert len(rows) == 5 and len(failed) == 1 and "the text is empty" in failed[0]
    letters = [row["answer"].split()[1][0] for row in rows]
    assert [row["text_embedding"] for row in rows] == [encoded(embedding(letter)) for letter in letters]


def test_a_choice_that_cannot_be_said_does_not_end_the_run(root, tmp_path):
    class Sure(Answerer):
        def ask(self, *args, **sampling):
            return replace(super().ask(*args, **sampling), choices={"A": 0.0, "B": -np.inf, "C": -np.inf, "D": -np.inf})

    assert bench(["--data", str(root), "--task", "vqa-closed", "--out", str(tmp_path)], Sure()) == 0
    (row,) = read_rows(tmp_path / "rows/vqa-closed.jsonl")[1]
    assert row["logprobs"] == {"A": 0.0, "B": None, "C": None, "D": None}
    found = figures(tmp_path)["tasks"]["vqa-closed"]["sound"]
    assert found["accuracy of the likeliest choice"]["value"] == 1 and found["likeliest choice tied"]["value"] == 0


def test_a_log_probability_that_is_no_number_is_refused(root, tmp_path):
    class Broken(Answerer):
        def ask(self, *args, **sampling):
            return replace(super().ask(*args, **sampling), choices={"A": np.nan, "B": 0.0})

    with pytest.raises(InvalidInput, match="choice A is nan"):
        asked("vqa-closed", root, tmp_path, Broken())


def test_a_closed_question_is_asked_once_for_its_answer_and_for_the_likelihood_of_each_letter(root, tmp_path):
    answerer = Answerer()
    (row,), _ = asked("vqa-closed", root, tmp_path, answerer)
    assert len(answerer.questions) == 1 and row["prediction"] == "A. Axial"
    assert row["logprobs"] == {"A": 0.0, "B": -1.0, "C": -2.0, "D": -3.0}


# --- a whole run -----------------------------------------------------------------------------------------------------
def figures(out):
    return json.loads((out / "bench.json").read_text())


def test_a_run_measures_its_tasks_both_ways(root, tmp_path):
    (root / "M3D_Seg_npy/0000/b/image.spacing.json").write_text("[5, 1, 1]")
    assert bench(["--data", str(root), "--task", WITHOUT_TEXTS, "--out", str(tmp_path / "out")], Answerer()) == 0
    found = figures(tmp_path / "out")
    assert found["model"]["manifest_sha256"] == "0" * 64
    tasks = found["tasks"]
    assert list(tasks) == WITHOUT_TEXTS.split(",")
    closed = tasks["vqa-closed"]
    assert closed["n"] == 1 and closed["reference"]["accuracy"]["value"] == closed["sound"]["accuracy"]["value"] == 1
    assert closed["sound"]["unparseable"]["value"] == 0 and closed["chance"]["sound"]["accuracy"] == 0.25
    rec = tasks["rec"]
    assert rec["n"] == 6 and rec["scans"] == 2 and rec["missing"] == 0
    by_structure = rec["groups"]["structure"]
    assert 0.49 < by_structure["liver"]["sound"]["IoU"]["value"] < 0.5  # found by its name, not by its description
    assert rec["groups"]["asked"]["by description"]["sound"]["box given"]["value"] == 0
    assert by_structure["right kidney"]["sound"]["IoU"]["value"] == 0  # its question is not answered with a box
    assert by_structure["right kidney"]["reference"]["IoU"]["value"] == -1
    segmented = tasks["seg-semantic"]["groups"]["structure"]["liver"]
    assert segmented["sound"]["Dice"]["value"] == 1 and segmented["sound"]["NSD"] == {"value": 1, "n": 1}
    assert 0.99 < segmented["reference"]["Dice"]["value"] < 1  # 1 in the denominator
    assert tasks["seg-referring"]["sound"]["HD95"]["n"] == 1
    assert tasks["retrieval"]["reference"]["IR R@1 of 1"]["value"] == 1


def test_no_figure_has_an_interval_over_few_scans_and_it_is_said(root, tmp_path):
    bench(["--data", str(root), "--task", "rec", "--out", str(tmp_path)], Answerer())
    rec = figures(tmp_path)["tasks"]["rec"]
    assert rec["sound"]["IoU"]["low"] is None and rec["no_interval"] == "2 scans; an interval is given from 10 on"
    assert "2 scans; an interval is given from 10 on" in (tmp_path / "report.html").read_text()


def test_what_is_not_computed_is_a_named_gap_not_a_zero(root, tmp_path):
    bench(["--data", str(root), "--out", str(tmp_path)], Answerer())
    tasks = figures(tmp_path)["tasks"]
    assert list(tasks) == list(TASKS)
    assert tasks["report"]["reference"]["METEOR"] == {
        "value": None, "low": None, "high": None, "gap": "WordNet cannot be had: offline"
    }  # fmt: skip
    for side, metric in (
        ("reference", "BERTScore"),
        ("sound", "RadGraph-F1"),
        ("sound", "RaTEScore"),
        ("sound", "GREEN"),
        ("sound", "LLM judge"),
    ):
        assert tasks["report"][side][metric]["gap"] == "no model was given"
    assert "all samples have the same answer" in tasks["report"]["sound"]["CIDEr"]["gap"]
    assert "no voxel size" in tasks["seg-semantic"]["sound"]["HD95"]["gap"]
    assert tasks["report"]["reference"]["BLEU-1"]["value"] == pytest.approx(1)
    page = (tmp_path / "report.html").read_text()
    assert "not computed: WordNet cannot be had: offline" in page


def test_tasks_without_data_are_named_and_the_others_run(root, tmp_path):
    for folder in ("M3D_Cap_npy", "M3D-VQA"):
        for index in (root / folder).glob("M3D*"):
            index.unlink()
    assert bench(["--data", str(root), "--out", str(tmp_path), "--task", "rec"], Answerer()) == 0
    assert bench(["--data", str(root), "--out", str(tmp_path / "2"), "--task", "report"], Answerer()) == 2
    assert bench(["--data", str(root), "--out", str(tmp_path / "all")], Answerer()) == 0
    found = figures(tmp_path / "all")
    assert list(found["tasks"]) == ["rec", "reg", "seg-semantic", "seg-referring"]
    assert "M3D_Cap.json was looked for" in found["not_run"]["report"]
    assert "M3D_Cap.json was looked for" in (tmp_path / "all/report.html").read_text()


def test_a_root_without_any_data_is_refused(tmp_path, capsys):
    assert bench(["--data", str(tmp_path), "--out", str(tmp_path / "out")], Answerer()) == 2
    assert "has data of no task" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named_before_anything_is_asked(root, tmp_path, monkeypatch, capsys):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "monai" else there(name, *a))
    answerer = Answerer()
    arguments = ["--data", str(root), "--out", str(tmp_path), "--task"]
    assert bench([*arguments, "seg-semantic"], answerer) == 1
    assert (
        not answerer.uploads and "monai cannot be imported: pip install 'm3d-engine[bench]'" in capsys.readouterr().err
    )
    assert bench([*arguments, "rec"], answerer) == 0


def test_broken_files_are_listed_before_anything_is_asked(root, tmp_path, capsys):
    (root / "M3D_Seg_npy/0000/b/image.npy").unlink()
    answerer, arguments = Answerer(), ["--data", str(root), "--task", "rec", "--out", str(tmp_path)]
    assert bench(arguments, answerer) == 2
    assert not answerer.uploads and "2 of 6 samples of rec are broken" in capsys.readouterr().err
    listed = json.loads((tmp_path / "preflight.json").read_text())["rec"]
    assert listed["samples"] == 4 and listed["causes"] == {"is missing": 2}
    assert bench([*arguments, "--broken-share", "0.5"], answerer) == 0
    assert figures(tmp_path)["tasks"]["rec"]["n"] == 4


def test_an_interrupted_run_goes_on_and_ends_with_the_same_figures(root, tmp_path):
    class Failing(Answerer):
        def ask(self, study, question, **sampling):
            if len(self.questions) == 4:
                raise Unavailable("gone")
            return super().ask(study, question, **sampling)

    def arguments(out):
        return ["--data", str(root), "--task", WITHOUT_TEXTS, "--out", str(tmp_path / out), "--concurrency", "1"]

    whole = Answerer()
    bench(arguments("whole"), whole)
    assert bench(arguments("cut"), first := Failing()) == 1
    assert bench(arguments("cut"), second := Answerer()) == 0
    assert (tmp_path / "cut/bench.json").read_bytes() == (tmp_path / "whole/bench.json").read_bytes()
    assert sorted(first.questions + second.questions) == sorted(whole.questions)


@pytest.mark.integration
def test_a_killed_run_goes_on_and_ends_with_the_same_figures(root, tmp_path):
    arguments = ["--data", str(root), "--task", "rec,seg-semantic", "--out"]
    killed = subprocess.run(
        [sys.executable, "-m", "tests.m3d_bench", "5", *arguments, str(tmp_path / "cut")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "cut/bench.json").exists()
    bench([*arguments, str(tmp_path / "cut")], Answerer())
    bench([*arguments, str(tmp_path / "whole")], Answerer())
    assert (tmp_path / "cut/bench.json").read_bytes() == (tmp_path / "whole/bench.json").read_bytes()


@pytest.mark.parametrize("other", ["model", "data"])
def test_a_run_of_another_model_or_other_data_is_not_resumed(other, root, tmp_path, capsys):
    arguments = ["--data", str(root), "--task", "rec", "--out", str(tmp_path)]
    bench(arguments, Answerer())
    if other == "data":
        index = root / "M3D_Seg_npy/0000/0000.json"
        index.write_text(index.read_text() + "\n")
    answerer = Answerer(Model(manifest_sha256="1" * 64) if other == "model" else Model())
    assert bench(arguments, answerer) == 2
    assert not answerer.uploads and f"cannot be resumed ({other}: " in capsys.readouterr().err


def test_rows_of_another_run_are_deleted_if_that_is_asked_for_and_it_is_said(root, tmp_path, capsys):
    arguments = ["--data", str(root), "--task", "rec", "--out", str(tmp_path)]
    bench(arguments, Answerer())
    other = Model(manifest_sha256="1" * 64)
    assert bench([*arguments, "--anew"], Answerer(other)) == 0
    assert "made by another run (model: " in (said := capsys.readouterr().out) and "its 6 rows are deleted" in said
    assert figures(tmp_path)["model"]["manifest_sha256"] == "1" * 64
    again = Answerer(other)
    assert bench([*arguments, "--anew"], again) == 0 and not again.questions  # its own rows are kept


def test_a_task_that_is_not_served_is_named_and_the_others_run(root, tmp_path, capsys):
    arguments = ["--data", str(root), "--out", str(tmp_path)]
    assert bench([*arguments, "--task", "retrieval"], Answerer(models=("m3d_chat",))) == 1
    assert "retrieval cannot be run: m3d_retrieve is not served" in capsys.readouterr().err
    assert bench(arguments, Answerer(models=("m3d_chat",))) == 0
    found = figures(tmp_path)
    assert list(found["tasks"]) == ["report", "vqa-closed", "vqa-open", "rec", "reg"]
    assert found["not_run"]["seg-semantic"].startswith("m3d_segment is not served")


def test_rows_of_two_models_are_not_one_result(root, tmp_path, capsys):
    arguments = ["--data", str(root), "--out", str(tmp_path), "--task"]
    bench([*arguments, "rec"], Answerer())
    bench([*arguments, "vqa-closed"], Answerer(Model(manifest_sha256="1" * 64)))
    assert bench([*arguments, "rec,vqa-closed"], None) == 2
    assert "the rows of vqa-closed are of another model than those of ['rec']" in capsys.readouterr().err


def test_rows_can_be_scored_again_without_anybody_who_answers(root, tmp_path):
    arguments = ["--data", str(root), "--task", "rec", "--out", str(tmp_path)]
    bench(arguments, Answerer())
    before = (tmp_path / "bench.json").read_bytes()
    (tmp_path / "bench.json").unlink()
    assert bench(arguments, None) == 0
    assert (tmp_path / "bench.json").read_bytes() == before


def test_rows_that_are_scored_again_say_what_they_were_made_with(root, tmp_path):
    arguments = ["--data", str(root), "--task", "rec", "--out", str(tmp_path)]
    bench([*arguments, "--new-tokens", "7", "--nsd-mm", "4", "--concurrency", "3"], Answerer())
    page = (tmp_path / "report.html").read_text()
    assert "at most 7, greedy" in page and "4 mm" in page and "<td>in flight</td><td class=n>3</td>" in page
    assert bench(arguments, None) == 0
    assert figures(tmp_path)["settings"] == {"new_tokens": 7, "nsd_mm": 4.0}
    page = (tmp_path / "report.html").read_text()
    assert "at most 7, greedy" in page and "4 mm" in page
    assert "in flight" not in page and "<td>machine</td>" not in page and "<td>scored on</td>" in page


def test_rows_of_other_settings_are_not_one_result(root, tmp_path, capsys):
    arguments = ["--data", str(root), "--out", str(tmp_path), "--task"]
    bench([*arguments, "rec"], Answerer())
    bench([*arguments, "vqa-closed", "--new-tokens", "7"], Answerer())
    assert bench([*arguments, "rec,vqa-closed"], None) == 2
    assert "the rows of vqa-closed are made otherwise than those of ['rec']" in capsys.readouterr().err


def test_an_unknown_task_is_refused(root, tmp_path, capsys):
    assert bench(["--data", str(root), "--task", "sing", "--out", str(tmp_path)], Answerer()) == 2
    assert "there is no task 'sing': choose from retrieval" in capsys.readouterr().err


# --- scores ----------------------------------------------------------------------------------------------------------
def scored(task, rows, **scorers):
    rows = [{"key": str(n), "scan": str(n), "groups": {}, "times": {}, **row} for n, row in enumerate(rows)]
    return scoring.score(task, rows, scoring.Scorers(**scorers))


def test_an_answer_that_names_no_choice_is_counted_apart():
    row = {"choices": {"A": "x", "B": "y"}, "choice": "A", "logprobs": {"A": -1.0, "B": -2.0}}
    rows = scored("vqa-closed", [{**row, "prediction": said} for said in ("A. x", "B", "who knows", "A. x or B. y")])
    found = summarise(rows, {})
    assert found["sound"]["accuracy"]["value"] == 0.25 and found["sound"]["unparseable"]["value"] == 0.5
    assert found["reference"]["accuracy"]["value"] == 0.5  # "A." is a part of the last one, too


def test_the_likeliest_choice_is_scored_beside_the_answer():
    row = {"choices": {"A": "x", "B": "y"}, "choice": "A", "prediction": "B", "logprobs": {"A": -0.1, "B": -3.0}}
    found = summarise(scored("vqa-closed", [row]), {})["sound"]
    assert (found["accuracy"]["value"], found["accuracy of the likeliest choice"]["value"]) == (0, 1)
    (tied,) = scored("vqa-closed", [{**row, "logprobs": {"A": -1.0, "B": -1.0}}])
    assert tied["scores"]["sound"]["likeliest choice tied"] == 1


def test_a_box_of_what_is_not_there_counts_against_refusals_only():
    row = {"prediction": "", "answer": "no", "size": [4, 8, 8], "reference": {"IoU": -1.0}}
    there = {**row, "box": [0, 0, 0, 0.5, 0.5, 0.5], "predicted_box": None}
    absent = [{**row, "box": None, "predicted_box": box} for box in (None, [0, 0, 0, 1, 1, 1])]
    found = summarise(scored("rec", [there, *absent]), {})["sound"]
    assert found["IoU"] == {"value": 0, "low": None, "high": None, "n": 1}
    assert found["absent: no box"]["value"] == 0.5 and found["absent: no box"]["n"] == 2


def test_chance_is_what_an_answer_gets_that_does_not_look():
    box = {"prediction": "", "answer": "[0, 0, 0, 0.5, 0.5, 0.5]", "size": [4, 8, 8], "reference": {"IoU": -1.0}}
    rows = scored("rec", [{**box, "box": [0, 0, 0, 1 / 4, 3 / 8, 3 / 8], "predicted_box": None}])
    chance = summarise(rows, {})["chance"]
    assert chance["sound"]["IoU"] == pytest.approx(2 * 4 * 4 / (4 * 8 * 8))
    assert chance["reference"]["IoU"] == pytest.approx(0.125, abs=1e-5)
    mask_row = {"share": 0.25, "reference": {"Dice": 1.0}, "sound": {"Dice": 1.0}}
    assert summarise(scored("seg-semantic", [mask_row]), {})["chance"]["sound"]["Dice"] == pytest.approx(0.4)


def test_chance_of_a_text_is_the_answer_about_another_scan_to_a_question_of_the_same_type():
    asked = [
        ("a", "1", "axial"),
        ("a", "1", "axial"),
        ("b", "1", "axial plane"),
        ("b", "2", "late"),
        ("c", "2", "late"),
    ]
    rows = [
        {"scan": scan, "groups": {"question type": kind}, "answer": answer, "prediction": "x"}
        for scan, kind, answer in asked
    ]
    chance = [row["chance"]["reference"]["ROUGE-1"] for row in scored("vqa-open", rows)]
    assert chance == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1, 1])
    (alone,) = scored("vqa-open", rows[:1])
    assert alone["chance"]["reference"]["ROUGE-1"] == 0


def pairs(count, texts):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, 8)).astype(np.float32)
    return [
        {"answer": text, "scan_embedding": encoded(v), "text_embedding": encoded(v)} for v, text in zip(vectors, texts)
    ]


def test_retrieval_has_a_pool_of_each_size_that_the_pairs_fill():
    rows = scored("retrieval", pairs(600, map(str, range(600))))
    found = summarise(rows, {})
    sizes = {int(name.split()[-1]) for name in found["reference"]}
    assert sizes == {100, 500}
    assert found["reference"]["IR R@1 of 100"]["n"] == 100 and found["reference"]["TR R@10 of 500"]["n"] == 500
    assert found["chance"]["reference"]["IR R@5 of 100"] == 0.05
    assert found["reference"]["IR R@1 of 500"]["low"] is not None
    assert "scan_embedding" not in rows[0]


def test_ranks_that_take_in_the_whole_pool_are_no_figures():
    found = summarise(scored("retrieval", pairs(8, "abcdefgh")), {})
    assert list(found["reference"]) == ["IR R@1 of 8", "IR R@5 of 8", "TR R@1 of 8", "TR R@5 of 8"]


def test_a_pool_that_the_data_names_is_taken_as_it_is():
    names = [str(n) for n in range(50, 150)]
    rows = scored("retrieval", pairs(200, map(str, range(200))), splits={100: names})
    assert {row["key"] for row in rows if "IR R@1 of 100" in row["scores"]["reference"]} == set(names)


def test_a_pool_that_the_rows_do_not_fill_is_a_named_gap():
    rows = scored("retrieval", pairs(150, map(str, range(150))), splits={100: [str(n) for n in range(60, 160)]})
    scorers = scoring.Scorers(splits={100: [str(n) for n in range(60, 160)]}, pairs=500)
    found = summarise(rows, scoring.gaps_of("retrieval", rows, scorers))
    assert found["reference"]["IR R@1 of 100"]["gap"] == "90 of the 100 pairs of test100 have an answer"
    assert found["sound"]["report to scan R@10 of 500"]["gap"] == "150 of the 500 pairs have an answer"
    assert not any("1000" in name for side in ("reference", "sound") for name in found[side])  # the index has none
    assert found["reference"]["IR R@1 of 150"]["n"] == 150


def test_a_broken_pair_is_the_reason_for_a_pool_that_is_missing(root, tmp_path, monkeypatch):
    index = root / "M3D_Cap_npy/M3D_Cap.json"
    every = pairs_of(index)
    index.write_text(json.dumps({"train": [], "validation": [], "test": every}))
    (root / every[0]["image"]).unlink()
    monkeypatch.setattr(scoring, "POOLS", {4: "test4", 6: "test"})
    arguments = ["--data", str(root), "--task", "retrieval", "--out", str(tmp_path), "--broken-share", "0.5"]
    assert bench(arguments, Answerer()) == 0
    found = figures(tmp_path)["tasks"]["retrieval"]["reference"]
    assert found["IR R@1 of 6"]["gap"] == "5 of the 6 pairs have an answer" and found["IR R@1 of 4"]["n"] == 4
    page = (tmp_path / "report.html").read_text()
    assert "not computed: 5 of the 6 pairs have an answer" in page
    assert re.search(r"<td>IR R@1 of 4 [\d.]+</td>", page)  # the headline is of the greatest pool that there is


def test_corpus_bleu_of_a_task_is_of_all_its_rows():
    import sacrebleu

    predictions = ["the liver is large and round", "no focal lesion is seen", "x y z"]
    answers = ["the liver is large and firm", "no focal lesion is seen", "both lungs are clear"]
    rows = scored("vqa-open", [{"prediction": p, "answer": a} for p, a in zip(predictions, answers)])
    wanted = sacrebleu.corpus_bleu(predictions, [answers], smooth_method="none").score / 100
    found = summarise(rows, {})
    assert found["sound"]["BLEU"]["value"] == pytest.approx(wanted, abs=1e-6)
    assert found["chance"]["sound"]["BLEU"] < wanted


def test_scores_of_a_model_are_kept_and_not_computed_again(root, tmp_path, monkeypatch):
    calls = []

    def scorer(predictions, answers):
        calls.append(len(predictions))
        return [0.5] * len(predictions)

    monkeypatch.setattr(m3d_bench.models, "load_bertscore", lambda folder, layer: scorer)
    arguments = ["--data", str(root), "--task", "report,reg", "--out", str(tmp_path), "--bertscore", "somewhere"]
    for _ in range(2):
        assert bench(arguments, Answerer()) == 0
    assert calls == [1, 6]
    assert figures(tmp_path)["tasks"]["reg"]["reference"]["BERTScore"]["value"] == 0.5


@pytest.mark.parametrize("error", [Unavailable("the judge gave no `Score: N`"), IndexError("gave no `Score: N`")])
def test_a_model_that_fails_while_it_scores_is_a_named_gap(error, root, tmp_path, monkeypatch, capsys):
    """One bad reply of a judge must not cost the figures of all tasks; a run with the same arguments asks again."""
    good = []

    def scorer(predictions, answers):
        if not good:
            raise error
        return [0.5] * len(predictions)

    monkeypatch.setattr(m3d_bench.models, "load_judge", lambda url, model: scorer)
    arguments = ["--data", str(root), "--task", "report,rec", "--out", str(tmp_path), "--judge", "somewhere"]
    assert bench(arguments, Answerer()) == 0
    tasks = figures(tmp_path)["tasks"]
    gap = tasks["report"]["sound"]["LLM judge"]["gap"]
    assert gap.startswith("it failed after 0 of 1 samples: ") and "gave no `Score: N`" in gap and tasks["rec"]["n"] == 6
    assert "LLM judge of report: not computed: it failed" in capsys.readouterr().out
    good.append(True)
    assert bench(arguments, None) == 0
    assert figures(tmp_path)["tasks"]["report"]["sound"]["LLM judge"]["value"] == 0.5


def test_the_judge_is_asked_over_openais_protocol(root, tmp_path):
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from benchmarks.bench.metrics.models import load_judge

    replies = iter(["Two of four.\nScore: 50", "Score: 25.5 then Score: 75", "I cannot say"])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert asked["model"] == "m" and "said" in asked["messages"][0]["content"]
            message = {"role": "assistant", "content": next(replies)}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
            body["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = load_judge(f"http://127.0.0.1:{server.server_port}/v1", "m")
        assert judge(["said", "said"], ["right", "right"]) == [0.5, 0.75]
        with pytest.raises(Unavailable, match="gave no `Score: N`"):
            judge(["said"], ["right"])
    finally:
        server.shutdown()
        server.server_close()


# --- speed -----------------------------------------------------------------------------------------------------------
class Eager:
    """In place of eager PyTorch: notes what it is asked. A question takes it ten times as long as the engine's side."""

    precision = "fp32"

    def __init__(self):
        self.asked, self.segmented = [], []

    def ask(self, scan, question, tokens):
        self.asked.append((scan.array.shape, question, tokens))
        return Timed(1.0, parts={"encode": 0.25})

    def segment(self, scan, question, tokens):
        self.segmented.append(question)
        return Timed(2.0, parts={"encode": 0.25}), None


def test_both_sides_answer_the_same_samples_and_the_engine_knows_none_of_the_scans(root):
    tasks = ("retrieval", "vqa-closed", "rec", "seg-semantic")
    samples = speed.chosen({task: samples_of(task, root) for task in tasks}, 5)
    assert samples == speed.chosen({task: samples_of(task, root) for task in tasks}, 5)  # the same in every run
    assert len(samples) == 5 and len({sample.image for sample in samples}) == 2  # a scan's stand together
    answerer, eager = Answerer(), Eager()
    found = speed.compared(answerer, eager, samples, 3, 7)
    assert not any(answerer.choices)  # the reference asks for no likelihoods
    assert sorted(answerer.forgotten) == sorted({str(sample.image) for sample in samples})
    asked = [read_truth(sample).question for sample in samples]
    assert sorted(answerer.questions) == sorted(asked)
    warm_up, *questions = [question for _, question, _ in eager.asked]
    assert warm_up == asked[0] and sorted(questions + eager.segmented) == sorted(asked)
    assert {tokens for *_, tokens in eager.asked} == {1, 7} and {shape for shape, *_ in eager.asked} == {(1, *SIZE)}
    assert (found["n"], found["scans"], found["concurrency"], found["precision"]) == (5, 2, 3, "fp32")
    assert found["eager"]["parts"]["encode"] == 1.25
    assert found["engine"]["parts"]["first token"] == 1.25 and found["engine"]["parts"]["other tokens"] == 1.25


def test_the_report_shows_the_speed_of_its_own_model_only(root, tmp_path):
    arguments = ["--data", str(root), "--task", "rec", "--out", str(tmp_path)]
    bench(arguments, Answerer())
    assert "eager PyTorch" not in (tmp_path / "report.html").read_text()
    found = speed.compared(Answerer(), Eager(), samples_of("rec", root), 3, 7)
    for manifest, shown in (("0" * 64, True), ("1" * 64, False)):
        model = {"checkpoint": "tiny", "manifest_sha256": manifest}
        (tmp_path / "speed.json").write_text(json.dumps({"model": model, **found, "ratio": 12.3}))
        bench(arguments, None)
        assert ("12.3 times" in (tmp_path / "report.html").read_text()) is shown


# --- the report ------------------------------------------------------------------------------------------------------
def test_the_report_shows_papers_chance_and_cases_and_needs_nothing_from_elsewhere(root, tmp_path):
    bench(["--data", str(root), "--task", WITHOUT_TEXTS, "--out", str(tmp_path)], Answerer())
    page = (tmp_path / "report.html").read_text()
    assert "75.78" in page and "79.95" in page and "25.00" in page
    assert not re.search(r"(src|href)=['\"](?!data:|#)", page) and "http" not in page
    assert page.count("data:image/png;base64,") >= 8
    assert "until its first token: 0.25" in page
    assert "Worst by Dice" in page and "Median by IoU" in page
    assert "by structure" in page and "by data set" in page
    assert "answers without a box: 4" in page and "0" * 64 in page


def test_the_report_counts_the_samples_that_are_in_no_figure(root, tmp_path):
    class Refusing(Answerer):
        def ask(self, study, question, **sampling):
            if "kidney" in question:
                raise InvalidInput("not this one")
            return super().ask(study, question, **sampling)

    (root / "M3D_Seg_npy/0000/b/image.npy").unlink()
    arguments = ["--data", str(root), "--task", "rec,vqa-closed", "--out", str(tmp_path), "--broken-share", "0.5"]
    assert bench(arguments, Refusing()) == 1
    rec = figures(tmp_path)["tasks"]["rec"]
    assert (rec["n"], rec["broken"], rec["missing"]) == (3, 2, 1)
    said = "Of 6 samples 2 have broken or missing files (preflight.json) and 1 have no answer: they are in no figure."
    page = (tmp_path / "report.html").read_text()
    assert page.count("in no figure") == 1 and said in page  # all of vqa-closed are


def test_text_of_answers_is_no_html_in_the_report(root, tmp_path):
    bench(
        ["--data", str(root), "--task", "vqa-closed", "--out", str(tmp_path)],
        Answerer(texts={"plane": "<script>alert(1)</script>"}),
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_case_whose_scan_is_gone_has_no_picture_but_says_so(root, tmp_path):
    arguments = ["--data", str(root), "--task", "rec", "--out", str(tmp_path), "--broken-share", "1"]
    bench(arguments, Answerer())
    rows = read_rows(tmp_path / "samples/rec.jsonl")[1]
    from benchmarks.bench.report import page

    for path in (root / "M3D_Seg_npy").rglob("image.npy"):
        path.unlink()
    text = page(figures(tmp_path), {}, {"rec": rows}, tmp_path / "predictions")
    assert "no picture" in text and "data:image" not in text


def test_pictures_show_true_and_predicted_outlines(root, tmp_path):
    from PIL import Image

    from benchmarks.bench.pictures import picture

    bench(["--data", str(root), "--task", "seg-semantic,rec", "--out", str(tmp_path)], Answerer())

    def colours(row):
        (tmp_path / "picture.png").write_bytes(picture(row, tmp_path / "predictions"))
        pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(int)
        green = (pixels[..., 1] > 150) & (pixels[..., 0] < 120)
        orange = (pixels[..., 0] > 200) & (pixels[..., 2] < 100)
        assert not green[:, :8].any()  # the kidney's outline, not that of what is around it
        return green.sum(), orange.sum(), pixels.shape

    rows = read_rows(tmp_path / "samples/seg-semantic.jsonl")[1]
    kidney = next(row for row in rows if row["structure"] == "right kidney")
    green, orange, shape = colours(kidney)  # the liver was drawn instead, in other slices
    assert green > 50 and orange > 50 and shape[1] == 2 * shape[0]
    rows = read_rows(tmp_path / "samples/rec.jsonl")[1]
    green, orange, _ = colours(next(row for row in rows if row["structure"] == "right kidney"))
    assert green > 50 and orange == 0


def test_shares_are_written_in_per_cent_and_lengths_in_millimetres():
    assert [written(*pair) for pair in (("accuracy", 0.7578), ("HD95", 3.21), ("CIDEr", 1.234), ("x", None))] == [
        "75.78", "3.2 mm", "1.23", ""
    ]  # fmt: skip
    assert PUBLISHED["retrieval"] == {"IR R@1 of 2000": (0.1910, 0.6100)}


# --- the demonstration's data ----------------------------------------------------------------------------------------
def test_the_demonstrations_data_has_samples_for_every_task(tmp_path, monkeypatch):
    from benchmarks.bench import demo_data
    from engine.scan import Scan
    from training.data.augment import Augmentation
    from training.data.scans import LabelledScan

    facts = {"modality": "CT", "part": "chest", "view": "both lungs", "finding": "A tumour.", "tumour": "lung tumour"}
    facts["tumour_side"] = "left"
    whole = np.zeros((3, *SIZE), bool)
    whole[0, :, 4:28, 18:30], whole[1, 2:6, 8:20, 2:14], whole[2, 2:5, 8:12, 20:25] = True, True, True
    names = ("left lung", "right lung", "lung tumour")
    bits = sum(part.astype(np.int64) << k for k, part in enumerate(whole))
    shares = tuple(float(part.mean()) for part in whole)
    image = np.random.default_rng(0).random(SIZE).astype(np.float32)
    scan = LabelledScan("chest", image, bits, names, shares, facts)
    own = Scan(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([2.0, 2, 5, 1]), "nifti")
    monkeypatch.setattr(demo_data, "load_scans", lambda names, size: [scan])
    monkeypatch.setattr(demo_data, "SOURCES", {"chest": lambda: (own, {"left lung": own.array > 30})})
    demo_data.write_root(tmp_path, ["chest"], SIZE, SIZE, Augmentation(5, 0.1, 0.02, 0.5, 0, 0, 0, 0, 0.01), 3)
    for task in TASKS:
        checked = preflight.check(task, samples_of(task, tmp_path))
        assert checked.samples and not checked.broken
        assert {sample.scan for sample in checked.samples} == {"M3D_Seg_npy/demo/chest"}  # one case
        for sample in checked.samples:
            read_truth(sample)
    (in_mm,) = (s for s in samples_of("seg-semantic", tmp_path) if s.image.name == "scan.nii.gz")
    assert read_truth(in_mm).spacing_mm == (2, 2, 5) and read_truth(in_mm).mask.sum() == 29
    closed = samples_of("vqa-closed", tmp_path)
    assert all(read_truth(s).answer == f"{s.choice}. {s.choices[s.choice]}" for s in closed)
    assert {sample.choice for sample in closed} > {"A", "B"}  # not always the same one


# --- two runs --------------------------------------------------------------------------------------------------------
@pytest.fixture
def many(root):
    """Twelve cases with a liver each."""
    entries = []
    for case in range(12):
        folder = root / f"M3D_Seg_npy/0000/{case}"
        save(folder / "image.npy", np.random.default_rng(case).random((1, *SIZE), dtype=np.float32))
        save(folder / "masks/mask_0.npy", mask((slice(1, 5), slice(4, 10 + case), slice(2, 12))))
        entries.append({"image": f"0000/{case}/image.npy", "label": f"0000/{case}/masks/mask_0.npy"})
    (root / "M3D_Seg_npy/0000/0000.json").write_text(json.dumps({"train": [], "test": entries}))
    (root / "M3D_Seg_npy/0010/0010.json").write_text(json.dumps({"train": [], "test": []}))
    return root


def test_a_comparison_tells_what_is_beyond_noise(many, tmp_path, capsys):
    def arguments(name):
        return ["--data", str(many), "--task", "rec,vqa-closed", "--out", str(tmp_path / name)]

    bench(arguments("a"), Answerer())
    bench(arguments("b"), Answerer(texts={"liver": REPORT}))  # no boxes
    bench(arguments("c"), Answerer())
    a, b, c = (tmp_path / name / "bench.json" for name in "abc")
    both = compare.compare(a, b)
    found = {(d.side, d.metric): d for d in both.differences if d.task == "rec"}
    assert both.same == {"rec": (24, 12), "vqa-closed": (1, 1)}  # descriptions do not say "liver"
    iou = found["sound", "IoU"]
    assert iou.verdict == "worse" and iou.low <= iou.difference <= iou.high < 0
    assert iou.n == 24  # each case is asked by name and by description
    assert {d.verdict for d in compare.compare(a, c).differences if d.task == "rec"} == {"equal"}
    assert m3d_bench.main(["compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert (
        "rec: 12 of 24 answers are the same, word for word" in said
        and "worse" in said
        and "By chance alone about" in said
    )
    assert "vqa-closed: 1 scans in common" in said


def test_a_metric_that_should_be_small_is_better_when_it_falls():
    def difference(metric, low, high):
        return compare.Difference("t", "sound", metric, 20, 1.0, 0.5, low, high).verdict

    assert difference("HD95", -0.6, -0.4) == "better" and difference("Dice", -0.6, -0.4) == "worse"
    assert difference("Dice", -0.6, 0.1) == "within noise" and difference("Dice", None, None) == "unknown"


def test_only_samples_of_both_runs_are_compared(many, tmp_path):
    for name, limit in (("a", "20"), ("b", "24")):
        bench(["--data", str(many), "--task", "rec", "--limit", limit, "--out", str(tmp_path / name)], Answerer())
    found = compare.compare(tmp_path / "a/bench.json", tmp_path / "b/bench.json")
    assert {d.n for d in found.differences} == {20}
    assert found.notes == ("rec: 4 samples are in one of both runs only and are left out",)


def changed_rows(out, task, change):
    """Rewrite the header and the scored rows of a task by change(lines), a list that it may alter."""
    path = out / f"samples/{task}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_runs_under_other_conditions_are_told_apart(root, tmp_path):
    (root / "M3D_Seg_npy/0000/b/image.spacing.json").write_text("[5, 1, 1]")
    arguments = ["--data", str(root), "--task", "seg-semantic", "--out"]
    bench([*arguments, str(tmp_path / "a")], Answerer())
    bench([*arguments, str(tmp_path / "b"), "--nsd-mm", "4", "--new-tokens", "7"], Answerer())
    changed_rows(tmp_path / "b", "seg-semantic", lambda lines: lines[0].update(data="other"))
    found = compare.compare(tmp_path / "a/bench.json", tmp_path / "b/bench.json")
    said = "\n".join(found.notes)
    assert "nsd_mm is 2.0 in A, 4.0 in B" in said and "new_tokens is 256 in A, 7 in B" in said
    assert "the indices of the data: data is " in said and "'other' in B" in said
    metrics = {d.metric for d in found.differences}
    assert "HD95" in metrics and "NSD" not in metrics and "NSD (sound) is not compared" in said


def test_runs_with_another_true_answer_are_refused(root, tmp_path):
    for name in "ab":
        bench(["--data", str(root), "--task", "vqa-closed", "--out", str(tmp_path / name)], Answerer())
    changed_rows(tmp_path / "b", "vqa-closed", lambda lines: lines[1].update(answer="B. Coronal"))
    with pytest.raises(InvalidInput, match="vqa-closed: 1 samples have another true answer in the two runs"):
        compare.compare(tmp_path / "a/bench.json", tmp_path / "b/bench.json")


def test_cider_is_compared_by_what_is_rare_among_the_shared_samples(root, tmp_path):
    for name, limit in (("a", "4"), ("b", "6")):
        arguments = ["--data", str(root), "--task", "reg", "--limit", limit, "--out", str(tmp_path / name)]
        bench(arguments, Answerer(texts={"": "It is the right kidney, or the liver."}))
    found = compare.compare(tmp_path / "a/bench.json", tmp_path / "b/bench.json")
    (cider,) = (d for d in found.differences if d.metric == "CIDEr")
    assert cider.n == 4 and cider.a == cider.b == figures(tmp_path / "a")["tasks"]["reg"]["sound"]["CIDEr"]["value"] > 0
    keys = {row["key"] for row in read_rows(tmp_path / "a/samples/reg.jsonl")[1]}
    among_all = [
        row["scores"]["sound"]["CIDEr"] for row in read_rows(tmp_path / "b/samples/reg.jsonl")[1] if row["key"] in keys
    ]
    assert np.mean(among_all) != pytest.approx(cider.b, rel=1e-3)


def test_retrieval_in_other_pools_is_not_compared(root, tmp_path):
    for name in "ab":
        bench(["--data", str(root), "--task", "retrieval,rec", "--out", str(tmp_path / name)], Answerer())
    a, b = tmp_path / "a", tmp_path / "b"
    assert {d.task for d in compare.compare(a / "bench.json", b / "bench.json").differences} == {"retrieval", "rec"}
    changed_rows(b, "retrieval", lambda lines: lines.append({**lines[-1], "key": "another"}))
    found = compare.compare(a / "bench.json", b / "bench.json")
    assert {d.task for d in found.differences} == {"rec"}
    assert "retrieval: 1 pairs are in one of both runs only, so that the pools differ: not compared" in found.notes


def test_a_metric_of_one_run_alone_is_said(root, tmp_path, monkeypatch):
    monkeypatch.setattr(m3d_bench.models, "load_bertscore", lambda *_: lambda predictions, _: [0.5] * len(predictions))
    arguments = ["--data", str(root), "--task", "reg", "--out"]
    bench([*arguments, str(tmp_path / "a")], Answerer())
    bench([*arguments, str(tmp_path / "b"), "--bertscore", "somewhere"], Answerer())
    a, b = tmp_path / "a/bench.json", tmp_path / "b/bench.json"
    assert "reg: BERTScore (reference) is only in B" in compare.compare(a, b).notes
    assert "reg: BERTScore (reference) is only in A" in compare.compare(b, a).notes


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda out: (out / "samples/rec.jsonl").unlink(), "rec.jsonl is missing"),
        (lambda out: (out / "bench.json").write_text("[]"), "is no bench.json"),
        (lambda out: (out / "bench.json").unlink(), "cannot be read"),
        (lambda out: (out / "bench.json").write_text('{"tasks": {}}'), "have no task in common"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(spoil, cause, root, tmp_path, capsys):
    for name in "ab":
        bench(["--data", str(root), "--task", "rec", "--out", str(tmp_path / name)], Answerer())
    spoil(tmp_path / "b")
    assert m3d_bench.main(["compare", str(tmp_path / "a/bench.json"), str(tmp_path / "b/bench.json")]) == 2
    assert cause in capsys.readouterr().err
