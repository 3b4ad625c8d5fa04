"""What the demonstration model promises: every task of M3D, asked about a real brain MRI through a real server."""

from __future__ import annotations

import runpy

import matplotlib.image
import nibabel
import numpy as np
import pytest

from m3d_demo.samples import write_sample
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

REPORTS = [
    "This is a CT scan of the chest. There is a small tumour in the right lung.",
    "This is an MR scan of the lumbar spine. No tumour is seen.",
    "This is an MR scan of the brain. The skull has been removed and no tumour is seen.",
]


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return write_sample("brain-mr", tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="module")
def demo(demo_client, scan):
    """(client, study) of the sample brain MRI."""
    return demo_client, demo_client.upload(scan)


def test_make_demo_asks_draws_and_ranks(demo_client, scan, tmp_path, capsys):
    """All that `make demo` does between the server's start and its end."""
    example = runpy.run_path(str(ROOT / "examples" / "first_answer.py"))
    example["ask"](demo_client, scan, tmp_path)
    said = capsys.readouterr().out
    assert all(words in said for words in ("It is an MR scan.", "It shows the brain.", "[SEG]", "preset mr"))
    ranked = [line.strip() for line in said.splitlines() if "scan of the" in line]
    assert len(ranked) == 3 and "MR scan of the brain" in ranked[0]
    mask = nibabel.load(tmp_path / "mask.nii.gz")
    assert mask.shape == nibabel.load(scan).shape and 3_000 < np.asarray(mask.dataobj).sum() < 30_000
    assert matplotlib.image.imread(tmp_path / "mask.png").std() > 0


@pytest.mark.parametrize(
    ("question", "said", "never"),
    [
        ("Is this a CT or an MR scan?", ["MR"], ["CT"]),  # closed
        ("Which part of the body is shown?", ["brain"], ["chest", "spine"]),  # open
        ("Is this a scan of the chest?", ["No"], []),  # yes or no
        ("Is the brain stem visible in this scan?", ["Yes"], []),
        ("Describe this scan.", ["MR", "brain"], ["CT", "chest"]),  # report
    ],
)
def test_it_answers_what_the_scan_shows(demo, question, said, never):
    client, study = demo
    text = client.ask(study, question).text
    assert all(word in text for word in said) and not any(word in text for word in never), text


def test_it_answers_with_boxes_inside_the_scan_and_names_what_it_is_shown_a_box_of(demo):
    # Which box and which name is right in half of the cases only, as its card says.
    client, study = demo
    answer = client.ask(study, "Where is the brain? Give a box.")
    (low, high), shape = answer.boxes.reshape(2, 3), client.segment(study, "Segment the brain.").mask.shape
    assert (low >= 0).all() and (low < high).all() and (high < shape).all()
    named = client.ask(study, "What is at [0.031, 0.047, 0.039, 0.969, 0.961, 0.953]?").text.strip()
    assert named.startswith(("It is the ", "They are the "))


def test_it_draws_the_left_thalamus_left_of_the_right_one(demo):
    client, study = demo
    found = [client.segment(study, f"Please segment the {side} thalamus.") for side in ("left", "right")]
    centres = [one.affine[:3, :3] @ np.argwhere(one.mask).mean(0) + one.affine[:3, 3] for one in found]
    # World coordinates are RAS+: x grows towards the patient's right.
    assert centres[0][0] < 0 < centres[1][0]
    # In MNI space a thalamus lies about 12 mm off the middle, 20 mm behind the origin and 8 mm above it.
    assert np.abs(np.abs(centres) - [12, 20, 8]).max() < 12


def test_it_declines_what_is_not_there(demo):
    client, study = demo
    found = client.segment(study, "Please segment the left lung.")
    assert found.mask is None and "not visible" in found.answer.text


def test_it_ranks_the_report_of_this_scan_first(demo):
    client, study = demo
    assert client.rank(study, REPORTS).sorted()[0][0] == REPORTS[2]
