"""A DICOM series is read exactly, and placed where every one of its slices lies, or refused with the cause."""

from __future__ import annotations

import base64
import copy
import io
import json
import signal
import sys
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from engine.errors import InvalidInput, Unavailable
from engine.scan import pack_scan, read_scan
from engine.scan.dicom.dataset import open_file
from engine.scan.dicom.decoder import Decoder, DecodingFailed
from engine.scan.dicom.pixels import stored_pixels
from engine.volume import prepare
from tests.conftest import ROOT
from tests.unit.test_scan import enhanced, refused, saved, series, zipped

SYNTAX = "1.2.840.10008.1.2.4."
BASELINE, EXTENDED, LOSSLESS, LOSSLESS_SV1 = (SYNTAX + kind for kind in ("50", "51", "57", "70"))
JPEG_LS, NEAR_LOSSLESS, JPEG_2000, JPEG_2000_LOSSY, HTJ2K = (SYNTAX + kind for kind in ("80", "81", "90", "91", "201"))
EXACT = (LOSSLESS, LOSSLESS_SV1, JPEG_LS, JPEG_2000, HTJ2K, RLELossless)
# Frames of other encoders (GDCM, DCMTK) of `fixture_picture`, with the pixels that DCMTK reads where they are lossy.
FRAMES = json.loads((ROOT / "tests" / "fixtures" / "dicom_frames.json").read_text())
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "feet first": (1, 0, 0, 0, -1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.8, 0.6, 0, 0.36, -0.48, -0.8),
}
ANGLE = np.deg2rad(0.02)


# --- helpers ---------------------------------------------------------------------------------------------------------
def in_order(slices):
    return sorted(slices, key=lambda dataset: float(np.dot(dataset.ImagePositionPatient, normal(dataset))))


def normal(dataset):
    return np.cross(*np.reshape(np.array(dataset.ImageOrientationPatient, float), (2, 3)))


def moved(dataset, along):
    dataset.ImagePositionPatient = [a + b for a, b in zip(dataset.ImagePositionPatient, along)]


def corners_off(scan, slices):
    """mm, the largest distance of a slice's corner from where the scan's affine puts it."""
    off = 0.0
    for index, dataset in enumerate(in_order(slices)):
        along_row, along_column = np.reshape(np.array(dataset.ImageOrientationPatient, float), (2, 3))
        row_spacing, column_spacing = dataset.PixelSpacing
        for column in (0, dataset.Columns - 1):
            for row in (0, dataset.Rows - 1):
                lps = np.array(dataset.ImagePositionPatient, float)
                lps = lps + column * column_spacing * along_row + row * row_spacing * along_column
                ras = (scan.affine @ [column, row, index, 1])[:3]
                off = max(off, float(np.linalg.norm(ras - lps * [-1, -1, 1])))
    return off


def pixels_of(bits, signed, shape=(24, 20), allocated=None, seed=0):
    """A picture whose values fill the bits, from the least to the greatest."""
    random = np.random.default_rng(seed)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    rows, columns = np.indices(shape)
    smooth = low + (high - low) * (0.5 + 0.25 * np.sin(rows / 5) + 0.2 * np.cos(columns / 7))
    picture = np.clip(smooth + random.integers(-3, 4, shape), low, high)
    picture[0, 0], picture[-1, -1] = low, high
    return picture.astype(f"{'i' if signed else 'u'}{(allocated or (8 if bits <= 8 else 16)) // 8}")


def image(bits, signed, picture=None, **fields):
    """A slice with that picture."""
    picture = pixels_of(bits, signed) if picture is None else picture
    dataset = series(1, shape=picture.shape[-2:])[0]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = picture.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation, dataset.PixelData = int(signed), picture.tobytes()
    dataset["PixelData"].VR = "OB" if picture.itemsize == 1 else "OW"
    if picture.ndim == 3:
        dataset.NumberOfFrames = len(picture)
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    return dataset


def encoded(dataset, syntax, **options):
    """The data set, compressed."""
    if syntax == RLELossless:
        dataset = copy.deepcopy(dataset)
        dataset.compress(syntax)
        return dataset
    pixels, bits = dataset.pixel_array, dataset.BitsStored
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    if pixels.dtype.kind == "i" and syntax not in (JPEG_2000, JPEG_2000_LOSSY, HTJ2K):
        pixels = pixels.view(f"u{pixels.itemsize}") & ((1 << bits) - 1)  # those know no sign
    encode = {
        BASELINE: lambda plane: imagecodecs.jpeg8_encode(plane, level=95),
        LOSSLESS: lambda plane: imagecodecs.jpeg8_encode(plane, lossless=True, predictor=6, bitspersample=bits),
        LOSSLESS_SV1: lambda plane: imagecodecs.jpeg8_encode(plane, lossless=True, predictor=1, bitspersample=bits),
        JPEG_LS: imagecodecs.jpegls_encode,
        NEAR_LOSSLESS: lambda plane: imagecodecs.jpegls_encode(plane, level=options["near"]),
        JPEG_2000: lambda plane: imagecodecs.jpeg2k_encode(
            plane, codecformat="j2k", reversible=True, bitspersample=bits
        ),
        JPEG_2000_LOSSY: lambda plane: imagecodecs.jpeg2k_encode(
            plane, codecformat="j2k", level=70, bitspersample=bits
        ),
        HTJ2K: imagecodecs.htj2k_encode,
    }[syntax]
    return with_frames(dataset, [encode(plane) for plane in pixels], syntax)


