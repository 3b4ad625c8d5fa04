"""What a file is decides its bytes, not its name; and one that is not read says what it is and what to send."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import io as matlab

from engine.cli import options
from engine.errors import InvalidInput
from engine.scan import FORMATS, pack_scan, read_scan
from tests.unit.refusals import refused
from tests.unit.test_metaimage import file as metaimage
from tests.unit.test_mgh import mgh
from tests.unit.test_nrrd import file as nrrd
from tests.unit.test_scan import nifti, saved, series, values, with_header


def written(save, *arguments, **options) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arguments, **options)
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    return written(Image.fromarray(values((64, 64, 2), np.uint8)[..., 0]).save, kind)


def archive(**members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for index, dataset in enumerate(series(3)):
            file.addfile(tarfile.TarInfo(f"{index}.dcm"), io.BytesIO(saved(dataset)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, words",
    [
        (picture("JPEG"), "a JPEG picture"),
        (picture("PNG"), "a PNG picture"),
        (picture("GIF"), "a GIF picture"),
        (picture("BMP"), "a BMP picture"),
        (picture("TIFF"), "a TIFF picture"),
        (picture("WEBP"), "a picture or video"),
        (b"%PDF-1.7\n" + bytes(999), "a PDF document"),
        (b"\x89HDF\r\n\x1a\n" + bytes(999), "an HDF5 file"),
        (written(matlab.savemat, {"volume": values()}), "a MATLAB file"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n" + bytes(999), "a MATLAB file"),
        (b"CDF\x01" + bytes(999), "MINC"),
        (b"\x80\x04\x95" + bytes(999), "a pickle"),
        (tar(), "a tar archive"),
        (b"BZh91AY&SY" + bytes(999), "bzip2"),
        (b"\xfd7zXZ\0" + bytes(999), "xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(999), "zstd"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(999), "7z"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"../.git/annex/objects/aa/bb/MD5E-s1--0.nii.gz/MD5E-s1--0.nii.gz", "git-annex"),
        (b"# vtk DataFile Version 3.0\n", "VTK"),
        (b"# === DATA DESCRIPTION FILE ======", "PAR/REC"),
        (b"\ntype = string-attribute\nname = HISTORY_NOTE\n", "AFNI"),
        (b"!INTERFILE :=\n", "Interfile"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_another_kind_is_named_with_what_to_send(data, words):
    refused(data, words, FORMATS)
    refused(gzip.compress(data), words, "gzip")


@pytest.mark.parametrize(
    "data, words",
    [
        (archive(**{"scan.nii.gz": gzip.compress(nifti())}), "scan.nii.gz"),
        (archive(**{"a/scan.nii": nifti(), "a/scan.json": b"{}", "__MACOSX/._scan.nii": b"x"}), "a/scan.nii"),
        (archive(**{"a.nrrd": nrrd()}), "a.nrrd"),
        (archive(**{"a.hdr": nifti()[:348], "a.img": nifti()[352:]}), "one .nii"),
        (written(np.savez, values()), ".npz archive of 1 arrays"),
        (written(np.savez_compressed, a=values(), b=values()), ".npz archive of 2 arrays"),
        (written(lambda buffer: torch.save(torch.ones(3), buffer)), "a PyTorch file"),
        (archive(**{"README.md": b"hello"}), "DICOM"),
        (archive(), "DICOM"),
    ],
)
def test_a_zip_of_other_files_is_named_with_what_to_send(data, words):
    refused(data, words)


def test_a_folder_of_other_files_is_named_with_what_to_send(tmp_path):
    for name in ("A.nii", "b.nii"):
        (tmp_path / name).write_bytes(nifti())
    refused(pack_scan(tmp_path)[0], "the folder or zip holds A.nii", "send that file itself")


def test_what_gzip_holds_decides_the_reader():
    assert read_scan(gzip.compress(nifti())).kind == "nifti" and read_scan(gzip.compress(mgh())).kind == "mgh"
    others = {"nrrd": nrrd(), "metaimage": metaimage(), "npy": pack_scan(values())[0], "dicom": saved(series(1)[0])}
    for kind, data in others.items():
        refused(gzip.compress(data), kind, "without the gzip")
    refused(gzip.compress(gzip.compress(nifti())), "gzipped once more")


def test_the_formats_are_named_in_errors_and_help():
    for word in (".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz", "DICOM", ".npy"):
        assert word in FORMATS and word in options._SCAN
    refused(b"hello", FORMATS)


@pytest.mark.parametrize("padding", [1, 511, 5000, 3 << 20])
@pytest.mark.parametrize("cut", [100, 348, 352, 700])
def test_zeros_between_and_behind_gzip_members_are_skipped(padding, cut):
    zeros = bytes(padding)
    data = gzip.compress(nifti()[:cut]) + zeros + gzip.compress(nifti()[cut:]) + zeros
    np.testing.assert_array_equal(read_scan(data).array, values())


@pytest.mark.parametrize("tail", [b"\x1f", b"\x1f\x8a", b"\0\x1f", b"more", bytes(7) + b"more"])
def test_what_follows_the_last_gzip_member_is_left_aside(tail):
    np.testing.assert_array_equal(read_scan(gzip.compress(nifti()) + tail).array, values())
    half = gzip.compress(nifti()[:700])
    refused(half + tail, "promises")


def test_many_small_gzip_members_are_one_stream():
    data, pieces = nifti(), []
    for start in range(0, len(data), 7):
        pieces += [gzip.compress(data[start : start + 7]), gzip.compress(b""), bytes(start % 3)]
    np.testing.assert_array_equal(read_scan(b"".join(pieces)).array, values())


def test_bytes_behind_a_niftis_voxels_are_left_aside():
    for tail in (b"\0", bytes(1000), b"a footer", nifti()):
        np.testing.assert_array_equal(read_scan(nifti() + tail).array, values())
        np.testing.assert_array_equal(read_scan(gzip.compress(nifti() + tail)).array, values())


def test_half_of_a_nifti_pair_says_what_to_send(tmp_path):
    nib.save(nib.Nifti1Pair(values(), np.eye(4)), tmp_path / "a.img")
    nib.save(nib.AnalyzeImage(values(), np.eye(4)), tmp_path / "b.img")
    for name in "ab":
        header = (tmp_path / f"{name}.hdr").read_bytes()
        refused(header, "two-file", "one .nii")
        refused(gzip.compress(header), "two-file", "one .nii")
        with pytest.raises(InvalidInput, match="voxels only.*.hdr.*.nii"):
            pack_scan(tmp_path / f"{name}.img")
    refused(with_header(nifti(), magic=b"ni1"), "two-file", "one .nii")


def test_a_zlib_stream_alone_is_no_scan():
    refused(zlib.compress(nifti()), "not an image")
