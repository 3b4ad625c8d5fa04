"""Reads FreeSurfer's MGH (.mgh, and .mgz, which is gzipped) from bytes that are not trusted."""

from __future__ import annotations

import math

import numpy as np
from nibabel.freesurfer.mghformat import DATA_OFFSET, MGHHeader, header_dtype

from engine.errors import InvalidInput
from engine.scan.affine import usable
from engine.scan.limits import Limits
from engine.scan.npy import without_frames
from engine.scan.parts import Volume
from engine.scan.voxels import raw_voxels

_GOOD_RAS = 28  # where the header says whether it has an orientation, which follows there
# What FreeSurfer's mghRead takes where there is none, "the CORONAL orientation": flag; voxel sizes; the steps along the
# axes: left, feet, front; centre. nibabel's own default has the last two steps the other way round.
_CORONAL = np.array(1, ">i2").tobytes() + np.array([1, 1, 1, -1, 0, 0, 0, 0, -1, 0, 1, 0, 0, 0, 0], ">f4").tobytes()
_VERSION = b"\0\0\0\1"  # big-endian, as all of an MGH file is
_DTYPES = {0: "u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}  # by the code of the type, as in FreeSurfer's mri.h

_GUESS = (
    "the MGH file has no orientation (goodRASFlag is not 1): that its voxels are 1 mm apart and its axes run to the "
    "patient's left, feet and front is a guess, as FreeSurfer's, left and right with it"
)


def is_mgh(head: bytes) -> bool:
    """Whether `head` can be the start of an MGH file."""
    return len(head) >= header_dtype.itemsize and head.startswith(_VERSION)


def mgh_size(head: bytes, limits: Limits) -> int:
    """Bytes up to the end of the voxels. Raises InvalidInput for what is not one volume within the limits."""
    shape, dtype = _layout(head, limits)
    return DATA_OFFSET + math.prod(shape) * dtype.itemsize


def read_mgh(data: memoryview, limits: Limits) -> Volume:
    """The volume in an uncompressed file. What follows its voxels (scan parameters, tags) is left aside."""
    head = bytes(data[: header_dtype.itemsize])
    shape, dtype = _layout(head, limits)
    array = raw_voxels("MGH", data, DATA_OFFSET, dtype, shape)
    has_orientation = int.from_bytes(head[_GOOD_RAS : _GOOD_RAS + 2], "big", signed=True) > 0
    if not has_orientation:
        head = head[:_GOOD_RAS] + _CORONAL
    with np.errstate(all="ignore"):  # a damaged header's numbers overflow; the result is looked at
        affine = np.asarray(MGHHeader(head, check=False).get_affine(), float)
    if not usable(affine):
        raise InvalidInput(
            "the MGH header is damaged: its voxel sizes, directions or centre are missing, singular or not finite; set "
            "them, for example with mri_convert, before sending the scan"
        )
    return Volume(array, affine, notes=() if has_orientation else (_GUESS,))


def _layout(head: bytes, limits: Limits) -> tuple[tuple[int, ...], np.dtype]:
    dims = np.frombuffer(head, ">i4", 6)[1:].tolist()
    shape, code = without_frames(tuple(dims[:4])), dims[4]
    if min(shape) < 0:
        raise InvalidInput(f"the MGH header has negative sizes {shape}: it is damaged")
    limits.check_shape(shape)
    if code not in _DTYPES:
        raise InvalidInput(
            f"the MGH file holds values of type {code}; one real number a voxel is wanted, of type 0, 1, 3, 4 or 10 "
            f"(8-, 16- or 32-bit integers, or float): convert it, for example with mri_convert -odt float"
        )
    return shape, np.dtype(_DTYPES[code])
