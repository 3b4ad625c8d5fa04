"""Masks: the reference's soft Dice of probabilities, and Dice, HD95 and NSD of the mask itself by MONAI."""

from __future__ import annotations

import numpy as np

NSD_MM = 2.0  # how far a surface may lie off and still count as right


def soft_dice(logits: np.ndarray | None, truth: np.ndarray) -> float:
    """The reference's Dice: of sigmoid(logits), not thresholded, with 1 added to the denominator only.

    logits: [D, H, W] in model space; None where the answer has no [SEG], for which the reference takes -inf: 0.
    truth: bool, the same shape.
    """
    if logits is None:
        return 0.0
    with np.errstate(over="ignore"):
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return float(2 * probability[truth].sum() / (probability.sum() + truth.sum() + 1))


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """2 |both| ÷ (|mask| + |truth|) of bool arrays of one shape. NaN if both are empty."""
    from monai.metrics import compute_dice

    return float(compute_dice(*_batched(mask, truth), include_background=True))


def hd95(mask: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, ...]) -> float:
    """95th percentile of the distances between the surfaces, mm, the greater of both directions.

    truth: not empty. An empty mask lies as far off as anything can: the volume's diagonal.
    """
    from monai.metrics import compute_hausdorff_distance

    if not mask.any():
        return float(np.linalg.norm(np.array(mask.shape) * spacing_mm))
    found = compute_hausdorff_distance(
        *_batched(mask, truth), include_background=True, percentile=95, spacing=list(map(float, spacing_mm))
    )
    return float(found)


def nsd(mask: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, ...], tolerance_mm: float = NSD_MM) -> float:
    """Share of both surfaces that lies within the tolerance of the other; 0 for an empty mask. truth: not empty."""
    from monai.metrics import compute_surface_dice

    if not mask.any():
        return 0.0
    found = compute_surface_dice(
        *_batched(mask, truth),
        class_thresholds=[tolerance_mm],
        include_background=True,
        spacing=list(map(float, spacing_mm)),
    )
    return float(found)


def _batched(*masks: np.ndarray):
    """Tensors [1, 1, D, H, W], as MONAI takes them."""
    import torch

    return tuple(torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in masks)
