"""A mask lies where its scan does, in nibabel and in SimpleITK, whatever the scan's header says."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from engine.errors import InvalidInput
from engine.results import save_mask
from engine.scan import Scan, pack_scan, read_scan
from tests.unit.foreign import STRAIGHT

SHAPE = (7, 9, 11)
SPACING = (0.7, 1.3, 5.0)
ORIGIN = (-31.5, 42.25, 813.0)
MICRON, METRE, MM = 3, 1, 2
LPS = np.diag([-1.0, -1, 1])


AXES = STRAIGHT  # the 48 ways in which axes can run
TURN = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
SHEAR = np.array([[1, 0.1, 0.0], [0, 1, 0.2], [0, 0, 1]])


def affine_of(axes: np.ndarray, turn: np.ndarray = np.eye(3)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes * SPACING
    affine[:3, 3] = ORIGIN
    return affine


def mask_of(shape=SHAPE) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[1:4, 2:8, 3:5] = True
    mask[5, 1, 9] = True
    return mask


def nifti(affine: np.ndarray | None, qform: int, sform: int, qform_affine=None, units: int = MM, **fields) -> bytes:
    """A scan's file. fields: of the header; of arrays as {index: value}."""
    values = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
    image = nib.Nifti1Image(values, affine)
    if affine is not None:
        image.set_sform(affine, sform)
        image.set_qform(affine if qform_affine is None else qform_affine, qform, strip_shears=True)
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    header["xyzt_units"] = units
    header["descrip"] = b"Jane Doe"
    for name, value in fields.items():
        for index, one in value.items() if isinstance(value, dict) else [(..., value)]:
            header[name][index] = one
    raw[:348] = bytes(header.binaryblock)
    return bytes(raw)


def corners(shape=SHAPE) -> np.ndarray:
    return np.array(list(itertools.product(*((0, n - 1) for n in shape))), float)


def in_nibabel(path) -> tuple[np.ndarray, np.ndarray]:
    """(mask, world RAS+ mm of the corner voxels)."""
    image = nib.load(path)
    unit = {METRE: 1000.0, MICRON: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
    return np.asarray(image.dataobj).astype(bool), unit * nib.affines.apply_affine(image.affine, corners(image.shape))


def in_itk(path) -> tuple[np.ndarray, np.ndarray]:
    image = SimpleITK.ReadImage(str(path))
    mask = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0).astype(bool)
    points = [image.TransformContinuousIndexToPhysicalPoint(corner.tolist()) for corner in corners(image.GetSize())]
    return mask, np.array(points) @ LPS


def saved(data: bytes, folder, name="mask.nii.gz"):
    """(scan, path of the scan, path of its mask)."""
    source = folder / "scan.nii"
    source.write_bytes(data)
    scan = read_scan(data)
    return scan, source, save_mask(mask_of(), scan, folder / name)


def assert_lies_on(scan, source, path, readers=(in_nibabel, in_itk)):
    """The mask's voxels lie where the scan's do in every reader; where the readers agree, that is where we say."""
    for read in readers:
        mask, placed = read(path)
        np.testing.assert_array_equal(mask, mask_of())
        np.testing.assert_allclose(placed, read(source)[1], atol=0.01)


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("turn", [np.eye(3), TURN], ids=["straight", "oblique"])
def test_masks_of_all_48_orientations_lie_on_their_scans(tmp_path, turn, codes):
    for axes in AXES:
        affine = affine_of(axes, turn)
        scan, source, path = saved(nifti(affine, *codes), tmp_path)
        assert_lies_on(scan, source, path)
        np.testing.assert_allclose(scan.affine, affine, atol=1e-4)


@pytest.mark.parametrize("turn", [np.eye(3), TURN], ids=["straight", "oblique"])
def test_masks_of_scans_without_a_header_lie_where_their_affine_says(tmp_path, turn):
    for axes in AXES:
        affine = affine_of(axes, turn)
        data, affine = pack_scan(np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.float32), affine)
        path = save_mask(mask_of(), read_scan(data, affine=affine), tmp_path / "mask.nii")
        for read in (in_nibabel, in_itk):
            mask, placed = read(path)
            np.testing.assert_array_equal(mask, mask_of())
            np.testing.assert_allclose(placed, nib.affines.apply_affine(affine, corners()), atol=0.01)


def test_a_mask_of_a_sheared_grid_is_exact_by_its_sform_and_opens_in_itk(tmp_path):
    for axes in AXES:
        affine = affine_of(axes, SHEAR)
        for source in (nifti(affine, 0, 1), nifti(affine, 1, 1)):
            scan, _, path = saved(source, tmp_path)
            mask, placed = in_nibabel(path)
            np.testing.assert_allclose(placed, nib.affines.apply_affine(affine, corners()), atol=0.01)
            np.testing.assert_array_equal(in_itk(path)[0], mask_of())
        scan = Scan(np.zeros(SHAPE, np.int16), affine, "dicom", "CT")
        path = save_mask(mask_of(), scan, tmp_path / "tilted.nii.gz")
        np.testing.assert_allclose(in_nibabel(path)[1], nib.affines.apply_affine(affine, corners()), atol=0.01)
        np.testing.assert_array_equal(in_itk(path)[0], mask_of())


