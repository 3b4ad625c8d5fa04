"""Random views of a labelled scan: image and structures move together, and a mirrored body swaps its sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from training.data.jitter import swap_sides
from training.data.scans import LabelledScan

_VISIBLE_SHARE, _VISIBLE_VOXELS = 0.4, 16


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes to a scan; each value is drawn uniformly from -x..x unless it says otherwise.

    rotate_degrees: about each axis. zoom: log2 of the scale of each axis, about a common one of the same range.
    shift: share of the volume's side. mirror: probability of swapping left and right. gamma: log2 of the exponent.
    contrast, brightness: of intensities in 0..1. gradient: strength of a linear field along a random axis.
    noise: largest standard deviation (drawn from 0..x).
    """

    rotate_degrees: float
    zoom: float
    shift: float
    mirror: float
    gamma: float
    contrast: float
    brightness: float
    gradient: float
    noise: float


@dataclass(frozen=True)
class View:
    """One random view of a scan at the model's size.

    image: float32 [D, H, W] in 0..1. bits: int64 [D, H, W], see LabelledScan; structures are named as they now lie.
    visible: the structures of which enough is in view to ask about them. facts: the scan's, sides swapped if mirrored.
    """

    scan: str
    image: np.ndarray
    bits: np.ndarray
    structures: tuple[str, ...]
    visible: tuple[str, ...]
    facts: dict[str, str]

    def mask(self, structure: str) -> np.ndarray:
        """bool [D, H, W] of one structure."""
        return (self.bits >> self.structures.index(structure)) & 1 == 1

    def box(self, structure: str) -> np.ndarray:
        """[6] first and last voxel along D, H, W (x1, y1, z1, x2, y2, z2), each divided by the axis' length."""
        mask = self.mask(structure)
        spans = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        return np.array([[span[0] for span in spans], [span[-1] for span in spans]]).ravel() / np.tile(mask.shape, 2)


def view_of(
    scan: LabelledScan, ranges: Augmentation | None, size: tuple[int, int, int], rng: np.random.Generator
) -> View:
    """A random view of `scan` at `size` (D, H, W); without ranges, the scan as it is."""
    matrix, shift = (np.eye(3), np.zeros(3)) if ranges is None else _placement(ranges, rng)
    mirrored = ranges is not None and rng.random() < ranges.mirror
    if mirrored:
        matrix = matrix @ np.diag([1.0, 1.0, -1.0])
    # Centres of the view's voxels in -1..1 along D, H, W, and where they lie in the scan.
    axes = [(2 * torch.arange(n) + 1) / n - 1 for n in size]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    places = centres @ torch.tensor(matrix.T, dtype=torch.float32) + torch.tensor(shift, dtype=torch.float32)
    image = F.grid_sample(torch.from_numpy(scan.image)[None, None], places.flip(-1)[None], align_corners=False)[0, 0]
    image = image.numpy() if ranges is None else _toned(image.numpy(), ranges, rng)
    bits = _nearest(scan.bits, places)
    structures = tuple(map(swap_sides, scan.structures)) if mirrored else scan.structures
    facts = {key: swap_sides(text) for key, text in scan.facts.items()} if mirrored else scan.facts
    return View(
        scan.name,
        np.clip(image, 0, 1),
        bits,
        structures,
        _visible(scan, bits, structures, abs(np.linalg.det(matrix))),
        facts,
    )


def _placement(ranges: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random rotation with zoom, and a shift, in coordinates -1..1."""
    matrix = np.diag(2.0 ** (rng.uniform(-1, 1) * ranges.zoom + rng.uniform(-1, 1, 3) * ranges.zoom / 2))
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-1, 1, 3) * ranges.rotate_degrees)):
        turn, (a, b) = np.eye(3), [k for k in range(3) if k != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix, 2 * rng.uniform(-1, 1, 3) * ranges.shift


def _toned(image: np.ndarray, ranges: Augmentation, rng: np.random.Generator) -> np.ndarray:
    image = np.clip(image, 0, 1) ** np.float32(2.0 ** (rng.uniform(-1, 1) * ranges.gamma))
    axis = rng.integers(3)
    ramp = np.linspace(-1, 1, image.shape[axis], dtype=np.float32) * np.float32(rng.uniform(-1, 1) * ranges.gradient)
    image = image * (1 + ramp.reshape([-1 if k == axis else 1 for k in range(3)]))
    image = image * np.float32(1 + rng.uniform(-1, 1) * ranges.contrast)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0, ranges.noise))
    return image + noise + np.float32(rng.uniform(-1, 1) * ranges.brightness)


def _nearest(bits: np.ndarray, places: torch.Tensor) -> np.ndarray:
    """`bits` at places in -1..1 along D, H, W; nothing outside."""
    padded = np.pad(bits, 1)
    flat = torch.zeros(places.shape[:-1], dtype=torch.int32)
    for axis, n in enumerate(bits.shape):
        index = ((places[..., axis] + 1) * (n / 2) + 1).clamp_(0, n + 1).to(torch.int32)
        flat = flat * (n + 2) + index
    return padded.ravel()[flat.numpy()]


def _visible(
    scan: LabelledScan, bits: np.ndarray, structures: tuple[str, ...], magnification: float
) -> tuple[str, ...]:
    """Counted on every other row and column, which is exact enough."""
    seen = bits[:, ::2, ::2].ravel()
    visible = []
    for k, name in enumerate(structures):
        there = np.count_nonzero(seen & (1 << k))
        if 4 * there >= _VISIBLE_VOXELS and there / seen.size * magnification >= _VISIBLE_SHARE * scan.shares[k]:
            visible.append(name)
    return tuple(visible)