def with_frames(dataset, frames, syntax=None):
    dataset = copy.deepcopy(dataset)
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].is_undefined_length, dataset["PixelData"].VR = True, "OB"
    dataset.file_meta.TransferSyntaxUID = syntax or dataset.file_meta.TransferSyntaxUID
    return dataset


def fixture_picture(bits, signed):
    rows, columns = np.indices((16, 16))
    top = (1 << bits) - 1
    picture = (rows * rows * 37 + columns * 91 + rows * columns * 13) % (top + 1) * 3 // 4
    picture[0, 0], picture[-1, -1] = 0, top
    return (picture - (1 << (bits - 1)) * signed).astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")


def frame_of(dataset):
    return next(generate_frames(dataset.PixelData, number_of_frames=1)).rstrip(b"\0")


@pytest.fixture(scope="module")
def decoder():
    with Decoder() as running:
        yield running


def decoded(dataset, decoder):
    dataset = open_file("a.dcm", saved(dataset))
    return stored_pixels("a.dcm", dataset, int(dataset.get("NumberOfFrames", 1)), decoder)


# --- where the slices lie --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("tilt", [0, 0.3], ids=["straight", "tilted"])
def test_simpleitk_puts_every_voxel_where_we_do(tmp_path, orientation, tilt):
    slices = series(5, orientation=orientation, PixelRepresentation=1)
    for dataset in slices:
        step = float(np.dot(dataset.ImagePositionPatient, normal(dataset)))
        moved(dataset, tilt * step * np.array(dataset.ImageOrientationPatient[3:], float))
        dataset.save_as(tmp_path / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
    scan = read_scan(pack_scan(tmp_path)[0])
    assert scan.notes == ()
    # ITK has no sheared images, so each slice is read by itself.
    for index, dataset in enumerate(in_order(slices)):
        other = sitk.ReadImage(str(tmp_path / f"{dataset.SOPInstanceUID}.dcm"))
        np.testing.assert_array_equal(scan.array[:, :, index], sitk.GetArrayFromImage(other)[0].T)
        for voxel in ((0, 0), (11, 0), (0, 9), (11, 9)):
            theirs = np.array(other.TransformIndexToPhysicalPoint((*voxel, 0))) * [-1, -1, 1]
            np.testing.assert_allclose((scan.affine @ [*voxel, index, 1])[:3], theirs, atol=0.01)
    if not tilt:
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
        other = sitk.ReadImage(names)
        flipped = np.dot(other.TransformIndexToPhysicalPoint((0, 0, 0)), normal(slices[0])) > (
            np.dot(other.TransformIndexToPhysicalPoint((0, 0, 4)), normal(slices[0]))
        )
        for index in np.ndindex(12, 10, 5):
            mine = (*index[:2], 4 - index[2]) if flipped else index
            assert scan.array[mine] == other.GetPixel(*index)
            theirs = np.array(other.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose((scan.affine @ [*mine, 1])[:3], theirs, atol=0.01)


@pytest.mark.parametrize("which", range(6))
def test_a_slice_to_the_side_is_named_with_its_distance(which):
    slices = in_order(series(6))
    moved(slices[which], (30, 0, 0))
    refused(zipped(slices), f"slice series/{which:03}.dcm lies 30.00 mm", slices[0].SeriesInstanceUID, "0.25 mm")


def test_half_a_series_that_is_shifted_in_plane_is_refused():
    slices = in_order(series(10, spacing=5))
    for dataset in slices[5:]:
        moved(dataset, (0, 12, 0))
    refused(zipped(slices), "lies 12.00 mm", "5 of 10", "0.50 mm")


@pytest.mark.parametrize("change", [0.09, 0.45])
def test_a_spacing_that_changes_is_refused(change):
    slices = in_order(series(60, spacing=5))
    for index, dataset in enumerate(slices):
        moved(dataset, (0, 0, change * max(0, index - 40)))
    refused(zipped(slices), "irregularly", f"from 5.000 to {5 + change:.3f} mm")


def test_a_spacing_that_grows_from_slice_to_slice_is_refused():
    slices = in_order(series(40, spacing=3))
    for index, dataset in enumerate(slices):
        moved(dataset, (0, 0, 0.002 * index**2))
    refused(zipped(slices), "irregularly")


@pytest.mark.parametrize("spacing, allowed", [(10, 0.5), (5, 0.5), (2, 0.2), (0.6, 0.06)])
def test_positions_may_vary_by_half_a_millimetre_or_a_tenth_of_the_distance(spacing, allowed):
    def jittered(size):
        slices = in_order(series(30, spacing=spacing))
        for index, dataset in enumerate(slices):
            moved(dataset, (size * (-1) ** index, 0, 0))
        return slices

    slices = jittered(0.85 * allowed)
    assert corners_off(read_scan(zipped(slices)), slices) < allowed
    refused(zipped(jittered(1.15 * allowed)), f"{allowed:.2f} mm")


def test_a_regular_series_keeps_the_files_numbers_exactly():
    slices = in_order(series(7, spacing=1.25, orientation=ORIENTATIONS["oblique"]))
    affine = read_scan(zipped(slices)).affine * [[-1], [-1], [1], [1]]
    assert (affine[:3, 3] == slices[0].ImagePositionPatient).all()
    assert (affine[:3, 0] == np.multiply(slices[0].ImageOrientationPatient[:3], 0.9)).all()
    assert (affine[:3, 1] == np.multiply(slices[0].ImageOrientationPatient[3:], 0.7)).all()


def turned(dataset, angle):
    """The slice turned about its normal, in the plane, at its first voxel."""
    dataset.ImageOrientationPatient = [np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0]


def test_an_orientation_that_drifts_is_refused_where_a_corner_is_off():
    slices = in_order(series(30, shape=(256, 256)))
    for index, dataset in enumerate(slices):
        turned(dataset, index * ANGLE)
    refused(zipped(slices), "at its farthest corner", "0.25 mm", "series/0")


def test_one_slice_that_is_turned_a_little_is_named():
    slices = in_order(series(9, shape=(256, 256)))
    turned(slices[4], 20 * ANGLE)
    refused(zipped(slices), "slice series/004.dcm lies 2.03 mm", "at its farthest corner")


def test_an_orientation_with_few_digits_is_read():
    slices = in_order(series(8, orientation=(0.8, 0.6, 0, 0, 0, -1)))
    for index, dataset in enumerate(slices):
        dataset.ImageOrientationPatient = [0.8, 0.6 + 1e-5 * (index % 2), 0, 0, 0, -1]
    assert corners_off(read_scan(zipped(slices)), slices) < 0.01


@pytest.mark.parametrize(
    "orientation",
    [(1.1, 0, 0, 0, 1, 0), (2, 0, 0, 0, 2, 0), (1, 0, 0, 0.3, 0.954, 0), (1, 0, 0, 1, 0, 0), (0, 0, 0, 0, 1, 0)],
    ids=["stretched", "twice", "not at a right angle", "parallel", "none"],
)
def test_directions_that_are_none_are_refused(orientation):
    slices = series(5)
    for dataset in slices:
        dataset.ImageOrientationPatient = list(orientation)
    refused(zipped(slices), "ImageOrientationPatient", "right angle", "lengths")


@pytest.mark.parametrize("orientation", [(1.005, 0, 0, 0, 1, 0), (1, 0, 0, 0.005, 0.9999875, 0)])
def test_directions_that_move_the_far_corner_of_a_large_slice_are_refused(orientation):
    for shape, ok in (((10, 10), True), ((512, 512), False)):
        slices = series(3, shape=shape)
        for dataset in slices:
            dataset.ImageOrientationPatient = list(orientation)
        if ok:
            read_scan(zipped(slices))
        else:
            refused(zipped(slices), "far corner is uncertain by")


def test_slices_that_coincide_or_lie_side_by_side_are_no_volume():
    slices = series(5, SpacingBetweenSlices=2.5)
    for dataset in slices:
        dataset.ImagePositionPatient = [1, 2, 3]
    refused(zipped(slices), "all 5 slices lie at one and the same position")
    for index, dataset in enumerate(slices):
        dataset.ImagePositionPatient = [30 * index, 2, 3]
    refused(zipped(slices), "all 5 slices lie beside each other")


def test_slices_are_placed_by_their_positions_not_by_other_elements():
    slices = series(6, SpacingBetweenSlices=7, SliceThickness=9, SliceLocation=0, ImagerPixelSpacing=[3, 3])
    assert read_scan(zipped(slices)).spacing_mm == pytest.approx((0.9, 0.7, 2.5))


def test_a_shift_too_steep_for_a_gantry_is_refused():
    slices = series(6)
    for dataset in slices:
        moved(dataset, (0, 3 * (dataset.ImagePositionPatient[2] - 100), 0))
    refused(zipped(slices), "shifted by 7.50 mm sideways", "2.50 mm", "gantry")


def test_missing_slices_are_named_wherever_they_are():
    for missing in (1, 4, 8):
        slices = in_order(series(10))
        del slices[missing]
        refused(zipped(slices), "slices are missing at 1 places", "5.000 mm between", "usual distance 2.500 mm")


def test_slices_of_several_frames_of_reference_or_modalities_are_refused():
    slices = series(6, FrameOfReferenceUID="1.2.3")
    slices[2].FrameOfReferenceUID = "1.2.4"
    refused(zipped(slices), "2 different frames of reference", "1.2.4 (1 slices)")
    slices = series(6)
    slices[2].Modality = "PT"
    refused(zipped(slices), "2 different modalities", "PT (1 slices)")


@pytest.mark.parametrize("keyword, what", [("EchoNumbers", "echoes"), ("TemporalPositionIdentifier", "temporal")])
def test_two_halves_of_different_echoes_or_times_are_no_volume(keyword, what):
    slices = in_order(series(6, modality="MR", **{keyword: 1}))
    for dataset in slices[3:]:
        setattr(dataset, keyword, 2)
    refused(zipped(slices), f"2 different {what}", "1 (3 slices), 2 (3 slices)")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"ImagePositionPatient": None}, "lacks ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "lacks ImageOrientationPatient"),
        ({"PixelSpacing": None}, "lacks PixelSpacing"),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.5, 0.5]}, "ImagerPixelSpacing alone"),
        ({"PixelSpacing": [0.5, -1]}, "PixelSpacing of [0.5, -1] mm"),
        ({"ImagePositionPatient": [1, 2]}, "3 finite numbers are wanted"),
        ({"ImagePositionPatient": ["1", "NaN", "3"]}, "ImagePositionPatient of"),
        ({"ImagePositionPatient": ["1e300", "1e300", "1e300"]}, ""),
        ({"RescaleSlope": 0}, "RescaleSlope of 0"),
        ({"RescaleSlope": "NaN"}, "RescaleSlope of NaN; a finite number is wanted"),
        ({"RescaleIntercept": "inf"}, "RescaleIntercept of inf"),
        ({"NumberOfFrames": -1}, "NumberOfFrames -1"),
        ({"AnatomicalOrientationType": "QUADRUPED"}, "QUADRUPED"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "Siemens mosaic"),
        ({"HighBit": 11}, "HighBit 11"),
        ({"BitsAllocated": 12}, "BitsAllocated 12"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_slice_says_wrongly_is_named(fields, words):
    slices = series(4)
    for keyword, value in fields.items():
        setattr(slices[1], keyword, value) if value is not None else delattr(slices[1], keyword)
    with pydicom.config.disable_value_validation():
        refused(zipped(slices), words)


# --- what values mean ------------------------------------------------------------------------------------------------
def test_slices_that_are_scaled_beside_slices_that_are_not_are_refused():
    slices = series(5)
    del slices[2].RescaleSlope, slices[2].RescaleIntercept
    refused(zipped(slices), "2 different scalings", "without (1 slices)")


def test_a_ct_without_a_scaling_is_said_to_be_a_guess():
    for modality, guessed in (("CT", True), ("MR", False)):
        slices = series(5, modality=modality)
        for dataset in slices:
            del dataset.RescaleSlope, dataset.RescaleIntercept
        scan = read_scan(zipped(slices))
        assert any("Hounsfield units is a guess" in note for note in scan.notes) is guessed
        assert ("Hounsfield units is a guess" in prepare(scan).reason) is guessed


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_named(keyword):
    slices = series(4, modality="MR")
    for dataset in slices:
        del dataset.PixelData
        setattr(dataset, keyword, np.ones(120, "f4" if keyword == "FloatPixelData" else "f8").tobytes())
    refused(zipped(slices), keyword, "parametric maps", "NIfTI")


def test_signed_values_in_fewer_bits_are_read_with_their_sign():
    picture = pixels_of(12, True)
    for stored in (picture, picture & 0x0FFF):
        slices = [image(12, True, stored, ImagePositionPatient=[0, 0, z]) for z in range(3)]
        for dataset in slices:
            dataset.SeriesInstanceUID = "1.2"
        scan = read_scan(zipped(slices))
        np.testing.assert_array_equal(scan.array[:, :, 1], picture.T - 1024)


def test_values_beyond_the_stored_bits_are_refused_unless_an_overlay_lies_there():
    picture = pixels_of(12, False)
    marked = picture | np.where(np.indices(picture.shape)[0] == 3, 0x8000, 0).astype(np.uint16)
    slices = [image(12, False, marked, ImagePositionPatient=[0, 0, z], SeriesInstanceUID="1.2") for z in range(3)]
    refused(zipped(slices), "beyond its 12 stored bits")
    for dataset in slices:
        dataset.add_new((0x6000, 0x0100), "US", 16)
        dataset.add_new((0x6000, 0x0102), "US", 15)
    np.testing.assert_array_equal(read_scan(zipped(slices)).array[:, :, 0], picture.T.astype(int) - 1024)


def test_the_order_of_bytes_and_implicit_types_change_nothing():
    slices = series(4, PixelRepresentation=1)
    for uid in (ImplicitVRLittleEndian, ExplicitVRBigEndian):
        other = copy.deepcopy(slices)
        for dataset in other:
            if uid == ExplicitVRBigEndian:
                dataset.PixelData = dataset.pixel_array.astype(">i2").tobytes()
            dataset.file_meta.TransferSyntaxUID = uid
        members = []
        for index, dataset in enumerate(other):
            buffer = io.BytesIO()
            pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
            members.append((f"{index}.dcm", buffer.getvalue()))
        np.testing.assert_array_equal(
            read_scan(zipped([], extra=members)).array, read_scan(zipped(slices)).array, err_msg=uid.name
        )


# --- compressed pixels -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits, signed", [(16, False), (16, True), (12, False), (12, True), (10, True), (8, False)])
@pytest.mark.parametrize("uid", EXACT)
def test_lossless_syntaxes_give_the_pixels_that_were_compressed(decoder, uid, bits, signed):
    dataset = image(bits, signed)
    compressed = encoded(dataset, uid)
    assert compressed.file_meta.TransferSyntaxUID == uid
    found = decoded(compressed, decoder)
    assert found.dtype == dataset.pixel_array.dtype
    np.testing.assert_array_equal(found[0], dataset.pixel_array)


@pytest.mark.parametrize("uid", EXACT)
def test_compressed_frames_of_one_file_are_read_in_order(decoder, uid):
    picture = np.stack([pixels_of(12, True, seed=seed) for seed in range(3)])
    found = decoded(encoded(image(12, True, picture), uid), decoder)
    np.testing.assert_array_equal(found, picture)


@pytest.mark.parametrize("uid", [LOSSLESS_SV1, JPEG_LS, RLELossless])
def test_a_compressed_series_is_the_series_it_was_made_from(uid):
    slices = series(4, PixelRepresentation=1)
    compressed = [encoded(dataset, uid) for dataset in slices]
    scan, plain = read_scan(zipped(compressed)), read_scan(zipped(slices))
    np.testing.assert_array_equal(scan.array, plain.array)
    np.testing.assert_array_equal(scan.affine, plain.affine)


@pytest.mark.parametrize(
    "uid, bits, options, allowed",
    [(BASELINE, 8, {}, 12), (NEAR_LOSSLESS, 12, {"near": 3}, 3), (JPEG_2000_LOSSY, 12, {}, 60)],
)
def test_lossy_syntaxes_are_read_as_simpleitk_reads_them(tmp_path, decoder, uid, bits, options, allowed):
    dataset = image(bits, False, np.clip(pixels_of(bits, False), 5, (1 << bits) - 6))
    compressed = encoded(dataset, uid, **options)
    found = decoded(compressed, decoder)[0]
    assert 0 < np.abs(found.astype(int) - dataset.pixel_array).max() <= allowed
    compressed.RescaleIntercept = 0
    compressed.save_as(tmp_path / "one.dcm")
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "one.dcm")))[0])


