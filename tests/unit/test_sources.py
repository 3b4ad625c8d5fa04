"""Whatever a user hands over is sent with its values and its place, or refused with what to hand over instead."""

from __future__ import annotations

import contextlib
import gzip
import io
import mmap
import os
import tempfile
import warnings
from pathlib import Path

import ml_dtypes
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from engine.client import M3DClient
from engine.errors import InvalidInput
from engine.scan import ARRAY_AFFINE, pack_scan, read_scan, scan_pieces
from engine.scan.limits import Limits
from tests.unit.foreign import DIRECTIONS, DTYPES, ORIGIN, SPACING, assert_as_itk, assert_as_nibabel, itk_image, voxels
from tests.unit.refusals import refused_source as refused
from tests.unit.test_scan import nifti, saved, series, zipped

AFFINE = nib.affines.from_matvec(DIRECTIONS[-1] * SPACING, ORIGIN)


def received(source, affine=None):
    """The scan as the server reads it."""
    data, affine = pack_scan(source, affine)
    return read_scan(data, affine=affine)


@pytest.mark.parametrize(
    "source",
    [
        nifti(),
        io.BytesIO(nifti()),
        nib.Nifti1Image(voxels(), AFFINE),
        itk_image(),
        torch.from_numpy(voxels(np.float32)),
    ],
    ids=lambda source: type(source).__name__,
)
def test_the_client_sends_what_it_is_given(triton, source):
    data, affine = pack_scan(source)
    with M3DClient(triton.url, timeout=30) as client:
        study = client.upload(source)
        np.testing.assert_array_equal(study.source.read().array, read_scan(data, affine=affine).array)
        for wrong in (None, 5, [voxels()], voxels()[0], "no/such/file.nii"):
            with pytest.raises(InvalidInput):
                client.upload(wrong)
    (whole,) = triton.uploads
    assert whole["VOLUME"].tobytes() == data
    np.testing.assert_array_equal(whole.get("AFFINE", affine), affine)


# --- nibabel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.MGHImage, nib.Spm99AnalyzeImage]
)
@pytest.mark.parametrize("direction", DIRECTIONS[::7], ids=range(len(DIRECTIONS[::7])))
def test_a_nibabel_image_lies_where_nibabel_has_it(kind, direction):
    image = kind(voxels(), nib.affines.from_matvec(direction * SPACING, ORIGIN))
    scan = received(image)
    assert_as_nibabel(scan, image)
    assert not scan.notes
    assert (scan.kind, scan.header is None) == (
        ("nifti", False) if isinstance(image, nib.Nifti1Pair) else ("array", True)
    )


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16, np.bool_, np.longdouble, ">i2", ">f4"])
def test_a_nibabel_image_of_any_type_is_taken(dtype):
    array = voxels() > 50 if dtype is np.bool_ else voxels(dtype)
    header = nib.Nifti1Header()  # says int16, whatever the array is
    for image in (nib.Nifti1Image(array, AFFINE, header), nib.Spm2AnalyzeImage(array.astype("f4"), AFFINE)):
        np.testing.assert_array_equal(received(image).array, array.astype("f4"))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img"])
@pytest.mark.parametrize("order", "<>")
def test_a_loaded_nifti_is_sent_as_its_file_is_stored(tmp_path, suffix, order):
    """Scaled values would be rounded if they were stored anew, as nibabel's to_bytes does."""
    kind = nib.Nifti1Pair if suffix == ".img" else nib.Nifti1Image
    header = kind.header_class(endianness=order)
    header["descrip"] = b"a name"
    image = kind(voxels(), AFFINE, header)
    image.header.set_slope_inter(0.37, -3.1)
    image.header.set_qform(AFFINE, code="scanner")
    nib.save(image, tmp_path / f"a{suffix}")
    loaded = nib.load(tmp_path / f"a{suffix}")
    scan = received(loaded)
    np.testing.assert_allclose(scan.array, np.asanyarray(loaded.dataobj), rtol=1e-6)
    assert_same_header(scan.header, loaded.header)
    assert b"a name" not in pack_scan(loaded)[0] and scan.kind == "nifti" and not scan.notes
    if suffix != ".img":
        by_path = received(tmp_path / f"a{suffix}")
        np.testing.assert_array_equal(by_path.array, scan.array)
        np.testing.assert_array_equal(by_path.affine, scan.affine)
        assert by_path.header == scan.header


def assert_same_header(given: bytes, header) -> None:
    found = nib.Nifti1Header(given, check=False)
    for name in ("sform_code", "qform_code", "quatern_b", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(found[name], header[name])


def test_a_nibabel_image_that_was_changed_is_sent_as_it_is_now(tmp_path):
    nib.save(nib.Nifti1Image(voxels(), AFFINE), tmp_path / "a.nii")
    loaded = nib.load(tmp_path / "a.nii")
    moved = nib.Nifti1Image(loaded.dataobj, np.diag([2.0, 3, 4, 1]), loaded.header)
    np.testing.assert_array_equal(received(moved).affine, np.diag([2, 3, 4, 1]))
    sliced = loaded.slicer[1:, ::2]
    assert_as_nibabel(received(sliced), sliced)
    turned = loaded.as_reoriented(nib.io_orientation(loaded.affine))
    assert_as_nibabel(received(turned), turned)
    loaded.header.set_data_dtype(np.float64)  # of a file to be saved: what is loaded stays what it is
    np.testing.assert_array_equal(received(loaded).array, voxels())


def test_a_nibabel_image_without_a_place_is_a_guess():
    blank = nib.AnalyzeImage(voxels(), None)
    for image in (
        nib.Nifti1Image(voxels(), None),
        nib.AnalyzeImage(voxels(), blank.header.get_base_affine(), blank.header),
    ):
        scan = received(image)
        np.testing.assert_array_equal(scan.array, voxels())
        assert any("guess" in note for note in scan.notes)


def test_units_of_a_nibabel_image_count():
    image = nib.Nifti1Image(voxels(), np.diag([0.002, 0.003, 0.004, 1]))
    image.header.set_xyzt_units("meter")
    assert received(image).spacing_mm == pytest.approx((2, 3, 4))


def test_what_is_no_volume_is_refused_of_nibabel_images(tmp_path):
    assert received(nib.Nifti1Image(voxels()[..., None], AFFINE)).array.shape == voxels().shape
    for image, words in (
        (nib.Nifti1Image(np.zeros((6, 5, 4, 3), np.int16), AFFINE), "6 x 5 x 4 x 3"),
        (nib.MGHImage(np.zeros((6, 5, 4, 3), np.int16), AFFINE), "6 x 5 x 4 x 3"),
        (nib.Nifti1Image(np.zeros((1, 6, 5, 4), np.int16), AFFINE), "1 x 6 x 5 x 4"),
        (nib.Nifti1Image(np.zeros((6, 5, 4), np.complex64), AFFINE), "real numbers"),
        (nib.Nifti1Image(np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE), "real numbers"),
        (nib.Nifti1Image(voxels(), np.ones((4, 4))), "affine"),
    ):
        refused(image, words)
    refused(nib.Nifti1Image(voxels(), AFFINE), "brings its own", affine=AFFINE)
    nib.save(nib.Nifti1Image(voxels(), AFFINE), tmp_path / "a.nii.gz")
    loaded = nib.load(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes()[:120])
    refused(loaded, "Nifti1Image", "cannot be read")
    (tmp_path / "a.nii.gz").unlink()
    refused(loaded, "Nifti1Image", "cannot be read", "No such file")


# --- SimpleITK -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS, ids=range(len(DIRECTIONS)))
def test_a_simpleitk_image_lies_where_itk_has_it(direction):
    image = itk_image(direction=direction)
    scan = received(image)
    assert_as_itk(scan, image)
    assert scan.kind == "array" and not scan.notes


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_simpleitk_image_of_any_type_is_taken(dtype):
    assert_as_itk(received(itk_image(dtype)), itk_image(dtype))


def test_a_nifti_that_simpleitk_wrote_lies_where_it_lies(tmp_path):
    for direction in DIRECTIONS:
        image = itk_image(direction=direction)
        sitk.WriteImage(image, tmp_path / "a.nii.gz")
        assert_as_itk(received(tmp_path / "a.nii.gz"), image)


def test_a_simpleitk_image_outlives_its_owner():
    """SimpleITK's views do not keep the image that they look into."""
    pieces, affine = scan_pieces(itk_image())
    np.testing.assert_array_equal(read_scan(b"".join(pieces), affine=affine).array, voxels())


@pytest.mark.parametrize(
    "image, words",
    [
        (sitk.Image([6, 5, 4], sitk.sitkVectorUInt8, 3), "3 values a voxel"),
        (sitk.Image([6, 5], sitk.sitkInt16), "6 x 5"),
        (sitk.Image([6, 5, 4, 3], sitk.sitkInt16), "6 x 5 x 4 x 3"),
        (sitk.Image([6, 5, 4], sitk.sitkComplexFloat32), "real numbers"),
        (sitk.Image([6, 5, 4], sitk.sitkLabelUInt8), "label"),
    ],
    ids=["vector", "2d", "4d", "complex", "label"],
)
def test_what_is_no_volume_is_refused_of_simpleitk_images(image, words):
    refused(image, words)


def test_itks_own_images_are_told_apart():
    class Image:  # as the itk package's are: numpy would read their values, and nothing of their place
        GetSize = GetSpacing = GetOrigin = GetDirection = lambda self: (1, 1, 1)

        def __array__(self, *_, **__):
            return voxels()

    refused(Image(), "SimpleITK")


# --- bytes, file objects, paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(data + data)[: len(data)]])
def test_bytes_are_a_files_content(kind):
    for data in (nifti(), gzip.compress(nifti()), pack_scan(voxels())[0], zipped(series())):
        assert pack_scan(kind(data))[0] == data


def test_binary_file_objects_are_read_from_their_start(tmp_path):
    path, packed = tmp_path / "a.nii", tmp_path / "a.nii.gz"
    path.write_bytes(nifti())
    packed.write_bytes(gzip.compress(nifti()))
    written = io.BytesIO()
    written.write(nifti())  # and stands at its end
    with contextlib.ExitStack() as stack:
        file, raw, mapped = (stack.enter_context(open(path, *mode)) for mode in (["rb"], ["rb", 0], ["r+b"]))
        temporary = stack.enter_context(tempfile.TemporaryFile())
        temporary.write(nifti())
        sources = [written, io.BytesIO(nifti()), io.BufferedReader(io.BytesIO(nifti())), file, raw, temporary]
        sources += [stack.enter_context(mmap.mmap(mapped.fileno(), 0)), stack.enter_context(gzip.open(packed))]
        for source in sources:
            assert pack_scan(source)[0] == nifti() == pack_scan(source)[0]


def test_a_pipe_is_read_once(tmp_path):
    reading, writing = os.pipe()
    with open(reading, "rb") as out, open(writing, "wb") as into:
        into.write(nifti())
        into.close()
        assert pack_scan(out)[0] == nifti()
        refused(out, "read to its end")


def test_file_objects_that_give_no_bytes_say_how_to_open_them(tmp_path):
    path = tmp_path / "a.nii"
    path.write_bytes(nifti())
    with open(path) as text, open(path, "ab") as written:
        refused(text, "'rb'")
        refused(io.StringIO("text"), "'rb'")
        refused(written, "cannot be read")
    refused(written, "cannot be read")  # closed
    refused(io.BytesIO(), "empty")

    class Odd:
        def read(self):
            return 5

    refused(Odd(), "gives int")


@pytest.mark.parametrize("kind", [list, tuple, lambda paths: [str(path) for path in paths], lambda paths: paths[::-1]])
def test_a_list_of_dicom_files_is_sent_as_their_folder(tmp_path, kind, monkeypatch):
    (tmp_path / "b").mkdir()
    for index, dataset in enumerate(series()):
        (tmp_path / ("b" if index % 2 else "") / f"{index // 2}.dcm").write_bytes(saved(dataset))
    paths = sorted(tmp_path.rglob("*.dcm"))
    expected = read_scan(zipped(series()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (kind(paths), kind([*paths, paths[0]])):
            scan = received(given)
            np.testing.assert_array_equal(scan.array, expected.array)
            np.testing.assert_array_equal(scan.affine, expected.affine)
    assert bytes(tmp_path) not in pack_scan(kind(paths))[0]
    monkeypatch.chdir(tmp_path)
    relative = [path.relative_to(tmp_path) for path in paths]
    assert pack_scan(relative)[0] == pack_scan(paths)[0] == pack_scan(tmp_path)[0]


def test_lists_of_other_things_say_what_a_list_holds(tmp_path):
    refused([], "empty", "folder")
    refused(["a.dcm", "b.dcm"], "a.dcm cannot be read", "No such file", "folder")
    refused([tmp_path], "is a folder", "alone")
    refused([voxels(), voxels()], "list of 2", "ndarray", "numpy.stack", "paths")
    refused((torch.ones(5, 5), torch.ones(5, 5)), "tuple of 2", "Tensor", "numpy.stack")
    refused(voxels().tolist(), "list of 6", "paths")
    refused([nib.Nifti1Image(voxels(), AFFINE)], "Nifti1Image", "paths")
    refused([nifti()], "bytes", "paths")
    refused([None], "None", "paths")
    (tmp_path / "a.dcm").write_bytes(bytes(10))
    refused([tmp_path / "a.dcm"] * 3, "max_bytes", limits=Limits(max_bytes=5))
    refused([""], "path is empty")
    refused(["a\0b"], "cannot be read")


@pytest.mark.parametrize(
    "path, words",
    [
        ("nothing.nii", "nothing.nii cannot be read: No such file"),
        (Path("no/such/folder"), "No such file"),
        ("", "path is empty"),
        ("  ", "path is empty"),
        ("a\0b.nii", "cannot be read"),
        ("long" * 5000, "File name too long"),
        ("https://example.org/scan.nii.gz", "download it first"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_paths_that_lead_nowhere_are_named(path, words):
    refused(path, words)


def test_a_path_may_be_of_any_kind_but_bytes(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti())

    class Pathlike:
        def __fspath__(self):
            return os.fsencode(tmp_path / "a.nii")

    assert pack_scan(Pathlike())[0] == nifti()
    refused(os.fsencode(tmp_path / "a.nii"), "are a path", "as str")
    (tmp_path / "empty.nii").touch()
    refused(tmp_path / "empty.nii", "is empty", "NIfTI")


@pytest.mark.parametrize("name", ["a.img", "a.raw", "a.zraw", "a.REC", "a+orig.BRIK"])
def test_half_of_a_pair_says_what_to_send(tmp_path, name):
    (tmp_path / name).write_bytes(voxels().tobytes())
    refused(tmp_path / name, "voxels only", "header", ".nii")
    (tmp_path / name).write_bytes(nifti())  # a name says nothing
    assert pack_scan(tmp_path / name)[0] == nifti()


# --- arrays ----------------------------------------------------------------------------------------------------------

FLOATS = [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", [*FLOATS, *INTS, torch.bool], ids=str)
def test_a_tensor_of_any_type_is_taken(dtype):
    tensor = torch.from_numpy(voxels(np.float32)).to(dtype)
    scan = received(tensor, AFFINE)
    np.testing.assert_array_equal(scan.array, tensor.to(torch.float32).numpy())
    np.testing.assert_array_equal(scan.affine, AFFINE)


def test_a_tensor_is_taken_whatever_hangs_on_it():
    tensor = torch.from_numpy(voxels(np.float32))
    for given in (
        tensor.clone().requires_grad_(),
        tensor.clone().requires_grad_() * 1,
        tensor.to(torch.bfloat16).requires_grad_(),
        torch.nn.Parameter(tensor),
        tensor[None, None],
        tensor[..., None],
        tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        tensor.to_sparse(),
        torch.quantize_per_tensor(tensor, 1.0, 0, torch.quint8),
        torch.complex(tensor, -tensor).conj().imag,
    ):
        np.testing.assert_array_equal(received(given, AFFINE).array, tensor.numpy())


def test_tensors_without_real_values_are_refused():
    refused(torch.ones(5, 5, 5, dtype=torch.complex64), "complex64", "real numbers")
    refused(torch.ones(5, 5, 5, device="meta"), "meta device")
    refused(torch.ones(5, 5), "5 x 5", "3 axes")
    refused(torch.ones(3, 5, 5, 5), "3 x 5 x 5 x 5", "one volume")
    refused(torch.tensor(3.0), "of a scalar")


def test_monais_tensors_bring_their_affine():
    array = torch.from_numpy(voxels())[None]
    scan = received(MetaTensor(array, affine=torch.from_numpy(AFFINE)))
    np.testing.assert_array_equal(scan.affine, AFFINE)
    np.testing.assert_array_equal(scan.array, voxels())
    lps = MetaTensor(array, affine=torch.from_numpy(AFFINE), meta={"space": "LPS"})
    np.testing.assert_allclose(received(lps).affine, np.diag([-1, -1, 1, 1]) @ AFFINE)
    read = MetaTensor(array, affine=torch.eye(4), meta={"filename_or_obj": "a.nii"})
    np.testing.assert_array_equal(received(read).affine, np.eye(4))
    unknown = received(MetaTensor(array))  # MONAI's identity: nobody knows where it lies
    assert unknown.kind == "npy" and unknown.notes
    given = received(MetaTensor(array, affine=torch.from_numpy(AFFINE)), np.diag([2.0, 3, 4, 1]))
    np.testing.assert_array_equal(given.affine, np.diag([2, 3, 4, 1]))
    refused(MetaTensor(array, affine=torch.zeros(4, 4)), "affine")


@pytest.mark.parametrize("shape", [(1, 6, 5, 4), (1, 1, 6, 5, 4), (6, 5, 4, 1), (6, 5, 4, 1, 1)])
def test_axes_of_length_one_around_a_volume_are_dropped(shape):
    np.testing.assert_array_equal(received(voxels().reshape(shape), AFFINE).array, voxels())


def test_other_arrays_are_taken():
    bfloat = voxels(np.float32).astype(ml_dtypes.bfloat16)
    for array in (bfloat, voxels(np.longdouble), np.ma.masked_array(voxels(), mask=False), voxels() > 50):
        np.testing.assert_array_equal(received(array, AFFINE).array, np.asarray(array).astype(np.float32))

    class Foreign:
        __array_interface__ = voxels().__array_interface__
        held = voxels()

    assert received(Foreign(), AFFINE).array.shape == voxels().shape
    np.testing.assert_array_equal(received(voxels()).affine, ARRAY_AFFINE)


@pytest.mark.parametrize(
    "source, words",
    [
        (None, "None is no scan"),
        (5, "5 is no scan"),
        (2.5, "2.5 is no scan"),
        (True, "True is no scan"),
        ({"a": 1}, "type dict"),
        ({1, 2}, "type set"),
        ((path for path in ()), "type generator"),
        (object(), "type object"),
        (np.ndarray, "the class ndarray"),
        (series(1)[0], "pydicom"),
        (np.float32(3), "of a scalar"),
        (np.array([None]), "object"),
        (np.full((5, 5, 5), None), "object"),
        (np.array(["a.dcm", "b.dcm"]), "<U5"),
        (np.ones((5, 5, 5), np.complex128), "complex128"),
        (np.zeros((5, 5, 5), [("a", "i2")]), "real numbers"),
        (np.zeros((5, 5, 5), "M8[s]"), "datetime64"),
        (np.zeros((6, 5, 4, 3)), "6 x 5 x 4 x 3"),
        (np.zeros((6, 5)), "6 x 5"),
        (np.zeros(6), "shape 6"),
        (np.ma.masked_array(voxels(), mask=voxels() > 3), "filled"),
        (memoryview(voxels()), "numpy.asarray"),
        (b"", "no bytes"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_scan_is_refused_by_name_with_what_may_be_given(source, words):
    refused(source, words)


def test_arrays_that_cannot_be_read_are_refused():
    class Broken:
        def __array__(self, *_, **__):
            raise RuntimeError("on the moon")

    refused(Broken(), "Broken", "on the moon", "NumPy")


@pytest.mark.parametrize("affine", ["RAS", object(), [[1, 2], [3]], torch.ones(3, 3), np.full((4, 4), None), {}])
def test_an_affine_that_is_none_is_refused(affine):
    refused(voxels(), "affine", "4 x 4", affine=affine)


def test_an_affine_may_be_a_tensor():
    np.testing.assert_array_equal(received(voxels(), torch.from_numpy(AFFINE)).affine, AFFINE)
