"""What config.json and the tokenizer say of a checkpoint, without its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.models import base, layout
from engine.models.checkpoint import (
    PARTS,
    TEXT_ENCODER,
    eos_token_ids,
    has_tokenizer,
    lamed_shapes,
    load_tokenizer,
    tokenizer_file,
)
from engine.models.clip import M3DClip
from engine.models.config import ClipConfig, LamedConfig, ViTConfig
from engine.models.lamed import Lamed
from engine.models.needs import Parts, parts_of
from engine.prompt import SEG_TOKEN, SPECIAL_TOKENS

_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LanguageModel:
    """family: transformers' model type, bert for M3D-CLIP's text encoder. context: tokens that prompt and answer share;
    of BERT, tokens of a text."""

    family: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Tokenizer:
    """file: that is read, None without one. ids: of special tokens, None for one that it does not know. ends: ids that
    end an answer."""

    file: str | None
    ids: dict[str, int | None] = field(default_factory=dict)
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """kind: config.json's model_type. parameters: numbers by part. expected: shapes of the keys that its files must
    hold, but those that are optional. notes: what is worth knowing. problems: why it cannot be exported."""

    kind: str
    language_model: LanguageModel
    vision: ViTConfig
    segmentation: ViTConfig | None
    visual_tokens: int | None
    parts: Parts
    parameters: dict[str, int]
    expected: _Shapes
    optional: frozenset[str]
    tokenizer: Tokenizer
    notes: list[str]
    problems: list[str]


def describe(folder: Path, values: dict) -> Description:
    """Describe a checkpoint.

    Args:
        folder: with its small files: settings and tokenizer. values: its config.json.

    Raises:
        CheckpointError: config.json does not describe a checkpoint that the engine reads.
    """
    return (_clip if values.get("model_type") == "m3d_clip" else _lamed)(folder, values)


def _lamed(folder: Path, values: dict) -> Description:
    notes, problems = list[str](), list[str]()
    config, ends = LamedConfig.from_dict(values), None
    try:
        ends = eos_token_ids(folder, values)
    except CheckpointError as error:
        problems.append(str(error))
    with torch.device("meta"):
        shapes = lamed_shapes(Lamed(config))
    parts, llm = parts_of(config), config.llm
    sizes = (llm["num_hidden_layers"], llm["hidden_size"], llm["num_attention_heads"], llm["vocab_size"])
    vision, projector = list(PARTS)[:2]
    return Description(
        kind=values["model_type"],
        language_model=LanguageModel(llm["model_type"], *sizes, config.context_length),
        vision=config.vision,
        segmentation=config.segmentation,
        visual_tokens=config.num_visual_tokens,
        parts=parts,
        parameters={
            "language model": parts.llm,
            "vision tower": _count(shapes, vision),
            "projector": _count(shapes, projector),
            "SegVol": parts.segmentation,
        },
        expected=_on_a_base(folder, values, shapes, notes, problems) if "base_model" in values else shapes,
        optional=frozenset({"lm_head.weight"} if llm.get("tie_word_embeddings") else ()),
        tokenizer=_lamed_tokenizer(folder, config, ends, notes, problems),
        notes=notes,
        problems=problems,
    )


def _on_a_base(folder: Path, values: dict, shapes: _Shapes, notes: list[str], problems: list[str]) -> _Shapes:
    """What the files of a checkpoint hold that was trained on top of a base model."""
    spec = values["base_model"]
    try:
        base.check_base(spec)
        notes.append(
            f"the language model is {spec['file']} of the package {spec['package']} {spec['version']}, which the "
            "export takes from the package index unless it is here"
        )
    except CheckpointError as error:
        problems.append(str(error))
    if (folder / layout.ADAPTER_CONFIG).is_file():
        rank = layout.read_object(folder / layout.ADAPTER_CONFIG).get("r")
        notes.append(f"a LoRA of rank {rank} is merged into it; whether it fits is checked at export")
    own = {key: shape for key, shape in shapes.items() if key.startswith(tuple(PARTS))}
    return own | {base.ADDED_TOKENS: (0, values["hidden_size"])}


def _lamed_tokenizer(
    folder: Path, config: LamedConfig, ends: list[int] | None, notes: list[str], problems: list[str]
) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        problems.append(str(error))
        return Tokenizer(tokenizer_file(folder), ends=tuple(ends or ()))
    ids, stops = {name: _id(tokenizer, name) for name in (*SPECIAL_TOKENS, SEG_TOKEN)}, tuple(ends or ())
    try:
        stops = config.prompt(tokenizer).layout.stop_ids(ends)
    except CheckpointError as error:
        problems.append(str(error))
    configured, known = config.seg_token_id, ids[SEG_TOKEN]
    if config.segmentation is not None and configured is None and known is None:
        problems.append(f"neither config.json (seg_token_id) nor the tokenizer knows {SEG_TOKEN}")
    elif config.segmentation is not None and configured is not None and configured != known:
        notes.append(f"config.json's seg_token_id is {configured}, the tokenizer's {SEG_TOKEN} is {known}")
    return Tokenizer(
        tokenizer_file(folder),
        {**ids, "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
        stops,
    )


def _clip(folder: Path, values: dict) -> Description:
    notes = ["M3D-CLIP ranks reports: it is exported beside an M3D-LaMed, by --clip-checkpoint"]
    problems = list[str]()
    config = ClipConfig.from_dict(values)
    with torch.device("meta"):
        model = M3DClip(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected, bert, tokenizer = shapes, model.language_encoder.config, Tokenizer(None)
    if "text_encoder" in values:
        spec = values["text_encoder"]
        expected = {key: shape for key, shape in shapes.items() if not key.startswith(TEXT_ENCODER)}
        package = f"{spec.get('package')} {spec.get('version')}"
        notes.append(f"text encoder and tokenizer are those of the package {package}")
    elif has_tokenizer(folder):
        tokenizer = Tokenizer(tokenizer_file(folder))
        try:
            read = load_tokenizer(folder)
            tokenizer = Tokenizer(
                tokenizer_file(folder), {name: _id(read, name) for name in ("[CLS]", "[SEP]", "[PAD]")}
            )
        except CheckpointError as error:
            problems.append(str(error))
    else:
        notes.append("without a tokenizer (vocab.txt) its encoders alone are served, and reports are not ranked")
    whole, text = sum(p.numel() for p in model.parameters()), _count(shapes, TEXT_ENCODER)
    sizes = (bert.num_hidden_layers, bert.hidden_size, bert.num_attention_heads, bert.vocab_size)
    return Description(
        kind=values["model_type"],
        language_model=LanguageModel(bert.model_type, *sizes, config.text_length),
        vision=config.vision,
        segmentation=None,
        visual_tokens=None,
        parts=Parts(0, 0, 0, whole),
        parameters={"text encoder": text, "vision encoder": whole - text},
        expected=expected,
        optional=frozenset(),
        tokenizer=tokenizer,
        notes=notes,
        problems=problems,
    )


def _count(shapes: _Shapes, prefix: str) -> int:
    return sum(math.prod(shape) for key, shape in shapes.items() if key.startswith(prefix))


def _id(tokenizer, token: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id and token != tokenizer.unk_token else found
