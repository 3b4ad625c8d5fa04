"""The language model in a folder of its own, as vLLM loads it: transformers' own architecture and keys, with the
tokenizer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.models.checkpoint import PARTS, checked_lamed, load_tokenizer
from engine.models.config import LamedConfig
from engine.models.language_model import causal_lm_config
from engine.models.layout import TOKENIZER_FILES
from engine.models.needs import SHARD_BYTES
from engine.models.tokenizer import MODEL as SENTENCEPIECE
from engine.models.weights import Weights, listed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_llm(
    config: LamedConfig, weights: Weights, source: Path, folder: Path, precision: str, progress: Callable[[str], None]
) -> None:
    """Stream the language model's tensors into `folder` in shards, converted to `precision`; write its tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tied = bool(config.llm.get("tie_word_embeddings"))
    model, expected = checked_lamed(config, weights)
    keys = [key for key in expected if not key.startswith(tuple(PARTS)) and not (tied and key == "lm_head.weight")]
    dtype = DTYPES[precision]
    shards = _shards(keys, expected, dtype.itemsize)
    for index, shard in enumerate(shards, start=1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        progress(f"{name}, {len(shard)} tensors")
        tensors = {key: weights[key].to(dtype).contiguous() for key in shard}
        if broken := [key for key, tensor in tensors.items() if not _finite(tensor)]:
            raise CheckpointError(
                f"the checkpoint has values that are NaN or infinite in {precision}, in "
                f"{listed(broken)}: get it again, or export with another --precision if its values "
                f"are too large for this one"
            )
        save_file(tensors, folder / name, metadata={"format": "pt"})
        shards[index - 1] = (name, shard)
    if len(shards) > 1:
        total = sum(torch.Size(expected[key]).numel() for key in keys) * dtype.itemsize
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, shard in shards for key in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    causal_lm_config(
        config.llm, architectures=[type(model.llm).__name__], dtype=str(dtype).removeprefix("torch.")
    ).save_pretrained(folder)
    if (source / SENTENCEPIECE).is_file():  # the server then needs no sentencepiece
        load_tokenizer(source).save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _finite(tensor: torch.Tensor) -> bool:
    """By its ends, which a NaN becomes too: a mask of all elements would take half as much memory again."""
    return all(math.isfinite(end) for end in tensor.aminmax())


def _shards(keys: list[str], shapes: dict, itemsize: int) -> list:
    shards, size = [[]], 0
    for key in keys:
        nbytes = torch.Size(shapes[key]).numel() * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
    return shards
