"""Tiny random checkpoints in the published layout: real architecture, real files, seconds to serve."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import weights
import write_checkpoint
from safetensors.numpy import load_file, save_file
from transformers import BertTokenizer

from engine.models.checkpoint import lamed_shapes, load_clip, load_lamed
from engine.models.clip import M3DClip
from engine.models.config import ClipConfig, LamedConfig
from engine.models.lamed import Lamed

IMAGE_SIZE, PATCH_SIZE = (16, 64, 64), (4, 16, 16)
NUM_VISUAL_TOKENS = 8
VIT = {"hidden_size": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 4}
LAMED = {
    "architectures": ["LamedLlamaForCausalLM"],
    "model_type": "lamed_llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_size": list(IMAGE_SIZE),
    "patch_size": list(PATCH_SIZE),
    "vision_tower": "vit3d",
    "mm_hidden_size": 64,
    "mm_projector_type": "spp",
    "proj_layer_type": "mlp",
    "proj_layer_num": 2,
    "proj_pooling_type": "spatial",
    "proj_pooling_size": 2,
    "segmentation_module": "segvol",
    "vision_config": VIT,
    "seg_config": VIT,
}
IMAGE_TOKEN_ID = 315
QUESTION = "w10 w20 w30"


def words(count: int, seed: int = 0) -> str:
    """A text of `count` tokens for the tiny M3D-CLIP, besides [CLS] and [SEP]."""
    return " ".join(f"w{k}" for k in np.random.default_rng(seed).integers(0, 290, count))


def volume(seed: str = "tiny") -> np.ndarray:
    """A float32 volume 1 x D x H x W in 0..1 at the tiny model's size."""
    return weights.volume((1, *IMAGE_SIZE), seed)


def write_tiny_lamed(folder: Path, seed: str = "tiny") -> Path:
    """A random M3D-LaMed whose greedy answer about `volume(seed)` to QUESTION holds `[SEG]`."""
    with torch.device("meta"):
        shapes = lamed_shapes(Lamed(LamedConfig.from_dict({**LAMED, "seg_token_id": 314})))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights.fill(shapes, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer_config.json").write_text(json.dumps(write_checkpoint.TOKENIZER_CONFIG))
    # Names do not change what the weights say: whatever the model often says becomes [SEG].
    _name_seg_token(folder, 314)
    model, tokenizer = load_lamed(folder)
    ids = tokenizer("<im_patch>" * NUM_VISUAL_TOKENS + QUESTION, return_tensors="pt")["input_ids"]
    said, _, _ = model.generate(torch.from_numpy(volume(seed))[None], ids, 1, max_new_tokens=24)
    words = [token for token in said[1:].tolist() if 2 < token < IMAGE_TOKEN_ID and token not in ids[0].tolist()]
    _name_seg_token(folder, Counter(words).most_common(1)[0][0])
    return folder


def as_phi3(llama: Path, folder: Path, **changes) -> Path:
    """The M3D-LaMed in `llama` in Phi-3's layout: the same computation from fused weights. changes: of config.json."""
    shutil.copytree(llama, folder)
    save_file(fused(load_file(llama / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    config |= {"architectures": ["LamedPhi3ForCausalLM"], "model_type": "lamed_phi3", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """LLaMA's tensors by Phi-3's keys: q, k and v in one weight, gate and up in another."""
    tensors = dict(tensors)
    queries = re.compile(r"(model\.layers\.\d+\.)self_attn\.q_proj\.weight")
    for layer in [found[1] for found in map(queries.fullmatch, tensors) if found]:
        for block, parts, whole in (("self_attn", ("q", "k", "v"), "qkv"), ("mlp", ("gate", "up"), "gate_up")):
            tensors[f"{layer}{block}.{whole}_proj.weight"] = np.concatenate(
                [tensors.pop(f"{layer}{block}.{part}_proj.weight") for part in parts]
            )
    return tensors


def _name_seg_token(folder: Path, token_id: int) -> None:
    case = {"image_token_id": IMAGE_TOKEN_ID, "seg_token_id": token_id, "config": LAMED}
    (folder / "tokenizer.json").write_text(json.dumps(write_checkpoint.tokenizer(case)))
    (folder / "config.json").write_text(json.dumps({**LAMED, "seg_token_id": token_id}))


def write_tiny_clip(folder: Path, seed: str = "tiny") -> Path:
    """A random M3D-CLIP for the same volumes, with a word-level BERT tokenizer of w0, w1, ...

    As published, it has 512 positions and says `max_text_len` 128, which nobody reads.
    """
    config = {
        "model_type": "m3d_clip",
        "img_size": list(IMAGE_SIZE),
        "patch_size": list(PATCH_SIZE),
        **VIT,
        "pos_embed": "perceptron",
        "in_channels": 1,
        "max_text_len": 128,
        "vocab_size": 300,
        "bert_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        },
    }
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in M3DClip(ClipConfig.from_dict(config)).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights.fill(shapes, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"w{i}" for i in range(300 - len(special)))]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


@torch.inference_mode()
def clip_scores(folder: Path, texts: list[str], padding: bool | str = False) -> list[float]:
    """Cosine similarities of `volume()` and each text alone, cut to 512 tokens, as the reference evaluates an M3D-CLIP.

    padding: as transformers' tokenizer takes it.
    """
    clip, _ = load_clip(folder)
    tokenizer = BertTokenizer.from_pretrained(folder)
    image = clip.encode_image(torch.from_numpy(volume())[None])[0, 0]
    scores = []
    for text in texts:
        tokens = tokenizer(text, max_length=512, truncation=True, padding=padding, return_tensors="pt")
        scores.append(float(clip.encode_text(tokens["input_ids"], tokens["attention_mask"])[0, 0] @ image))
    return scores
