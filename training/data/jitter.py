"""The recipe's random changes to an example: quarter turns and flips of image and mask together, and intensities."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

_TURN, _FLIP, _TONE, _STRENGTH = 0.5, 0.1, 0.5, 0.1
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """One drawn change. turns: quarter turns from H to W. flips: of D, H, W. image * (1 + scale) + shift."""

    turns: int = 0
    flips: tuple[bool, bool, bool] = (False, False, False)
    scale: float = 0.0
    shift: float = 0.0

    @property
    def mirrored(self) -> bool:
        """Whether the body has become its mirror image, in which left and right have changed places."""
        return sum(self.flips) % 2 == 1

    def place(self, volume: np.ndarray) -> np.ndarray:
        """[1, D, H, W] turned and flipped; for images and masks."""
        volume = np.rot90(volume, self.turns, (2, 3))
        return np.flip(volume, [axis for axis, flip in enumerate(self.flips, 1) if flip])

    def tone(self, image: np.ndarray) -> np.ndarray:
        """The image's intensities, changed and kept in 0..1."""
        return np.clip(image * np.float32(1 + self.scale) + np.float32(self.shift), 0, 1)


def draw_change(rng: np.random.Generator, size: tuple[int, int, int]) -> Change:
    """A change by the recipe: a turn with probability 0.5, each flip 0.1, scale and shift within 0.1 with 0.5 each.

    A plane that is not square (of `size` D, H, W) is turned by half turns only.
    """
    turns = int(rng.integers(1, 4)) if rng.random() < _TURN else 0
    if size[1] != size[2]:
        turns = 2 * (turns > 0)
    flips = tuple(bool(flip) for flip in rng.random(3) < _FLIP)
    scale, shift = (float(rng.uniform(-_STRENGTH, _STRENGTH)) if rng.random() < _TONE else 0.0 for _ in range(2))
    return Change(turns, flips, scale, shift)


def swap_sides(text: str) -> str:
    """`text` with the words left and right exchanged, capitals kept."""

    def other(found: re.Match) -> str:
        word = "right" if found[0].lower() == "left" else "left"
        return word.upper() if found[0].isupper() else word.capitalize() if found[0][0].isupper() else word

    return _SIDE.sub(other, text)
