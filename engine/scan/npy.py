"""Reads .npy files, and writes an array as one without copying its values."""

from __future__ import annotations

import io

import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import ARRAY_AFFINE
from engine.scan.limits import Limits
from engine.scan.parts import Volume
from engine.scan.voxels import raw_voxels

_MAX_HEADER = 1 << 16

ARRAY_GUESS = (
    "an array without an affine is taken as slices from feet to head, rows from front to back and columns from the "
    "patient's right to left, 1 mm apart: a guess, left and right with it"
)


def is_npy(head: bytes) -> bool:
    return head.startswith(b"\x93NUMPY")


def read_npy(data: memoryview, limits: Limits) -> Volume:
    """The array in an .npy file, in the orientation of ARRAY_AFFINE, which is a guess."""
    stream = io.BytesIO(data[:_MAX_HEADER])
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
    shape = of_three_axes(shape)
    limits.check_shape(shape)
    array = raw_voxels(".npy", data, stream.tell(), dtype, shape, "F" if fortran else "C")
    return Volume(array, ARRAY_AFFINE, notes=(ARRAY_GUESS,))


def npy_pieces(array: np.ndarray) -> tuple[bytes, memoryview]:
    """What np.save writes: the header, and the values where they are."""
    header, described = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(header, described)
    return header.getvalue(), (array.T if described["fortran_order"] else np.ascontiguousarray(array)).data


def without_frames(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without axes of length 1 behind three others, of formats whose first three axes are those of space."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def of_three_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without axes of length 1 in front of three others (batch, channel) or behind them (time)."""
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
