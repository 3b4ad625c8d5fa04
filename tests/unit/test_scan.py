"""Every scan format is read as the file means it, and nothing about a file is trusted."""

import errno
import gzip
import io
import os
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from engine.errors import InvalidInput
from engine.scan import ARRAY_AFFINE, pack_scan, read_scan
from engine.scan.limits import Limits
from tests.unit.refusals import refused

OBLIQUE = np.array([[-0.9, 0.1, 0.2, 12], [0.1, 1.4, -0.3, -80], [0.1, 0.2, 2.9, 7], [0, 0, 0, 1.0]])


def values(shape=(12, 10, 8), dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def nifti(array=None, affine=OBLIQUE, edit=lambda header: None, kind=nib.Nifti1Image, endianness="<"):
    array = values() if array is None else array
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(array.dtype)
    image = kind(array, affine, header)
    edit(image.header)
    return image.to_bytes()


def with_header(data, **fields):
    """The file with raw header fields overwritten, whatever they then claim."""
    header = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + data[348:]


# --- NIfTI -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endianness", "<>")
def test_no_text_of_a_nifti_header_stays_in_what_is_kept_of_it(kind, endianness):
    texts = [name for name, (dtype, *_) in kind.header_class.template_dtype.fields.items() if dtype.kind == "S"]
    assert {"descrip", "aux_file", "intent_name"} < set(texts)

    def name_patient(header):
        for name in texts:
            if name != "magic":
                header[name] = b"J"

    plain, named = (read_scan(nifti(edit=edit, kind=kind, endianness=endianness)) for edit in (str, name_patient))
    found, expected = (kind.header_class(scan.header, check=False) for scan in (named, plain))
    assert [found[name].item() for name in texts if name != "magic"] == [b""] * (len(texts) - 1)
    assert found["magic"] == expected["magic"] and named.header == plain.header


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_nifti_keeps_values_dtype_and_affine(compress, kind, dtype):
    array = values(dtype=dtype)
    scan = read_scan(compress(nifti(array, kind=kind)))
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_array_equal(
        scan.affine, nib.Nifti1Image.from_bytes(nifti(array)).affine if kind is nib.Nifti1Image else OBLIQUE
    )
    assert scan.array.dtype == dtype and scan.kind == "nifti" and scan.modality is None
    assert scan.orientation == "LAS" and scan.spacing_mm == pytest.approx(np.linalg.norm(OBLIQUE[:3, :3], axis=0))


def test_big_endian_nifti_is_read():
    scan = read_scan(nifti(endianness=">"))
    np.testing.assert_array_equal(scan.array, values())
    assert scan.array.dtype.isnative


def test_wide_dtypes_become_float32():
    assert read_scan(nifti(values(dtype=np.float64))).array.dtype == np.float32
    assert read_scan(nifti(values(dtype=np.int32))).array.dtype == np.float32


@pytest.mark.parametrize(
    "dtype, slope, intercept, expected",
    [
        (np.int16, 0.5, 10, np.float32),
        (np.uint16, 1, -1024, np.int16),
        (np.uint8, 1, 1000, np.int16),
        (np.int16, 1, 32700, np.float32),
        (np.int16, 1, 0.5, np.float32),
    ],
)
def test_slope_and_intercept_are_applied_without_wide_dtypes(dtype, slope, intercept, expected):
    array = values(dtype=dtype)
    data = with_header(nifti(array), scl_slope=slope, scl_inter=intercept)
    scan = read_scan(data)
    np.testing.assert_allclose(scan.array, array * float(slope) + intercept)
    assert scan.array.dtype == expected


def test_a_fourth_axis_of_length_one_is_dropped():
    assert read_scan(nifti(values()[..., None])).array.shape == (12, 10, 8)


def test_without_a_usable_sform_the_qform_counts():
    data = nifti(edit=lambda header: header.set_qform(np.diag([2, 2, 2, 1.0]), code=1))
    scan = read_scan(with_header(data, srow_x=[0, 0, 0, 0]))
    np.testing.assert_allclose(scan.affine, np.diag([2, 2, 2, 1]))
    scan = read_scan(with_header(data, srow_y=[np.nan, 0, 0, 0]))
    np.testing.assert_allclose(scan.affine, np.diag([2, 2, 2, 1]))


def test_without_any_form_voxel_sizes_count_as_in_nibabel():
    data = with_header(nifti(), sform_code=0, qform_code=0)
    np.testing.assert_array_equal(read_scan(data).affine, nib.Nifti1Image.from_bytes(data).affine)


def test_a_nifti_without_any_usable_orientation_is_refused():
    refused(with_header(nifti(), sform_code=0, qform_code=0, pixdim=[1, 0, 0, 0, 0, 0, 0, 0]), "orientation", "nibabel")


def test_a_header_promising_more_voxels_than_the_file_has_is_refused():
    for data in (nifti()[:-1], with_header(nifti(), dim=[3, 12, 10, 9, 1, 1, 1, 1])):
        refused(data, "12 x 10 x", "promises", "bytes")
    refused(gzip.compress(with_header(nifti(), dim=[3, 12, 10, 9, 1, 1, 1, 1])), "promises")


@pytest.mark.parametrize("cut", [15, 200, -500, -9, -4, -1])
def test_truncated_gzip_is_named_as_such(cut):
    refused(gzip.compress(nifti())[:cut], "gzip", "truncated")


def test_damaged_gzip_is_named_as_such():
    data = bytearray(gzip.compress(nifti()))
    data[-6] ^= 255  # the checksum
    refused(bytes(data), "gzip", "damaged")
    data = bytearray(gzip.compress(nifti()))
    data[100:140] = bytes(40)
    refused(bytes(data), "gzip")


def test_gzip_of_several_members_is_one_stream():
    data = nifti()
    scan = read_scan(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    np.testing.assert_array_equal(scan.array, values())


def test_what_follows_a_tiny_gzipped_scan_is_ignored():
    array = values((2, 2, 2), np.uint8)
    np.testing.assert_array_equal(read_scan(gzip.compress(nifti(array) + bytes(1000))).array, array)


def gzip_bomb(head, megabytes):
    """A gzip that starts with `head` and expands to so many megabytes of zeros, made without holding them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    return packer.compress(head) + b"".join(packer.compress(zeros) for _ in range(megabytes)) + packer.flush()


def test_a_gzip_bomb_stops_before_it_expands():
    bomb = gzip_bomb(nifti()[:352], 100)
    tracemalloc.start()
    refused(bomb, "every voxel")  # honest small header, 100 MB behind it: the excess is never read
    refused(gzip_bomb(with_header(nifti(), dim=[3, 2000, 2000, 2000, 1, 1, 1, 1])[:352], 100), "limit", "max_voxels")
    refused(gzip_bomb(b"", 100), "not a NIfTI")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_a_header_that_puts_voxels_nowhere_is_refused():
    for offset in (2e9, 0, -5, np.nan, np.inf):
        for compress in (bytes, gzip.compress):
            refused(compress(with_header(nifti(), vox_offset=offset)), "header is damaged")
    refused(with_header(nifti(), vox_offset=1000), "promises", "from byte 1000")


@pytest.mark.parametrize(
    "shape, words",
    [
        ((512, 512), "2 axes"),
        ((64, 64, 1), "2 axes"),
        ((8, 8, 8, 5), "8 x 8 x 8 x 5"),
        ((8, 8, 8, 1, 3), "8 x 8 x 8 x 1 x 3"),
        ((5, 0, 5), "no axes"),
    ],
)
def test_what_is_not_one_volume_is_refused(shape, words):
    if 0 not in shape:
        refused(nifti(values(shape)), words, "3 axes")
    buffer = io.BytesIO()
    np.save(buffer, values(shape))
    refused(buffer.getvalue(), words, "3 axes")


@pytest.mark.parametrize("dtype", [[("R", "u1"), ("G", "u1"), ("B", "u1")], np.complex64])
def test_colour_and_complex_niftis_are_refused(dtype):
    refused(nifti(np.ones((6, 6, 6), dtype)), "one real number")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted_and_refused(bad):
    array = values(dtype=np.float32)
    array[1, 2, 3] = array[3, 2, 1] = bad
    refused(nifti(array), "2 voxels", "NaN, infinite")
    array = values(dtype=np.float64)
    array[0, 0, 0] = -1e300
    refused(nifti(array), "1 voxels", "beyond 1e+30")


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_volume_is_refused(value):
    refused(nifti(np.full((8, 8, 8), value, np.int16)), f"every voxel of the scan is {value}")


def test_limits_are_named_with_the_setting_that_raises_them():
    refused(nifti(), "960", "500", "max_voxels", limits=Limits(max_voxels=500))
    refused(nifti(), "1,000", "max_bytes", limits=Limits(max_bytes=1000))
    refused(
        gzip.compress(nifti(np.zeros((12, 10, 8), np.int16))),
        "decompressed",
        "max_bytes",
        limits=Limits(max_bytes=1500),
    )


@pytest.mark.parametrize(
    "field, value", [("datatype", 999), ("magic", b"ni1"), ("dim", [-3] * 8), ("scl_inter", np.inf)]
)
def test_damaged_nifti_headers_are_refused(field, value):
    for compress in (bytes, gzip.compress):
        refused(compress(with_header(nifti(), **{field: value})))


def test_a_two_file_header_is_told_apart():
    refused(with_header(nifti(), magic=b"ni1"), "Analyze or two-file", ".nii")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "empty"),
        (b"hello, I am a text file" * 50, "not an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "not an image"),
        (gzip.compress(b"text" * 1000), "not a NIfTI"),
        (gzip.compress(b""), "not a NIfTI"),
        (bytes(128) + b"DICM" + bytes(500), "single DICOM file"),
        (b"\x5c\x01\x00\x00", "not an image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_formats_that_are_read(data, words):
    refused(data, words)


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_never_escapes_as_another_error(seed):
    random = np.random.default_rng(seed)
    sources = [nifti(), gzip.compress(nifti()), pack_scan(values())[0], zipped(series())]
    for source in sources:
        for _ in range(60):
            data = bytearray(source)
            for position in random.integers(0, min(len(data), 600), 4):
                data[position] = random.integers(256)
            try:
                read_scan(bytes(data))
            except InvalidInput:
                pass


# --- npy and arrays --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("leading", [(), (1,)])
def test_arrays_round_trip_through_the_client(order, leading):
    array = np.asarray(values(dtype=np.float32), order=order)
    scan = read_scan(pack_scan(array.reshape(*leading, *array.shape))[0])
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_array_equal(scan.affine, ARRAY_AFFINE)
    assert scan.kind == "npy" and scan.orientation == "SPL"
    data, affine = pack_scan(array, OBLIQUE.tolist())
    scan = read_scan(np.frombuffer(data, np.uint8), affine=affine)
    np.testing.assert_array_equal(scan.affine, OBLIQUE)
    assert scan.kind == "array"


@pytest.mark.parametrize(
    "turned",
    [
        np.ascontiguousarray,
        np.asfortranarray,
        lambda a: a[::2, 1:],
        lambda a: a[:0],
        lambda a: a.astype(">i2"),
        lambda a: a.T,
    ],
)
def test_an_array_goes_out_as_numpy_would_save_it(turned):
    array, saved = turned(values()), io.BytesIO()
    np.save(saved, array)
    assert pack_scan(array)[0] == saved.getvalue()


def test_masks_and_half_floats_are_taken_as_arrays():
    assert read_scan(pack_scan(values() > 50)[0]).array.dtype == np.uint8
    assert read_scan(pack_scan(values(dtype=np.float16))[0]).array.dtype == np.float32


def test_pickles_are_never_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}] * 8).reshape(2, 2, 2), allow_pickle=True)
    refused(buffer.getvalue(), "pickle")
    with pytest.raises(InvalidInput, match="real numbers"):
        pack_scan(np.array([None]))


def test_damaged_npy_is_refused():
    data = pack_scan(values())[0]
    refused(data[:-1], "promises", "truncated")
    refused(data[:20], "header")
    refused(data.replace(b"(12, 10, 8)", b"(12, 10,88)"), "promises")
    refused(data.replace(b"'shape'", b"'shame'"), "header")


@pytest.mark.parametrize("affine", [np.eye(3), np.zeros((4, 4)), np.full((4, 4), np.nan), "RAS", np.ones((4, 4))])
def test_a_bad_affine_is_refused(affine):
    refused(pack_scan(values())[0], "affine", "4 x 4", affine=affine)
    with pytest.raises(InvalidInput, match="affine"):
        pack_scan(values(), affine)


def test_an_affine_beside_a_file_that_has_one_is_refused():
    refused(nifti(), "brings its own", affine=np.eye(4))


def test_a_file_is_sent_as_it_is(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(nifti()))
    assert pack_scan(path)[0] == pack_scan(str(path))[0] == path.read_bytes()
    with pytest.raises(InvalidInput, match="No such file"):
        pack_scan(tmp_path / "nothing.nii")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="empty"):
        pack_scan(tmp_path / "empty")


def test_a_gzipped_scan_is_decompressed_once_and_not_copied():
    data = gzip.compress(nifti(values((128, 128, 128))))
    tracemalloc.start()
    scan = read_scan(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * scan.array.nbytes + (2 << 20)


def test_int16_is_read_without_a_copy():
    data = nifti(values((64, 64, 64)))
    tracemalloc.start()
    scan = read_scan(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * scan.array.nbytes


# --- DICOM -----------------------------------------------------------------------------------------------------------


def series(count=6, spacing=2.5, orientation=(1, 0, 0, 0, 1, 0), shape=(10, 12), modality="CT", **fields):
    """Slices of one CT series, shuffled; the value of a voxel tells slice, row and column."""
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    normal, uid = np.cross(along_row, along_column), generate_uid()
    slices = []
    for index in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.Modality = uid, modality
        dataset.Rows, dataset.Columns = shape
        dataset.ImageOrientationPatient, dataset.PixelSpacing = list(orientation), [0.7, 0.9]
        dataset.ImagePositionPatient = list(np.array([-50.0, 20, 100]) + index * spacing * normal)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        rows, columns = np.indices(shape)
        dataset.PixelData = (1000 + 1000 * index + 50 * rows + columns).astype(np.uint16).tobytes()
        for keyword, value in fields.items():
            setattr(dataset, keyword, value)
        slices.append(dataset)
    return [slices[i] for i in np.random.default_rng(0).permutation(count)]


def saved(dataset):
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def zipped(slices, compression=zipfile.ZIP_DEFLATED, extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for index, dataset in enumerate(slices):
            archive.writestr(f"series/{index:03}.dcm", saved(dataset))
        for name, content in extra:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_dicom_series_is_sorted_rescaled_and_placed_in_ras():
    scan = read_scan(zipped(series(), extra=[("series/", b""), ("README.txt", b"hello"), ("DICOMDIR", bytes(200))]))
    columns, rows, slices = np.indices((12, 10, 6))
    np.testing.assert_array_equal(scan.array, 1000 + 1000 * slices + 50 * rows + columns - 1024)
    assert scan.array.dtype == np.int16 and scan.modality == "CT" and scan.kind == "dicom"
    expected = np.array([[-0.9, 0, 0, 50], [0, -0.7, 0, -20], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    np.testing.assert_allclose(scan.affine, expected)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (0.8, 0.6, 0, 0.36, -0.48, -0.8)])
def test_coronal_sagittal_and_oblique_series_map_voxels_to_their_positions(orientation):
    slices = series(orientation=orientation)
    scan = read_scan(zipped(slices))
    for dataset in slices:
        value = dataset.pixel_array[4, 7] - 1024.0
        i, j, k = np.argwhere(scan.array == value)[0]
        along_row, along_column = np.reshape(dataset.ImageOrientationPatient, (2, 3))
        lps = dataset.ImagePositionPatient + 7 * 0.9 * along_row + 4 * 0.7 * along_column
        np.testing.assert_allclose((scan.affine @ [i, j, k, 1])[:3], lps * [-1, -1, 1], atol=1e-6)


def test_a_folder_of_dicom_files_is_read(tmp_path):
    (tmp_path / "study" / "a").mkdir(parents=True)
    for index, dataset in enumerate(series()):
        (tmp_path / "study" / "a" / f"IM{index}").write_bytes(saved(dataset))
    data, affine = pack_scan(tmp_path / "study")
    assert affine is None
    np.testing.assert_array_equal(read_scan(data).array, read_scan(zipped(series())).array)


def test_a_folder_with_file_names_that_are_not_utf8_is_read(tmp_path):
    for index, dataset in enumerate(series()):
        (tmp_path / os.fsdecode(b"Sch\xe4del%d" % index)).write_bytes(saved(dataset))
    np.testing.assert_array_equal(read_scan(pack_scan(tmp_path)[0]).array, read_scan(zipped(series())).array)


@pytest.mark.parametrize("limits", [Limits(max_files=5), Limits(max_bytes=599)])
def test_a_folder_over_the_limits_is_refused_before_a_file_is_read(tmp_path, monkeypatch, limits):
    for index in range(6):
        (tmp_path / f"IM{index}").write_bytes(bytes(100))
    pack_scan(tmp_path, limits=Limits(max_files=6, max_bytes=600))
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(InvalidInput, match=f"{tmp_path.name} has more than .*one DICOM series"):
        pack_scan(tmp_path, limits=limits)


def test_a_file_of_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "IM0").touch()

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InvalidInput, match="IM0 cannot be read: Permission denied"):
        pack_scan(tmp_path)


def test_a_tilted_gantry_gives_a_sheared_affine():
    slices = series()
    for dataset in slices:
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y + 0.2 * (z - 100), z]
    np.testing.assert_allclose(read_scan(zipped(slices)).affine[:3, 2], [0, -0.5, 2.5])


def test_slices_with_their_own_rescale_slope_become_float32():
    slices = series(modality="PT")
    for index, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 + index, 0
    scan = read_scan(zipped(slices))
    assert scan.array.dtype == np.float32 and scan.modality == "PT"
    first = min(slices, key=lambda d: d.ImagePositionPatient[2])
    np.testing.assert_allclose(scan.array[:, :, 0], first.pixel_array.T * float(first.RescaleSlope))


def enhanced(frames=5):
    """An enhanced multi-frame CT: geometry in functional groups, frames out of order."""
    dataset = series(1)[0]
    pixels = np.stack([np.full((10, 12), 100 * (frames - f)) for f in range(frames)]).astype(np.uint16)
    dataset.NumberOfFrames, dataset.PixelData = frames, pixels.tobytes()
    item, shared = pydicom.Dataset, pydicom.Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [item()], [item()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = dataset.ImageOrientationPatient
    shared.PixelMeasuresSequence[0].PixelSpacing = dataset.PixelSpacing
    for keyword in (
        "ImageOrientationPatient",
        "PixelSpacing",
        "ImagePositionPatient",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(dataset, keyword)
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], []
    for frame in range(frames):
        group = item()
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [item()], [item()]
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, -3.0 * frame]
        group.PixelValueTransformationSequence[0].RescaleSlope = 1
        group.PixelValueTransformationSequence[0].RescaleIntercept = -5
        dataset.PerFrameFunctionalGroupsSequence.append(group)
    return dataset


def test_enhanced_multi_frame_dicom_is_read():
    scan = read_scan(zipped([enhanced()]))
    np.testing.assert_array_equal(scan.array[0, 0], [95, 195, 295, 395, 495])
    assert scan.affine[2, 2] == 3 and scan.affine[2, 3] == -12


def test_a_series_is_read_within_three_times_its_size():
    data = zipped(series(40, shape=(256, 256)))
    tracemalloc.start()
    scan = read_scan(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * scan.array.nbytes


def test_mixed_series_are_refused_with_their_uids_and_counts():
    one, other = series(6), series(4)
    refused(
        zipped(one + other),
        "2 different series",
        one[0].SeriesInstanceUID,
        "6 slices",
        other[0].SeriesInstanceUID,
        "4 slices",
    )


def test_mixed_sizes_orientations_and_spacings_are_refused():
    slices, odd = series(6), series(6, shape=(8, 12))[0]
    odd.SeriesInstanceUID = slices[0].SeriesInstanceUID
    refused(zipped(slices + [odd]), "slice sizes", "10 x 12 (6 slices)", "8 x 12 (1 slices)")
    slices = series(6)
    slices[2].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    refused(zipped(slices), "2 different orientations", "(5 slices)")
    slices = series(6)
    slices[2].PixelSpacing = [0.7, 0.8]
    refused(zipped(slices), "2 different pixel spacings")


def test_duplicate_and_missing_slices_are_refused():
    slices = series(6)
    slices.append(pydicom.dcmread(io.BytesIO(saved(slices[0]))))
    slices[-1].SOPInstanceUID = generate_uid()
    refused(zipped(slices), "1 slices of 7", slices[0].SeriesInstanceUID, "one phase")
    slices = sorted(series(8), key=lambda d: d.ImagePositionPatient[2])
    refused(zipped(slices[:3] + slices[4:]), "missing", slices[0].SeriesInstanceUID, "5.000 mm", "2.500 mm")


def test_a_single_slice_is_refused():
    refused(zipped(series(1)), "2 axes", "12 x 10 x 1")


def test_slices_without_a_place_in_space_are_refused():
    slices = series()
    del slices[0].ImagePositionPatient
    refused(zipped(slices), "ImagePositionPatient")
    refused(zipped(series(PixelSpacing=[0, 0.7])), "PixelSpacing")


def test_colour_slices_are_refused():
    refused(zipped(series(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)), "RGB", "grey")


def test_inverted_grey_values_are_named_as_such():
    refused(zipped(series(PhotometricInterpretation="MONOCHROME1")), "low values are the bright ones", "invert")


@pytest.mark.parametrize("with_meta", [True, False])
def test_a_series_without_preambles_is_read(with_meta):
    # What is no image goes on being passed over, although it starts as a data set does.
    members = [("counts.bin", b"\x08\0\0\0" + bytes(range(256))), ("report", b"\x08\0\x60\0CS\x02\0SR")]
    for index, dataset in enumerate(series()):
        content = saved(dataset)[132:]
        meta_length = 12 + int.from_bytes(content[8:12], "little")
        members.append((f"IM{index}", content if with_meta else content[meta_length:]))
    np.testing.assert_array_equal(read_scan(zipped([], extra=members)).array, read_scan(zipped(series())).array)


@pytest.mark.parametrize("tag", [b"\x28\0\x02\0US", b"\x28\0\x08\0IS", b"\x20\0\x32\0DS", b"\x28\0\x53\x10DS"])
def test_a_tag_of_an_unknown_kind_of_value_is_damage(tag):
    content = saved(series(NumberOfFrames=1)[0])
    assert content.count(tag) == 1
    refused(zipped(series(), extra=[("bad.dcm", content.replace(tag, tag[:4] + b"QQ"))]), "bad.dcm is a damaged DICOM")


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.9", "1.2.840.10008.1.1", "1.2.840.9"])
def test_an_unknown_transfer_syntax_is_named(uid):
    known = ExplicitVRLittleEndian.encode() + b"\0"
    content = saved(series(1)[0]).replace(known, uid.encode().ljust(len(known), b"\0"))
    refused(zipped(series(), extra=[("odd.dcm", content)]), f"odd.dcm has the transfer syntax {uid}", "dcmconv")


def test_a_compressed_series_without_a_decoder_says_what_to_do(monkeypatch):
    from pydicom.encaps import encapsulate

    slices = series(PixelData=encapsulate([b"\xff\x4f\xff\x51nonsense"]))
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset["PixelData"].is_undefined_length = True
    refused(zipped(slices), "JPEG 2000", "decompress the series")


def test_deflated_dicom_is_refused_before_it_is_inflated():
    slices = series()
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    refused(zipped(slices), "deflated", "dcmconv")


def test_rle_compressed_series_are_read():
    slices = series()
    for dataset in slices:
        dataset.compress(pydicom.uid.RLELossless)
    np.testing.assert_array_equal(read_scan(zipped(slices)).array, read_scan(zipped(series())).array)


def test_pixels_shorter_than_promised_are_refused():
    slices = series()
    slices[0].PixelData = slices[0].PixelData[:-20]
    refused(zipped(slices), "truncated or damaged")


def test_a_zip_bomb_stops_before_it_expands():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb.dcm", "w", force_zip64=True) as member:
            for _ in range(100):
                member.write(bytes(1 << 20))
    bomb = buffer.getvalue()
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    refused(bomb, "unpacked zip", "max_bytes", limits=Limits(max_bytes=50 << 20))
    position = bomb.rindex(b"PK\x01\x02")  # the central directory understates the size
    lie = bytearray(bomb)
    lie[position + 24 : position + 28] = (1000).to_bytes(4, "little")
    refused(bytes(lie), limits=Limits(max_bytes=50 << 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_zip_limits_and_damage():
    data = zipped(series())
    refused(data, "6 files", "max_files", limits=Limits(max_files=5))
    refused(data, "more than 500 voxels", limits=Limits(max_voxels=500))
    refused(data[: len(data) // 2], "damaged")
    refused(zipped([], extra=[("a.txt", b"hello")]), "no DICOM images")
    refused(zipped([]), "no DICOM images")
    broken = bytearray(zipped(series(), zipfile.ZIP_STORED))
    broken[2000] ^= 255
    refused(bytes(broken), "damaged")


def patched(archive, record, offset, content):
    """The archive with `content` at `offset` behind the last `record`."""
    start = archive.rindex(record) + offset
    return archive[:start] + content + archive[start + len(content) :]


def without_a_name(archive):
    """The zip with an empty name in its directory, and the room for the name in the comment behind it."""
    position = archive.rindex(b"PK\x01\x02")
    size = archive[position + 28 : position + 30]
    return archive[: position + 28] + bytes(4) + size + archive[position + 34 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda: without_a_name(zipped([], extra=[("a.dcm", bytes(200))])),
        lambda: patched(zipped([], extra=[("a.dcm", bytes(200))]), b"PK\x05\x06", 16, b"\xff\xff\xff\x7f"),
        lambda: patched(zipped([], zipfile.ZIP_LZMA, [("a.dcm", bytes(200))]), b"PK\x03\x04", 39, b"\xff" * 5),
    ],
    ids=["a name that is none", "members before the start", "LZMA"],
)
def test_damaged_zips_never_escape_as_another_error(damage):
    refused(damage(), "the zip is damaged")
