"""The voxels of a file: as many as its header promises, or an error that says what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.errors import InvalidInput
from engine.scan.inflate import Inflate
from engine.scan.limits import Limits


def raw_voxels(
    name: str, data: memoryview, start: int, dtype: np.dtype, shape: Sequence[int], order: str = "F"
) -> np.ndarray:
    """Uncompressed voxels from byte `start` on, a view of `data`; `shape` must have been checked against the limits."""
    there = max(0, len(data) - start)
    if there < (promised := _promised(dtype, shape)):
        raise InvalidInput(
            f"the {name} header promises {' x '.join(map(str, shape))} voxels ({promised:,} bytes from byte {start}), "
            f"but the file has only {there:,} bytes there: it is truncated or its header is damaged; copy the file "
            "again"
        )
    voxels = np.frombuffer(data, dtype, math.prod(shape), start)
    return voxels.reshape(shape, order="F" if order == "F" else "C")


def inflated_voxels(
    name: str, data: memoryview, start: int, dtype: np.dtype, shape: Sequence[int], limits: Limits
) -> np.ndarray:
    """Voxels that are compressed from byte `start` on; nothing beyond what the header promises is decompressed."""
    promised = _promised(dtype, shape)
    limits.check_bytes(promised, "the decompressed scan")
    voxels = Inflate(data, f"the {name} file's compressed data", start).fill(promised)
    if len(voxels) < promised:
        raise InvalidInput(
            f"the {name} header promises {' x '.join(map(str, shape))} voxels ({promised:,} bytes), but only "
            f"{len(voxels):,} come out of the compressed data: its header is damaged; write the file again"
        )
    return np.frombuffer(voxels, dtype).reshape(shape, order="F")


def _promised(dtype: np.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize
