"""The three losses of instruction tuning with segmentation (REFERENCE: M3D-LaMed, LM + Dice + BCE)."""
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - 2 |P T| / (|P| + |T| + 1) over the first axis, P the sigmoid of `logits`, `target` in 0..1.

    As in the reference, P is not thresholded and the smoothing 1 stands in the denominator only.
    """
    p, t = logits.float().sigmoid().flatten(1), target.float().flatten(1)
    return (1 - 2 * (p * t).sum(1) / (p.sum(1) + t.sum(1) + 1)).mean()


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice + binary cross-entropy of mask logits."""
    return dice_loss(logits, target) + F.binary_cross_entropy_with_logits(logits.float(), target.float())


def language_loss(logits: Tensor, answers: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of answer tokens [T]: logits [T, V] of the positions before them, weights [T]."""
    return (weights * F.cross_entropy(logits.float(), answers, reduction="none")).sum() / weights.sum()
