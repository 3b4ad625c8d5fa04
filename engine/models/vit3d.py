"""The 3D Vision Transformer of M3D (vision tower, SegVol's encoder, M3D-CLIP's image encoder).

MONAI's ViT in layout and arithmetic, written out because the checkpoints lack what newer MONAI blocks hold beside it
and because an explicit graph exports cleanly; a test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.config import ViTConfig


class PatchEmbedding(nn.Module):
    """ "Perceptron" patch embedding: each patch, flattened, through a Linear, plus a learned position.

    Keys: patch_embeddings.1.{weight,bias}, position_embeddings.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        p_d, p_h, p_w = config.patch_size
        self.config = config
        # Index 1: the checkpoints' nn.Sequential has einops' parameterless Rearrange at index 0.
        self.patch_embeddings = nn.Sequential(
            nn.Identity(), nn.Linear(config.in_channels * p_d * p_h * p_w, config.hidden_size)
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches, config.hidden_size))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        (d, h, w), (p_d, p_h, p_w) = self.config.grid, self.config.patch_size
        channels = self.config.in_channels
        x = x_BCDHW.reshape(-1, channels, d, p_d, h, p_h, w, p_w)
        x_BNP = x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(-1, d * h * w, p_d * p_h * p_w * channels)
        return self.patch_embeddings(x_BNP) + self.position_embeddings


class SelfAttention(nn.Module):
    """Multi-head self-attention without qkv bias. Keys: qkv.weight, out_proj.{weight,bias}."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BNE: Tensor) -> Tensor:
        n, width = x_BNE.shape[1:]
        qkv = self.qkv(x_BNE).reshape(-1, n, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).reshape(-1, n, width))


class MLP(nn.Module):
    """Linear, exact GELU, Linear. Keys: linear1.*, linear2.*."""

    def __init__(self, hidden_size: int, mlp_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(hidden_size, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, hidden_size)

    def forward(self, x_BNE: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x_BNE)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.mlp = MLP(config.hidden_size, config.mlp_dim)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attn = SelfAttention(config.hidden_size, config.num_heads)
        self.norm2 = nn.LayerNorm(config.hidden_size)

    def forward(self, x_BNE: Tensor) -> Tensor:
        x_BNE = x_BNE + self.attn(self.norm1(x_BNE))
        return x_BNE + self.mlp(self.norm2(x_BNE))


class ViT3D(nn.Module):
    """3D ViT: [B, C, D, H, W] in 0..1 -> [B, N (+1), E] after the final LayerNorm, CLS first if there is one.

    Positions are added before CLS is put in front, so CLS has none (as in the reference).
    """

    def __init__(self, config: ViTConfig, cls_token: bool):
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if cls_token else None

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        x_BNE = self.patch_embedding(image_BCDHW)
        if self.cls_token is not None:
            x_BNE = torch.cat([self.cls_token.expand(x_BNE.shape[0], -1, -1), x_BNE], dim=1)
        for block in self.blocks:
            x_BNE = block(x_BNE)
        return self.norm(x_BNE)
