"""The spatial-pooling projector: visual tokens of the ViT to prefix embeddings of the language model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.config import LamedConfig


class SpatialPoolingProjector(nn.Module):
    """Average-pool the patch grid, then Linear(-GELU-Linear)*: [B, N_patches, E] -> [B, N, H_llm].

    Keys: projector.{0,2,...}.{weight,bias}. Pooling comes first, the GELU is exact (paper, section 3.2).
    """

    def __init__(self, config: LamedConfig):
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.Linear(config.vision.hidden_size, config.llm_width)]
        for _ in range(1, config.proj_layer_num):
            if config.proj_layer_type == "mlp":
                layers.append(nn.GELU())
            layers.append(nn.Linear(config.llm_width, config.llm_width))
        self.projector = nn.Sequential(*layers)

    def forward(self, x_BNE: Tensor) -> Tensor:
        size = self.config.proj_pooling_size
        x_BEN = x_BNE.transpose(1, 2)
        if self.config.proj_pooling_type == "spatial":
            # In fp32: CPUs have no kernel for less.
            pooled = F.avg_pool3d(x_BEN.unflatten(2, self.config.vision.grid).float(), size).to(x_BEN.dtype).flatten(2)
        else:
            pooled = F.avg_pool1d(x_BEN, size**3)
        return self.projector(pooled.transpose(1, 2))
