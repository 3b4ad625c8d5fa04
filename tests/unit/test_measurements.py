"""Measurements of a mask are those of an independent implementation, on any grid."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import SimpleITK as sitk

from engine.errors import InvalidInput
from engine.results.measurements import Measurements, measure
from engine.scan import Scan
from tests.unit.test_crop import FLIPPED, oblique
from tests.unit.test_modality import ct, mr

SHEARED = np.array([[1, 0.4, 0, -3], [0, 1.2, 0.3, 8], [0.1, 0, 2.5, 40], [0, 0, 0, 1.0]])
GRIDS = {
    "anisotropic": np.diag([0.5, 2.0, 5.0, 1]),
    "flipped": np.array([[-0.7, 0, 0, 90], [0, -0.7, 0, 80], [0, 0, 3.0, -20], [0, 0, 0, 1]]),
    "left-handed": np.array([[-1.0, 0, 0, 3], [0, 1, 0, 8], [0, 0, 1, -2], [0, 0, 0, 1]]),
    "permuted": FLIPPED,
    "oblique": oblique(),
    "oblique and flipped": oblique() @ np.diag([1.0, -1, -1, 1]),
}
SHAPE = (30, 26, 22)


def blob(shape=SHAPE):
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return ((i - 0.2) / 0.5) ** 2 + ((j + 0.1) / 0.6) ** 2 + ((k - 0.1) / 0.4) ** 2 + 0.4 * i * j < 1


def values(shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(0).normal(40, 300, shape).astype(dtype)


def itk(array, affine):
    """The same grid as an image of ITK, whose array is k, j, i and whose world is LPS+."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    to_lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((to_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(to_lps[:3, 3].tolist())
    return image


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_shape_is_what_simpleitk_measures(affine):
    mask = blob()
    found, theirs = measure(mask, affine), sitk.LabelShapeStatisticsImageFilter()
    theirs.Execute(itk(mask.astype(np.uint8), affine))
    assert found.voxel_count == theirs.GetNumberOfPixels(1)
    assert found.volume_ml == pytest.approx(theirs.GetPhysicalSize(1) / 1000, rel=1e-9)
    np.testing.assert_allclose(found.centroid_ras_mm, np.multiply(theirs.GetCentroid(1), (-1, -1, 1)), atol=1e-9)
    box = np.array(theirs.GetBoundingBox(1))
    assert found.bounding_box_voxels == (*box[:3], *(box[:3] + box[3:]))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_intensities_are_what_simpleitk_measures(affine, dtype):
    mask, array = blob(), np.abs(values(dtype=np.int16)).astype(dtype)
    found, theirs = measure(mask, affine, array), sitk.LabelIntensityStatisticsImageFilter()
    theirs.Execute(itk(mask.astype(np.uint8), affine), itk(array, affine))
    for name, expected in (
        ("mean", theirs.GetMean(1)),
        ("sd", theirs.GetStandardDeviation(1)),
        ("min", theirs.GetMinimum(1)),
        ("max", theirs.GetMaximum(1)),
    ):
        assert getattr(found, f"intensity_{name}") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("affine", [*GRIDS.values(), SHEARED], ids=[*GRIDS, "sheared"])
def test_box_centroid_and_volume_are_those_of_all_voxels_one_by_one(affine):
    mask = blob()
    found, indices = measure(mask, affine), np.argwhere(mask)
    world = indices @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(found.centroid_ras_mm, world.mean(0))
    corners = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing="ij"), -1).reshape(-1, 3) @ affine[:3, :3].T
    all_corners = (world[:, None] + corners).reshape(-1, 3)
    np.testing.assert_allclose(found.bounding_box_ras_mm, [*all_corners.min(0), *all_corners.max(0)])
    edges = affine[:3, :3].T
    assert found.volume_ml == pytest.approx(mask.sum() * abs(np.cross(edges[0], edges[1]) @ edges[2]) / 1000)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_layout_of_mask_and_scan_does_not_matter(monkeypatch, order):
    monkeypatch.setattr("engine.results.measurements._SLAB_VOXELS", 1000)
    mask, array = blob(), values()
    expected = measure(mask, SHEARED, array)
    found = measure(np.asarray(mask, order=order).astype(np.uint8), SHEARED, np.asarray(array, order=order)[::-1][::-1])
    assert found.intensity_unit == expected.intensity_unit
    assert found.intensity_missing is expected.intensity_missing is None
    for name in set(Measurements.__dataclass_fields__) - {"intensity_unit", "intensity_missing"}:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), err_msg=name)


def test_small_contrast_on_large_values_is_not_lost():
    array, mask = (1e6 + values(dtype=np.float64) / 1000).astype(np.float64), blob()
    found = measure(mask, np.eye(4), array)
    assert found.intensity_sd == pytest.approx(array[mask].std(ddof=1), rel=1e-6)


def test_the_scans_offset_is_added():
    mask, array = blob(), values(dtype=np.float32)
    found = measure(mask, np.eye(4), Scan(array, np.eye(4), "nifti", None, 5e6))
    assert found.intensity_mean == pytest.approx(array[mask].mean() + 5e6, abs=0.01)
    assert found.intensity_min == array[mask].min() + 5e6 and found.intensity_max == array[mask].max() + 5e6
    assert found.intensity_sd == pytest.approx(array[mask].std(ddof=1), rel=1e-5)


@pytest.mark.parametrize(
    ("array", "modality", "preset", "unit"),
    [
        (ct(), None, None, "HU"),
        (mr(), None, None, "arbitrary"),
        (mr(), "CT", None, "HU"),
        (ct(), "PT", None, "arbitrary"),
        (ct(), "CT", "mr", "HU"),
        (mr(), None, "ct", "HU"),
        (ct(), None, "mr", "arbitrary"),
        (ct(), None, "m3d-cap", "HU"),
        (mr(), None, "raw", "arbitrary"),
    ],
)
def test_the_unit_is_said(array, modality, preset, unit):
    scan = Scan(array, np.eye(4), "nifti", modality)
    assert measure(blob(array.shape), np.eye(4), scan, preset=preset).intensity_unit == unit


def test_without_a_scan_there_are_no_intensities():
    found = measure(blob(), np.eye(4))
    assert found.volume_ml > 0
    assert {getattr(found, f"intensity_{name}") for name in ("mean", "sd", "min", "max", "unit")} == {None}


def test_an_empty_mask_has_no_place():
    found = measure(np.zeros(SHAPE, bool), np.eye(4), values())
    assert (found.voxel_count, found.volume_ml) == (0, 0.0)
    assert found.bounding_box_voxels is found.centroid_ras_mm is found.intensity_mean is None


def test_one_voxel_has_a_box_of_its_size_and_no_spread():
    mask = np.zeros(SHAPE, bool)
    mask[3, 4, 5] = True
    found = measure(mask, np.diag([1.0, 2, 4, 1]), values())
    assert found.bounding_box_voxels == (3, 4, 5, 4, 5, 6)
    assert found.bounding_box_ras_mm == (2.5, 7, 18, 3.5, 9, 22)
    assert found.centroid_ras_mm == (3, 8, 20) and found.volume_ml == pytest.approx(0.008)
    assert found.intensity_sd == 0 and found.intensity_mean == values()[3, 4, 5]


@pytest.mark.parametrize(
    ("mask", "scan"), [(np.ones((3, 4), bool), None), (np.ones((3, 4, 5), bool), np.zeros((3, 4, 6)))]
)
def test_what_does_not_fit_together_is_refused(mask, scan):
    with pytest.raises(InvalidInput, match="mask"):
        measure(mask, np.eye(4), scan)


def test_why_there_are_no_intensities_is_said():
    assert measure(blob(), FLIPPED).intensity_missing == "no scan was given"
    assert measure(blob(), FLIPPED, missing="it is gone").intensity_missing == "it is gone"
    assert measure(np.zeros_like(blob()), FLIPPED, missing="it is gone").intensity_missing == "it is gone"
    assert measure(np.zeros_like(blob()), FLIPPED, values()).intensity_missing == "the mask is empty"


def test_they_are_frozen_and_become_json_with_units_in_the_names(tmp_path):
    found = measure(blob(), FLIPPED, values())
    with pytest.raises(FrozenInstanceError):
        found.volume_ml = 1.0
    read = json.loads(found.save(tmp_path / "mask.json").read_text())
    assert read == found.to_dict() and set(read) == set(Measurements.__dataclass_fields__)
    assert {"volume_ml", "bounding_box_voxels", "bounding_box_ras_mm", "centroid_ras_mm", "intensity_unit"} < set(read)
    unknown = measure(blob(), FLIPPED, np.where(blob(), np.nan, 0.0)).save(tmp_path / "nan.json")
    assert json.loads(unknown.read_text())["intensity_mean"] is None


def test_measuring_a_large_mask_copies_neither_mask_nor_scan():
    mask, array = np.ones((200, 300, 300), bool), np.zeros((200, 300, 300), np.int16)
    array[0] = 1
    tracemalloc.start()
    measure(mask, np.eye(4), array, preset="mr")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150_000_000  # float64 of all of it are 144 MB, and a copy of all indices 432 MB
