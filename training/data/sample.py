"""What every training set hands to the stages: one example, or the reason why it could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.errors import M3DError


@dataclass(frozen=True)
class Sample:
    """One training example.

    image: float32 [1, D, H, W] in 0..1. question: "" for contrastive pairs. answer: text; may hold [SEG], and boxes
    between <bx_start> and <bx_end>. mask: bool [1, D, H, W] of the structure that [SEG] stands for, or None.
    space: whether a space stands between image tokens and question (VQA, REC, REG, segmentation: yes; captions: no).
    task: caption, vqa_closed, vqa_open, vqa_yes_no, segmentation, rec, reg or refseg.
    source: path of the image, for reports. structure: what the question is about, if that has a name.
    """

    image: np.ndarray
    question: str
    answer: str
    mask: np.ndarray | None
    space: bool
    task: str
    source: str
    structure: str | None = None


class BrokenSample(M3DError):
    """A sample cannot be read. paths: the files concerned; cause: what is wrong with them."""

    code = "INVALID_ARGUMENT"

    def __init__(self, paths: str | Path | Sequence[str | Path], cause: str):
        self.paths = tuple(map(str, [paths] if isinstance(paths, (str, Path)) else paths))
        self.cause = cause
        super().__init__(f"{' and '.join(self.paths)}: {cause}")

    def __reduce__(self):
        # Raised in DataLoader workers: pickle would call the class with the message alone.
        return BrokenSample, (self.paths, self.cause)
