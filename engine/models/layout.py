"""The published layout of a checkpoint: which of its files are read.

Reading (`Weights.open`), hashing (`sha256`) and downloading (`hub.locate`) all follow this one rule. Code in a folder
(*.py) is never read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

from engine.errors import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SETTINGS = (CONFIG, GENERATION_CONFIG)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
INDEX = ".index.json"
# What the weights may lie in. The first one that is there is read, and none of the others.
WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "model.bin",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NO_WEIGHTS = f"holds no weights: none of {', '.join(WEIGHTS)}"


def weights_file(names: Collection[str]) -> str | None:
    """The one of WEIGHTS that is read of a folder that holds files of these names."""
    return next((name for name in WEIGHTS if name in names), None)


def tensor_files(names: Collection[str], path: Callable[[str], Path]) -> list[str]:
    """The files that hold the weights: one file, or the shards that the index names.

    Args:
        names: names of the files in the folder.
        path: the local path of one of them.

    Returns:
        Names, sorted; empty without weights. An index may name shards that are not among `names`.

    Raises:
        CheckpointError: the index is damaged.
    """
    name = weights_file(names)
    if name is None or not name.endswith(INDEX):
        return [name] if name else []
    try:
        shards = set(json.loads(path(name).read_text())["weight_map"].values())
        if others := [shard for shard in shards if not isinstance(shard, str)]:
            raise TypeError(f"{others[0]!r} is no file name")
        if outside := [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]:
            raise ValueError(f"{outside[0]!r} lies outside the folder")
        return sorted(shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path(name)} is damaged ({type(error).__name__}: {error}): its weight_map must give the file "
            f"of each key; get the checkpoint again"
        ) from None


def files_read(names: Collection[str], path: Callable[[str], Path]) -> list[str]:
    """All files of a checkpoint that are read: settings, tokenizer, then weights. Arguments as for `tensor_files`.

    The adapter is read where config.json names a `base_model`, see `engine/models/base.py`.

    Raises:
        CheckpointError: config.json or the index is damaged.
    """
    found = [name for name in (*SETTINGS, *TOKENIZER_FILES) if name in names]
    if CONFIG in names and "base_model" in read_object(path(CONFIG)):
        found += [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name in names]
    name = weights_file(names)
    if name is not None and name.endswith(INDEX):
        found.append(name)
    return found + tensor_files(names, path)


def read_object(file: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError if there is none."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return values
