"""A region of interest: the box of a scan that the model is to see."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidInput, shortened

UNITS = ("voxels", "mm")
SYNTAX = "i0:i1,j0:j1,k0:k1 in voxels of the array's axes, or x0:x1,y0:y1,z0:z1mm in mm (RAS+)"
_TEXT = re.compile(r"([^:,]+):([^:,]+),([^:,]+):([^:,]+),([^:,]+):([^:,]+?)\s*(mm)?")
_ROUNDING = 1e-6  # of a voxel: boxes that were computed are not refused for it


@dataclass(frozen=True)
class Crop:
    """A box: from `low` to `high`, three numbers each.

    unit: "voxels" of the scan's array axes, half-open, so that array[i0:i1, j0:j1, k0:k1] is inside; edges that are not
    whole numbers are rounded outwards. Or "mm" of the world, RAS+; inside are the voxels whose centre is, and on a grid
    that is oblique to the world's axes the voxels around them that make the region a box of the array.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    unit: str = "voxels"

    def __post_init__(self):
        if self.unit not in UNITS:
            raise InvalidInput(f"a crop is in voxels or mm, not in {shortened(self.unit)}")
        if not all(map(math.isfinite, (*self.low, *self.high))):
            raise InvalidInput(f"the crop {self} is not finite: give {SYNTAX}")
        if not all(low < high for low, high in zip(self.low, self.high)):
            raise InvalidInput(
                f"the crop {self} is empty or inverted: along each axis the first number is below the second; give "
                f"{SYNTAX}"
            )

    def __str__(self) -> str:
        box = ",".join(f"{low:.10g}:{high:.10g}" for low, high in zip(self.low, self.high))
        return box + ("mm" if self.in_mm else "")

    @property
    def in_mm(self) -> bool:
        return self.unit == "mm"

    @property
    def box(self) -> tuple[float, ...]:
        """Six numbers, in the order of an answer's boxes: (i0, j0, k0, i1, j1, k1)."""
        return (*self.low, *self.high)

    @classmethod
    def of(cls, given: Crop | str | np.ndarray) -> Crop:
        """A crop from what users give.

        Args:
            given: a text (SYNTAX); six numbers in voxels, (i0, j0, k0, i1, j1, k1), as an answer's boxes are; or three
                pairs in voxels, ((i0, i1), (j0, j1), (k0, k1)), as a study's info has them. Voxels are half-open.

        Returns:
            The crop, in voxels or, of a text that ends with mm, in mm (RAS+).

        Raises:
            InvalidInput: for anything else, and for a box that is empty, inverted or not finite.
        """
        if isinstance(given, Crop):
            return given
        if isinstance(given, str):
            return cls._of_text(given)
        try:
            numbers = np.asarray(given, float)
        except (TypeError, ValueError):
            numbers = np.empty(0)
        if numbers.shape == (3, 2):
            numbers = numbers.T.ravel()
        if numbers.shape != (6,):
            raise InvalidInput(
                f"a crop is a text, {SYNTAX}, or six numbers (i0, j0, k0, i1, j1, k1) in voxels, not {shortened(given)}"
            )
        return cls(*_corners(numbers))

    @classmethod
    def of_numbers(cls, box: np.ndarray, unit: str | None) -> Crop:
        """A crop as it crosses a model boundary: `box` as the property, float64 [6]; unit: None stands for voxels."""
        return cls(*_corners(np.asarray(box, float).reshape(-1)), unit or "voxels")

    @classmethod
    def _of_text(cls, text: str) -> Crop:
        found = _TEXT.fullmatch(text.strip())
        try:
            numbers = np.array([float(number) for number in found.groups()[:6]]) if found else None
        except ValueError:
            numbers = None
        if found is None or numbers is None:
            raise InvalidInput(f"the crop {shortened(text)} cannot be read: give {SYNTAX}")
        low, high = _corners(numbers.reshape(3, 2).T.ravel())
        crop = cls(low, high, "mm" if found[7] else "voxels")
        if not crop.in_mm and not all(number.is_integer() for number in crop.box):
            raise InvalidInput(f"the crop {crop} has parts of voxels: give whole numbers, or add mm at its end")
        return crop

    def region(self, shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, int], ...]:
        """The crop in a scan: (start, stop) in voxels along each of its array's axes, half-open.

        Args:
            shape: of the scan's array. affine: its voxel-to-world matrix, [4, 4], RAS+ mm.

        Raises:
            InvalidInput: for a box that is not within the scan, or holds no voxel's centre.
        """
        if self.in_mm:
            return self._region_of_mm(shape, affine)
        box = [(math.floor(low + _ROUNDING), math.ceil(high - _ROUNDING)) for low, high in zip(self.low, self.high)]
        if not all(0 <= start < stop <= n for (start, stop), n in zip(box, shape)):
            whole = ",".join(f"0:{n}" for n in shape)
            raise InvalidInput(f"the crop {self} is not within the scan, which is {whole} in voxels")
        return tuple(box)

    def _region_of_mm(self, shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, int], ...]:
        corners = _corners_of([(-0.5, n - 0.5) for n in shape]) @ affine[:3, :3].T + affine[:3, 3]
        least, most = corners.min(0), corners.max(0)
        slack = 1e-3 * np.linalg.norm(affine[:3, :3], axis=0).min()
        if (np.subtract(self.low, least) < -slack).any() or (np.subtract(self.high, most) > slack).any():
            whole = ",".join(f"{low:.6g}:{high:.6g}" for low, high in zip(least, most)) + "mm"
            raise InvalidInput(f"the crop {self} is not within the scan, which is {whole} (RAS+)")
        corners = _corners_of(list(zip(self.low, self.high))) - affine[:3, 3]
        voxels = np.linalg.solve(affine[:3, :3], corners.T).T
        box = [
            (max(0, math.ceil(low - _ROUNDING)), min(n, math.floor(high + _ROUNDING) + 1))
            for low, high, n in zip(voxels.min(0), voxels.max(0), shape)
        ]
        if not all(start < stop for start, stop in box) or not self._holds_a_centre(box, affine):
            raise InvalidInput(f"the crop {self} lies between the scan's voxels, or beside them: give a larger one")
        return tuple(box)

    def _holds_a_centre(self, box: list[tuple[int, int]], affine: np.ndarray) -> bool:
        """Whether a voxel of `box`, which encloses the crop on a possibly oblique grid, has its centre in the crop."""
        i, j, k = (np.arange(start, stop, dtype=float) for start, stop in box)
        plane = (affine[:3, 1, None, None] * j[:, None] + affine[:3, 2, None, None] * k) + affine[:3, 3, None, None]
        low, high = (np.array(end)[:, None, None] for end in (self.low, self.high))
        for index in i:  # a plane at a time
            centres = plane + affine[:3, 0, None, None] * index
            if ((centres >= low - _ROUNDING) & (centres <= high + _ROUNDING)).all(0).any():
                return True
        return False


def _corners(numbers: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    if numbers.shape != (6,):
        raise InvalidInput(f"a crop has six numbers (i0, j0, k0, i1, j1, k1), not {numbers.size}")
    i0, j0, k0, i1, j1, k1 = numbers.tolist()
    return (i0, j0, k0), (i1, j1, k1)


def _corners_of(box: list[tuple[float, float]]) -> np.ndarray:
    """[8, 3]"""
    return np.stack([corner.ravel() for corner in np.meshgrid(*box, indexing="ij")], axis=-1)
