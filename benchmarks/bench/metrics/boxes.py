"""Boxes in answers: the reference's "IoU", whose denominator is the enclosing box, and the intersection over union."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

NO_BOX = -1.0  # the reference's score of a sample of which the prediction or the answer has no box
_NUMBER = r"([-+]?\d*\.\d+|[-+]?\d+)"
_REFERENCE_BOX = re.compile(r"\[" + ", ".join([_NUMBER] * 6) + r"\]")


def reference_box(text: str) -> list[float] | None:
    """The first box that the reference's evaluation finds in a text: any six numbers, parted by comma and one space."""
    found = _REFERENCE_BOX.search(text)
    return [float(number) for number in found.groups()] if found else None


def hull_iou(prediction: Sequence[float] | None, answer: Sequence[float] | None) -> float:
    """Intersection ÷ enclosing box of both, as the reference computes it; -1 if one of them is missing."""
    if not prediction or not answer:
        return NO_BOX
    (p0, p1), (a0, a1) = ((np.array(box[:3]), np.array(box[3:])) for box in (prediction, answer))
    both = np.prod(np.maximum(0, np.minimum(p1, a1) - np.maximum(p0, a0)))
    hull = np.prod(np.maximum(p1, a1) - np.minimum(p0, a0))
    return float(both / (hull + 1e-6))


def iou(a: np.ndarray, b: np.ndarray, size: tuple[int, int, int]) -> float:
    """Intersection ÷ union of boxes [6] that name first and last voxel of each axis, divided by its length.

    Both of these voxels belong to the box: a structure of one slice has a box of one slice, not of none.
    size: of the volume, (D, H, W).
    """

    def edges(box):
        return box[:3] * size, box[3:] * size + 1

    (a0, a1), (b0, b1) = edges(np.asarray(a, float)), edges(np.asarray(b, float))
    both = np.prod(np.maximum(0, np.minimum(a1, b1) - np.maximum(a0, b0)))
    return float(both / (np.prod(a1 - a0) + np.prod(b1 - b0) - both))
