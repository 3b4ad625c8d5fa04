"""Left is left: a NIfTI's orientation is read as SimpleITK reads it, refused with its cause, or said to be a guess."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest

from engine.errors import InvalidInput
from engine.scan import pack_scan, read_scan
from engine.volume import prepare
from tests.unit.test_results import AXES, TURN, affine_of, corners, in_itk, nifti

NAN = float("nan")
QFORM = (1, 0)  # codes of qform and sform


def damaged(axes=AXES[0], turn=np.eye(3), codes=QFORM, **fields) -> bytes:
    return nifti(affine_of(axes, turn), *codes, **fields)


REPAIRED = {
    "qfac 0": {"pixdim": {0: 0}},
    "qfac 2": {"pixdim": {0: 2}},
    "qfac -3": {"pixdim": {0: -3}},
    "qfac 0.5": {"pixdim": {0: 0.5}},
    "a negative size of i": {"pixdim": {1: -0.7}},
    "a negative size of j": {"pixdim": {2: -1.3}},
    "a negative size of k": {"pixdim": {3: -5}},
    "two negative sizes and qfac 0": {"pixdim": {0: 0, 1: -0.7, 2: -1.3}},
    "a quaternion a rounding too long": {"quatern_b": 0, "quatern_c": 0, "quatern_d": 1.0000004},
    "a quaternion of three parts too long": {"quatern_b": 0.57737, "quatern_c": 0.57737, "quatern_d": 0.57737},
    "an unknown code": {"qform_code": 9},
}


@pytest.mark.parametrize("name", REPAIRED)
@pytest.mark.parametrize("turn", [np.eye(3), TURN], ids=["straight", "oblique"])
def test_a_qform_is_read_as_simpleitk_reads_it(tmp_path, name, turn):
    for axes in AXES[::7]:
        data = damaged(axes, turn, **REPAIRED[name])
        (tmp_path / "scan.nii").write_bytes(data)
        scan = read_scan(data)
        placed = nib.affines.apply_affine(scan.affine, corners())
        np.testing.assert_allclose(placed, in_itk(tmp_path / "scan.nii")[1], atol=0.01)
        disputed = "negative" in name or name == "qfac -3"
        assert ["side is left is a guess" in note for note in scan.notes] == [True] * disputed


REFUSED = {
    "an offset that is NaN": ({"qoffset_x": NAN}, "offset"),
    "an offset that is infinite": ({"qoffset_z": np.inf}, "offset"),
    "a quaternion that is NaN": ({"quatern_c": NAN}, "quaternion"),
    "a qfac that is NaN": ({"pixdim": {0: NAN}}, "qfac"),
    "a size that is NaN": ({"pixdim": {2: NAN}}, "voxel sizes"),
    "a size of 0": ({"pixdim": {3: 0}}, "voxel size of 0"),
    "a quaternion that is no rotation": ({"quatern_b": 1, "quatern_c": 1, "quatern_d": 0}, "no rotation"),
    "a negative code": ({"qform_code": -1}, "qform_code is -1"),
    "a unit that there is not": ({"units": 5}, "unit of length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_orientation_that_is_there_and_cannot_be_read_is_refused_with_its_cause(name):
    fields, cause = REFUSED[name]
    with pytest.raises(InvalidInput, match=cause):
        read_scan(damaged(**fields))


def test_an_unusable_sform_gives_way_to_a_qform_and_to_nothing_else():
    flat = {"srow_x": dict.fromkeys(range(4), 0)}
    both = read_scan(damaged(AXES[9], codes=(1, 1), **flat))
    np.testing.assert_allclose(both.affine, affine_of(AXES[9]), atol=1e-4)
    with pytest.raises(InvalidInput, match="the sform is singular or not finite"):
        read_scan(damaged(AXES[9], codes=(0, 1), **flat))
    with pytest.raises(InvalidInput, match="sform is singular.*and the qform has a offset|sform is singular.*qform"):
        read_scan(damaged(AXES[9], codes=(1, 1), qoffset_y=NAN, **flat))


def test_a_file_without_an_orientation_says_that_left_and_right_are_a_guess():
    scan = read_scan(damaged(codes=(0, 0)))
    assert scan.orientation == "LAS" and "guess, left and right" in scan.notes[0]
    assert "left and right with it" in prepare(scan, (8, 16, 16), "mr").reason


def test_left_and_right_stay_apart_with_qfac_0():
    """The left half is bright. Whatever the axes' order and direction, it is on the same side of the model's volume."""
    sides = set()
    for axes, qfac in itertools.product(AXES, (0, 1, -1)):
        affine = affine_of(axes)
        world = nib.affines.apply_affine(affine, np.stack(np.indices((16, 16, 16)), -1))
        values = np.where(world[..., 0] < world[..., 0].mean(), 900, 100).astype(np.int16)
        proper = np.linalg.det(axes) > 0
        if qfac != -1 and not proper or qfac == -1 and proper:
            continue  # a left-handed grid needs qfac -1
        image = nib.Nifti1Image(values, affine)
        image.set_sform(None, 0)
        image.set_qform(affine, 1)
        raw = bytearray(image.to_bytes())
        header = nib.Nifti1Header(bytes(raw[:348]), check=False)
        header["pixdim"][0] = qfac
        raw[:348] = bytes(header.binaryblock)
        volume = prepare(read_scan(bytes(raw)), (8, 16, 16), "m3d-cap").image[0]
        sides.add(bool(volume[:, :, :4].mean() > volume[:, :, -4:].mean()))
    # W runs from the patient's right to left.
    assert sides == {False}


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.int32, np.uint32, np.uint64])
@pytest.mark.parametrize("base", [1.7e9, 3e8, 0])
def test_contrast_on_a_large_offset_is_kept(dtype, base):
    levels = np.arange(1000).reshape(10, 10, 10)
    values = (levels + int(base)).astype(dtype)
    image = nib.Nifti1Image(values, np.eye(4), dtype=dtype)
    scan = read_scan(image.to_bytes())
    np.testing.assert_array_equal(scan.array.astype(float) + scan.offset, values.astype(float))
    assert len(np.unique(scan.array)) == 1000


def test_contrast_is_kept_where_the_offset_is_the_files_intercept():
    image = nib.Nifti1Image(np.arange(1000).reshape(10, 10, 10).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.25, 1.7e9)
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    header["scl_slope"], header["scl_inter"] = 0.25, 1.7e9
    raw[:348] = bytes(header.binaryblock)
    scan = read_scan(bytes(raw))
    np.testing.assert_allclose(np.diff(np.sort(scan.array.ravel())), 0.25)


@pytest.mark.parametrize("base", [2**60 + 200, 2**63 + 1500, 2**64 - 2000])
def test_unsigned_values_of_64_bits_do_not_wrap(base):
    levels = (np.arange(8000) % 1000).reshape(20, 20, 20).astype(np.uint64)
    data, affine = pack_scan(levels + np.uint64(base), np.eye(4))
    np.testing.assert_array_equal(read_scan(data, affine=affine).array, levels.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint32])
def test_contrast_beside_a_background_of_0_is_kept(dtype):
    levels = (np.arange(8000) % 1000).reshape(20, 20, 20)
    values = (levels + 1_700_000_000).astype(dtype)
    values[:4] = 0
    data, affine = pack_scan(values, np.eye(4))
    scan = read_scan(data, affine=affine)
    np.testing.assert_array_equal(scan.array[4:], levels[4:])
    assert scan.offset == 1_700_000_000
