"""Reads NIfTI-1 and NIfTI-2, plain or gzipped, from bytes that are not trusted."""

from __future__ import annotations

import math
from typing import cast

import nibabel as nib
import numpy as np
from isal import isal_zlib  # zlib's interface, at least twice as fast: gunzip is most of the time a large CT takes

from engine.errors import InvalidInput
from engine.scan.limits import Limits

_CHUNK = 1 << 20
_MAX_HEADER = 16 << 20  # header and extensions in front of the voxels
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}


def header_class(head: bytes) -> type[nib.Nifti1Header] | None:
    """nibabel's header class if `head` (4 bytes or more) can be the start of a NIfTI file, of either byte order."""
    for order in ("little", "big"):
        if found := _HEADERS.get(int.from_bytes(head[:4], order)):
            return found
    return None


def read_nifti(data: memoryview, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """(array as stored with slope and intercept applied, float64 RAS+ affine in mm) of an uncompressed file."""
    header = _header(bytes(data[:540]))
    shape = _shape(header, limits)
    dtype = header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise InvalidInput(
            f"the NIfTI file holds {header.get_value_label('datatype')} values; one real number a voxel "
            f"is wanted: convert colour or complex images to grey values first"
        )
    offset = _offset(header)
    promised = math.prod(shape) * dtype.itemsize
    if len(data) - offset < promised:
        raise InvalidInput(
            f"the NIfTI header promises {' x '.join(map(str, shape))} voxels ({promised:,} bytes from "
            f"byte {offset}), but the file has only {max(0, len(data) - offset):,} bytes there: it is "
            f"truncated or its header is damaged; copy the file again"
        )
    array = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    return rescale(array, slope or 1.0, intercept or 0.0), _affine(header)


def read_gzipped_nifti(data: memoryview, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """As `read_nifti`. What the header promises is checked first, and nothing beyond it is decompressed."""
    stream = _Gunzip(data)
    head = stream.read(540)
    if len(head) < 348 or header_class(head) is None:
        raise InvalidInput(
            "the gzipped data is not a NIfTI image: send .nii, .nii.gz, .npy, or a DICOM series as a folder or zip"
        )
    header = _header(head)
    shape = _shape(header, limits)
    wanted = _offset(header) + math.prod(shape) * header.get_data_dtype().itemsize
    limits.check_bytes(wanted, "the decompressed scan")
    head = head[:wanted]  # a tiny scan may be followed by something else
    buffer = np.empty(wanted, np.uint8)
    buffer[: len(head)] = np.frombuffer(head, np.uint8)
    filled = len(head)
    while filled < wanted and (piece := stream.read(min(_CHUNK, wanted - filled))):
        buffer[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
        filled += len(piece)
    stream.read(1)  # reaches the checksum if the voxels were the last thing in the stream
    return read_nifti(buffer.data[:filled], limits)


def rescale(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """slope * array + intercept, in a small dtype: whole numbers stay whole where they fit 16 bits, else float32."""
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise InvalidInput(f"the intensity scaling (slope {slope}, intercept {intercept}) is not finite")
    if (slope, intercept) == (1, 0):
        return array
    if slope == 1 and intercept == int(intercept) and array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
        low, high = int(array.min()) + intercept, int(array.max()) + intercept
        if low >= -(1 << 15) and high < 1 << 15:
            # Wraps around in 16 bits on the way and comes out right, as the result fits.
            return np.add(array.astype(np.int16), np.array(int(intercept) & 0xFFFF, np.uint16).view(np.int16))
    scaled = array.astype(np.float32)
    scaled *= np.float32(slope)
    scaled += np.float32(intercept)
    return scaled


class _Gunzip:
    """Reads a gzip stream (one or more members) piece by piece."""

    def __init__(self, data: memoryview):
        self._data, self._position, self._tail = data, 0, b""
        self._inflate = isal_zlib.decompressobj(wbits=31)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the stream. Raises InvalidInput if it is cut off or damaged."""
        pieces, missing = [], size
        while missing:
            if self._inflate.eof:
                rest = self._inflate.unused_data + self._take(2)
                if rest[:2] != b"\x1f\x8b":
                    break
                self._inflate, self._tail = isal_zlib.decompressobj(wbits=31), rest
            compressed = self._tail or self._take(_CHUNK >> 4)
            if not compressed:
                raise InvalidInput("the gzip stream is truncated: the file was cut off, copy or compress it again")
            try:
                piece = self._inflate.decompress(compressed, missing)
            except isal_zlib.error as error:  # type: ignore[misc]  # to its stub an instance, no class
                raise InvalidInput(f"the gzip stream is damaged ({error}): copy or compress the file again") from None
            self._tail = self._inflate.unconsumed_tail
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _take(self, size: int) -> bytes:
        piece = bytes(self._data[self._position : self._position + size])
        self._position += len(piece)
        return piece


def _header(head: bytes) -> nib.Nifti1Header:
    kind = cast(type[nib.Nifti1Header], header_class(head))  # whoever calls this has looked
    try:
        header = kind(head[: kind.template_dtype.itemsize], check=False)
        if header["magic"].item().rstrip(b"\0")[:2] not in (b"n+", b"n\0"):
            raise InvalidInput(
                "the file is the header of an Analyze or two-file NIfTI image, without voxels: convert "
                "it to one .nii or .nii.gz file"
            )
        header.get_data_dtype(), header.get_data_offset(), header.get_slope_inter()
        return header
    except (
        nib.spatialimages.HeaderDataError,
        nib.wrapstruct.WrapStructError,
        KeyError,
        ValueError,
        OverflowError,
    ) as error:
        raise InvalidInput(f"the NIfTI header is damaged ({error})") from None


def _shape(header: nib.Nifti1Header, limits: Limits) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
    except nib.spatialimages.HeaderDataError as error:
        raise InvalidInput(f"the NIfTI header is damaged ({error})") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if any(n < 0 for n in shape):
        raise InvalidInput(f"the NIfTI header has negative sizes {shape}: it is damaged")
    limits.check_shape(shape)
    return shape


def _offset(header: nib.Nifti1Header) -> int:
    offset = int(header.get_data_offset())
    if not header.sizeof_hdr <= offset <= _MAX_HEADER:
        raise InvalidInput(
            f"the NIfTI header is damaged: it puts the voxels at byte {offset}, expected "
            f"{header.sizeof_hdr} to {_MAX_HEADER:,}"
        )
    return offset


def _affine(header: nib.Nifti1Header) -> np.ndarray:
    """The sform if it is set and usable, else the qform, else voxel sizes alone, as nibabel would."""
    candidates = [
        lambda: header.get_sform(coded=True)[0],
        lambda: header.get_qform(coded=True)[0],
        header.get_base_affine,
    ]
    for candidate in candidates:
        try:
            affine = candidate()
        except (nib.spatialimages.HeaderDataError, np.linalg.LinAlgError, ValueError):
            continue
        if affine is not None and usable(affine):
            return np.asarray(affine, float)
    raise InvalidInput(
        "the NIfTI header has no usable orientation: sform, qform and voxel sizes are missing, singular "
        "or not finite; set its voxel sizes, for example with nibabel, before sending it"
    )


def usable(affine: np.ndarray) -> bool:
    """Whether a 4x4 matrix maps voxels to millimetres: finite, affine, and not flat."""
    if not (np.isfinite(affine).all() and np.array_equal(affine[3], [0, 0, 0, 1])):
        return False
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    return bool(lengths.min() > 1e-6 and abs(np.linalg.det(columns / lengths)) > 1e-3)
