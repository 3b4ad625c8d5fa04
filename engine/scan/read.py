"""Reads a scan from a file's bytes, whatever its format: what the bytes are decides, never a name."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import checked_affine
from engine.scan.dicom import (
    looks_like_dicom,
    read_dicom_file,
    read_dicom_zip,
    read_series_of_file,
    read_series_of_zip,
)
from engine.scan.dicom.references import SeriesReference
from engine.scan.formats import FORMATS, HEAD, named, not_an_image
from engine.scan.inflate import Inflate
from engine.scan.limits import Limits
from engine.scan.metaimage import is_metaimage, read_metaimage
from engine.scan.mgh import is_mgh, mgh_size, read_mgh
from engine.scan.nifti import is_nifti, nifti_size, read_nifti
from engine.scan.npy import is_npy, read_npy
from engine.scan.nrrd import is_nrrd, read_nrrd
from engine.scan.parts import Volume
from engine.scan.scan import Scan
from engine.scan.values import checked_values

_GZIP, _ZIP = b"\x1f\x8b", (b"PK\x03\x04", b"PK\x05\x06")
_READERS: dict[str, tuple[Callable[[bytes], bool], Callable[[memoryview, Limits], Volume]]] = {
    "npy": (is_npy, read_npy),
    "nifti": (is_nifti, read_nifti),
    "nrrd": (is_nrrd, read_nrrd),
    "metaimage": (is_metaimage, read_metaimage),
    "mgh": (is_mgh, read_mgh),
}
# Formats that are gzipped as a whole: how many bytes a file has up to the end of its voxels, as its first HEAD say.
_GZIPPED: dict[str, Callable[[bytes, Limits], int]] = {"nifti": nifti_size, "mgh": mgh_size}
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mgh", ".mgz", ".hdr", ".img", ".npy")
_BESIDE = (
    ".json",
    ".txt",
    ".csv",
    ".tsv",
    ".bval",
    ".bvec",
    ".md",
    ".ds_store",
    "/",
)  # what archives have beside those


def read_scan(
    data: bytes | memoryview | np.ndarray, *, affine: np.ndarray | None = None, limits: Limits = Limits()
) -> Scan:
    """The scan in a file's bytes, of one of FORMATS.

    Args:
        data: the file. The scan's array may share memory with it.
        affine: for .npy only, [4, 4], RAS+ mm; without it the axes are taken as ARRAY_AFFINE says. An .npy may have
            leading axes of length 1, as M3D's own volumes do.
        limits: what the file may weigh. Beside `data`, at most 3 times the scan's size is in use.

    Raises:
        InvalidInput: naming cause, limit and way out, for all but one finite, non-constant volume within limits.
        Unavailable: a package that the file needs is not installed; the message says which.
    """
    try:
        data = (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")
    except TypeError as error:
        raise InvalidInput(
            f"the bytes of a file are wanted, not {type(data).__name__} ({error}): `engine.scan.pack_scan` makes them "
            "of paths, arrays and images"
        ) from None
    limits.check_bytes(len(data), "the file")
    if affine is not None and not is_npy(bytes(data[:HEAD])):
        raise InvalidInput("an affine was given with a file that brings its own: give one with arrays and .npy only")
    kind, found = read_volume(data, limits)
    if affine is not None:
        kind, found = "array", replace(found, affine=checked_affine(affine), notes=())
    array, offset, notes = checked_values(found.array)
    notes = (*found.notes, *notes)
    return Scan(array, found.affine, kind, found.modality, offset, found.header, notes, found.series)


def read_volume(data: memoryview, limits: Limits = Limits()) -> tuple[str, Volume]:
    """(kind, volume) of a file's bytes, its values as they are: a label image may be constant. Raises InvalidInput."""
    head = bytes(data[:HEAD])
    if head.startswith(_GZIP):
        return _read_gzipped(data, limits)
    if head.startswith(_ZIP):
        return "dicom", _read_zip(data, limits)
    for kind, (is_kind, read) in _READERS.items():
        if is_kind(head):
            return kind, read(data, limits)
    if looks_like_dicom(head):
        return "dicom", read_dicom_file(data, limits)
    raise InvalidInput(not_an_image(head))


def read_series(data: bytes | memoryview, limits: Limits = Limits()) -> SeriesReference | None:
    """The DICOM series in a file's bytes, as `Scan.series`, without reading pixels; None for a file of another format.

    Raises:
        InvalidInput: the DICOM files form no volume.
    """
    data = memoryview(data).cast("B")
    head = bytes(data[:HEAD])
    if head.startswith(_ZIP):
        return read_series_of_zip(data, limits)
    if any(is_kind(head) for is_kind, _ in _READERS.values()) or not looks_like_dicom(head):
        return None
    return read_series_of_file(data, limits)


def is_recognised(data: bytes | memoryview) -> bool:
    """Whether a file is of a format that is read, from its first bytes; of a gzip it is not known what it holds."""
    head = bytes(data[:HEAD])
    readers = any(is_kind(head) for is_kind, _ in _READERS.values())
    return readers or head.startswith((_GZIP, *_ZIP)) or looks_like_dicom(head)


def _read_gzipped(data: memoryview, limits: Limits) -> tuple[str, Volume]:
    """What the gzip holds decides the reader. Its header is checked first, and nothing beyond it is decompressed."""
    stream = Inflate(data)
    head = stream.read(HEAD)
    for kind, size_of in _GZIPPED.items():
        is_kind, read = _READERS[kind]
        if is_kind(head):
            size = size_of(head, limits)
            limits.check_bytes(size, "the decompressed scan")
            return kind, read(stream.fill(size, head), limits)
    others = {**{kind: is_kind for kind, (is_kind, _) in _READERS.items()}, "dicom": looks_like_dicom}
    if kinds := [kind for kind, is_kind in others.items() if is_kind(head)]:
        raise InvalidInput(
            f"the gzip holds a file of another format ({kinds[0]}): send that file without the gzip round it"
        )
    what = f"{found}; " if (found := named(head)) else ""
    raise InvalidInput(f"the gzipped data is not a NIfTI or MGH image: {what}send {FORMATS}")


def _read_zip(data: memoryview, limits: Limits) -> Volume:
    """A DICOM series. Raises InvalidInput for a zip of something else, which its names tell."""
    try:
        return read_dicom_zip(data, limits)
    except InvalidInput:
        if what := _other_zip(data):
            raise InvalidInput(what) from None
        raise


def _other_zip(data: memoryview) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except Exception:  # a damaged one raises whatever its parser stumbles over
        return None
    names = [name for name in names if not name.lower().endswith(_BESIDE) and not name.startswith("__MACOSX/")]
    if any(name.endswith("/data.pkl") for name in names):
        return "this is a PyTorch file: save the volume in it with numpy.save, and send that"
    if not names or not all(name.lower().endswith(_VOLUMES) for name in names):
        return None
    if all(name.endswith(".npy") for name in names):
        return f"this is an .npz archive of {len(names)} arrays: send one array as .npy"
    return f"the folder or zip holds {names[0][:80]}, no DICOM series: send that file itself (a pair as one .nii)"
