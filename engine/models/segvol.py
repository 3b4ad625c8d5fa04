"""SegVol's segmentation module: its own 3D ViT, a text-prompt encoder and a SAM-style mask decoder.

Only what a text prompt reaches is computed; the rest (mask down-scaling, point embeddings, masks 1-3, IoU head) is kept
as parameters, since published checkpoints hold it and are read strictly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.config import ViTConfig
from engine.models.vit3d import ViT3D

NUM_MASK_TOKENS = 4
NUM_HEADS = 8
MLP_DIM = 2048
DEPTH = 2


class Attention(nn.Module):
    """Multi-head attention whose inner width is the outer one divided by `downsample`."""

    def __init__(self, width: int, downsample: int = 1):
        super().__init__()
        inner = width // downsample
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q_BQE: Tensor, k_BNE: Tensor, v_BNE: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (NUM_HEADS, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, q_BQE), (self.k_proj, k_BNE), (self.v_proj, v_BNE))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PromptMLP(nn.Module):
    """The mask decoder's MLP with ReLU. Keys: lin1, lin2."""

    def __init__(self, width: int):
        super().__init__()
        self.lin1 = nn.Linear(width, MLP_DIM)
        self.lin2 = nn.Linear(MLP_DIM, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Queries attend to themselves and to the image, then the image attends to the queries.

    The first block replaces the queries by their self-attention: no residual, no position term.
    """

    def __init__(self, width: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = Attention(width)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, downsample=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = PromptMLP(width)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, downsample=2)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        k = keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, k, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, queries + query_pe, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """[B, N, E] image features and [B, Q, E] prompt tokens attend to each other."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, first=index == 0) for index in range(DEPTH))
        self.final_attn_token_to_image = Attention(width, downsample=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, image_BNE: Tensor, image_pe: Tensor, tokens_BQE: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = tokens_BQE, image_BNE
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens_BQE, image_pe)
        attended = self.final_attn_token_to_image(queries + tokens_BQE, keys + image_pe, keys)
        return self.norm_final_attn(queries + attended), keys


class ReluMLP(nn.Module):
    """Linear layers with ReLU between. Keys: layers.{0,1,2}."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layers[0](x))
        return self.layers[2](F.relu(self.layers[1](x)))


class RandomPositionEncoding(nn.Module):
    """SAM's random Fourier features of a grid's cell centres, [1, N, E].

    Quirk of the reference: for a D,H,W grid the coordinates are stacked as (H, D, W).
    """

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, grid: tuple[int, int, int], width: int):
        super().__init__()
        self.grid = grid
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, width // 2))

    def forward(self) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        axes = [(torch.arange(n, dtype=matrix.dtype, device=matrix.device) + 0.5) / n for n in self.grid]
        d, h, w = torch.meshgrid(*axes, indexing="ij")
        angles = 2 * math.pi * ((2 * torch.stack([h, d, w], dim=-1) - 1) @ matrix)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).flatten(0, 2)[None]


class PromptEncoder(nn.Module):
    """Text prompts only: the prompt is the one sparse token, `no_mask_embed` the dense term."""

    def __init__(self, grid: tuple[int, int, int], width: int):
        super().__init__()
        self.pe_layer = RandomPositionEncoding(grid, width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        # 2-D convolutions with LayerNorm2d between, never run with a text prompt.
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            nn.LayerNorm(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            nn.LayerNorm(16),
            nn.GELU(),
            nn.Conv2d(16, width, 1),
        )
        self.no_mask_embed = nn.Embedding(1, width)


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm over millions of values, [..., C, D, H, W] over its last four axes, exact in every runtime.

    ONNX Runtime's LayerNormalization adds its values up one after the other in fp32. Over 3.1 million of them it is off
    by 6e-5. Means of means are sums of few values each, and are off by 1e-7 to 6e-7.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self._mean(x)
        return centred * torch.rsqrt(self._mean(centred * centred) + self.eps) * self.weight + self.bias

    @staticmethod
    def _mean(x: Tensor) -> Tensor:
        return x.mean((-2, -1), keepdim=True).mean(-3, keepdim=True).mean(-4, keepdim=True)


class MaskDecoder(nn.Module):
    """Image features and one prompt to mask logits at four times the patch grid."""

    def __init__(self, grid: tuple[int, int, int], width: int):
        super().__init__()
        self.grid = grid
        self.transformer = TwoWayTransformer(width)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, width)
        # The LayerNorm spans the whole grid, which ties these weights to the volume's size.
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(width, width // 4, 2, 2),
            WideLayerNorm((width // 4, *(2 * n for n in grid))),
            nn.GELU(),
            nn.ConvTranspose3d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            ReluMLP(width, width, width // 8) for _ in range(NUM_MASK_TOKENS)
        )
        self.iou_prediction_head = ReluMLP(width, 256, NUM_MASK_TOKENS)
        self.txt_align_upscaled_embedding = nn.Linear(width, width // 8)

    def forward(self, image_BNE: Tensor, image_pe: Tensor, prompt_BE: Tensor) -> Tensor:
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([output_tokens.expand(prompt_BE.shape[0], -1, -1), prompt_BE[:, None]], dim=1)
        hidden, image_BNE = self.transformer(image_BNE, image_pe, tokens)
        upscaled = self.output_upscaling(image_BNE.transpose(1, 2).unflatten(2, self.grid))
        # Mask 0 of 4 (token 1; token 0 is the IoU's), plus the text term, which the reference leaves unnormalised.
        weights_BC = self.output_hypernetworks_mlps[0](hidden[:, 1]) + self.txt_align_upscaled_embedding(prompt_BE)
        return (weights_BC[:, None] @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])


class SegVol(nn.Module):
    """encode: [B, 1, D, H, W] -> features [B, E, d, h, w].

    decode: features and prompts [B, E] -> logits [B, 1, D, H, W].
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.image_encoder = ViT3D(config, cls_token=False)
        self.prompt_encoder = PromptEncoder(config.grid, config.hidden_size)
        self.mask_decoder = MaskDecoder(config.grid, config.hidden_size)

    def encode(self, image_BCDHW: Tensor) -> Tensor:
        return self.image_encoder(image_BCDHW).transpose(1, 2).unflatten(2, self.config.grid)

    def decode_low_res(self, features_BEdhw: Tensor, prompt_BE: Tensor) -> Tensor:
        """Logits at four times the patch grid, [B, 1, 4d, 4h, 4w]."""
        image_BNE = features_BEdhw.flatten(2).transpose(1, 2) + self.prompt_encoder.no_mask_embed.weight
        # DeepSpeed casts weights and leaves buffers, of which the positions are computed.
        return self.mask_decoder(image_BNE, self.prompt_encoder.pe_layer().to(image_BNE.dtype), prompt_BE)

    def decode(self, features_BEdhw: Tensor, prompt_BE: Tensor) -> Tensor:
        low_res = self.decode_low_res(features_BEdhw, prompt_BE)
        return F.interpolate(low_res, size=self.config.image_size, mode="trilinear", align_corners=False)
