"""What every scan's values are, whatever its format: finite, not constant, of a small dtype."""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidInput, Unavailable

_LEVELS = 1 << 16  # steps of contrast that conversion to float32 keeps between the smallest and the largest value
_SAMPLES = 1_000_000  # voxels that are looked at for an offset
_BACKGROUND = 0.01  # share of the voxels that one value has, if it is the background
_LARGEST = 1e30  # intensities beyond it overflow float32 on the way


def checked_values(array: np.ndarray) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """(`array` less an offset, in native byte order and a small dtype, finite and not constant; the offset; notes).

    A read-only view if it already is. The offset is 0 unless float32 would lose contrast, far from 0. NaN that reaches
    the volume's border is background: it becomes the smallest finite value, and a note says so.

    Raises InvalidInput for any other value that is not finite, or too large, and for a constant volume.
    """
    notes: tuple[str, ...] = ()
    offset: int | float = 0
    low, high = array.min(), array.max()
    if array.dtype.kind == "f" and not -_LARGEST < low <= high < _LARGEST:
        array, notes = _without_border(array)
        low, high = array.min(), array.max()
    small = array.dtype.kind in "iu" and array.dtype.itemsize <= 2
    if not small and array.dtype.kind != "b" and array.dtype != np.float32:
        offset = _offset(array)
    if offset:
        array = _less(array, offset)
    wanted = array.dtype.newbyteorder("=") if small else np.uint8 if array.dtype.kind == "b" else np.float32
    converted = array.astype(wanted, order="K", copy=False)
    if offset or converted is not array:
        low, high = converted.min(), converted.max()
    if low == high:
        raise InvalidInput(f"every voxel of the scan is {low:g}: there is nothing to see; check the file or the export")
    converted.flags.writeable = False
    return converted, float(offset), notes


def _without_border(array: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(a copy of an array of floats with its NaN filled, notes). Raises InvalidInput if other values are not finite."""
    empty = np.isnan(array)
    count = int(np.count_nonzero(empty))
    finite = sum(int(np.count_nonzero(np.abs(part) < _LARGEST)) for part in array)
    beyond = array.size - finite - count
    if count == array.size:
        raise InvalidInput(
            f"all {count:,} voxels of the scan are NaN: there is nothing to see; check the file or the export"
        )
    enclosed = count and count - _at_border(empty)
    if beyond or enclosed:
        parts = [f"{beyond:,} infinite or beyond {_LARGEST:g}"] if beyond else []
        parts += [f"{enclosed:,} NaN with finite voxels all round them"] if enclosed else []
        raise InvalidInput(
            f"the scan has {beyond + enclosed:,} voxels that are NaN, infinite or beyond {_LARGEST:g} "
            f"({' and '.join(parts)}): replace them, for example by the background value; only NaN that reaches the "
            f"volume's border is taken as background"
        )
    low = np.nanmin(array)
    filled = np.where(empty, low, array)
    return filled, (
        f"{count:,} of {array.size:,} voxels are NaN and reach the volume's border: they are taken as background, "
        f"{float(low):g}, the smallest value of the others",
    )


def _at_border(mask: np.ndarray) -> int:
    """How many voxels of `mask` are connected with the volume's border, face by face.

    Raises Unavailable without SciPy.
    """
    try:
        from scipy import ndimage  # 110 MB, which a client need not have: few scans come here
    except ImportError:
        raise Unavailable(
            "the scan has NaN; to tell background from damage takes SciPy, which is not installed: pip install scipy"
        ) from None
    labels, parts = ndimage.label(mask)
    reaches = np.zeros(parts + 1, bool)
    for axis in range(mask.ndim):
        for end in (0, -1):
            reaches[np.take(labels, end, axis)] = True
    reaches[0] = False
    return int(np.count_nonzero(reaches[labels]))


def _offset(array: np.ndarray) -> int | float:
    """What to take off wide values before they become float32; 0 unless rounding would blur their contrast.

    It is the smallest value beside a background, which is one value that many voxels have: a background of 0 beside
    values far from 0 does not count.
    """
    sample = array.ravel(order="K")[:: max(1, array.size // _SAMPLES)]
    values, counts = np.unique(sample, return_counts=True)
    if len(values) > 2 and counts.max() > _BACKGROUND * sample.size:
        values = np.delete(values, counts.argmax())
    low, high = values[0].item(), values[-1].item()
    if float(np.spacing(np.float32(max(abs(low), abs(high))))) > (high - low) / _LEVELS > 0:
        return low
    return 0


def _less(array: np.ndarray, offset: int | float) -> np.ndarray:
    """array - offset as float32, slice by slice; 64-bit whole numbers are exact in a long double, and do not wrap."""
    exact = np.longdouble if array.dtype.kind in "iu" else array.dtype.type
    found = np.empty_like(array, np.float32)
    for target, part in zip(found, array):
        target[...] = part.astype(exact) - exact(offset)
    return found
