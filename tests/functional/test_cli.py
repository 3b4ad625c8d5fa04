"""The command line against a real server: answers, masks in the scan's own space, rankings."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import matplotlib.image
import nibabel
import numpy as np
import pytest
import SimpleITK

from tests.conftest import ROOT
from tests.tiny import QUESTION, words

pytestmark = pytest.mark.integration

AFFINE = np.array([[0, -2.0, 0, 30], [-1.5, 0, 0.1, 20], [0, 0, 4.0, -50], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A scan with oblique, permuted and flipped axes."""
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    i, j, k = np.mgrid[-1:1:40j, -1:1:44j, -1:1:20j]
    body = 300 * ((i / 0.8) ** 2 + (j / 0.7) ** 2 + (k / 0.9) ** 2 < 1)
    noise = np.random.default_rng(0).normal(0, 20, body.shape)
    nibabel.save(nibabel.Nifti1Image((body + np.abs(noise)).astype(np.int16), AFFINE), path)
    return path


def m3d(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "engine.cli", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_ask_streams_what_the_client_gets(server, client, scan):
    done = m3d("ask", scan, QUESTION, "--server", server.url, "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    assert done.stdout == client.ask(scan, QUESTION, max_new_tokens=12).text + "\n"
    assert "auto chose" in done.stderr


def test_ask_prints_the_likelihood_of_choices_best_first(server, client, scan):
    settings = ["--server", server.url, "--max-new-tokens", 12, "--choice", "w5", "--choice", "w6 w7", "--choice", "w9"]
    done = m3d("ask", scan, QUESTION, *settings, "--only-choices")
    assert done.returncode == 0, done.stderr
    answer, *lines = done.stdout.splitlines()
    assert answer in ("w5", "w6 w7", "w9")
    right = client.ask(scan, QUESTION, choices=["w5", "w6 w7", "w9"]).choices
    found = {text: float(logprob) for logprob, text in (line.split("\t") for line in lines)}
    assert found == pytest.approx(right, abs=1e-3) and list(found) == sorted(right, key=right.get, reverse=True)


def test_a_schema_that_cannot_be_used_is_refused_before_anything_is_sent(scan, tmp_path):
    path = tmp_path / "schema.json"
    for content, why in ((None, "No such file"), ('{"type": "tree"}', "type 'tree' is none of")):
        if content:
            path.write_text(content)
        done = m3d("ask", scan, QUESTION, "--json-schema", path, "--server", "localhost:1")
        assert done.returncode == 2 and why in done.stderr


def test_segment_writes_a_mask_in_the_scans_own_space_and_a_picture(server, client, scan, tmp_path):
    expected = client.segment(scan, QUESTION, max_new_tokens=24)
    assert expected.mask is not None
    done = m3d(
        "segment", scan, QUESTION, "-o", tmp_path / "mask.nii.gz", "--server", server.url, "--max-new-tokens", 24
    )
    assert done.returncode == 0, done.stderr
    mask, original = nibabel.load(tmp_path / "mask.nii.gz"), nibabel.load(scan)
    assert mask.shape == original.shape
    np.testing.assert_allclose(mask.affine, original.affine)
    np.testing.assert_array_equal(np.asarray(mask.dataobj).astype(bool), expected.mask)
    assert matplotlib.image.imread(tmp_path / "mask.png").std() > 0


def test_segment_within_a_crop_writes_mask_and_measurements_in_the_scans_own_space(server, client, scan, tmp_path):
    crop = "2:38,2:42,1:19"
    study = client.upload(scan, crop=crop)
    expected = client.segment(study, QUESTION, max_new_tokens=24)
    arguments = ("-o", tmp_path / "mask.nii.gz", "--server", server.url, "--max-new-tokens", 24, "--crop", crop)
    done = m3d("segment", scan, QUESTION, *arguments)
    assert done.returncode == 0, done.stderr
    assert crop in done.stderr
    mask = np.asarray(nibabel.load(tmp_path / "mask.nii.gz").dataobj).astype(bool)
    np.testing.assert_array_equal(mask, expected.mask)
    inside = np.zeros(mask.shape, bool)
    inside[2:38, 2:42, 1:19] = True
    assert mask.any() and not (mask & ~inside).any()
    measured = json.loads((tmp_path / "mask.json").read_text())
    assert measured == expected.measurements.to_dict()
    assert measured["intensity_mean"] == pytest.approx(np.asarray(nibabel.load(scan).dataobj)[mask].mean())
    assert f"{measured['voxel_count']:,} voxels" in done.stderr


def test_a_crop_outside_the_scan_is_refused_with_the_scans_extent(server, scan):
    done = m3d("ask", scan, QUESTION, "--server", server.url, "--crop", "0:41,0:44,0:20")
    assert done.returncode == 2 and "0:40,0:44,0:20" in done.stderr and not done.stdout


def test_rank_sorts_by_score(server, scan):
    done = m3d("rank", scan, "w1 w2", "w3", "w4 w5 w6", "--server", server.url)
    assert done.returncode == 0, done.stderr
    scores = [float(line.split("\t")[0]) for line in done.stdout.splitlines()]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert "warning" not in done.stderr


def test_rank_warns_of_reports_that_were_cut(server, scan, tmp_path):
    (tmp_path / "reports.txt").write_text(f"{words(510)}\n\n{words(511)}\n")
    done = m3d("rank", scan, words(600), "--file", tmp_path / "reports.txt", "--server", server.url)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "warning: texts 1, 3 are longer than M3D-CLIP reads: only the first 512 tokens count\n" in done.stderr


def test_doctor_knows_an_exported_repository(repository):
    done = m3d("doctor", "--repository", repository)
    assert done.returncode == 0, done.stdout
    assert "ready to serve" in done.stdout
    assert "chat, segmentation, ranking" in " ".join(done.stdout.split())


def test_the_mask_of_a_file_has_its_header_and_lies_on_it_in_simpleitk(server, client, scan, tmp_path):
    """A qform and an sform that differ, and free text that stays with the scan."""
    image = nibabel.load(scan)
    image.set_qform(np.diag([2.0, 2, 4, 1]), 1)
    image.set_sform(AFFINE, 2)
    image.header["descrip"] = b"Jane Doe"
    nibabel.save(image, tmp_path / "both.nii.gz")
    found = client.segment(client.upload(tmp_path / "both.nii.gz"), QUESTION, max_new_tokens=24)
    mask = nibabel.load(found.save(tmp_path / "mask.nii.gz"))
    for name in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(mask.header[name], nibabel.load(tmp_path / "both.nii.gz").header[name])
    assert b"Jane" not in found.header and b"Jane" not in gzip.decompress((tmp_path / "mask.nii.gz").read_bytes())[:352]
    ours, theirs = (SimpleITK.ReadImage(str(tmp_path / name)) for name in ("mask.nii.gz", "both.nii.gz"))
    for read in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        np.testing.assert_allclose(getattr(ours, read)(), getattr(theirs, read)())