def test_a_mask_keeps_a_qform_and_an_sform_that_differ(tmp_path):
    scan, source, path = saved(nifti(affine_of(AXES[0]), 1, 2, qform_affine=affine_of(AXES[5], TURN)), tmp_path)
    assert_lies_on(scan, source, path)
    ours, theirs = nib.load(path).header, nib.load(source).header
    for name in (
        "qform_code",
        "sform_code",
        "pixdim",
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "srow_x",
        "srow_y",
    ):
        np.testing.assert_array_equal(
            ours[name][..., :4] if name == "pixdim" else ours[name],
            theirs[name][..., :4] if name == "pixdim" else theirs[name],
        )
    assert b"Jane" not in bytes(ours.binaryblock) and b"Jane" not in scan.header


@pytest.mark.parametrize(("units", "mm"), [(METRE, 1000), (MICRON, 0.001), (MM, 1), (0, 1)])
def test_units_become_millimetres_inside_and_stay_outside(tmp_path, units, mm):
    scan, source, path = saved(nifti(affine_of(AXES[3]), 1, 1, units=units), tmp_path)
    np.testing.assert_allclose(scan.spacing_mm, np.array(SPACING) * mm, rtol=1e-5)
    np.testing.assert_allclose(scan.affine[:3, 3], np.array(ORIGIN) * mm, rtol=1e-5)
    assert int(nib.load(path).header["xyzt_units"]) & 7 == units
    np.testing.assert_allclose(in_nibabel(path)[1], in_nibabel(source)[1], rtol=1e-5)
    np.testing.assert_allclose(in_itk(path)[1], in_itk(source)[1], rtol=1e-5)


def test_a_mask_with_a_long_axis_is_a_nifti_2(tmp_path):
    shape = (40_000, 2, 3)
    scan = Scan(np.zeros(shape, np.int16), np.diag([0.1, 1, 1, 1]), "array")
    mask = np.zeros(shape, bool)
    mask[39_999, 1, 2] = True
    image = nib.load(save_mask(mask, scan, tmp_path / "long.nii.gz"))
    assert isinstance(image, nib.Nifti2Image) and image.shape == shape
    np.testing.assert_array_equal(np.asarray(image.dataobj).astype(bool), mask)
    np.testing.assert_allclose(image.affine, scan.affine)


def test_a_nifti_2_and_a_big_endian_scan_keep_their_place(tmp_path):
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    for kind in (nib.Nifti2Image, nib.Nifti1Image):
        image = kind(values, affine_of(AXES[7], TURN))
        big = kind(values, image.affine, image.header.as_byteswapped(">"))
        for one in (image, big):
            scan = read_scan(one.to_bytes())
            path = save_mask(mask_of(), scan, tmp_path / "mask.nii")
            np.testing.assert_allclose(
                in_nibabel(path)[1], nib.affines.apply_affine(image.affine, corners()), atol=0.01
            )
            assert type(nib.load(path)) is kind


@pytest.mark.parametrize(
    ("mask", "name", "words"),
    [
        (np.zeros((2, 2)), "m.nii", "3 axes"),
        (mask_of(), "m.nrrd", "nii.gz"),
        (mask_of(), "no/m.nii", "cannot be written"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, mask, name, words):
    with pytest.raises(InvalidInput, match=words):
        save_mask(mask, Scan(np.zeros(SHAPE, np.int16), np.eye(4), "array"), tmp_path / name)


@pytest.mark.parametrize("length", [1.0000004, 1.0004])
def test_a_mask_of_a_quaternion_a_rounding_too_long_opens_in_nibabel_too(tmp_path, length):
    parts = {"quatern_b": 0, "quatern_c": 0, "quatern_d": length}
    scan, source, path = saved(nifti(affine_of(AXES[0]), 1, 0, **parts), tmp_path)
    assert_lies_on(scan, source, path, readers=(in_itk,))
    np.testing.assert_allclose(in_nibabel(path)[1], nib.affines.apply_affine(scan.affine, corners()), atol=0.01)


@pytest.mark.parametrize("row", [dict.fromkeys(range(4), 0), {2: float("nan")}], ids=["flat", "nan"])
def test_a_mask_beside_an_unusable_sform_lies_by_the_qform_that_counts(tmp_path, row):
    scan, _, path = saved(nifti(affine_of(AXES[9], TURN), 1, 1, units=METRE, srow_x=row), tmp_path)
    np.testing.assert_allclose(in_nibabel(path)[1], nib.affines.apply_affine(scan.affine, corners()), rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "scan", "path", "words"),
    [
        (mask_of().transpose(2, 1, 0), None, "m.nii", "its scan"),
        (np.full(SHAPE, 0.1), None, "m.nii", "0 and 1 only"),
        (np.full(SHAPE, np.nan), None, "m.nii", "0 and 1 only"),
        (mask_of(), "a path", "m.nii", "what `read_scan` returned"),
        (mask_of(), None, 5, "a path"),
    ],
)
def test_a_mask_that_is_none_of_its_scan_is_refused(tmp_path, mask, scan, path, words):
    scan = scan or Scan(np.zeros(SHAPE, np.int16), np.eye(4), "array")
    with pytest.raises(InvalidInput, match=words):
        save_mask(mask, scan, tmp_path / path if isinstance(path, str) else path)
