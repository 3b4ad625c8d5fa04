"""Looking at large arrays without copying them."""

from __future__ import annotations

import numpy as np

SAMPLES = 2_000_000  # voxels that are looked at, evenly spread
_BLOCK = 16 << 20  # voxels that are counted at a time


def sampled(array: np.ndarray, most: int = SAMPLES) -> np.ndarray:
    """A view of every n-th voxel along each axis, about `most` in all."""
    steps, budget = [1] * array.ndim, float(most)
    for left, axis in zip(range(array.ndim, 0, -1), sorted(range(array.ndim), key=lambda axis: array.shape[axis])):
        allowed = max(1, round(budget ** (1 / left)))  # what a short axis does not use is left for the longer ones
        steps[axis] = -(-array.shape[axis] // allowed)
        budget /= max(1, -(-array.shape[axis] // steps[axis]))
    return array[tuple(slice(None, None, step) for step in steps)]


def counts(mask: np.ndarray) -> list[np.ndarray]:
    """How many voxels of a bool mask lie in each plane: int64 [shape[axis]] for each of its 3 axes.

    The mask is read once, in the order of its memory.
    """
    order = sorted(range(3), key=lambda axis: -abs(mask.strides[axis]))
    backwards = tuple(slice(None, None, -1 if mask.strides[axis] < 0 else 1) for axis in order)
    view = mask.transpose(order)[backwards]
    slow, middle, fast = view.shape
    found = [np.zeros(n, np.int64) for n in view.shape]
    rows = max(1, min(middle, _BLOCK // max(1, fast)))
    planes = max(1, _BLOCK // max(1, rows * fast))
    for i in range(0, slow, planes):
        for j in range(0, middle, rows):
            block = np.ascontiguousarray(view[i : i + planes, j : j + rows])
            found[0][i : i + planes] += block.reshape(len(block), -1).sum(1, dtype=np.int64)
            across = block.sum(0, dtype=np.uint32)
            found[1][j : j + rows] += across.sum(1, dtype=np.int64)
            found[2] += across.sum(0, dtype=np.int64)
    return [found[order.index(axis)][backwards[order.index(axis)]] for axis in range(3)]
