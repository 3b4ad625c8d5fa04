"""The command line: answers on stdout, notes on stderr, one line instead of a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import matplotlib.image
import nibabel
import numpy as np
import pytest

from tests.conftest import ROOT, copy_repository
from tests.unit.fake_triton import ANSWER


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "scan.nii.gz"
    values = np.random.default_rng(0).integers(0, 500, (12, 13, 14)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 2, 3, 1])), path)
    return path


def test_ask_prints_the_answer_and_nothing_else_on_stdout(m3d, scan, triton):
    code, out, err = m3d("ask", scan, "What is this?", "--server", triton.url, "--max-new-tokens", 5, "--stop", "X")
    assert (code, out) == (0, "".join(ANSWER) + "\n")
    assert "4 tokens" in err
    assert b'"max_new_tokens": 5' in triton.asked[0][1]["SAMPLING"][0]
    assert b'"stop": ["X"]' in triton.asked[0][1]["SAMPLING"][0]


def test_segment_writes_mask_and_picture(m3d, scan, triton, tmp_path):
    triton.mask = np.zeros((12, 13, 14), bool)
    triton.mask[3:6, 4:8, 5:9] = True
    code, out, err = m3d("segment", scan, "Segment it.", "-o", tmp_path / "out.nii.gz", "--server", triton.url)
    assert (code, out) == (0, "".join(ANSWER) + "\n")
    assert np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj).sum() == 48
    assert matplotlib.image.imread(tmp_path / "out.png").ndim == 3


def test_segment_writes_measurements_beside_the_mask_and_prints_them(m3d, scan, triton, tmp_path):
    triton.mask = np.zeros((12, 13, 14), bool)
    triton.mask[3:6, 4:8, 5:9] = True
    _, _, err = m3d("segment", scan, "Segment it.", "-o", tmp_path / "out.nii.gz", "--server", triton.url)
    found = json.loads((tmp_path / "out.json").read_text())
    values = np.asarray(nibabel.load(scan).dataobj)[triton.mask]
    assert found["voxel_count"] == 48 and found["volume_ml"] == pytest.approx(48 * 6 / 1000)
    assert found["bounding_box_voxels"] == [3, 4, 5, 6, 8, 9] and found["centroid_ras_mm"] == [4, 11, 19.5]
    assert found["intensity_mean"] == pytest.approx(values.mean()) and found["intensity_unit"] == "HU"
    assert "0.288 mL, 48 voxels (2.20% of the scan)" in err and f"intensity {values.mean():.4g} HU" in err
    assert str(tmp_path / "out.json") in err


def test_segment_never_writes_measurements_over_the_scan(m3d, scan, triton, tmp_path):
    (tmp_path / "out.json").symlink_to(scan)
    code, _, err = m3d("segment", scan, "Segment it.", "-o", tmp_path / "out.nii.gz", "--server", triton.url)
    assert code == 2 and "the scan itself" in err and not triton.uploads


def test_a_scan_that_changes_while_it_is_asked_about_is_neither_drawn_nor_measured(m3d, scan, triton, tmp_path):
    triton.mask = np.ones((12, 13, 14), bool)
    triton.on_answer = lambda: nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4)), scan)
    code, _, err = m3d("segment", scan, "Segment it.", "-o", tmp_path / "out.nii.gz", "--server", triton.url)
    assert code == 0 and "has changed since it was sent" in err and not (tmp_path / "out.png").exists()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["voxel_count"] == 12 * 13 * 14 and found["intensity_mean"] is None
    assert "has changed since it was sent" in found["intensity_missing"]


@pytest.mark.parametrize("command", [("ask", "What?"), ("segment", "What?"), ("rank", "a text")], ids=lambda c: c[0])
def test_a_crop_is_sent_with_the_scan(m3d, scan, triton, command):
    name, words = command
    m3d(name, scan, words, "--crop", "-4:5,0:6.5,1:9mm", "--server", triton.url)
    assert triton.uploads[0]["CROP"].tolist() == [-4, 0, 1, 5, 6.5, 9]
    assert triton.uploads[0]["CROP_UNIT"].tolist() == [b"mm"]


@pytest.mark.parametrize("crop", ["1:2", "5:1,0:6,1:9", "1:5,0:6,1:inf", "all", ""])
@pytest.mark.parametrize("command", ["ask", "segment", "rank"])
def test_an_unusable_crop_is_refused_before_anything_is_sent(m3d, scan, triton, command, crop):
    code, _, err = m3d(command, scan, "What?", "--crop", crop, "--server", triton.url)
    assert code == 2 and "i0:i1,j0:j1,k0:k1" in err and not triton.parts


def test_segment_without_a_mask_fails_after_the_answer(m3d, scan, triton, tmp_path):
    code, out, err = m3d("segment", scan, "What?", "-o", tmp_path / "out.nii.gz", "--server", triton.url)
    assert code == 1 and out == "".join(ANSWER) + "\n"
    assert "no [SEG]" in err and "m3d ask" in err
    assert not (tmp_path / "out.nii.gz").exists()


def test_segment_writes_pictures_as_png_only(m3d, scan, triton, tmp_path):
    code, out, err = m3d(
        "segment",
        scan,
        "What?",
        "-o",
        tmp_path / "mask.nii",
        "--picture",
        tmp_path / "mask.jpg",
        "--server",
        triton.url,
    )
    assert code == 2 and ".png" in err and not triton.uploads


def test_a_folder_that_cannot_be_written_is_one_line_of_error(m3d, scan):
    code, out, err = m3d("sample", "brain-mr", "-o", scan / "folder")
    assert code == 1 and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize(("output", "words"), [("mask.png", ".nii"), ("no/such/folder/mask.nii", "does not exist")])
def test_segment_refuses_an_unusable_output_before_asking(m3d, scan, triton, tmp_path, output, words):
    code, out, err = m3d("segment", scan, "What?", "-o", tmp_path / output, "--server", triton.url)
    assert code == 2 and words in err and not triton.uploads


@pytest.mark.parametrize("option", ["--output", "--picture"])
def test_segment_never_writes_over_the_scan(m3d, scan, triton, tmp_path, option):
    link = tmp_path / {"--output": "link.nii.gz", "--picture": "link.png"}[option]
    link.symlink_to(scan)
    code, out, err = m3d("segment", scan, "What?", option, link, "--server", triton.url)
    assert code == 2 and "the scan itself" in err and not triton.uploads


def test_names_are_printed_as_they_are(m3d, scan, triton, tmp_path):
    triton.mask = np.ones((12, 13, 14), bool)
    output = tmp_path / "a [bold]b[" / "x].nii.gz"
    output.parent.mkdir()
    code, _, err = m3d("segment", scan, "Segment it.", "-o", output, "--server", triton.url)
    assert code == 0 and f"wrote {output}" in err and output.is_file()


def test_rank_prints_scores_best_first(m3d, scan, triton, tmp_path):
    (tmp_path / "texts").write_text("second\n\nfirst\n")
    code, out, _ = m3d("rank", scan, "third", "--file", tmp_path / "texts", "--server", triton.url)
    assert code == 0
    assert out.splitlines() == ["+1.0000\tfirst", "+0.5000\tsecond", "+0.0000\tthird"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a b", "a"], None),
        (["a", "a b c"], "text 2 is longer than M3D-CLIP reads: only the first 2 tokens count"),
        (["a b c", "a", "a b c d"], "texts 1, 3 are longer than M3D-CLIP reads: only the first 2 tokens count"),
    ],
)
def test_rank_warns_of_texts_that_were_cut(m3d, scan, triton, texts, words):
    triton.text_limit = 2
    code, out, err = m3d("rank", scan, *texts, "--server", triton.url)
    assert code == 0 and len(out.splitlines()) == len(texts) and "warning" not in out
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert warnings == ([f"warning: {words}"] if words else [])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ask", "SCAN", "What?", "--server", "127.0.0.1:1"], 1, ["127.0.0.1:1", "m3d serve"]),
        (["ask", "nowhere.nii", "What?", "--server", "URL"], 2, ["nowhere.nii", "cannot be read"]),
        # Nothing is sent for these: the server that they name is not there.
        (["ask", "SCAN", "", "--server", "127.0.0.1:1"], 2, ["empty"]),
        (["segment", "SCAN", " ", "--server", "127.0.0.1:1"], 2, ["empty"]),
        (["ask", "SCAN", "What?", "--temperature", "9", "--server", "127.0.0.1:1"], 2, ["temperature", "9"]),
        (["rank", "SCAN", "--server", "URL"], 2, ["nothing to rank"]),
        (["rank", "SCAN", "--file", "nowhere.txt", "--server", "URL"], 2, ["nowhere.txt"]),
        (["sample", "foot-mr"], 2, ["foot-mr", "brain-mr"]),
        (["serve", "--repository", "FOLDER"], 1, ["never exported", "build_engines.py"]),
        (["serve", "--repository", "FOLDER", "--target", "gpu"], 2, ["gpu", "cpu, tensorrt"]),
        (["ask", "SCAN", "What?", "--beams", "3"], 2, ["--beams"]),
        (["ask", "SCAN", "What?", "--server", "http://127.0.0.1:1"], 2, ["http://127.0.0.1:1", "host:port"]),
        (["ask", "SCAN", "What?", "--server", ""], 2, ["host:port"]),
    ],
)
def test_a_mistake_gives_its_cause_and_no_traceback(m3d, scan, triton, tmp_path, arguments, code, words):
    replaced = {"SCAN": scan, "URL": triton.url, "FOLDER": tmp_path}
    found, out, err = m3d(*(replaced.get(argument, argument) for argument in arguments))
    assert found == code and out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err


class Served:
    """In the place of engine.server.Server: ends at once, as by Ctrl-C."""

    url, metrics_url, log = "127.0.0.1:8001", "http://127.0.0.1:8002/metrics", "triton.log"

    def __init__(self, *_, **arguments):
        self.arguments = arguments

    def start(self):
        print("starting", file=sys.stderr)

    def wait(self):
        raise KeyboardInterrupt

    def stop(self):
        pass


@pytest.fixture
def served(monkeypatch):
    """What `m3d serve` makes: a list of servers that never start."""
    made = []
    monkeypatch.setattr("engine.server.Server", lambda *_, **arguments: made.append(Served(**arguments)) or made[-1])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the tests' own stay
    return made


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-1.hospital.example"])
def test_serve_says_before_it_starts_what_others_can_do_at_a_port_they_reach(m3d, served, host):
    code, out, err = m3d("serve", "--host", host, "--grpc-port", 9001)
    assert (code, out) == (130, "") and served[0].arguments["host"] == host
    warning, _, rest = err.partition("\n")
    assert warning.startswith(f"warning: --host {host}: ") and "starting" in rest and "warning" not in rest
    for word in ("9001", "upload", "ask", "segment", "rank", "handle", "capacity", "key", "not encrypted", "gateway"):
        assert word in warning


def test_serve_says_what_others_can_read_of_metrics(m3d, served):
    _, _, err = m3d("serve", "--metrics-host", "0.0.0.0", "--metrics-port", 9002)
    assert served[0].arguments["metrics_host"] == "0.0.0.0" and served[0].arguments["host"] == "127.0.0.1"
    warning, _, rest = err.partition("\n")
    assert warning.startswith("warning: --metrics-host 0.0.0.0: ") and "starting" in rest and "warning" not in rest
    assert "9002" in warning and "counts, timings" in warning and "upload" not in warning


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1", "localhost"])
def test_serve_warns_of_nothing_where_only_this_machine_reaches_it(m3d, served, host):
    _, _, err = m3d("serve", "--host", host, "--metrics-host", host)
    assert "warning" not in err and served[0].arguments["metrics_host"] == host


def test_serve_keeps_metrics_on_this_machine_unless_told_otherwise(m3d, served):
    m3d("serve", "--host", "0.0.0.0")
    assert served[0].arguments["metrics_host"] == "127.0.0.1" and "http_port" not in served[0].arguments
    assert m3d("serve", "--http-port", 8000)[0] == 2


def test_doctor_names_what_is_missing_and_how_to_get_it(m3d, tmp_path):
    code, out, _ = m3d("doctor", "--repository", tmp_path)
    assert code == 1
    assert "build_engines.py" in " ".join(out.split()) and "missing" in out
    assert "GPU" in out and "not been run" in " ".join(out.split())


def test_help_comes_without_loading_what_only_commands_need():
    code = (
        "import sys; sys.argv = ['m3d', '--help']\nfrom engine.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('LOADED', [m for m in ('grpc', 'numpy', 'nibabel', 'matplotlib', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout
    for command in ("serve", "ask", "segment", "rank", "sample", "inspect", "doctor", "export", "evaluate", "bench"):
        assert command in done.stdout
    assert "\x1b" not in done.stdout  # no colour codes in a pipe


def test_a_reader_that_has_enough_ends_the_request_quietly(scan, triton):
    triton.endless = True
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.cli", "ask", str(scan), "What?", "--server", triton.url],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "Exception" not in err
    assert triton.cancelled.wait(60)


@pytest.mark.parametrize(
    "command", ["", "ask", "segment", "rank", "serve", "doctor", "inspect", "sample", "export", "evaluate", "bench"]
)
def test_every_command_has_a_help_text(m3d, command):
    code, out, _ = m3d(*filter(None, [command]), "--help")
    assert code == 0 and "usage: m3d" in " ".join(out.lower().split())


# --- how a command ends ----------------------------------------------------------------------------------------------
def started(*arguments) -> subprocess.Popen:
    """`m3d` in a process of its own, in which Ctrl-C is not ignored, as it may be in this one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "engine.cli", *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(process: subprocess.Popen) -> str:
    """What a process says on stderr after Ctrl-C; it ends as it should."""
    try:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err and "Exception" not in err, err
    return err


