"""Models at the size of a toy, as the folders that training starts from, and configurations of its stages."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from tests import tiny_chats
from tests.m3d_data import SIZE

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "vocab_size": 259,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 258,
    "max_position_embeddings": 512,
}
VIT = {"hidden_size": 32, "mlp_dim": 64, "num_layers": 1, "num_heads": 2}
PARTS = {
    "image_size": list(SIZE),
    "patch_size": [4, 16, 16],
    "vision_config": VIT,
    "seg_config": VIT,
    "mm_hidden_size": 32,
}
TRAINER = {
    "use_cpu": True,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "save_steps": 1,
    "logging_steps": 1,
    "disable_tqdm": True,
}


def byte_tokenizer(unk_token: str | None = "<unk>", pad_token: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: k for k, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad_token, unk_token=unk_token
    )


def language_model(folder: Path, family: str = "llama", seed: int = 0, **changes) -> str:
    """A random language model with its tokenizer, as a folder. family: llama, phi3, llama3 (without its chat template),
    or a kind of `tiny_chats` with `-chat` behind it."""
    torch.manual_seed(seed)
    settings, tokenizer = {**LLAMA, **changes}, byte_tokenizer()
    if family == "phi3":
        del settings["head_dim"]
        model = Phi3ForCausalLM(Phi3Config(**{"sliding_window": 48, **settings}))
    elif family.endswith("-chat"):
        kind = tiny_chats.KINDS[family.removesuffix("-chat")]
        tokenizer = kind.make_tokenizer()
        del settings["head_dim"]
        settings |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
        settings["eos_token_id"] = tokenizer.convert_tokens_to_ids(kind.text_end)
        model = kind.model_class(kind.config_class(**settings))
    elif family == "llama3":
        # Its tokenizer has neither an unknown nor a padding token; chats end with another token than texts.
        tokenizer = byte_tokenizer(unk_token=None, pad_token=None)
        model = LlamaForCausalLM(
            LlamaConfig(
                **{
                    **settings,
                    "pad_token_id": None,
                    "eos_token_id": [258, 256],
                    "rope_parameters": {
                        "rope_type": "llama3",
                        "rope_theta": 500000.0,
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64,
                    },
                }
            )
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def text_encoder(folder: Path) -> str:
    """A random BERT without dropout, with its tokenizer, as a folder."""
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=259,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def clip_configuration(out: Path, data: Path, encoder: str, **trainer) -> dict:
    return {
        "out": str(out),
        "seed": 1,
        "data": {"m3d": {"root": str(data), "tasks": ["pair"]}},
        "text_encoder": encoder,
        "max_text_len": 32,
        "sample_every": 2,
        "vision": {"image_size": list(SIZE), "patch_size": [4, 16, 16], **VIT},
        "trainer": {**TRAINER, **trainer},
    }


def finetune_configuration(out: Path, data: Path, llm: str, dropout: float = 0.05, **trainer) -> dict:
    return {
        "out": str(out),
        "seed": 1,
        "sample_every": 4,
        "data": {"m3d": {"root": str(data), "tasks": ["caption", "vqa_yes_no", "segmentation", "refseg"]}},
        "start": {"language_model": llm, "model": PARTS},
        "lora": {"r": 4, "alpha": 8, "dropout": dropout},
        "train": ["vision_tower", "mm_projector", "embeddings", "lm_head", "seg_projector", "seg_module"],
        "max_length": 256,
        "trainer": {**TRAINER, **trainer},
    }


def written(values: dict, file: Path) -> Path:
    """A configuration file."""
    file.write_text(json.dumps(values))
    return file
