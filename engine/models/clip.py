"""M3D-CLIP: one 3D ViT for scans and one BERT for texts, with projections into a common space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.config import ClipConfig
from engine.models.vit3d import ViT3D


class M3DClip(nn.Module):
    """Features of scans and texts, L2-normalised; position 0 (CLS) is the one that is compared."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        from transformers import BertConfig, BertModel

        width = config.vision.hidden_size
        self.config = config
        self.vision_encoder = ViT3D(config.vision, cls_token=True)
        self.language_encoder = BertModel(BertConfig(**config.bert))
        self.mm_vision_proj = nn.Linear(width, width)
        self.mm_language_proj = nn.Linear(self.language_encoder.config.hidden_size, width)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, image_BCDHW: Tensor) -> Tensor:
        """[B, 1, D, H, W] -> [B, N + 1, E], every token normalised, CLS first."""
        return F.normalize(self.mm_vision_proj(self.vision_encoder(image_BCDHW)), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] token ids -> [B, L, E], every token normalised, CLS first (the last hidden state; no pooler)."""
        hidden = self.language_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.mm_language_proj(hidden), dim=-1)

    def logits_per_image(self, image_BCDHW: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Similarities [B_image, B_text] times `logit_scale` (as it is, without exp, as in the reference)."""
        image = self.encode_image(image_BCDHW)[:, 0]
        return self.logit_scale * image @ self.encode_text(input_ids, attention_mask)[:, 0].T
