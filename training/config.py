"""One JSON file a stage: read into frozen dataclasses, strictly, before anything is loaded or trained."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import InvalidInput
from engine.validation import checked

T = TypeVar("T")
TENSORBOARD = "tensorboard"

# Set by the stages; everything else of transformers' TrainingArguments may stand under `trainer`.
MANAGED = {
    "output_dir": "out",
    "seed": "seed",
    "data_seed": "seed",
    "remove_unused_columns": None,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": None,
    "push_to_hub": None,
    "do_train": None,
    "do_eval": "trainer.eval_strategy",
    # Checkpoints appear once, whole, in a folder that all machines share.
    "save_on_each_node": None,
    # With these a resumed run would not end where one that was never interrupted does.
    "save_only_model": None,
    "ignore_data_skip": None,
    "auto_find_batch_size": None,
}


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What every stage's configuration has.

    out: folder of the run (its record, checkpoints, TensorBoard curves, and at the end `final`). seed: decides every
    random number. data: see `training.data.sets`. trainer: transformers' TrainingArguments by name, DeepSpeed and FSDP
    among them. sample_every: steps between sample predictions in TensorBoard, 0 for none.
    """

    out: Path
    seed: int
    data: dict
    trainer: dict
    sample_every: int = 0


def read(cls: type[T], path: Path | str) -> T:
    """The settings in a JSON file. Raises InvalidInput naming unknown, missing and mistyped settings."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the configuration {path} cannot be read: {error}") from None
    return build(cls, values)


def build(cls: type[T], values: Any, where: str = "") -> T:
    """A dataclass from an object of settings; `where` stands in front of the names in errors."""
    try:
        settings = checked(cls, values, where)
    except ValueError as error:
        raise InvalidInput(f"the configuration: {error}") from None
    _refuse_odd(settings, where.removesuffix("."))
    return settings


def training_arguments(settings: StageSettings, **defaults):
    """transformers' TrainingArguments from `settings.trainer`. Raises InvalidInput naming what is wrong."""
    from transformers import TrainingArguments

    given = settings.trainer
    check_trainer(given)
    boards = boards_of(given)
    # One process has no group; several on CPUs talk through gloo.
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    backend = {"ddp_backend": None if alone else given.get("ddp_backend", "gloo" if given.get("use_cpu") else None)}
    try:
        return TrainingArguments(
            **{
                # No batch is padded by repeating samples, and every parameter that is trained is reached by every step.
                "dataloader_drop_last": True,
                "ddp_find_unused_parameters": False,
                "save_total_limit": 2,
                **defaults,
                **given,
                **backend,
                # TensorBoard's curves are the stage's own.
                "report_to": [name for name in boards if name != TENSORBOARD] or "none",
                "output_dir": str(settings.out),
                "seed": settings.seed,
                "data_seed": settings.seed,
                "remove_unused_columns": False,
            }
        )
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise InvalidInput(f"trainer: {error}") from None


def check_trainer(given: dict) -> None:
    """Raise InvalidInput for what cannot stand under `trainer`, before anything is loaded."""
    from transformers import TrainingArguments

    managed = sorted(set(given) & set(MANAGED))
    if managed:
        instead = ", ".join(f"{name}" + (f" (use `{MANAGED[name]}`)" if MANAGED[name] else "") for name in managed)
        raise InvalidInput(f"trainer.{instead} is set by the stage itself")
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    unknown = sorted(set(given) - known)
    if unknown:
        raise InvalidInput(
            f"unknown setting {', '.join('trainer.' + name for name in unknown)}: "
            "not one of transformers' TrainingArguments"
        )
    hints = typing.get_type_hints(TrainingArguments)
    # Its annotation lags behind: true is the form that stays, a string the one that is about to go.
    hints["fsdp"] |= bool
    for name, value in given.items():
        if not _fits(hints[name], value):
            raise InvalidInput(f"trainer.{name} must be {_name(hints[name])}, not {value!r}")
    boards_of(given)
    _check_files(given)
    if given.get("full_determinism") and not given.get("use_cpu"):
        raise InvalidInput(
            "trainer.full_determinism: on CUDA, PyTorch has no deterministic gradient of the projector's pooling "
            "(AvgPool3d) and of the masks' upsampling (trilinear), and stops at the first of them: leave it out"
        )


def boards_of(given: dict) -> list[str]:
    """Where curves go: `report_to`, by default TensorBoard. Raises InvalidInput naming what is not installed."""
    from transformers.integrations import get_available_reporting_integrations

    names = given.get("report_to", TENSORBOARD)
    names = [] if names in ("none", None) else names if isinstance(names, list) else [names]
    there = get_available_reporting_integrations()
    if unknown := sorted({str(name) for name in names} - {*there, TENSORBOARD}):
        raise InvalidInput(
            f"trainer.report_to: {', '.join(unknown)} is not installed, or not known to transformers; here is "
            f"{', '.join(there) or 'none'}"
        )
    return names


def _check_files(given: dict) -> None:
    """Raise InvalidInput where DeepSpeed's or FSDP's settings cannot be read, or DeepSpeed is not installed."""
    for name in ("deepspeed", "fsdp_config"):
        if isinstance(file := given.get(name), str):
            try:
                json.loads(Path(file).read_text())
            except (OSError, ValueError) as error:
                raise InvalidInput(f"trainer.{name}: {file} cannot be read: {error}") from None
    if given.get("deepspeed") and not importlib.util.find_spec("deepspeed"):
        raise InvalidInput("trainer.deepspeed: the package deepspeed is not installed")


def as_json(settings: Any) -> Any:
    """Settings as what JSON can hold, for a run's record."""
    if dataclasses.is_dataclass(settings):
        return {f.name: as_json(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, dict):
        return {str(key): as_json(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [as_json(value) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def _refuse_odd(value: Any, name: str) -> None:
    """Raises InvalidInput for numbers below zero and for empty paths, but in objects whose keys others name."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        inner = {key: one for key, one in vars(value).items() if dict not in (hints[key], *typing.get_args(hints[key]))}
    else:
        inner = dict(enumerate(value)) if isinstance(value, tuple) else value if isinstance(value, dict) else {}
    for key, one in inner.items():
        _refuse_odd(one, f"{name}.{key}".lstrip("."))
    if isinstance(value, (int, float)) and value < 0:
        raise InvalidInput(f"{name} must not be negative, is {value}")
    if value == Path():
        raise InvalidInput(f"{name} must be a path, not an empty text")


def _fits(hint, value) -> bool:
    """Whether a JSON value is of a type; a type that JSON does not know is left to its owner."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(kind, value) for kind in typing.get_args(hint))
    hint = origin or hint
    if hint in (str, bool, dict, list):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if hint is type(None):
        return value is None
    return hint is Any or not isinstance(value, bool)


def _name(hint) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_name(kind) for kind in typing.get_args(hint))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
