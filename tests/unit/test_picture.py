"""The montage: right planes, radiological sides, true proportions, a readable file for any mask."""

from __future__ import annotations

import itertools

import matplotlib.image
import numpy as np
import pytest

from engine import picture
from engine.picture import BONE, COLOURS, LUNG, MASK, SOFT_TISSUE, montage, window
from engine.seg_states import MAX_SEGMENTS

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


def test_what_is_known_of_a_scan_decides_its_window():
    """Values like those of no CT, and like those of one."""
    plain, ct = head(), np.where(head() > 100, 40, -1000).astype(np.int16)
    assert window(plain, None, modality="CT") == window(plain, None, preset="ct") == SOFT_TISSUE == window(ct, None)
    for known in ({"modality": "MR"}, {"preset": "mr"}, {"modality": "MR", "preset": "ct"}):
        assert window(ct, None, **known) != SOFT_TISSUE
    assert window(ct, None, preset="m3d-cap") == SOFT_TISSUE and window(plain, None, preset="raw") != SOFT_TISSUE


def test_the_modality_reaches_the_picture(tmp_path):
    arguments = (head(), RAS, None, "q")
    paths = [montage(tmp_path / "1.png", *arguments), montage(tmp_path / "2.png", *arguments, modality="CT")]
    one, other = map(matplotlib.image.imread, paths)
    assert one.shape == other.shape and np.abs(one - other).max() > 0.2


def test_a_small_part_decides_the_window_in_a_large_scan():
    scan, mask = np.full((400, 400, 400), -1000, np.int16), np.zeros((400, 400, 400), bool)
    scan[:, 100:300] = 40
    mask[201, 201, 201] = True
    scan[mask] = 900
    assert window(scan, mask) == BONE


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_do_not_spoil_the_window(value):
    scan = head().astype(float)
    scan[0] = value
    low, high = window(scan, None)
    assert 0 <= low < 5 and 190 < high <= 200
    assert window(np.full((4, 4, 4), np.nan), None) == (0.0, 1.0)


def test_other_scans_are_windowed_by_their_own_values():
    low, high = window(head().astype(float), None)
    assert 0 <= low < 5 and 190 < high <= 200
    assert window(np.zeros((4, 4, 4)), None) == (0.0, 1.0)


# --- any shape -------------------------------------------------------------------------------------------------------
LONG = {
    "along the head": ((4, 4, 4000), (1, 1, 1)),
    "along the left": ((4000, 4, 4), (1, 1, 1)),
    "along the back": ((4, 4000, 4), (1, 1, 1)),
    "a plane": ((4, 2000, 2000), (1, 1, 1)),
    "small": ((2, 2, 2), (1, 1, 1)),
    "one voxel": ((1, 1, 1), (1, 1, 1)),
    "a line": ((1, 1, 5000), (1, 1, 1)),
    "thick slices": ((90, 90, 90), (0.01, 0.01, 10)),
    "thick columns": ((90, 90, 90), (10, 0.01, 0.01)),
    "whole body": ((60, 50, 200), (8, 8, 9)),
    "microscopic": ((50, 50, 50), (1e-4, 1e-4, 1e-4)),
    "astronomic": ((50, 50, 50), (1e6, 1e6, 1e6)),
}


