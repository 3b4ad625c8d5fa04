"""M3D-LaMed on its language model, assembled from its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.models.answering import answer
from engine.models.config import LamedConfig, ViTConfig
from engine.models.language_model import causal_lm
from engine.models.projector import SpatialPoolingProjector
from engine.models.segvol import SegVol
from engine.models.vit3d import ViT3D
from engine.seg_states import merged


class VisionTower(nn.Module):
    """The 3D ViT without its CLS token: [B, 1, D, H, W] -> [B, N_patches, E]. Keys: vision_tower.*."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vision_tower = ViT3D(config, cls_token=True)

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        return self.vision_tower(image_BCDHW)[:, 1:]


class Lamed(nn.Module):
    """M3D-LaMed. Parameters are named by part (`llm.*`, `vision_tower.*`, ...); `checkpoint` maps the published names.

    with_llm: False leaves the language model out, for exports that do not need it.
    """

    def __init__(self, config: LamedConfig, with_llm: bool = True):
        super().__init__()
        self.config = config
        # Any, as a part may be None; its callers check that the checkpoint has it.
        self.llm: Any = causal_lm(config.llm) if with_llm else None
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = SpatialPoolingProjector(config)
        self.seg_module: SegVol | Any = None
        self.seg_projector: nn.Sequential | Any = None
        if config.segmentation is not None:
            self.seg_module = SegVol(config.segmentation)
            self.seg_projector = nn.Sequential(
                nn.Linear(config.llm_width, config.llm_width),
                nn.ReLU(),
                nn.Linear(config.llm_width, config.segmentation.hidden_size),
                nn.Dropout(0.1),
            )

    def encode_images(self, image_BCDHW: Tensor) -> Tensor:
        """Visual tokens [B, N, H_llm] of volumes [B, 1, D, H, W] in 0..1."""
        return self.mm_projector(self.vision_tower(image_BCDHW))

    def prompt_embeddings(self, input_ids: Tensor, visual_tokens_BNH: Tensor, start: int) -> Tensor:
        """Embeddings [B, L, H_llm]: those of `input_ids`, the N from index `start` on replaced by the visual tokens."""
        embedded = self.llm.get_input_embeddings()(input_ids)
        end = start + visual_tokens_BNH.shape[1]
        return torch.cat([embedded[:, :start], visual_tokens_BNH, embedded[:, end:]], dim=1)

    def segment(self, features_BEdhw: Tensor, states_BH: Tensor) -> Tensor:
        """Mask logits [B, 1, D, H, W] from SegVol's features and the mean `[SEG]` states of the answers."""
        return self.seg_module.decode(features_BEdhw, self.seg_projector(states_BH))

    @torch.inference_mode()
    def generate(
        self, image_BCDHW: Tensor, input_ids: Tensor, start: int, max_new_tokens: int = 256, **sampling
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The slow, obvious way that every fast path is compared with: one volume, one question.

        input_ids: [1, L], a prompt (`Prompt.input_ids`) whose image tokens begin at index `start`. Returns (token ids
        [T], states [T, H_llm], logits or None): `states[t]` is the state that token t was sampled from. An empty
        answer, or one without `[SEG]`, has no mask.
        """
        embeds = self.prompt_embeddings(input_ids, self.encode_images(image_BCDHW), start)
        answered = answer(self.llm, embeds, max_new_tokens, **sampling)
        ids, states = answered.ids[0], answered.states[0]
        chosen = states[ids == self.config.seg_token_id]
        if self.seg_module is None or len(chosen) == 0:
            return ids, states, None
        return ids, states, self.segment(self.seg_module.encode(image_BCDHW), merged(chosen)[None])