@pytest.mark.parametrize("uid", [LOSSLESS, LOSSLESS_SV1, JPEG_LS, JPEG_2000])
def test_simpleitk_reads_the_same_values_from_a_compressed_series(tmp_path, uid):
    for dataset in series(4, modality="MR", PixelRepresentation=1):
        encoded(dataset, uid).save_as(tmp_path / f"{dataset.SOPInstanceUID}.dcm")
    other = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    scan = read_scan(pack_scan(tmp_path)[0])
    np.testing.assert_array_equal(scan.array, sitk.GetArrayFromImage(other).T)
    for voxel in ((0, 0, 0), (11, 9, 3)):
        theirs = np.array(other.TransformIndexToPhysicalPoint(voxel)) * [-1, -1, 1]
        np.testing.assert_allclose((scan.affine @ [*voxel, 1])[:3], theirs, atol=0.01)


@pytest.mark.parametrize("case", FRAMES, ids=lambda case: f"{case['maker']}-{case['syntax'][-2:]}-{case['bits']}")
def test_frames_of_other_encoders_are_read(decoder, case):
    picture = fixture_picture(case["bits"], case["signed"])
    frame = base64.b64decode(case["frame"])
    dataset = with_frames(image(case["bits"], case["signed"], picture), [frame], case["syntax"])
    expected = picture
    if "pixels" in case:
        expected = np.frombuffer(zlib.decompress(base64.b64decode(case["pixels"])), "<i4").reshape(16, 16)
    np.testing.assert_array_equal(decoded(dataset, decoder)[0], expected)


