"""What a mask measures: volume, place, and the scan's own intensities within it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import InvalidInput
from engine.scan import Scan
from engine.volume.modality import is_ct
from engine.volume.views import counts

_SLAB_VOXELS = 4 << 20


@dataclass(frozen=True)
class Measurements:
    """Measurements of a mask. Lengths are in mm of the world, RAS+; what an empty mask does not have is None.

    voxel_count: voxels in the mask.
    volume_ml: their volume in millilitres.
    bounding_box_voxels: (i0, j0, k0, i1, j1, k1), half-open, of the scan's array axes.
    bounding_box_ras_mm: (x0, y0, z0, x1, y1, z1), the smallest box along the world's axes that holds the mask's voxels,
        each with its whole extent.
    centroid_ras_mm: mean of the voxels' centres.
    intensity_mean, intensity_sd, intensity_min, intensity_max: of the scan's own values in the mask, before any
        preprocessing; the SD is that of a sample (n - 1), 0 of one voxel. None without a scan.
    intensity_unit: "HU", or "arbitrary" for all but CT; None without a scan.
    intensity_missing: why there are no intensities; None where there are.
    """

    voxel_count: int
    volume_ml: float
    bounding_box_voxels: tuple[int, ...] | None
    bounding_box_ras_mm: tuple[float, ...] | None
    centroid_ras_mm: tuple[float, float, float] | None
    intensity_mean: float | None = None
    intensity_sd: float | None = None
    intensity_min: float | None = None
    intensity_max: float | None = None
    intensity_unit: str | None = None
    intensity_missing: str | None = None

    def to_dict(self) -> dict:
        """JSON-ready: lists for tuples, None for what is not finite."""
        found = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return {
            name: None if isinstance(value, float) and not isfinite(value) else value for name, value in found.items()
        }

    def save(self, path: str | PathLike) -> Path:
        """Write them as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        return path


def measure(
    mask: np.ndarray,
    affine: np.ndarray,
    scan: Scan | np.ndarray | None = None,
    *,
    preset: str | None = None,
    missing: str = "no scan was given",
) -> Measurements:
    """Measure a mask on any grid: anisotropic, flipped, oblique or sheared.

    Args:
        mask: 3 axes, bool (or 0 and others), the scan's shape.
        affine: [4, 4], voxel to world, mm, RAS+, as a scan or a segmentation has it.
        scan: whose intensities are measured; an array is taken as it is. None leaves them out.
        preset: the preset that the server chose, where it is known: ct says that the values are Hounsfield units.
        missing: without a scan, why there is none.

    Raises:
        InvalidInput: for a mask that has not three axes or not the scan's shape.
    """
    mask, affine = np.asarray(mask), np.asarray(affine, float)
    mask = mask if mask.dtype == bool else mask != 0
    if mask.ndim != 3 or affine.shape != (4, 4):
        raise InvalidInput(f"a mask has 3 axes and an affine of 4 x 4, not {mask.shape} and {affine.shape}")
    array = scan.array if isinstance(scan, Scan) else None if scan is None else np.asarray(scan)
    if array is not None and array.shape != mask.shape:
        raise InvalidInput(f"the mask has shape {mask.shape}, the scan has {array.shape}")
    offset, modality = getattr(scan, "offset", 0.0), getattr(scan, "modality", None)
    unit = None
    if array is not None:
        missing = "the mask is empty"
        unit = "HU" if is_ct(array, offset, modality=modality, preset=preset) else "arbitrary"
    # The mask's voxels along each axis: from these come box and centroid, without an index of each voxel.
    planes = counts(mask)
    number = int(planes[0].sum())
    if not number:
        return Measurements(0, 0.0, None, None, None, intensity_unit=unit, intensity_missing=missing)
    found = [np.flatnonzero(plane) for plane in planes]
    box = tuple(slice(int(indices[0]), int(indices[-1]) + 1) for indices in found)
    centre = [float(plane @ np.arange(plane.size)) / number for plane in planes]
    inside = mask[box]
    intensities = {} if array is None else _intensities(array[box], inside, offset)
    return Measurements(
        number,
        number * abs(float(np.linalg.det(affine[:3, :3]))) / 1000,
        (*(part.start for part in box), *(part.stop for part in box)),
        _world_box(inside, [part.start for part in box], affine),
        tuple((affine[:3, :3] @ centre + affine[:3, 3]).tolist()),
        **intensities,
        intensity_unit=unit,
        intensity_missing=missing if array is None else None,
    )


def _world_box(inside: np.ndarray, start: list[int], affine: np.ndarray) -> tuple[float, ...]:
    """The box along the world's axes around the voxels of `inside`, whose array begins at the voxel `start`."""
    # Along each line of the last axis a coordinate is extreme at the line's first or last voxel.
    i, j = np.nonzero(inside.any(axis=2))
    first = inside.argmax(axis=2)[i, j]
    last = inside.shape[2] - 1 - inside[:, :, ::-1].argmax(axis=2)[i, j]
    ends = np.concatenate([np.stack([i, j, k], axis=1) for k in (first, last)]) + start
    world = ends @ affine[:3, :3].T + affine[:3, 3]
    margin = np.abs(affine[:3, :3]).sum(axis=1) / 2
    return (*(world.min(0) - margin).tolist(), *(world.max(0) + margin).tolist())


class _Moments(NamedTuple):
    """Of some values: how many, their mean, and the sum of squared differences from it."""

    number: int
    mean: float
    squares: float

    def with_(self, other: _Moments) -> _Moments:
        """Of both together, without the cancellation of sums of squares (Chan et al., 1979)."""
        number, apart = self.number + other.number, other.mean - self.mean
        return _Moments(
            number,
            self.mean + apart * other.number / number,
            self.squares + other.squares + apart**2 * self.number * other.number / number,
        )


def _intensities(array: np.ndarray, inside: np.ndarray, offset: float) -> dict[str, float]:
    moments, low, high = _Moments(0, 0.0, 0.0), np.inf, -np.inf
    for values in _slabs(array, inside):
        mean = float(values.mean())
        moments = moments.with_(_Moments(values.size, mean, float(np.square(values - mean).sum())))
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return {
        "intensity_mean": moments.mean + offset,
        "intensity_sd": float(np.sqrt(moments.squares / max(1, moments.number - 1))),
        "intensity_min": low + offset,
        "intensity_max": high + offset,
    }


def _slabs(array: np.ndarray, inside: np.ndarray) -> Iterator[np.ndarray]:
    """The values inside, as float64, some of them at a time."""
    axis = int(np.argmax(np.abs(array.strides)))
    step = max(1, _SLAB_VOXELS * array.shape[axis] // array.size)
    for start in range(0, array.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        values = array[part][inside[part]].astype(np.float64)
        if values.size:
            yield values
