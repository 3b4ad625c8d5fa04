"""The recipe of a training run: everything that decides its result, read from one JSON file and checked."""
from __future__ import annotations

import json
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

from engine.errors import InvalidInput


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
class Lora:
    """LoRA on every linear layer of the language model."""

    r: int
    alpha: int


@dataclass(frozen=True)
class Stage:
    """One stage of training. batch: scans a step and process. per_scan: structures or questions asked about each.

    learning_rate: its peak, after `warmup` (share of the steps), before the cosine decay to a hundredth.
    """

    steps: int
    batch: int
    per_scan: int
    learning_rate: float
    warmup: float
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """A whole run. model: config.json's keys for our part; base_model: the package that carries the language model.

    processes: data-parallel workers of one thread each; they average their gradients. fine_grid: (D, H, W) to which
    scans are prepared before augmentation. train: scan -> how often it is drawn, relative to the others.
    mask_loss_weight: of Dice + BCE beside the language loss; prompt_loss_weight: of the distance between a `[SEG]`
    prompt and the one that the segmentation stage learned for the structure. prompt_noise: standard deviation of the
    noise on those prompts in the refinement stage.
    """

    seed: int
    processes: int
    base_model: dict
    model: dict
    lora: Lora
    fine_grid: tuple[int, int, int]
    train: dict
    held_out: tuple[str, ...]
    augmentation: Augmentation
    held_out_augmentation: Augmentation
    segmentation: Stage
    alignment: Stage
    instruction: Stage
    refinement: Stage
    mask_loss_weight: float
    prompt_loss_weight: float
    prompt_noise: float

    @classmethod
    def read(cls, path: Path | str) -> "Recipe":
        """Read a recipe. Raises InvalidInput naming unknown, missing or mistyped settings."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise InvalidInput(f"the recipe {path} cannot be read: {error}") from None
        return _build(cls, values, "")


def _build(cls, values, where: str):
    if not isinstance(values, dict):
        raise InvalidInput(f"{where or 'the recipe'} must be an object of settings, not {values!r}")
    known = {f.name for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    for problem, names in (("unknown", set(values) - known), ("missing", known - set(values))):
        if names:
            raise InvalidInput(f"{problem} setting {', '.join(where + n for n in sorted(names))}; "
                               f"known: {', '.join(sorted(known))}")
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in values.items()})


def _convert(hint, value, where: str):
    if is_dataclass(hint):
        return _build(hint, value, where + ".")
    if isinstance(hint, types.GenericAlias):
        kind = typing.get_args(hint)[0]
        if not isinstance(value, list):
            raise InvalidInput(f"{where} must be a list, not {value!r}")
        return tuple(_convert(kind, item, where) for item in value)
    allowed = (int, float) if hint is float else (hint,)
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise InvalidInput(f"{where} must be {hint.__name__}, not {value!r}")
    if hint in (int, float) and value < 0:
        raise InvalidInput(f"{where} must not be negative, is {value}")
    return hint(value)
