"""Where the planes of a series lie: one affine that holds for every one of them, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import LPS_TO_RAS
from engine.scan.dicom.plane import Plane

MAX_DEVIATION_MM = 0.5
MAX_DEVIATION = 0.1  # of the distance between slices; the smaller of the two counts
_ROUNDING_MM = 0.01  # what files lose of positions by writing few digits
_SAME_MM = 1e-3
_MISSING = 1.5  # a gap above this many usual distances has room for a slice
_STEEPEST = 1.0  # in-plane shift per distance between slices; gantries tilt by 30 degrees (0.58) at most


def sorted_planes(planes: Sequence[Plane]) -> list[Plane]:
    """The planes in order along their common normal."""
    normal = _normal(planes)
    return sorted(planes, key=lambda plane: float(plane.position @ normal))


def fitted_affine(planes: Sequence[Plane]) -> np.ndarray:
    """The affine that fits the planes, two or more of one size in order, best.

    Returns:
        float64 [4, 4], (column, row, plane) to mm in RAS+: from the first plane to the last if that fits, as it does
        for regular series, exactly as the files write it; else fitted to all planes.

    Raises:
        InvalidInput: planes coincide or are missing; or the first voxel or a corner of a plane lies farther than
            MAX_DEVIATION_MM or MAX_DEVIATION from where the affine puts it.
    Source: DICOM PS3.3 C.7.6.2.1.1.
    """
    _check_apart(planes)
    rows, columns = planes[0].pixels.shape
    corners = np.array([(0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)], float)
    positions = np.array([plane.position for plane in planes])
    across = np.array([plane.along_row * plane.column_spacing for plane in planes])
    down = np.array([plane.along_column * plane.row_spacing for plane in planes])
    actual = positions[:, None] + corners[:, :1] * across[:, None] + corners[:, 1:] * down[:, None]

    def deviations(step: np.ndarray, origin: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """mm [planes, corners]"""
        fitted = origin + np.arange(len(planes))[:, None] * step
        return np.linalg.norm(actual - (fitted[:, None] + corners @ edges), axis=2)

    grids = list(_grids(positions, across, down))
    found = [deviations(*grid) for grid in grids]
    best = 0 if found[0].max() <= _ROUNDING_MM else int(np.argmin([each.max() for each in found]))
    step, origin, edges = grids[best]
    distance = float(step @ _normal(planes))
    tolerance = min(MAX_DEVIATION_MM, MAX_DEVIATION * distance)
    # Not written as `>`: what is not a number must not pass.
    if not found[best].max() <= tolerance:
        raise InvalidInput(_irregular(planes, found[-1], tolerance))
    _check_axes(planes, edges, step, (columns, rows), tolerance)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.column_stack([*edges, step]), origin
    return LPS_TO_RAS @ affine


def _normal(planes: Sequence[Plane]) -> np.ndarray:
    normal = np.mean([plane.normal for plane in planes], 0)
    return normal / np.linalg.norm(normal)


def _grids(
    positions: np.ndarray, across: np.ndarray, down: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(step between planes, origin, steps between columns and rows): end to end, least squares, and one that outliers
    leave alone."""
    index = np.arange(len(positions))
    # Files that agree keep their numbers: a mean of equal numbers may differ from them in the last digit.
    edges = np.array([vectors[0] if (vectors == vectors[0]).all() else vectors.mean(0) for vectors in (across, down)])
    yield (positions[-1] - positions[0]) / index[-1], positions[0], edges
    step, origin = np.polyfit(index, positions, 1)
    yield step, origin, edges
    step = np.median(np.diff(positions, axis=0), 0)
    origin = np.percentile(positions - index[:, None] * step, 50, 0, method="lower")
    yield step, origin, np.array([np.median(across, 0), np.median(down, 0)])


