"""The scans that are sent: as many different ones as needed, all alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.scan import pack_scan, read_scan

CT_SHAPE = (512, 512, 64)
CT_SPACING_MM = (0.75, 0.75, 5.0)


@dataclass(frozen=True, eq=False)
class BenchmarkScan:
    """array: 3 axes. affine: 4 x 4, RAS+ mm."""

    array: np.ndarray
    affine: np.ndarray


def phantom(shape: tuple[int, int, int] = CT_SHAPE, seed: int = 0) -> BenchmarkScan:
    """An int16 CT in Hounsfield units: a body of soft tissue with two lungs, noise everywhere."""
    i, j, k = np.ogrid[tuple(slice(-1, 1, complex(n)) for n in shape)]
    noise = np.random.default_rng(seed).integers(-40, 40, shape, np.int16)
    array = np.where(np.broadcast_to(i**2 / 0.64 + j**2 / 0.4 < 1, shape), np.int16(40), np.int16(-1000))
    for side in (-0.4, 0.4):
        array[((i - side) / 0.25) ** 2 + (j / 0.4) ** 2 + (k / 0.8) ** 2 < 1] = -800
    return BenchmarkScan(np.asfortranarray(array + noise), np.diag([*CT_SPACING_MM, 1.0]))


def read(path: Path) -> BenchmarkScan:
    """A scan file of the user's."""
    data, _ = pack_scan(path)
    scan = read_scan(data)
    return BenchmarkScan(scan.array, scan.affine)


def different(scan: BenchmarkScan) -> Iterator[BenchmarkScan]:
    """Copies of `scan` with other noise in their middle, within its range: the same work, but nothing of it is cached,
    not even by a server that an earlier run has measured.

    Outside the middle a copy might lose the difference when it is cropped, and have the same visual tokens.
    """
    low, high = scan.array.min(), scan.array.max()
    middle = tuple(slice(n // 2, n // 2 + max(1, n // 8)) for n in scan.array.shape)
    rng = np.random.default_rng()
    while True:
        array = scan.array.copy(order="K")
        array[middle] = rng.uniform(low, high, array[middle].shape)
        yield BenchmarkScan(array, scan.affine)
