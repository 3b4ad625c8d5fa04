"""A tiny random LLaMA or Phi-3 in an exported repository, and what transformers computes with it: the slow, obvious
way."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import weights
import write_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from engine.manifest import LLM_FOLDER, Manifest
from tests.tiny import fused

VISUAL_TOKENS, WIDTH, VOCABULARY, CONTEXT = 64, 128, 320, 512
BOS, EOS, IMAGE_TOKEN = 1, 2, 315
QUESTION_WORDS = range(3, 160)  # never the word that becomes [SEG], which a tokenizer would not know as a word
CONFIG = LlamaConfig(
    hidden_size=WIDTH,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=CONTEXT,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=0,
    architectures=["LlamaForCausalLM"],
)
# Attention looks back over a part of the visual tokens only, and LongRoPE would begin behind the context.
PHI3_CONFIG = Phi3Config(
    **{
        key: getattr(CONFIG, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "rms_norm_eps",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    },
    max_position_embeddings=4 * CONTEXT,
    original_max_position_embeddings=CONTEXT,
    sliding_window=40,
    rope_scaling={
        "type": "longrope",
        "short_factor": [1 + 0.1 * k for k in range(16)],
        "long_factor": [2.0 + k for k in range(16)],
    },
    architectures=["Phi3ForCausalLM"],
)


def visual_tokens(seed: int) -> np.ndarray:
    """fp32 [VISUAL_TOKENS, WIDTH] of an imaginary scan."""
    return 0.2 * np.random.default_rng(seed).standard_normal((VISUAL_TOKENS, WIDTH), dtype=np.float32)


def question(seed: int, words: int | None = None) -> str:
    """3 to 14 words, or as many as asked for."""
    generator = np.random.default_rng(seed)
    return " ".join(f"w{i}" for i in generator.choice(QUESTION_WORDS, words or generator.integers(3, 15)))


@dataclass(frozen=True)
class TinyLlm:
    """An exported repository with `manifest.json` and the decoder's folder only."""

    repository: Path

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.read(self.repository)

    @property
    def folder(self) -> Path:
        return self.repository / LLM_FOLDER

    @cached_property
    def model(self) -> LlamaForCausalLM | Phi3ForCausalLM:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def prompt(self, visual: np.ndarray, question: str) -> torch.Tensor:
        """fp32 [1, T, H]"""
        ids = [int(word[1:]) for word in question.split()]
        embed = self.model.get_input_embeddings()
        rows = torch.cat([embed(torch.tensor([BOS])), torch.from_numpy(visual), embed(torch.tensor(ids))])
        return rows[None].detach()

    def generate(self, visual: np.ndarray, question: str, length: int, **settings) -> list[int]:
        """Greedy ids by transformers, with the final EOS."""
        return self.model.generate(
            inputs_embeds=self.prompt(visual, question), max_new_tokens=length, do_sample=False, **settings
        )[0].tolist()

    @torch.inference_mode()
    def states(self, visual: np.ndarray, question: str, answer: list[int]) -> np.ndarray:
        """fp32 [len(answer), H]: the state that each token of the answer was sampled from."""
        answered = self.model.get_input_embeddings()(torch.tensor(answer[:-1], dtype=torch.long))
        rows = torch.cat([self.prompt(visual, question)[0], answered])
        return self.model.model(inputs_embeds=rows[None]).last_hidden_state[0, -len(answer) :].numpy()


def write_tiny_llm(
    repository: Path, seed: str = "tiny-llm-2", phi3: bool = False, attention_bias: bool = False, **changes
) -> TinyLlm:
    """A repository whose `[SEG]` is what the model says most often. attention_bias: of a LLaMA's projections. changes:
    of the manifest."""
    folder = repository / LLM_FOLDER
    folder.mkdir(parents=True)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), "attention_bias": attention_bias}))
    filled = weights.fill({key: tuple(value.shape) for key, value in model.state_dict().items()}, seed)
    filled = {key: 25 * value if key.endswith(".bias") else value for key, value in filled.items()}
    if phi3:
        model, filled = Phi3ForCausalLM(PHI3_CONFIG), fused(filled)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in filled.items()})
    model.save_pretrained(folder)
    tiny = TinyLlm(repository)
    said = Counter(id_ for i in range(8) for id_ in tiny.generate(visual_tokens(i), question(i), 48))
    seg = next(id_ for id_, _ in said.most_common() if QUESTION_WORDS.stop <= id_ < IMAGE_TOKEN)
    case = {"image_token_id": IMAGE_TOKEN, "seg_token_id": seg, "config": {"vocab_size": VOCABULARY}}
    (folder / "tokenizer.json").write_text(json.dumps(write_checkpoint.tokenizer(case)))
    (folder / "tokenizer_config.json").write_text(json.dumps(write_checkpoint.TOKENIZER_CONFIG))
    facts = dict(
        checkpoint=seed,
        checkpoint_sha256="",
        target="cpu",
        precision="fp32",
        image_size=(16, 64, 64),
        patch_size=(4, 16, 16),
        family="lamed_phi3" if phi3 else "lamed_llama",
        num_visual_tokens=VISUAL_TOKENS,
        llm_width=WIDTH,
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        image_token_id=IMAGE_TOKEN,
        seg_token_id=seg,
        eos_token_ids=(EOS,),
        models=("decoder",),
        graphs={},
        versions={},
    )
    Manifest(**{**facts, **changes}).write(repository)
    return tiny
