"""Merge LoRA and everything else that was trained into one checkpoint in the published layout.

    python training/merge_lora.py training/configs/paper/merge_lora.json

The result has the published key names and is read strictly by `engine.models.checkpoint`; what is incomplete is
refused, and the folder appears whole or not at all, with a `run.json` that says what it was made from. With `keep_base`
the language model is left out: the folder holds what was trained, and the engine composes it with the package that
carries the base model.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from engine.cli import console
from engine.errors import CheckpointError, InvalidInput
from engine.models import base
from engine.models.checkpoint import lamed_shapes, read_config
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed
from engine.models.layout import TOKENIZER_FILES
from training import record
from training.config import as_json, build, read
from training.files import place, write_json
from training.starting_points import (
    BASE_DIGEST,
    EMBEDDINGS,
    HEAD,
    PackagedModel,
    check_shapes,
    open_language_model,
    open_part,
    read_adapter,
)

STAGE = "merge_lora"
DTYPES = ("float32", "bfloat16", "float16")
_SHARD = "5GB"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """trained: `final`, or a checkpoint, of finetune. out: the folder to write; it must not be there yet. dtype: of the
    tensors written. base: the language model, where it is no longer where training found it. keep_base: see above."""

    trained: Path
    out: Path
    dtype: str = "bfloat16"
    base: str | PackagedModel | None = None
    keep_base: bool = False


def merge(settings: Settings) -> Path:
    """Write the merged checkpoint; returns its folder. CheckpointError: something does not fit or is incomplete."""
    if settings.dtype not in DTYPES:
        raise InvalidInput(f"dtype {settings.dtype!r} is not known; known: {', '.join(DTYPES)}")
    if settings.out.exists():
        raise InvalidInput(f"{settings.out} is already there: remove it to merge again, or give another `out`")
    trained = settings.trained
    if not (trained / "config.json").is_file() or not (trained / "model.safetensors").is_file():
        raise CheckpointError(
            f"{trained} holds no trained model (config.json and model.safetensors). A checkpoint of "
            "ZeRO-3 has none unless stage3_gather_16bit_weights_on_model_save is set: join its "
            "shards with DeepSpeed's zero_to_fp32.py"
        )
    config = read_config(trained)
    if "base_model" not in config:
        raise CheckpointError(f"{trained} names no base_model: it is a whole checkpoint already")
    if settings.keep_base and "package" not in config["base_model"]:
        raise InvalidInput("keep_base needs a base model that a package carries: the engine composes no other")
    own, adapter = open_part(str(trained / "model.safetensors")), {}
    if any((trained / name).is_file() for name in (base.ADAPTER_CONFIG, base.ADAPTER_WEIGHTS)):
        adapter = open_part(str(trained / base.ADAPTER_WEIGHTS))
    if not any((trained / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{trained} has no tokenizer: it is incomplete")
    source = settings.base or _base_of(config)
    state = {
        **_language_model(source, trained, adapter, own),
        **{key: value for key, value in own.items() if key != base.ADDED_TOKENS},
    }
    if config.get("tie_word_embeddings"):
        state.pop(HEAD, None)
    with torch.device("meta"):
        model = Lamed(LamedConfig.from_dict(config))
    expected = {
        key: torch.empty(shape, device="meta")
        for key, shape in lamed_shapes(model).items()
        if not (config.get("tie_word_embeddings") and key == HEAD)
    }
    check_shapes("checkpoint that its config.json describes", str(trained), state, expected)
    broken = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(f"{trained}: values that are not finite in {', '.join(sorted(broken)[:4])}")
    dtype = getattr(torch, settings.dtype)
    staging = settings.out.with_name(f".{settings.out.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    record.begin(staging, STAGE, as_json(settings))
    if settings.keep_base:
        _save(own, staging, "model", dtype)
        _save(adapter, staging, "adapter_model", dtype)
        if adapter:
            shutil.copy(trained / base.ADAPTER_CONFIG, staging)
    else:
        config = {
            **{key: value for key, value in config.items() if key not in ("base_model", BASE_DIGEST)},
            "torch_dtype": settings.dtype,
        }
        _save(state, staging, "model", dtype)
    write_json(staging / "config.json", config)
    for name in TOKENIZER_FILES:
        if (trained / name).is_file():
            shutil.copy(trained / name, staging)
    record.end(staging)
    place(staging, settings.out)
    return settings.out


def _base_of(config: dict) -> str | PackagedModel:
    spec = config["base_model"]
    return spec["path"] if "path" in spec else build(PackagedModel, spec, "base_model.")


def _language_model(
    source: str | PackagedModel, trained: Path, adapter: dict[str, Tensor], own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The base language model with LoRA merged in, and with the rows that were added to it."""
    model = open_language_model(source)
    state = dict(model.state)
    if adapter:
        settings = read_adapter(trained, model)
        a_count = sum(".lora_A." in key for key in adapter)
        if 2 * a_count != len(adapter) or any(value.numel() == 0 for value in adapter.values()):
            raise CheckpointError(
                f"the LoRA in {trained} is incomplete: {a_count} lora_A in {len(adapter)} tensors, "
                f"{sum(value.numel() == 0 for value in adapter.values())} of them empty"
            )
        state = {key: value.float() if key.startswith("model.layers.") else value for key, value in state.items()}
        base.merge_lora(state, settings, adapter)
    if base.ADDED_TOKENS in own:
        state[EMBEDDINGS] = torch.cat([state[EMBEDDINGS], own[base.ADDED_TOKENS].to(state[EMBEDDINGS].dtype)])
    return state


def _save(tensors: dict[str, Tensor], folder: Path, stem: str, dtype: torch.dtype) -> None:
    from huggingface_hub import save_torch_state_dict

    if tensors:
        save_torch_state_dict(
            {key: value.to(dtype).contiguous() for key, value in tensors.items()},
            folder,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=_SHARD,
        )


def main() -> None:
    parser = console.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", type=Path, help="a JSON file, e.g. from training/configs")
    path = parser.parse_args().configuration
    if status := console.run(lambda: _run(path)):
        sys.exit(status)


def _run(configuration: Path) -> None:
    settings = read(Settings, configuration)
    # As in the other stages: a finished result is left as it is, if its settings are those of the configuration.
    if settings.out.is_dir():
        record.check(settings.out, STAGE, as_json(settings))
        unknown = "" if (settings.out / record.FILE).is_file() else ", though it does not say what it was made from"
        print(f"{settings.out} is already there{unknown}: nothing to do (remove it to merge again)")
    else:
        print(f"wrote {merge(settings)}")


if __name__ == "__main__":
    main()