def _check_apart(planes: Sequence[Plane]) -> None:
    series, normal = planes[0].series, _normal(planes)
    spread = np.ptp([plane.position for plane in planes], axis=0).max()
    heights = np.array([plane.position @ normal for plane in planes])
    if heights[-1] - heights[0] < _SAME_MM:
        where = "at one and the same position" if spread < _SAME_MM else "beside each other in one plane"
        raise InvalidInput(
            f"series {series}: all {len(planes)} slices lie {where} (ImagePositionPatient), so they are no volume: "
            f"send a series of slices that lie one behind the other; distances are not taken from other elements"
        )
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if (twins := np.flatnonzero(gaps < max(_SAME_MM, 0.01 * usual))).size:
        first, second = planes[twins[0]], planes[twins[0] + 1]
        raise InvalidInput(
            f"series {series}: {len(twins)} slices of {len(planes)} lie where another one does "
            f"(first: {first.name} and {second.name}): send one phase, echo or time point at a time"
        )


def _irregular(planes: Sequence[Plane], deviations: np.ndarray, tolerance: float) -> str:
    """What to say of planes that no affine fits.

    deviations: mm [planes, corners], from the line that outliers leave alone: it tells which planes are the odd ones.
    """
    heights = np.array([plane.position @ _normal(planes) for plane in planes])
    gaps, series = np.diff(heights), planes[0].series
    usual = float(np.median(gaps))
    worst = int(np.argmax(deviations.max(1)))
    corner = int(np.argmax(deviations[worst]))
    off = (
        f"slice {planes[worst].name} lies {deviations[worst, corner]:.2f} mm from where the others put it"
        f"{'' if corner == 0 else ', at its farthest corner'}"
    )
    limit = (
        f"(ImagePositionPatient, ImageOrientationPatient and PixelSpacing of every slice may differ by "
        f"{tolerance:.2f} mm from one grid)"
    )
    if (holes := np.flatnonzero(gaps > _MISSING * usual)).size:
        hole = holes[0]
        return (
            f"series {series}: slices are missing at {len(holes)} places (usual distance {usual:.3f} mm; "
            f"{gaps[hole]:.3f} mm between {planes[hole].name} and {planes[hole + 1].name}); {off} {limit}: send the "
            f"whole series"
        )
    uneven = (
        f"; the distances between slices run from {gaps.min():.3f} to {gaps.max():.3f} mm"
        if np.ptp(gaps) > _ROUNDING_MM
        else ""
    )
    count = int((deviations.max(1) > tolerance).sum())
    return (
        f"series {series}: the slices lie irregularly, {count} of {len(planes)} off the line of the others: {off} "
        f"{limit}{uneven}: leave out what does not belong to the series, or resample it to a regular grid, as NIfTI"
    )


def _check_axes(
    planes: Sequence[Plane], edges: np.ndarray, step: np.ndarray, size: tuple[int, int], tolerance: float
) -> None:
    """Refuse directions that are not of length 1 or not at a right angle, where that moves the far corner of a slice;
    and slices that are shifted too steeply for a tilted gantry."""
    plane = planes[0]
    lengths = np.linalg.norm([plane.along_row, plane.along_column], axis=1)
    extents = np.linalg.norm(edges, axis=1) * (np.array(size) - 1)
    stretched = float((np.abs(lengths - 1) * extents).max())
    skewed = abs(float(plane.along_row @ plane.along_column)) * float(extents.min())
    if not max(stretched, skewed) <= tolerance:
        raise InvalidInput(
            f"{plane.name} has an ImageOrientationPatient whose directions are not of length 1 or not at a right "
            f"angle: its far corner is uncertain by {max(stretched, skewed):.2f} mm, {tolerance:.2f} mm are allowed; "
            f"export the series again with more digits"
        )
    normal = _normal(planes)
    distance = float(step @ normal)
    shift = float(np.linalg.norm(step - distance * normal))
    if not shift <= _STEEPEST * distance:
        raise InvalidInput(
            f"series {plane.series}: each slice is shifted by {shift:.2f} mm sideways and lies {distance:.2f} mm "
            f"behind the one before it, more than a tilted gantry does: its ImagePositionPatient and "
            f"ImageOrientationPatient do not fit each other; export the series again"
        )
