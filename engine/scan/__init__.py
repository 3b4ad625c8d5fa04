"""A scan: an array of 3 axes with the affine that says where its voxels lie; and reading one from a file's bytes."""

from __future__ import annotations

import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import aff2axcodes

from engine.errors import InvalidInput
from engine.scan.dicom import read_dicom_zip
from engine.scan.limits import Limits
from engine.scan.nifti import header_class, read_gzipped_nifti, read_nifti, usable

# Without an affine an array is taken as slices x rows x columns, 1 mm apart, as the model's own volumes are: from
# inferior to superior, anterior to posterior, right to left.
ARRAY_AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)

_LARGEST = 1e30  # intensities beyond it overflow float32 on the way
FORMATS = "NIfTI (.nii, .nii.gz), a DICOM series as a folder or zip, or .npy"


@dataclass(frozen=True)
class Scan:
    """One volume as its file has it: neither reoriented nor resampled.

    array: 3 axes, integers of at most 16 bits or float32, finite and not constant; read-only, often F-ordered.
    affine: float64 [4, 4], voxel indices to mm, RAS+.
    kind: nifti, dicom, array (with an affine) or npy (without, see ARRAY_AFFINE).
    modality: DICOM's modality, for example CT or MR; None where the format does not say.
    """

    array: np.ndarray
    affine: np.ndarray
    kind: str
    modality: str | None = None

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between voxels along the array's axes."""
        return tuple(float(x) for x in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Where the array's axes point, for example RAS or LPS (nearest, if oblique)."""
        return "".join(aff2axcodes(self.affine))


def read_scan(
    data: bytes | memoryview | np.ndarray, *, affine: np.ndarray | None = None, limits: Limits = Limits()
) -> Scan:
    """The scan in a file's bytes: NIfTI, gzipped NIfTI, zip of a DICOM series, or npy.

    affine: for npy only, [4, 4], RAS+ mm; without it the axes are taken as ARRAY_AFFINE says. An npy may have a
    leading axis of length 1, as M3D's own volumes do.
    Raises InvalidInput, naming cause, limit and way out, for everything that is not one finite, non-constant volume
    within the limits. The array may share memory with `data`; beside it, at most 3 times the scan's size is in use.
    """
    data = (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")
    limits.check_bytes(len(data), "the file")
    head = bytes(data[:8])
    if affine is not None and not head.startswith(b"\x93NUMPY"):
        raise InvalidInput("an affine was given with a file that brings its own: give one with arrays and .npy only")
    modality = None
    if head.startswith(b"\x93NUMPY"):
        kind = "npy" if affine is None else "array"
        array, affine = _read_npy(data, limits), _checked_affine(ARRAY_AFFINE if affine is None else affine)
    elif head.startswith(b"\x1f\x8b"):
        kind, (array, affine) = "nifti", read_gzipped_nifti(data, limits)
    elif head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind, (array, affine, modality) = "dicom", read_dicom_zip(data, limits)
    elif len(data) >= 348 and header_class(head) is not None:
        kind, (array, affine) = "nifti", read_nifti(data, limits)
    else:
        raise InvalidInput(_not_an_image(data))
    return Scan(_checked_values(array), affine, kind, modality)


def pack_scan(
    source: str | os.PathLike | np.ndarray, affine: np.ndarray | None = None, limits: Limits = Limits()
) -> tuple[bytes, np.ndarray | None]:
    """A scan as a file: (bytes that `read_scan` reads, affine or None). See `scan_pieces`."""
    pieces, affine = scan_pieces(source, affine, limits)
    return b"".join(pieces), affine


def scan_pieces(
    source: str | os.PathLike | np.ndarray, affine: np.ndarray | None = None, limits: Limits = Limits()
) -> tuple[tuple[bytes | memoryview, ...], np.ndarray | None]:
    """What a client sends: (one behind the other, a file that `read_scan` reads; affine or None).

    source: a file (its bytes as they are), a folder with a DICOM series (an uncompressed zip), or an array of 3 axes
    or 1 x D x H x W (as npy; its values are not copied). affine: for arrays and .npy files, [4, 4], RAS+ mm. limits:
    for a folder.
    """
    affine = None if affine is None else _checked_affine(affine)
    if not isinstance(source, (str, os.PathLike)):
        array = np.asarray(source)
        if array.dtype.kind not in "biuf":
            raise InvalidInput(f"the array holds {array.dtype} values; real numbers are wanted")
        return _npy(array), affine
    path = Path(source)
    if path.is_dir():
        return (_zip_folder(path, limits),), affine
    try:
        return (path.read_bytes(),), affine
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None


def _npy(array: np.ndarray) -> tuple[bytes, memoryview]:
    """What np.save writes: the header, and the values where they are."""
    header, described = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue(), (array.T if described["fortran_order"] else np.ascontiguousarray(array)).data


def _zip_folder(folder: Path, limits: Limits) -> bytes:
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(_files(folder, limits)):
                # Names only serve messages: what is not UTF-8 in them is spelt out, as zips cannot hold it.
                name = str(path.relative_to(folder)).encode(errors="backslashreplace").decode()
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
            if not archive.namelist():
                raise InvalidInput(f"the folder {folder} is empty: a folder with one DICOM series is wanted")
    except OSError as error:
        raise InvalidInput(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return buffer.getvalue()


def _files(folder: Path, limits: Limits) -> list[Path]:
    """The files in a folder and those below it. It may be a whole disk by mistake: listing stops at the limits."""
    files, size = [], 0
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        files.append(path)
        size += path.stat().st_size
        if len(files) > limits.max_files or size > limits.max_bytes:
            raise InvalidInput(
                f"the folder {folder} has more than a scan may have, {limits.max_files:,} files of "
                f"{limits.max_bytes:,} bytes in all (Limits.max_files, Limits.max_bytes): give the "
                f"folder of one DICOM series"
            )
    return files


def _read_npy(data: memoryview, limits: Limits) -> np.ndarray:
    stream = io.BytesIO(data[: 1 << 16])
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except Exception as error:  # numpy parses the header as a Python literal, and raises whatever that stumbles over
        raise InvalidInput(f"the .npy header is damaged or of an unknown version ({type(error).__name__})") from None
    if dtype.kind not in "biuf":
        raise InvalidInput(
            f"the .npy file holds {dtype} values; real numbers are wanted, and pickled objects are never loaded"
        )
    if len(shape) == 4 and shape[0] == 1:
        shape = shape[1:]
    limits.check_shape(shape)
    promised, offset = math.prod(shape) * dtype.itemsize, stream.tell()
    if len(data) - offset < promised:
        raise InvalidInput(
            f"the .npy header promises {' x '.join(map(str, shape))} voxels ({promised:,} bytes), but "
            f"the file has only {len(data) - offset:,} bytes there: it is truncated, copy it again"
        )
    return np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape, order="F" if fortran else "C")


def _checked_affine(affine: np.ndarray) -> np.ndarray:
    try:
        affine = np.array(affine, float)
    except (TypeError, ValueError):
        affine = np.empty(0)
    if affine.shape != (4, 4) or not usable(affine):
        raise InvalidInput(
            "the affine must be a finite, invertible 4 x 4 matrix with last row 0 0 0 1, from voxel "
            "indices to mm in RAS+ (as nibabel's `image.affine`)"
        )
    return affine


def _checked_values(array: np.ndarray) -> np.ndarray:
    """`array` in native byte order and a small dtype, finite and not constant, as a read-only view if it already is."""
    small = array.dtype.kind in "iu" and array.dtype.itemsize <= 2
    with np.errstate(over="ignore"):
        wanted = array.dtype.newbyteorder("=") if small else np.uint8 if array.dtype.kind == "b" else np.float32
        array = array.astype(wanted, order="K", copy=False)
    low, high = array.min(), array.max()
    if not -_LARGEST < low <= high < _LARGEST:
        bad = np.size(array) - sum(int((np.abs(part) < _LARGEST).sum()) for part in array)
        raise InvalidInput(
            f"the scan has {bad:,} voxels that are NaN, infinite or beyond {_LARGEST:g}: replace them, "
            f"for example by the background value"
        )
    if low == high:
        raise InvalidInput(f"every voxel of the scan is {low:g}: there is nothing to see; check the file or the export")
    array.flags.writeable = False
    return array


def _not_an_image(data: memoryview) -> str:
    if not len(data):
        return f"the file is empty: send {FORMATS}"
    if bytes(data[128:132]) == b"DICM":
        return "this is a single DICOM file: send the folder of the whole series, or a zip of it"
    return f"the data is not an image that is read here (it starts with {bytes(data[:8])!r}): send {FORMATS}"