def test_ctrl_c_ends_an_answer_and_cancels_its_question(scan, triton):
    triton.endless = True
    process = started("ask", scan, "What?", "--server", triton.url)
    assert process.stdout.read(10)
    assert interrupted(process).endswith("interrupted\n")
    assert triton.cancelled.wait(60)


@pytest.mark.parametrize("command", [("segment", "Segment it."), ("rank", "a text")], ids=lambda c: c[0])
def test_ctrl_c_ends_a_command_that_waits_for_the_server(scan, triton, command):
    name, words = command
    sent, end = threading.Event(), threading.Event()

    def wait(seconds):
        sent.set()
        return end.wait(seconds)

    triton.may_answer = SimpleNamespace(wait=wait)
    process = started(name, scan, words, "--server", triton.url)
    try:
        assert sent.wait(60)
        assert interrupted(process).endswith("interrupted\n")
    finally:
        end.set()


@pytest.mark.integration
def test_ctrl_c_ends_an_export(dev_small, tmp_path):
    process = started("export", "--checkpoint", dev_small.folder, "--repository", copy_repository(tmp_path))
    assert process.stdout.readline().startswith("this export needs")
    assert "interrupted\n" in interrupted(process)


def test_a_second_ctrl_c_does_not_cut_the_end_of_a_command_short():
    code = (
        "import os, signal, sys\nfrom engine.cli import console\n"
        "def body():\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('tidied')\n"
        "sys.exit(console.run(body))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "tidied\n", "interrupted\n")


# --- scripts of a clone ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["export", "--checkpoint", "nowhere", "--beams", "3"], 2, ["--beams", "m3d export --help"]),
        (["export", "--checkpoint", "nowhere", "--repository", "FOLDER"], 1, ["model repository"]),
        (["evaluate", "FOLDER/none.json"], 2, ["none.json"]),
        (["bench", "--tokens", "0"], 2, ["--tokens", "m3d bench --help"]),
        (["bench", "--server", "localhost:1", "--scan", "FOLDER/none.nii"], 2, ["none.nii"]),
    ],
)
def test_a_script_that_m3d_runs_fails_as_m3d_does(m3d, tmp_path, arguments, code, words):
    found, out, err = m3d(*(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert found == code and out == "" and err.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize("command", ["export", "evaluate", "bench"])
def test_the_package_alone_says_that_a_script_needs_a_clone(tmp_path, command):
    shutil.copytree(ROOT / "engine", tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", command, "--help"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    for word in (f"error: m3d {command}", ".py", "clone"):
        assert word in done.stderr


def test_a_script_without_its_packages_says_how_to_install_them(monkeypatch, m3d):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "training.evaluate", raising=False)
    code, _, err = m3d("evaluate", "none.json")
    assert code == 1 and "accelerate" in err and "m3d-engine[cpu,train,bench]" in err


# --- one mask for each [SEG] -----------------------------------------------------------------------------------------
@pytest.fixture
def two(triton):
    """An answer with two [SEG], the second of which marks nothing."""
    triton.answer = ("The liver is ", "[SEG]", " and the spleen", " is [SEG].")
    triton.segments = [np.zeros((12, 13, 14), bool) for _ in range(2)]
    triton.segments[0][3:6, 4:8, 5:9] = True
    triton.mask = triton.segments[0]
    return triton


def test_segment_writes_one_mask_for_each_seg_with_its_number(m3d, scan, two, tmp_path):
    output = tmp_path / "out.nii.gz"
    code, out, err = m3d("segment", scan, "Segment both.", "-o", output, "--merge", "each", "--server", two.url)
    assert (code, out) == (0, "The liver is [SEG] and the spleen is [SEG].\n")
    assert {path.name for path in tmp_path.glob("out*")} == {"out_1.nii.gz", "out_2.nii.gz", "out.json", "out.png"}
    voxels = [np.asarray(nibabel.load(tmp_path / f"out_{number}.nii.gz").dataobj).sum() for number in (1, 2)]
    assert voxels == [48, 0]
    found = json.loads((tmp_path / "out.json").read_text())
    first, second = found["segments"]
    assert found["answer"] == out.strip() and first["file"] == "out_1.nii.gz" and second["file"] == "out_2.nii.gz"
    assert (first["words"], second["words"]) == ("The liver is", "and the spleen is")
    assert found["answer"][slice(*second["span"])] == second["words"]
    assert first["voxel_count"] == 48 and first["intensity_unit"] == "HU" and second["voxel_count"] == 0
    assert first["score"] == pytest.approx(0.9)
    for words in ("1 The liver is", "2 and the spleen is", "score 0.900", "48 voxels", str(tmp_path / "out_2.nii.gz")):
        assert words in err


@pytest.mark.parametrize("there", ["out_1.nii.gz", "out_7.nii", "out.json", "out.png"])
def test_segment_for_each_seg_overwrites_nothing_and_mixes_with_no_earlier_masks(m3d, scan, two, tmp_path, there):
    (tmp_path / there).write_text("earlier")
    output = tmp_path / "out.nii.gz"
    code, _, err = m3d("segment", scan, "Segment both.", "-o", output, "--merge", "each", "--server", two.url)
    assert code == 2 and there in err and "another --output" in err and not two.uploads
    assert [path.name for path in tmp_path.glob("out*")] == [there] and (tmp_path / there).read_text() == "earlier"


@pytest.mark.parametrize("beside", ["out_a.nii.gz", "out_1.txt", "xout_1.nii.gz", "out_1.nii.gz.bak", "out.nii.gz"])
def test_other_files_beside_the_masks_do_not_matter(m3d, scan, two, tmp_path, beside):
    (tmp_path / beside).write_text("other")
    output = tmp_path / "out.nii.gz"
    assert m3d("segment", scan, "Segment both.", "-o", output, "--merge", "each", "--server", two.url)[0] == 0
    assert (tmp_path / beside).read_text() == "other"


def test_segment_draws_one_mask_of_all_seg_unless_it_is_told_otherwise(m3d, scan, two, tmp_path):
    code, _, err = m3d("segment", scan, "Segment both.", "-o", tmp_path / "out.nii.gz", "--server", two.url)
    assert code == 0 and {path.name for path in tmp_path.glob("out*")} == {"out.nii.gz", "out.json", "out.png"}
    assert two.asked[-1][1]["MERGE"].tolist() == [b"reference"] and "score 0.750" in err


def test_an_unknown_merge_is_refused_before_anything_is_sent(m3d, scan, triton):
    code, _, err = m3d("segment", scan, "What?", "--merge", "all", "--server", triton.url)
    assert code == 2 and "reference, each" in err and "'all'" in err and not triton.parts
