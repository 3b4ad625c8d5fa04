"""The montage: right planes, radiological sides, true proportions, a readable file for any mask."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from engine import picture
from engine.picture import BONE, LUNG, MASK, SOFT_TISSUE, montage, window

RAS = np.diag([1.0, 1.0, 1.0, 1.0])


def drawn(path) -> np.ndarray:
    """Pixels in the colour of the outline, without the legend at the bottom."""
    pixels = matplotlib.image.imread(path)[..., :3]
    colour = np.array([int(MASK[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    found = np.abs(pixels - colour).max(-1) < 0.15
    found[-40:] = False
    return found


def head(shape=(40, 50, 60)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(np.int16)


@pytest.mark.parametrize(
    "affine",
    [RAS, np.diag([-1.0, -1.0, 1.0, 1.0]), np.array([[0, 0, -1.0, 0], [1.0, 0, 0, 0], [0, -1.0, 0, 0], [0, 0, 0, 1]])],
    ids=["RAS", "LPS", "permuted"],
)
def test_the_patients_left_is_on_the_right_whatever_the_arrays_axes(tmp_path, affine):
    """A mask at the patient's left front bottom, given in arrays of several orientations."""
    import nibabel

    mask = np.zeros((40, 50, 60), bool)
    mask[4:12, 38:46, 4:12] = True  # RAS: left, anterior, inferior
    to = nibabel.orientations.ornt_transform(nibabel.io_orientation(RAS), nibabel.io_orientation(affine))
    scan, mask = (nibabel.apply_orientation(array, to) for array in (head(), mask))
    found = drawn(montage(tmp_path / "x.png", scan, affine, mask, "question", "answer"))
    third = found.shape[1] // 3
    axial, coronal, sagittal = found[:, :third], found[:, third : 2 * third], found[:, 2 * third :]
    middle = found.shape[0] * 0.57  # of the panels: the title takes the top
    for panel, right, low in ((axial, True, False), (coronal, True, True), (sagittal, False, True)):
        rows, columns = np.nonzero(panel)
        assert rows.size
        assert (columns.mean() > third / 2) == right
        assert (rows.mean() > middle) == low


def test_millimetres_are_true_in_both_directions(tmp_path):
    """A cube of 24 mm in voxels of 1 x 1 x 6 mm is square in every plane."""
    mask = np.zeros((60, 60, 12), bool)
    mask[18:42, 18:42, 4:8] = True
    found = drawn(montage(tmp_path / "x.png", head((60, 60, 12)), np.diag([1.0, 1.0, 6.0, 1.0]), mask, "q", "a"))
    third = found.shape[1] // 3
    for panel in (found[:, :third], found[:, third : 2 * third], found[:, 2 * third :]):
        rows, columns = np.nonzero(panel)
        assert np.ptp(rows) == pytest.approx(np.ptp(columns), rel=0.06)


@pytest.mark.parametrize(
    "mask", [None, np.zeros((40, 50, 60), bool), np.ones((40, 50, 60), bool)], ids=["none", "empty", "everything"]
)
def test_any_mask_makes_a_picture(tmp_path, mask):
    path = montage(tmp_path / "x.png", head(), RAS, mask, "a question with $ and ümlaut " * 12, "")
    assert drawn(path).any() == (mask is not None and mask.any())


def test_the_planes_lie_where_the_mask_is_largest(tmp_path, monkeypatch):
    """Two separate parts: the planes go through the larger one, not through the empty middle."""
    mask = np.zeros((40, 50, 60), bool)
    mask[2:5, 2:5, 2:5] = True
    mask[30:38, 40:48, 50:58] = True
    outlined = []
    monkeypatch.setattr(picture, "_outline", lambda axes, plane, *_: outlined.append(plane.sum()))
    montage(tmp_path / "x.png", head(), RAS, mask, "q")
    assert outlined == [64, 64, 64]


@pytest.mark.parametrize(("value", "expected"), [(-850, LUNG), (50, SOFT_TISSUE), (700, BONE)])
def test_a_ct_window_suits_what_the_mask_holds(value, expected):
    scan = np.full((10, 10, 10), -1000.0)
    mask = np.zeros(scan.shape, bool)
    mask[4:6] = True
    scan[mask] = value
    scan[0, 0, 0] = 1500
    assert window(scan, mask) == expected


def test_other_scans_are_windowed_by_their_own_values():
    low, high = window(head().astype(float), None)
    assert 0 <= low < 5 and 190 < high <= 200
    assert window(np.zeros((4, 4, 4)), None) == (0.0, 1.0)
