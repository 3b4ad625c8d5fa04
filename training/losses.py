"""The losses: LM + Dice + BCE of instruction tuning, and the contrastive one of M3D-CLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
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


def language_loss(logits: Tensor, answers: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy of answer tokens [T], summed and divided by `total` (by default the sum of the weights).

    logits: [T, V] of the positions before them. weights: [T].
    """
    return (weights * F.cross_entropy(logits.float(), answers, reduction="none")).sum() / (
        weights.sum() if total is None else total
    )


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor, kept_B: Tensor | None = None) -> Tensor:
    """M3D-CLIP's loss: mean cross-entropy of each scan among all texts and of each text among all scans.

    Row k of both (L2-normalised) belongs together; rows that are not `kept_B` (bool) count as not there. In a process
    group the rows of all processes (as many in each) are compared, and gradients flow back to the process that a row
    came from; every process gets the same value.
    """
    kept_B = torch.ones(len(image_BE), dtype=torch.bool, device=image_BE.device) if kept_B is None else kept_B
    if dist.is_initialized() and dist.get_world_size() > 1:
        image_BE, text_BE = _Gathered.apply(image_BE), _Gathered.apply(text_BE)
        kept_B = _gather(kept_B.to(torch.uint8)).bool()
    if not kept_B.any():
        return (image_BE.sum() + text_BE.sum() + scale) * 0
    image_BE, text_BE = image_BE[kept_B], text_BE[kept_B]
    logits = scale * image_BE @ text_BE.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class _Gathered(torch.autograd.Function):
    """The rows of all processes, one after the other; their gradients are summed and go back where they came from."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        return _gather(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(rows: Tensor) -> Tensor:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
