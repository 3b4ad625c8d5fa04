"""The tensors of a checkpoint, as its files have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.models import layout

# Buffers that older transformers versions saved and that are derived, never learned.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
# Cross-attention that MONAI's transformer blocks have since 1.4, and that a ViT never runs: a checkpoint that was saved
# with such a MONAI has it in the vision tower and in SegVol's encoder.
NEVER_RUN = re.compile(r"\.blocks\.\d+\.(norm_)?cross_attn\.")


class Weights:
    """The tensors of a checkpoint by published key, read one at a time from memory-mapped files.

    Iterating gives the keys; `weights[key]` the tensor; `shape(key)` its shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor | tuple[Path, str]]):
        self._tensors = tensors
        self._files: dict[Path, object] = {}

    @classmethod
    def open(cls, folder: Path) -> Weights:
        """The weights in `folder`: of `layout.WEIGHTS` the first that is there."""
        names = layout.tensor_files(file_names(folder), folder.joinpath)
        if not names:
            raise CheckpointError(f"{folder} {layout.NO_WEIGHTS}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: the index names {', '.join(missing)}, which are not there")
        tensors: dict[str, Tensor | tuple[Path, str]] = {}
        for name in names:
            tensors.update(cls.open_file(folder / name)._tensors)
        return cls(tensors)

    @classmethod
    def open_file(cls, file: Path) -> Weights:
        """The weights in one file: .safetensors, or what torch.save wrote."""
        return cls(_safetensors_keys(file) if file.suffix == ".safetensors" else _torch_tensors(file))

    def joined(self, tensors: dict[str, Tensor]) -> Weights:
        """These and others."""
        return Weights({**self._tensors, **tensors})

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._tensors if not DERIVED.search(key) and not NEVER_RUN.search(key))

    @property
    def never_run(self) -> list[str]:
        """Keys that later versions of MONAI add and nobody uses; iterating leaves them out."""
        return [key for key in self._tensors if NEVER_RUN.search(key)]

    def __getitem__(self, key: str) -> Tensor:
        value = self._tensors[key]
        return value if isinstance(value, Tensor) else self._file(value[0]).get_tensor(value[1])

    def shape(self, key: str) -> tuple[int, ...]:
        value = self._tensors[key]
        return tuple(value.shape if isinstance(value, Tensor) else self._file(value[0]).get_slice(value[1]).get_shape())

    def _file(self, path: Path):
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]


def file_names(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return [file.name for file in folder.iterdir() if file.is_file()]


def _safetensors_keys(file: Path) -> dict[str, tuple[Path, str]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: (file, key) for key in opened.keys()}  # noqa: SIM118 safe_open is not iterable
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a readable safetensors file (cut off?): {error}") from None


def _torch_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, runtime and value errors alike
        raise CheckpointError(f"{file} cannot be read as plain tensors (weights_only): {error}") from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file} holds a {type(tensors).__name__}, expected are tensors by key")
    others = [
        f"{key}: {type(value).__name__}"
        for key, value in tensors.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise CheckpointError(f"{file} holds more than tensors by key ({listed(others)})")
    return tensors


def listed(names: list[str], limit: int = 6) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
