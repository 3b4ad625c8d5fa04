"""The models that are measured: the published sizes with random weights, made where they run; and tiny ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.make_checkpoint import PUBLISHED_CLIP, config_of
from deploy.checks.fixtures import volume
from engine.models.config import ClipConfig, LamedConfig

TINY_VIT = {"hidden_size": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 4}
TINY_LAMED = {
    "image_size": [8, 64, 64],
    "mm_hidden_size": 64,
    "vision_config": TINY_VIT,
    "seg_config": TINY_VIT,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
TINY_BERT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
}
SEED = 20240331
_Model = TypeVar("_Model", bound=nn.Module)


def lamed_config(tiny: bool) -> LamedConfig:
    """The published M3D-LaMed on LLaMA-2-7B, or a tiny one."""
    return LamedConfig.from_dict(config_of("7b", **(TINY_LAMED if tiny else {})))


def clip_config(tiny: bool) -> ClipConfig:
    """The published M3D-CLIP, or a tiny one."""
    sizes = {"img_size": [8, 64, 64], **TINY_VIT, "bert_config": TINY_BERT} if tiny else {}
    return ClipConfig.from_dict({**PUBLISHED_CLIP, **sizes})


def made(build: Callable[[], _Model], device: str, dtype: torch.dtype) -> _Model:
    """The module that `build()` makes, with random weights of this type, made on the device and never in fp32."""
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return build().eval()
    finally:
        torch.set_default_dtype(before)


@functools.cache
def volumes(count: int, image_size: tuple[int, int, int]) -> Tensor:
    """Different volumes in 0..1, fp32 [count, 1, D, H, W]; always the same ones, not to be written to."""
    return torch.stack([volume((1, *image_size), f"gpu-check.{n}") for n in range(count)])
