"""M3D-LaMed on language models with a chat template: tiny random checkpoints with tokenizers of their families' kind,
and what transformers' own classes say to their own chat templates.

Nobody published such a checkpoint; the folders have the published layout.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import weights
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from engine.models.checkpoint import PARTS, lamed_shapes, load_lamed
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed
from engine.prompt import IMAGE_TOKEN, SEG_TOKEN, SPECIAL_TOKENS
from tests import tiny

LENGTH = 40
ROWS = 352  # of the embeddings; some are spare, as published language models have them
TEXT = "what is the liver in this image where can it be found there and which organ is shown on the scan please"
# The published formats, in words of our own.
QWEN_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for turn in messages -%}
{{ '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
LLAMA3_TEMPLATE = """\
{{- bos_token -}}
{%- for turn in messages -%}
{{ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' ~ (turn.content | trim) ~ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE; no BOS."""
    learned = _learned(Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer.pre_tokenizer)
    found = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    found.chat_template = QWEN_TEMPLATE
    return found


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts BOS before every text."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned = _learned(split)
    backend = Tokenizer(models.BPE(learned["vocab"], [tuple(pair) for pair in learned["merges"]], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    bos = "<|begin_of_text|>"
    backend.add_special_tokens([bos, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|eot_id|>")
    found.chat_template = LLAMA3_TEMPLATE
    return found


def _learned(split) -> dict:
    """vocab and merges of a BPE with a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return json.loads(backend.to_str())["model"]


@dataclass(frozen=True)
class Kind:
    """model_type, architecture: of the checkpoint. config: its own keys. seed: of weights with which some of QUESTIONS
    are answered with `[SEG]`, and some answers end. scales: end of keys -> factor on what weights.py gives.
    turn_end: what ends answers; config.json names `text_end` only."""

    model_type: str
    architecture: str
    config: dict
    seed: str
    scales: dict
    turn_end: str
    text_end: str
    make_tokenizer: Callable
    model_class: type
    config_class: type


KINDS = {
    "qwen2": Kind(
        "lamed_qwen2",
        "LamedQwen2ForCausalLM",
        # As Qwen2.5's config.json has them: a window that is not used.
        dict(
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=16,
            max_window_layers=1,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
        ),
        "qwen2.21",
        # Biases that change answers, and layers that outweigh the tied embeddings: else a token repeats itself.
        {"_proj.bias": 25.0, "o_proj.weight": 12.0, "down_proj.weight": 12.0},
        "<|im_end|>",
        "<|endoftext|>",
        qwen_tokenizer,
        Qwen2ForCausalLM,
        Qwen2Config,
    ),
    "llama3": Kind(
        "lamed_llama3",
        "LamedLlama3ForCausalLM",
        dict(rope_theta=5e5),
        "llama3",
        {},
        "<|eot_id|>",
        "<|end_of_text|>",
        llama3_tokenizer,
        LlamaForCausalLM,
        LlamaConfig,
    ),
}
QUESTIONS = [f"{start} {rest}" for start in TEXT.split()[:8] for rest in ("is it?", "organ is shown in this image?")]


def tokenizer(kind: str):
    """The family's, with M3D-LaMed's tokens added as training adds them."""
    found = KINDS[kind].make_tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)}, replace_extra_special_tokens=False)
    found.add_tokens([SEG_TOKEN])
    return found


def write(kind: str, folder: Path) -> Path:
    """A random M3D-LaMed of a kind. What it often says is `[SEG]`."""
    case, own = KINDS[kind], tokenizer(kind)
    id_of = own.convert_tokens_to_ids
    config = {
        **{key: value for key, value in tiny.LAMED.items() if key not in ("bos_token_id", "pad_token_id")},
        **case.config,
        "architectures": [case.architecture],
        "model_type": case.model_type,
        "vocab_size": ROWS,
        "bos_token_id": own.bos_token_id,
        "eos_token_id": id_of(case.text_end),
        "seg_token_id": id_of(SEG_TOKEN),
    }
    with torch.device("meta"):
        shapes = lamed_shapes(Lamed(LamedConfig.from_dict(config)))
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    tensors = weights.fill(shapes, case.seed)
    for key in tensors:
        tensors[key] *= next((factor for end, factor in case.scales.items() if key.endswith(end)), 1)
    folder.mkdir(parents=True)
    own.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    chat = Chat(kind, folder)
    said = Counter(token for question in QUESTIONS for token in chat.answer(question)[0])
    asked = {token for question in QUESTIONS for token in chat.prompt_ids(question)}
    often = next(token for token, _ in said.most_common() if token not in asked)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in tensors:
            tensors[key][[often, id_of(SEG_TOKEN)]] = tensors[key][[id_of(SEG_TOKEN), often]]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Chat:
    """What transformers makes of a checkpoint: its own tokenizer, chat template, class and `generate`. Visual tokens
    are those of the engine's encoder."""

    kind: str
    folder: Path

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def ends(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids([KINDS[self.kind].turn_end, KINDS[self.kind].text_end])

    @property
    def is_tied(self) -> bool:
        """Whether the output layer is the embeddings."""
        return KINDS[self.kind].config.get("tie_word_embeddings", False)

    @cached_property
    def model(self):
        case, told = KINDS[self.kind], json.loads((self.folder / "config.json").read_text())
        settings = {key: told[key] for key in told if key in case.config_class.__dataclass_fields__}
        settings |= {
            "rope_parameters": {"rope_type": "default", "rope_theta": told["rope_theta"]},
            "pad_token_id": None,
        }
        del settings["architectures"], settings["model_type"]
        model = case.model_class(case.config_class(**settings)).eval()
        tensors = load_file(self.folder / "model.safetensors")
        own = {key: torch.from_numpy(value) for key, value in tensors.items() if not key.startswith(tuple(PARTS))}
        missing, unexpected = model.load_state_dict(own, strict=False)
        assert not unexpected and missing == ["lm_head.weight"] * self.is_tied
        model.tie_weights()
        return model

    @cached_property
    def visual_tokens(self) -> np.ndarray:
        """fp32 [N, H] of `tiny.volume()`."""
        lamed, _ = load_lamed(self.folder)
        with torch.inference_mode():
            return lamed.encode_images(torch.from_numpy(tiny.volume())[None])[0].numpy()

    def prompt_ids(self, asked: str | Sequence[tuple[str, str]]) -> list[int]:
        """By `apply_chat_template`; the image tokens begin the first turn of the user."""
        turns = [("user", asked)] if isinstance(asked, str) else list(asked)
        first = [role for role, _ in turns].index("user")
        messages = [
            {"role": role, "content": IMAGE_TOKEN * tiny.NUM_VISUAL_TOKENS * (number == first) + text}
            for number, (role, text) in enumerate(turns)
        ]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    @torch.inference_mode()
    def answer(
        self, asked: str | Sequence[tuple[str, str]], length: int = LENGTH, visual_tokens: np.ndarray | None = None
    ) -> tuple[list[int], np.ndarray]:
        """(greedy ids with the end, fp32 states [K, H] of its `[SEG]` tokens)."""
        ids = torch.tensor(self.prompt_ids(asked))
        rows = self.model.get_input_embeddings()(ids)
        visual = self.visual_tokens if visual_tokens is None else visual_tokens
        rows[ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] = torch.from_numpy(visual)
        out = self.model.generate(
            inputs_embeds=rows[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        said = out.sequences[0].tolist()
        states = torch.cat([step[-1][0, -1:] for step in out.hidden_states]).numpy()
        return said, states[np.array(said) == self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)]
