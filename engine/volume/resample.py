"""Separable resampling of a volume between two grids that cover the same extent, with products of sparse matrices.

Every output voxel is the mean of the input over a box around its centre, one box per axis. A box as wide as an input
voxel is linear interpolation (align_corners=False, edges replicated); a box as wide as an output voxel is area
averaging. The wider of the two is smooth when the grid gets finer and keeps small structures when it gets coarser.
Few input voxels lie in a box: a dense product of the same matrices takes ten times as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import csr_array

SLAB_BYTES = 16 << 20


def weights(size_in: int, size_out: int, box: str = "wider", *, reverse: bool = False) -> np.ndarray:
    """float32 [size_out, size_in], rows sum to 1: output voxels as weighted means of input voxels.

    box: as wide as an "input" voxel, an "output" voxel, or the "wider" of the two. reverse: the output runs backwards.
    """
    scale = size_in / size_out
    width = {"input": 1.0, "output": scale, "wider": max(scale, 1.0)}[box]
    centre = (np.arange(size_out)[:, None] + 0.5) * scale
    left, right = np.arange(size_in, dtype=float), np.arange(1.0, size_in + 1)
    left[0], right[-1] = -np.inf, np.inf
    overlap = np.minimum(centre + width / 2, right) - np.maximum(centre - width / 2, left)
    matrix = (np.maximum(overlap, 0) / width).astype(np.float32)
    return matrix[::-1] if reverse else matrix


def apply(volume: np.ndarray, matrix: csr_array, axis: int) -> np.ndarray:
    """`matrix` [out, in] along `axis` of a C-contiguous float32 volume with 3 axes."""
    if axis == 0:
        return (matrix @ volume.reshape(len(volume), -1)).reshape(-1, *volume.shape[1:])
    shape = list(volume.shape)
    shape[axis] = matrix.shape[0]
    result = np.empty(shape, np.float32)
    for part, into in zip(volume, result):
        into[...] = matrix @ part if axis == 1 else (matrix @ part.T).T
    return result


def cheapest_order(matrices: Sequence[csr_array]) -> tuple[int, ...]:
    """The order of axes in which applying `matrices` takes the fewest multiplications."""

    def cost(order):
        sizes, total = [m.shape[1] for m in matrices], 0.0
        for axis in order:
            times = 2 if axis == 2 else 1  # along the last axis every slice is turned, there and back
            total += times * np.prod(sizes, dtype=float) / sizes[axis] * matrices[axis].nnz
            sizes[axis] = matrices[axis].shape[0]
        return total

    return min(itertools.permutations(range(3)), key=cost)


def slabs(shape: Sequence[int], axis: int, itemsize: int = 4) -> list[slice]:
    """Slices along `axis` that cut a volume of `shape` into pieces of about SLAB_BYTES."""
    step = max(1, SLAB_BYTES * shape[axis] // max(1, int(np.prod(shape, dtype=np.int64)) * itemsize))
    return [slice(i, min(i + step, shape[axis])) for i in range(0, shape[axis], step)]


def resample(
    volume: np.ndarray, matrices: Sequence[np.ndarray], intensity_map: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> np.ndarray:
    """float32 volume resampled by one matrix per axis, after `intensity_map` (float32 to float32) maps intensities.

    `volume` may be a view of any strides and real dtype; it is read once, slab by slab in the order of its memory.
    """
    memory = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))
    # A matrix without weights on an input voxel (linear interpolation to a coarser grid) need not read it.
    read = [np.flatnonzero(matrices[axis].any(0)) for axis in memory]
    matrices = [csr_array(matrices[axis][:, used]) for axis, used in zip(memory, read)]
    volume = volume.transpose(memory)
    first, *rest = cheapest_order(matrices)
    across = 1 if first == 0 else 0
    sizes = [len(used) for used in read]
    sizes[first] = matrices[first].shape[0]
    result = np.empty(sizes, np.float32)
    for part in slabs([len(used) for used in read], across):
        chosen = list(read)
        chosen[across] = chosen[across][part]
        slab = volume[np.ix_(*chosen)] if any(map(_has_gaps, chosen)) else volume[tuple(map(_span, chosen))]
        # A copy: intensity maps work in place, and the scan is the caller's.
        slab = intensity_map(np.array(slab, np.float32, order="C"))
        result[(slice(None),) * across + (part,)] = apply(slab, matrices[first], first)
    for axis in rest:
        result = apply(result, matrices[axis], axis)
    return np.ascontiguousarray(result.transpose(np.argsort(memory)))


def _span(indices: np.ndarray) -> slice:
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _has_gaps(indices: np.ndarray) -> bool:
    return len(indices) != indices[-1] - indices[0] + 1
