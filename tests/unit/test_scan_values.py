"""NaN round a scan is background; no other value that is not finite gets through."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from engine.errors import InvalidInput
from engine.scan import pack_scan, read_scan
from tests.unit.test_scan import nifti

SHAPE = (12, 10, 8)


def brain(dtype=np.float32) -> np.ndarray:
    """A ball of values 20 to 119 that touches no border, in NaN."""
    away = np.indices(SHAPE) - np.array([5.5, 4.5, 3.5]).reshape(3, 1, 1, 1)
    values = np.random.default_rng(0).integers(20, 120, SHAPE).astype(dtype)
    values[(away**2).sum(0) > 12] = np.nan
    return values


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4", ">f8"])
@pytest.mark.parametrize("order", "CF")
def test_nan_up_to_the_border_is_background_and_counted(dtype, order):
    array = np.asarray(brain(dtype), order=order)
    scan = read_scan(pack_scan(array, np.eye(4))[0], affine=np.eye(4))
    low, count = np.nanmin(array), int(np.isnan(array).sum())
    np.testing.assert_array_equal(scan.array, np.where(np.isnan(array), low, array))
    (note,) = scan.notes
    assert f"{count:,} of 960 voxels are NaN" in note and f"background, {low:g}" in note
    assert scan.array.dtype == np.float32 and np.isnan(array).any()


def test_nan_of_a_file_is_background_too():
    (note,) = read_scan(nifti(brain())).notes
    assert "background" in note


@pytest.mark.parametrize("side", range(6))
def test_a_block_at_any_side_reaches_the_border(side):
    array = np.nan_to_num(brain(), nan=3.0)
    axis, end = divmod(side, 2)
    np.moveaxis(array, axis, 0)[-2 * end :][: 2 if not end else None] = np.nan
    assert read_scan(pack_scan(array)[0]).array.min() == 3


def test_one_value_that_is_enclosed_is_refused_with_both_counts():
    array = brain()
    around = int(np.isnan(array).sum())
    array[5, 4, 3] = np.nan
    with pytest.raises(InvalidInput, match=r"1 voxels that are NaN.*1 NaN with finite voxels all round"):
        read_scan(nifti(array))
    array[5, 4, 3] = 50
    array[5, 5, 3:5] = np.inf, -np.inf
    with pytest.raises(InvalidInput, match=r"2 voxels that are NaN, infinite.*2 infinite"):
        read_scan(nifti(array))
    assert around > 0


def test_voxels_that_touch_by_a_corner_alone_are_not_connected():
    array = np.nan_to_num(brain(), nan=3.0)
    array[0, 0, 0] = array[1, 1, 1] = np.nan
    with pytest.raises(InvalidInput, match="1 NaN"):
        read_scan(nifti(array))
    array[0, 0, 1] = array[0, 1, 1] = np.nan
    assert len(read_scan(nifti(array)).notes) == 1


@pytest.mark.parametrize("seed", range(20))
def test_what_is_connected_is_what_spreads_from_the_border(seed):
    """Against the slow way: the border's NaN, spread face by face as long as there is more."""
    random = np.random.default_rng(seed)
    array = random.random((6, 7, 8)).astype(np.float32)
    empty = random.random(array.shape) < random.uniform(0.05, 0.5)
    array[empty] = np.nan
    frame = np.ones(array.shape, bool)
    frame[1:-1, 1:-1, 1:-1] = False
    enclosed = int((empty & ~ndimage.binary_propagation(empty & frame, mask=empty)).sum())
    if enclosed:
        with pytest.raises(InvalidInput, match=f"{enclosed:,} NaN with finite"):
            read_scan(nifti(array))
    elif empty.any():
        assert f"{int(empty.sum())} of 336" in read_scan(nifti(array)).notes[0]


def test_nothing_but_nan_is_refused_and_so_is_one_value_beside_it():
    with pytest.raises(InvalidInput, match="all 960 voxels of the scan are NaN"):
        read_scan(nifti(np.full(SHAPE, np.nan, np.float32)))
    array = np.full(SHAPE, np.nan, np.float32)
    array[2, 2, 2] = 5
    with pytest.raises(InvalidInput, match="every voxel of the scan is 5"):
        read_scan(nifti(array))
    with pytest.raises(InvalidInput, match="infinite"):
        read_scan(nifti(np.full(SHAPE, np.inf, np.float32)))


def test_far_from_zero_the_background_keeps_the_contrast():
    array = brain(np.float64) + 1e9
    scan = read_scan(pack_scan(array)[0])
    np.testing.assert_array_equal(
        scan.array.astype(float) + scan.offset, np.where(np.isnan(array), np.nanmin(array), array)
    )
