"""What a checkpoint's `config.json` says about the model, checked on reading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from engine.errors import CheckpointError
from engine.models.language_model import FAMILIES, context_length, known_families
from engine.prompt import Prompt

# What the published checkpoints leave unsaid: the reference hard-codes these sizes (multimodal_encoder/vit.py).
PUBLISHED_VIT = {"hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12}
BERT_POSITIONS = 512  # BertConfig's default, which the published M3D-CLIP leaves as it is
MOST_PATCHES = 1 << 17  # of a volume; the published one has 2,048


@dataclass(frozen=True)
class ViTConfig:
    """A 3D ViT. image_size and patch_size in voxels, (D, H, W)."""

    image_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    hidden_size: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    in_channels: int = 1

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or any(not isinstance(n, int) or n < 1 for n in value):
                raise CheckpointError(f"{name} must be three positive whole numbers (D, H, W), not {value}")
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size)):
            raise CheckpointError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.num_patches > MOST_PATCHES:
            raise CheckpointError(
                f"image_size {self.image_size} is {self.num_patches:,} patches; {MOST_PATCHES:,} are read"
            )
        _check_whole({name: getattr(self, name) for name in ("in_channels", *PUBLISHED_VIT)})
        if self.hidden_size % self.num_heads:
            raise CheckpointError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along D, H and W."""
        return cast(tuple[int, int, int], tuple(n // patch for n, patch in zip(self.image_size, self.patch_size)))

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class LamedConfig:
    """M3D-LaMed: 3D ViT, spatial-pooling projector, language model, and SegVol with its own encoder if
    `segmentation`.

    family: config.json's model_type, one of FAMILIES. llm: the language model's part of config.json, with transformers'
    name of its family as `model_type`.
    seg_token_id: id of `[SEG]`; None where the checkpoint does not name it (then the tokenizer does).
    """

    vision: ViTConfig
    segmentation: ViTConfig | None
    family: str
    llm: dict
    proj_layer_type: str = "mlp"
    proj_layer_num: int = 2
    proj_pooling_type: str = "spatial"
    proj_pooling_size: int = 2
    seg_token_id: int | None = None

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens that one volume becomes, N."""
        if self.proj_pooling_type == "sequence":
            return self.vision.num_patches // self.proj_pooling_size**3
        return math.prod(self.visual_grid)

    @property
    def visual_grid(self) -> tuple[int, ...]:
        """(d, h, w) of the visual tokens under spatial pooling."""
        return tuple(n // self.proj_pooling_size for n in self.vision.grid)

    @property
    def llm_width(self) -> int:
        return self.llm["hidden_size"]

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        return context_length(self.llm)

    def prompt(self, tokenizer: Any) -> Prompt:
        """Prompts for this model. Raises CheckpointError if `tokenizer` is not the family's."""
        configured = self.llm.get("eos_token_id")
        layout = FAMILIES[self.family].layout(tokenizer)
        return Prompt(
            layout,
            self.num_visual_tokens,
            self.context_length,
            [configured] if isinstance(configured, int) else configured,
        )

    @classmethod
    def from_dict(cls, values: dict) -> LamedConfig:
        """From a checkpoint's config.json (keys as published; `vision_config` and `seg_config` for other sizes)."""
        model_type = values.get("model_type")
        if model_type not in FAMILIES:
            raise CheckpointError(
                f"this is a checkpoint of architecture {model_type!r}; the engine reads M3D-LaMed with model_type "
                f"{known_families()}, and M3D-CLIP ('m3d_clip', with --clip-checkpoint)"
            )
        required = (
            "image_size",
            "patch_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        )
        missing = [key for key in required if key not in values]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        counts = {key: values[key] for key in required[2:]}
        _check_whole(counts | {key: values[key] for key in ("proj_layer_num", "proj_pooling_size") if key in values})
        # null leaves these to transformers.
        _check_whole(
            {
                key: values[key]
                for key in ("num_key_value_heads", "head_dim", "max_position_embeddings")
                if values.get(key) is not None
            }
        )
        if values.get("vision_tower", "vit3d") != "vit3d":
            raise CheckpointError(f"vision_tower {values['vision_tower']!r} is not known; known is 'vit3d'")
        if values.get("vision_select_layer", -1) != -1 or values.get("vision_select_feature", "patch") != "patch":
            raise CheckpointError(
                "only vision_select_layer -1 with vision_select_feature 'patch' is supported "
                "(others are broken in the reference)"
            )
        if values.get("mm_projector_type", "spp") != "spp":
            raise CheckpointError(f"mm_projector_type {values['mm_projector_type']!r} is not known; known is 'spp'")
        size = {key: _as_tuple(values[key]) for key in ("image_size", "patch_size")}
        vision = ViTConfig(
            **size,
            in_channels=values.get("image_channel", 1),
            **_vit_sizes(values.get("vision_config"), values.get("mm_hidden_size", 768)),
        )
        module = values.get("segmentation_module")
        if module is not None and "segvol" not in str(module).lower():
            raise CheckpointError(f"segmentation_module {module!r} is not known; known is 'segvol'")
        segmentation = module and ViTConfig(**size, **_vit_sizes(values.get("seg_config")))
        config = cls(
            vision=vision,
            segmentation=segmentation or None,
            family=model_type,
            llm=FAMILIES[model_type].known_settings(values),
            proj_layer_type=values.get("proj_layer_type", "mlp"),
            proj_layer_num=values.get("proj_layer_num", 2),
            proj_pooling_type=values.get("proj_pooling_type", "spatial"),
            proj_pooling_size=values.get("proj_pooling_size", 2),
            seg_token_id=values.get("seg_token_id"),
        )
        if config.proj_layer_type not in ("mlp", "linear"):
            raise CheckpointError(f"proj_layer_type {config.proj_layer_type!r} is not known; known: mlp, linear")
        if config.proj_pooling_type not in ("spatial", "sequence"):
            raise CheckpointError(
                f"proj_pooling_type {config.proj_pooling_type!r} is not known; known: spatial, sequence"
            )
        if config.num_visual_tokens < 1:
            raise CheckpointError(
                f"proj_pooling_size {config.proj_pooling_size} leaves no visual token of the "
                f"{' x '.join(map(str, vision.grid))} patches"
            )
        if config.context_length <= config.num_visual_tokens:
            raise CheckpointError(
                f"the language model has a context of {config.context_length} tokens, and a scan alone takes "
                f"{config.num_visual_tokens}: max_position_embeddings or the image size is wrong"
            )
        seg, vocabulary = config.seg_token_id, values["vocab_size"]
        if segmentation and seg is not None and not (isinstance(seg, int) and 0 <= seg < vocabulary):
            raise CheckpointError(f"seg_token_id {seg!r} is no token of the vocabulary: vocab_size is {vocabulary}")
        return config


@dataclass(frozen=True)
class ClipConfig:
    """M3D-CLIP: 3D ViT and BERT. `bert` is the text encoder's config as transformers' BertConfig takes it."""

    vision: ViTConfig
    bert: dict

    @property
    def text_length(self) -> int:
        """Most tokens of a text that are read, [CLS] and [SEP] included: BERT's positions.

        Not config.json's `max_text_len` (published: 128): the reference trains and evaluates at 512 and never reads it.
        """
        return self.bert.get("max_position_embeddings", BERT_POSITIONS)

    @classmethod
    def from_dict(cls, values: dict) -> ClipConfig:
        """From a checkpoint's config.json, keys as published."""
        if values.get("model_type") != "m3d_clip":
            raise CheckpointError(
                f"this is a checkpoint of architecture {values.get('model_type')!r}, M3D-CLIP ('m3d_clip') is needed"
            )
        if values.get("pos_embed", "perceptron") != "perceptron":
            raise CheckpointError(f"pos_embed {values['pos_embed']!r} is not known; known is 'perceptron'")
        vision = ViTConfig(
            image_size=_as_tuple(values.get("img_size", (32, 256, 256))),
            patch_size=_as_tuple(values.get("patch_size", (4, 16, 16))),
            in_channels=values.get("in_channels", 1),
            **{key: values.get(key, default) for key, default in PUBLISHED_VIT.items()},
        )
        # The published checkpoint names bert-base-uncased by path only; its sizes are BertConfig's defaults.
        bert = {"vocab_size": values.get("vocab_size", 30522), **values.get("bert_config", {})}
        config = cls(vision=vision, bert=bert)
        _check_whole({"max_position_embeddings": config.text_length})
        return config


def _as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


def _check_whole(values: dict) -> None:
    for key, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{key} must be a positive whole number, not {value!r}")


def _vit_sizes(given: dict | None, hidden_size: int = 768) -> dict:
    if not isinstance(given, dict | None):
        raise CheckpointError(f"vision_config/seg_config must be an object with sizes, not {given!r}")
    given = {"hidden_size": hidden_size, **(given or {})}
    unknown = sorted(set(given) - set(PUBLISHED_VIT))
    if unknown:
        raise CheckpointError(
            f"vision_config/seg_config: unknown {', '.join(unknown)}; known: {', '.join(PUBLISHED_VIT)}"
        )
    return {**PUBLISHED_VIT, **given}
