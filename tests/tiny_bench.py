"""What the benchmark's checkpoints and scans are, in sizes that take seconds."""

from __future__ import annotations

from pathlib import Path

from benchmarks.make_checkpoint import config_of, write
from tests.tiny import IMAGE_SIZE, PATCH_SIZE, VIT

TINY = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=600,
    max_position_embeddings=512,
    image_size=list(IMAGE_SIZE),
    patch_size=list(PATCH_SIZE),
    mm_hidden_size=VIT["hidden_size"],
    vision_config=VIT,
    seg_config=VIT,
)


def write_tiny_checkpoint(folder: Path, llm: str = "135m") -> Path:
    return write(folder, config_of(llm, **TINY))