@pytest.mark.parametrize(("shape", "spacing"), LONG.values(), ids=LONG)
def test_a_scan_of_any_shape_makes_a_picture_of_bounded_size_with_one_voxel_seen_in_each_plane(
    tmp_path, monkeypatch, shape, spacing
):
    outlined = []
    monkeypatch.setattr(picture, "_outline", lambda *a, outline=picture._outline: outlined.append(a[1]) or outline(*a))
    scan = np.random.default_rng(0).integers(0, 200, shape, dtype=np.int16)
    mask = np.zeros(shape, bool)
    mask[tuple(2 * n // 3 for n in shape)] = True
    found = drawn(montage(tmp_path / "x.png", scan, np.diag([*spacing, 1.0]), mask, "q", "a"))
    height, width = found.shape
    assert width == 1560 and 250 <= height <= 2000
    assert [plane.sum() for plane in outlined] == [1, 1, 1]
    assert all(max(plane.shape) <= 1500 for plane in outlined)
    assert found.sum() > 60 and np.ptp(np.flatnonzero(found.any(0))) > 150  # in several planes


def test_planes_keep_one_scale_where_the_height_is_bounded(tmp_path):
    """A cube of 80 mm in a scan of 320 x 240 x 1600 mm."""
    mask = np.zeros((40, 30, 200), bool)
    mask[10:20, 10:20, 90:100] = True
    found = drawn(montage(tmp_path / "x.png", head(mask.shape), np.diag([8.0, 8, 8, 1]), mask, "q"))
    columns = np.flatnonzero(found.any(0))
    planes = np.split(columns, np.flatnonzero(np.diff(columns) > 5) + 1)
    assert len(planes) == 3
    for plane in planes:
        rows = np.flatnonzero(found[:, plane].any(1))
        assert np.ptp(rows) == pytest.approx(np.ptp(plane), rel=0.06) == pytest.approx(np.ptp(planes[0]), rel=0.06)


def test_a_thin_line_of_a_huge_plane_is_not_lost(tmp_path, monkeypatch):
    outlined = []
    monkeypatch.setattr(picture, "_outline", lambda axes, plane, *_: outlined.append(plane))
    mask = np.zeros((4000, 4000, 1), bool)
    mask[:, 1733] = True
    montage(tmp_path / "x.png", np.zeros(mask.shape, np.uint8), RAS, mask, "q")
    assert outlined[0].shape == (1500, 1500) and outlined[0].any(0).sum() + outlined[0].any(1).sum() == 1501


def test_a_large_scan_is_drawn_without_copies_of_it(tmp_path):
    import tracemalloc

    scan = np.zeros((256, 512, 512), np.int16).transpose(2, 1, 0)  # as NIfTI has it
    scan[100:400, 100:400, 50:200] = 900
    mask = np.zeros(scan.shape, bool)
    mask[200:300, 200:300, 100:150] = True
    tracemalloc.start()
    montage(tmp_path / "x.png", scan, np.diag([0.7, 0.7, 1.0, 1.0]), mask, "q")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 134_000_000  # the scan's own size


def test_the_volume_in_the_legend_is_that_of_a_sheared_grid(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = []
    monkeypatch.setattr(Figure, "text", lambda self, x, y, text, **_: texts.append(text))
    affine = RAS.copy()
    affine[0, 1] = affine[1, 2] = 1.0  # the axes are longer, the volume is not
    montage(tmp_path / "x.png", head(), affine, np.ones((40, 50, 60), bool), "q")
    assert "outline: mask, 120.0 mL" in texts


# --- several findings ------------------------------------------------------------------------------------------------
def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def test_an_answers_findings_have_colours_that_can_be_told_apart():
    assert len(set(COLOURS)) == len(COLOURS) == MAX_SEGMENTS
    for one, other in itertools.combinations([*COLOURS, picture.BACKGROUND, picture.TEXT], 2):
        assert np.abs(rgb(one) - rgb(other)).max() > 0.15, (one, other)


def blocks(*corners) -> list[np.ndarray]:
    masks = [np.zeros((40, 50, 60), bool) for _ in corners]
    for mask, (i, j, k) in zip(masks, corners):
        mask[i : i + 8, j : j + 8, k : k + 8] = True
    return masks


def test_each_finding_is_outlined_in_its_own_colour_and_named_in_it(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = {}
    monkeypatch.setattr(
        Figure, "text", lambda self, x, y, text, *, color, text_=Figure.text, **_: texts.update({text: color})
    )
    masks = blocks((2, 2, 2), (30, 2, 2), (0, 0, 0))
    masks[2][:] = False
    names = ["The liver is", "costs $5 and " * 20, ""]
    path = montage(tmp_path / "x.png", head(), RAS, np.any(masks, 0), "q", findings=list(zip(names, masks)))
    pixels = matplotlib.image.imread(path)[..., :3]
    for colour, is_drawn in zip(COLOURS, (True, True, False)):
        assert (np.abs(pixels - rgb(colour)).max(-1) < 0.1).any() == is_drawn
    legend = {text: colour for text, colour in texts.items() if text[:1] in ("1", "2", "3")}
    assert list(legend.values()) == list(COLOURS[:3])
    first, second, third = legend
    assert first == "1  The liver is, 512 mm³" and third == "3  [SEG], 0 mm³"
    assert second.startswith(r"2  costs \$5 and") and "…" in second and len(second) < 90


def test_the_planes_cut_as_many_findings_as_they_can_and_the_legend_says_which_they_do_not(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = []
    monkeypatch.setattr(Figure, "text", lambda self, x, y, text, **_: texts.append(text))
    large, first, second = blocks((0, 0, 0), (20, 30, 40), (24, 34, 44))
    large[:12, :12, :12] = True
    masks = [large, first, second]
    montage(tmp_path / "x.png", head(), RAS, np.any(masks, 0), "q", findings=[("a", m) for m in masks])
    assert "1  a, 1.7 mL, not in these planes" in texts and "2  a, 512 mm³" in texts and "3  a, 512 mm³" in texts


@pytest.mark.parametrize("count", [1, 2, MAX_SEGMENTS])
def test_the_legend_of_many_findings_takes_nothing_from_the_planes(tmp_path, count):
    mask = blocks((10, 10, 10))[0]
    plain = drawn(montage(tmp_path / "1.png", head(), RAS, mask, "q"))
    path = montage(tmp_path / "2.png", head(), RAS, mask, "q", findings=[("It is", mask)] * count)
    height = matplotlib.image.imread(path).shape[0]
    assert height - plain.shape[0] == pytest.approx(-(-count // 2) * 0.2 * picture.DPI, abs=2)
