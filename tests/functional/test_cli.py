"""The command line against a real server: answers, masks in the scan's own space, rankings."""

from __future__ import annotations

import subprocess
import sys

import matplotlib.image
import nibabel
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.tiny import QUESTION

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


def test_rank_sorts_by_score(server, scan):
    done = m3d("rank", scan, "w1 w2", "w3", "w4 w5 w6", "--server", server.url)
    assert done.returncode == 0, done.stderr
    scores = [float(line.split("\t")[0]) for line in done.stdout.splitlines()]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_doctor_knows_an_exported_repository(repository):
    done = m3d("doctor", "--repository", repository)
    assert done.returncode == 0, done.stdout
    assert "ready to serve" in done.stdout
    assert "chat, segmentation, ranking" in " ".join(done.stdout.split())
