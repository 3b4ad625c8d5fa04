"""The language models under M3D-LaMed: the table of their families, what config.json says of them, and transformers'
implementation. docs/language_models.md says how to add one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engine.errors import CheckpointError
from engine.prompt.layout import Layout
from engine.prompt.llama3 import Llama3Layout
from engine.prompt.plain import PlainLayout
from engine.prompt.qwen2 import Qwen2Layout

_SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "hidden_act",
    "tie_word_embeddings",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Family:
    """title: for people. model_type: transformers' name. architecture: M3D-LaMed's on it. layout: of its prompts.
    own_keys: of config.json, beside the shared."""

    title: str
    model_type: str
    architecture: str
    layout: type[Layout]
    own_keys: tuple[str, ...]

    def known_settings(self, values: dict) -> dict:
        """The language model's part of a checkpoint's config.json."""
        keys = (*_SHARED, *self.own_keys)
        return {"model_type": self.model_type, **{key: values[key] for key in keys if key in values}}


_LLAMA_KEYS = ("attention_bias", "mlp_bias")
# By config.json's model_type. Of several on one model type of transformers, training takes the first unless it is told.
# Phi-3 has q, k and v, and gate and up, in one weight each, and may look back no further than sliding_window.
FAMILIES = {
    "lamed_llama": Family("LLaMA", "llama", "LamedLlamaForCausalLM", PlainLayout, _LLAMA_KEYS),
    "lamed_phi3": Family(
        "Phi-3",
        "phi3",
        "LamedPhi3ForCausalLM",
        PlainLayout,
        ("sliding_window", "partial_rotary_factor", "original_max_position_embeddings", "resid_pdrop"),
    ),
    "lamed_llama3": Family(
        "Llama-3 with its chat template", "llama", "LamedLlama3ForCausalLM", Llama3Layout, _LLAMA_KEYS
    ),
    "lamed_qwen2": Family(
        "Qwen2.5",
        "qwen2",
        "LamedQwen2ForCausalLM",
        Qwen2Layout,
        ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    ),
}


def known_families() -> str:
    """The families, for messages: 'lamed_llama' (LLaMA), ..."""
    return ", ".join(f"{name!r} ({family.title})" for name, family in FAMILIES.items())


def families_on(model_type: str | None) -> list[str]:
    """The families, by config.json's model_type, that are built on a model type of transformers."""
    return [name for name, family in FAMILIES.items() if family.model_type == model_type]


def context_length(llm: dict) -> int:
    """Tokens that prompt and answer may have together.

    Under LongRoPE no more than before its extension: above, transformers chooses the factors by the length of the
    text, vLLM by the length that it was started with, and their answers part.
    """
    length = llm.get("max_position_embeddings", 2048)
    rope = llm.get("rope_parameters") or llm.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return length
    original = llm.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length
    return min(length, original)


def causal_lm_config(llm: dict, **changes):
    """transformers' configuration. Raises CheckpointError for values that it refuses."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        # Phi-3's own default for padding is a token that a smaller vocabulary has not.
        return AutoConfig.for_model(**{"pad_token_id": None, **llm, **changes})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"config.json does not describe a language model of type {llm['model_type']!r}: {error}"
        ) from None


def causal_lm(llm: dict) -> nn.Module:
    """`llm`, as `Family.known_settings` gives it, as transformers' model with random weights."""
    # transformers is slow to import; the export of the graphs alone does not need it.
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = causal_lm_config(llm)
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except (ValueError, TypeError, KeyError) as error:  # of a value that the configuration takes, and no layer
        raise CheckpointError(
            f"config.json does not describe a language model of type {llm['model_type']!r} "
            f"({type(error).__name__}: {error})"
        ) from None
