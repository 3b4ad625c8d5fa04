"""Write a checkpoint of real geometry with random weights: what latency depends on, without a download.

    python benchmarks/make_checkpoint.py --llm 135m DIR [--clip DIR]

Full-size 3D ViT, projector and SegVol as published; the language model has SmolLM2-135M's, TinyLlama-1.1B's or
LLaMA-2-7B's sizes. Its answers mean nothing, but never end early: each answer repeats the last token of the question
until the limit is reached. So a question that ends with `[SEG]` gets a mask. --clip writes an M3D-CLIP, too, as
published: the same ViT and a BERT-base.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from engine.models.base import text_encoder_folder
from engine.models.checkpoint import PARTS
from engine.models.clip import M3DClip
from engine.models.config import ClipConfig, LamedConfig
from engine.models.lamed import Lamed
from engine.prompt import SEG_TOKEN, SPECIAL_TOKENS

DEMO = Path(__file__).resolve().parent.parent / "training" / "demo"  # has tokenizers
SHARD_BYTES = 2_000_000_000
ADDED_TOKENS = (*SPECIAL_TOKENS, SEG_TOKEN)
LLMS = {
    "135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49156,
        max_position_embeddings=2048,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "1b": dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32004,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    ),
    "7b": dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32004,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
}
PUBLISHED = {
    "architectures": ["LamedLlamaForCausalLM"],
    "model_type": "lamed_llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "image_size": [32, 256, 256],
    "patch_size": [4, 16, 16],
    "vision_tower": "vit3d",
    "mm_hidden_size": 768,
    "mm_projector_type": "spp",
    "proj_layer_type": "mlp",
    "proj_layer_num": 2,
    "proj_pooling_type": "spatial",
    "proj_pooling_size": 2,
    "segmentation_module": "segvol",
}
PUBLISHED_CLIP = {
    "architectures": ["M3DCLIP"],
    "model_type": "m3d_clip",
    "img_size": [32, 256, 256],
    "patch_size": [4, 16, 16],
    "in_channels": 1,
    "hidden_size": 768,
    "mlp_dim": 3072,
    "num_layers": 12,
    "num_heads": 12,
    "max_text_len": 128,
}


def config_of(llm: str, **changes) -> dict:
    """config.json of a checkpoint with a language model of LLMS. changes: of its keys, for other sizes."""
    values = {**PUBLISHED, **LLMS[llm], **changes}
    return {**values, "seg_token_id": values["vocab_size"] - 1}


def write(folder: Path, values: dict, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a checkpoint with `values` as config.json: weights in shards of about 2 GB, and a tokenizer.

    dtype: of the files. Published ones are fp32, twice the size; the values are those of bf16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, shard, size = {}, {}, 0
    for key, tensor in _tensors(LamedConfig.from_dict(values)):
        tensor = tensor.to(dtype)
        if shard and size + tensor.nbytes > SHARD_BYTES:
            _save(folder, shard, weight_map)
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    _save(folder, shard, weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(values["vocab_size"])))
    (folder / "tokenizer_config.json").write_text((DEMO / "tokenizer_config.json").read_text())
    return folder


def write_clip(folder: Path, values: dict) -> Path:
    """Write an M3D-CLIP with `values` as config.json: fp32 weights, and the demo's tokenizer, which is BERT's."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(20240331)
    model = M3DClip(ClipConfig.from_dict(values))
    save_file(
        {key: tensor.contiguous() for key, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    source = text_encoder_folder(json.loads((DEMO / "clip" / "config.json").read_text())["text_encoder"])
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, folder)
    return folder


def tokenizer(vocab_size: int) -> dict:
    """The demo's byte-level BPE (tokenizer.json), cut to its first tokens, with the added ones as the last ids."""
    values = json.loads((DEMO / "tokenizer.json").read_text())
    first_added = vocab_size - len(ADDED_TOKENS)
    model = values["model"]
    model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < first_added}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    ids = {token: first_added + i for i, token in enumerate(ADDED_TOKENS)}
    values["added_tokens"] = [
        {**token, "id": ids.get(token["content"], token["id"])} for token in values["added_tokens"]
    ]
    return values


def _save(folder: Path, shard: dict, weight_map: dict) -> None:
    name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
    save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, name)
    print(f"{name}: {len(shard)} tensors, {sum(t.nbytes for t in shard.values()) / 1e6:,.0f} MB", flush=True)


def _tensors(config: LamedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Published keys and bf16 values, one at a time."""
    torch.manual_seed(20240331)
    ours = Lamed(config, with_llm=False)
    published = {own: prefix for prefix, own in PARTS.items()}
    for key, tensor in ours.state_dict().items():
        prefix = next(own for own in published if key.startswith(own))
        yield published[prefix] + key[len(prefix) :], tensor.bfloat16().contiguous()
    del ours
    with torch.device("meta"):
        llm = Lamed(config).llm
    for key, meta in llm.state_dict().items():
        if key == "lm_head.weight" and config.llm["tie_word_embeddings"]:
            continue
        yield key, _llm_tensor(key, tuple(meta.shape), config.llm["eos_token_id"])


def _llm_tensor(key: str, shape: tuple[int, ...], eos: int) -> torch.Tensor:
    """Large embeddings and small layers, so that a token predicts itself; EOS has the same logit, 0, everywhere."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    embeds = key in ("model.embed_tokens.weight", "lm_head.weight")  # alike, as if they were tied
    generator = torch.Generator().manual_seed(zlib.crc32(b"embeddings" if embeds else key.encode()))
    tensor = torch.randn(shape, generator=generator)
    if embeds:
        tensor[eos] = 0
    else:
        tensor *= 0.5 * shape[1] ** -0.5
    return tensor.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write into")
    parser.add_argument("--llm", choices=LLMS, default="135m", help="size of the language model (default: %(default)s)")
    parser.add_argument("--fp32", action="store_true", help="fp32 files, as published ones are (default: bf16)")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="folder to write an M3D-CLIP into")
    arguments = parser.parse_args()
    if arguments.clip and arguments.clip.resolve() == arguments.folder.resolve():
        parser.error("two checkpoints, two folders: --clip names the other's")
    try:
        print(write(arguments.folder, config_of(arguments.llm), torch.float32 if arguments.fp32 else torch.bfloat16))
        if arguments.clip:
            print(write_clip(arguments.clip, PUBLISHED_CLIP))
    except OSError as error:
        parser.error(f"{error.filename or arguments.folder} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
