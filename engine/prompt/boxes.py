"""Boxes as answers write them."""

from __future__ import annotations

import re

import numpy as np

from engine.prompt.tokens import BOX_END, BOX_START

_NUMBER = r"\s*([0-9]*\.?[0-9]+)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 6) + r"\]")


def parse_boxes(text: str) -> np.ndarray:
    """The boxes written in an answer: float64 [K, 6] as (x1, y1, z1, x2, y2, z2), normalised to the D, H, W axes of the
    model volume in that order. What is not six numbers in 0..1 with lower corners first is no box.
    """
    boxes = np.array([[float(number) for number in found] for found in _BOX.findall(text)], dtype=np.float64)
    boxes = boxes.reshape(-1, 6)
    valid = (boxes <= 1).all(axis=1) & (boxes[:, :3] <= boxes[:, 3:]).all(axis=1)
    return boxes[valid]


def format_box(box) -> str:
    """A normalised box as training writes it: `<bx_start>[x1, y1, z1, x2, y2, z2]<bx_end>`.

    Numbers have at most three decimals and no zeros at their end, as the reference writes them: 0.25, 0.0.
    """
    return f"{BOX_START}{[round(float(value), 3) for value in box]}{BOX_END}"