def test_near_lossless_values_may_go_beyond_the_stored_bits(decoder):
    dataset = image(12, False)
    found = decoded(encoded(dataset, NEAR_LOSSLESS, near=3), decoder)[0]
    assert found.max() > 4095 and np.abs(found.astype(int) - dataset.pixel_array).max() <= 3


def test_a_sign_that_no_bit_tells_is_refused(decoder):
    dataset = image(12, True)
    compressed = encoded(dataset, LOSSLESS_SV1)
    compressed.BitsStored, compressed.HighBit = 16, 15
    with pytest.raises(InvalidInput, match="samples have 12 bits, while BitsAllocated and BitsStored say 16 and 16"):
        decoded(compressed, decoder)
    compressed.PixelRepresentation = 0
    assert decoded(compressed, decoder).max() > 2048
    signed = encoded(dataset, JPEG_2000)
    signed.PixelRepresentation = 0
    with pytest.raises(InvalidInput, match="samples are signed"):
        decoded(signed, decoder)


def test_jpeg_of_8_bits_may_fill_cells_of_16(decoder):
    dataset = image(8, False, pixels_of(8, False, allocated=16))
    compressed = with_frames(
        dataset, [imagecodecs.jpeg8_encode(dataset.pixel_array.astype(np.uint8), level=95)], EXTENDED
    )
    found = decoded(compressed, decoder)[0]
    assert found.dtype == np.uint16 and np.abs(found.astype(int) - dataset.pixel_array).max() < 12


def test_signed_pixels_in_lossy_jpeg_are_refused(decoder):
    compressed = encoded(image(8, True), BASELINE)
    with pytest.raises(InvalidInput, match="signed pixels compressed as JPEG Baseline.*torn apart"):
        decoded(compressed, decoder)


def test_a_decoder_that_dies_is_named_and_the_next_frame_read():
    compressed = encoded(image(8, False), LOSSLESS_SV1)
    with Decoder() as running:
        decoded(compressed, running)
        running._process.send_signal(signal.SIGSEGV)  # as a damaged frame might make it
        with pytest.raises(InvalidInput, match="the decoder died of it .SIGSEGV.*copy the file again"):
            decoded(compressed, running)
        assert decoded(compressed, running).shape == (1, 24, 20)


def test_a_file_of_7_bits_which_kills_gdcm_is_read(decoder):
    dataset = image(7, False)
    np.testing.assert_array_equal(decoded(encoded(dataset, LOSSLESS_SV1), decoder)[0], dataset.pixel_array)


@pytest.mark.parametrize("uid", [BASELINE, LOSSLESS_SV1, JPEG_LS])
def test_a_frame_that_was_cut_off_is_refused(decoder, uid):
    compressed = encoded(image(8, False), uid)
    frame = frame_of(compressed)
    for cut in (1, 2, 5, len(frame) // 2, len(frame) - 3):
        with pytest.raises(InvalidInput, match="frame 1 could not be decoded"):
            decoded(with_frames(compressed, [frame[:-cut]]), decoder)


@pytest.mark.parametrize("uid", [BASELINE, LOSSLESS_SV1, JPEG_LS, JPEG_2000_LOSSY])
@pytest.mark.parametrize("rows, columns", [(20, 24), (23, 20), (48, 20), (24, 40)])
def test_a_frame_of_another_size_is_refused_before_it_is_decoded(uid, rows, columns):
    compressed = encoded(image(8, False), uid)
    compressed.Rows, compressed.Columns = rows, columns
    with pytest.raises(InvalidInput, match="24 x 20 pixels, while Rows and Columns say"):
        decoded(compressed, None)


@pytest.mark.integration
@pytest.mark.parametrize("uid", [BASELINE, LOSSLESS_SV1, JPEG_LS, JPEG_2000, RLELossless])
def test_damaged_frames_never_escape_as_another_error(decoder, uid):
    random = np.random.default_rng(0)
    compressed = encoded(image(8, False), uid)
    frame = frame_of(compressed)
    for _ in range(60):
        damaged = bytearray(frame)
        for position in random.integers(0, min(len(frame), 150), 2):
            damaged[position] = random.integers(256)
        try:
            assert decoded(with_frames(compressed, [bytes(damaged)]), decoder).shape == (1, 24, 20)
        except InvalidInput as error:
            assert "could not be decoded" in str(error)


def test_more_or_fewer_frames_than_promised_are_refused(decoder):
    picture = np.stack([pixels_of(12, False, seed=seed) for seed in range(3)])
    compressed = encoded(image(12, False, picture), LOSSLESS_SV1)
    for frames in (2, 4):
        compressed.NumberOfFrames = frames
        with pytest.raises(InvalidInput, match="frame"):
            decoded(compressed, decoder)


def test_a_decoder_that_takes_too_long_is_stopped():
    compressed = encoded(image(8, False), LOSSLESS_SV1)
    with pytest.raises(InvalidInput, match="longer than 0.01 s"):
        decoded(compressed, Decoder(seconds=0.01))


def test_without_imagecodecs_the_error_says_what_to_install(tmp_path, monkeypatch):
    compressed = encoded(image(8, False), LOSSLESS_SV1)
    (tmp_path / "imagecodecs.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Decoder() as running, pytest.raises(Unavailable, match=r"pip install 'm3d-engine\[dicom\]'"):
        decoded(compressed, running)


def test_the_decoder_starts_on_a_python_without_the_option_p(tmp_path, monkeypatch):
    """As Python 3.10 is."""
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\ncase "$1" in -P*) exit 2;; esac\nexec {sys.executable} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(old))
    with Decoder() as running:
        assert decoded(encoded(image(8, False), LOSSLESS_SV1), running).shape == (1, 24, 20)


def test_the_decoder_starts_on_a_system_without_limits_of_a_process(tmp_path, monkeypatch):
    """As Windows is."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['resource'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Decoder() as running:
        assert decoded(encoded(image(8, False), LOSSLESS_SV1), running).shape == (1, 24, 20)


@pytest.mark.parametrize("name", ["codestream", "imagecodecs_of_this_folder"])
def test_the_decoder_imports_nothing_of_its_own_folder_and_the_working_one(tmp_path, monkeypatch, name):
    (tmp_path / "imagecodecs_of_this_folder.py").touch()
    (tmp_path / "path").mkdir()
    told = "raise ValueError('found' if importlib.util.find_spec('{}') else 'not there')"
    (tmp_path / "path" / "imagecodecs.py").write_text("import importlib.util\n" + told.format(name))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path)
    with Decoder() as running, pytest.raises(InvalidInput, match="not there"):
        decoded(encoded(image(8, False), LOSSLESS_SV1), running)


def test_the_decoder_needs_an_interpreter(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(DecodingFailed, match="does not start"):
        Decoder().decode(b"", family="jpeg", rows=1, columns=1, allocated=8)


def test_the_decoder_keeps_no_secrets_of_its_parent(monkeypatch):
    monkeypatch.setenv("M3D_SECRET", "1")
    with Decoder() as running:
        decoded(encoded(image(8, False), LOSSLESS_SV1), running)
        environment = Path(f"/proc/{running._process.pid}/environ").read_bytes()
    assert b"M3D_SECRET" not in environment and b"PATH=" in environment


# --- one file --------------------------------------------------------------------------------------------------------
def test_one_enhanced_file_is_a_series():
    np.testing.assert_array_equal(read_scan(saved(enhanced())).array, read_scan(zipped([enhanced()])).array)


@pytest.mark.parametrize("with_meta", [True, False])
def test_one_enhanced_file_without_preamble_is_a_series(with_meta):
    content = saved(enhanced())[132:]
    bare = content if with_meta else content[12 + int.from_bytes(content[8:12], "little") :]
    np.testing.assert_array_equal(read_scan(bare).array, read_scan(saved(enhanced())).array)


def test_a_compressed_enhanced_file_is_read():
    plain = enhanced(4)
    plain.BitsStored, plain.HighBit = 16, 15
    compressed = encoded(plain, LOSSLESS_SV1)
    np.testing.assert_array_equal(read_scan(saved(compressed)).array, read_scan(saved(plain)).array)


def test_one_slice_is_no_series_whatever_it_is():
    refused(saved(series(1)[0]), "single DICOM file", "folder of the whole series")
    refused(saved(series(1)[0])[132:], "single DICOM file")
    report = series(1, modality="SR")[0]
    del report.PixelData, report.Rows
    refused(saved(report), "single DICOM file", "SR")


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_only_starts_as_dicom_does_is_refused():
    for content in (b"\x08\0\x05\0CS" + b"\xff" * 100, saved(enhanced())[132:400], b"\x02\0\0\0UL\x04\0"):
        refused(content, "DICOM")


def test_frames_without_places_of_their_own_are_refused():
    movie = series(1)[0]
    movie.NumberOfFrames, movie.PixelData = 3, movie.PixelData * 3
    refused(saved(movie), "3 frames", "PerFrameFunctionalGroupsSequence")
    short = enhanced(5)
    del short.PerFrameFunctionalGroupsSequence[3:]
    refused(saved(short), "5 frames, and says where 3 of them lie")


@pytest.mark.parametrize(
    "macro, keyword, values, words",
    [
        ("FrameContentSequence", "StackID", ("1", "2"), "stacks (StackID)"),
        ("FrameContentSequence", "TemporalPositionIndex", (1, 2), "temporal positions"),
        ("MREchoSequence", "EffectiveEchoTime", (10.0, 20.0), "echoes (EffectiveEchoTime)"),
        ("MRDiffusionSequence", "DiffusionBValue", (0.0, 1000.0), "diffusion b-values"),
        ("MRImageFrameTypeSequence", "ComplexImageComponent", ("MAGNITUDE", "PHASE"), "image components"),
    ],
)
def test_an_enhanced_file_with_several_volumes_is_refused_by_what_differs(macro, keyword, values, words):
    dataset = enhanced(6)
    for index, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        item = pydicom.Dataset()
        setattr(item, keyword, values[index // 3])
        setattr(group, macro, [item])
    refused(saved(dataset), f"2 different {words}", "(3 slices)", "one of them at a time")


def test_an_enhanced_file_is_read_within_three_times_its_size():
    dataset = enhanced(40)
    dataset.Rows = dataset.Columns = 256
    dataset.PixelData = np.random.default_rng(0).integers(0, 4000, (40, 256, 256)).astype(np.uint16).tobytes()
    data = saved(dataset)
    tracemalloc.start()
    scan = read_scan(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * scan.array.nbytes


# --- what lies in the folder -----------------------------------------------------------------------------------------
def test_files_that_are_there_twice_are_read_once_and_said():
    slices = series(6)
    again = copy.deepcopy(slices[1])
    again.add_new((0x0009, 0x0010), "LO", "WORKSTATION")
    content = saved(slices[0])
    scan = read_scan(zipped(slices + [again], extra=[("copy.dcm", content)]))
    np.testing.assert_array_equal(scan.array, read_scan(zipped(series(6))).array)
    assert scan.notes == ("2 files were there twice and read once",)
    assert "2 files were there twice" in prepare(scan).reason


def test_files_of_one_uid_that_differ_are_refused():
    for change in (
        lambda dataset: setattr(dataset, "PixelData", bytes(2) + dataset.PixelData[2:]),
        lambda dataset: moved(dataset, (0, 0, 50)),
        lambda dataset: setattr(dataset, "RescaleIntercept", 0),
    ):
        slices = series(6)
        other = copy.deepcopy(slices[3])
        change(other)
        refused(zipped(slices + [other]), f"the same SOPInstanceUID {other.SOPInstanceUID}", "003.dcm", "006.dcm")


def beside(modality, with_pixels=False, **fields):
    dataset = series(1, modality=modality, **fields)[0]
    if not with_pixels:
        del dataset.PixelData, dataset.Rows, dataset.Columns, dataset.ImagePositionPatient
    return dataset


def test_what_archives_keep_beside_a_series_is_left_aside_and_said():
    scout = beside("CT", True, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], shape=(30, 8))
    odd_scout = beside("CT", True, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], PixelSpacing=[0, 0])
    others = [beside(modality) for modality in ("SR", "PR", "KO", "RTSTRUCT", "SR")]
    others.append(beside("MR", SpectroscopyData=bytes(8)))
    others += [beside("SEG", True, BitsAllocated=1, BitsStored=1, HighBit=0), scout, odd_scout]
    scan = read_scan(zipped(series(6) + others))
    np.testing.assert_array_equal(scan.array, read_scan(zipped(series(6))).array)
    assert scan.notes == (
        "left aside beside the series: 2 SR, 1 PR, 1 KO, 1 RTSTRUCT, 1 MR spectroscopy, 1 SEG, 2 localizer images",
    )
    assert "1 RTSTRUCT" in prepare(scan).reason


def test_a_folder_with_no_scan_says_what_it_holds():
    refused(zipped([beside("SEG", True), beside("SR")]), "no DICOM images", "1 SEG, 1 SR")


def test_localizers_alone_are_a_series():
    scan = read_scan(zipped(series(6, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])))
    assert scan.array.shape == (12, 10, 6) and scan.notes == ()


def test_files_that_are_not_dicom_are_counted():
    scan = read_scan(zipped(series(6), extra=[("README.txt", b"hello"), ("DICOMDIR", dicomdir())]))
    assert scan.notes == ("1 file that is not DICOM passed over",)


def dicomdir():
    dataset = beside("")
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    return saved(dataset)


def test_an_image_that_lost_its_pixels_is_not_passed_over():
    slices = series(6)
    del slices[2].PixelData
    refused(zipped(slices), "CT image without pixels", "002.dcm")


def test_two_series_stay_refused_whatever_lies_beside_them():
    one, other = series(6), series(6, modality="MR")
    data = zipped(one + other + [beside("SEG", True)])
    refused(data, "2 different series", one[0].SeriesInstanceUID, other[0].SeriesInstanceUID, "(6 slices)")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_damage_to_any_element_never_escapes_as_another_error(seed):
    random = np.random.default_rng(seed)
    whole, slices = saved(series(1)[0]), [("0.dcm", saved(series(1)[0]))]
    for _ in range(150):
        data = bytearray(whole)
        for position in random.integers(132, len(whole) - 240, 2):
            data[position] = random.integers(256)
        for sent in (zipped([], extra=[*slices, ("1.dcm", bytes(data))]), bytes(data)):
            try:
                read_scan(sent)
            except InvalidInput as error:
                assert len(str(error)) < 2000
