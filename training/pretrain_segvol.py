"""Pretrain SegVol on labelled scans with one learned prompt a structure, without a language model.

    python training/pretrain_segvol.py training/configs/demo/1_pretrain_segvol.json

The paper starts from the published SegVol instead. The prompts are teachers: in instruction tuning the language model's
`[SEG]` states learn to take their place. `final` has SegVol's own keys (`model.*`) and the prompts. Masks are compared
at the decoder's own resolution, where targets are the share of each cell that the structure fills.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.errors import CheckpointError
from engine.models.config import ViTConfig
from engine.models.segvol import SegVol
from training import trainer
from training.config import StageSettings
from training.data.augment import View
from training.data.jitter import swap_sides
from training.data.selection import open_held_out, open_views
from training.files import write_json
from training.lamed import UNREACHED
from training.losses import mask_loss
from training.packing import filled_share
from training.starting_points import begin_encoders, check_shapes


@dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """start: `final` of another run of this stage. train_prompts: whether the prompts are learned, or stay as they
    started. prompt_noise: standard deviation of the noise on prompts, as large as what `[SEG]` states miss them by."""

    vision: ViTConfig
    start: str | None = None
    train_prompts: bool = True
    prompt_noise: float = 0.0


class _BiasApart(nn.ConvTranspose3d):
    """On a CPU, oneDNN runs its slow reference code for the bias gradient of a transposed convolution; an addition's
    gradient is a plain sum."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose3d(x, self.weight, None, self.stride) + self.bias.view(-1, 1, 1, 1)


class TaughtSegVol(trainer.StageModel):
    """SegVol and a table of prompts, one for each structure in either body half."""

    def __init__(self, config: ViTConfig, structures: set[str], noise: float = 0.0):
        super().__init__()
        self.names = tuple(sorted(structures | set(map(swap_sides, structures))))
        self.seg_module = SegVol(config)
        begin_encoders(self.seg_module.image_encoder)
        self.prompts = nn.Embedding(len(self.names), config.hidden_size)
        self.noise = noise
        for module in self.seg_module.mask_decoder.output_upscaling:
            if isinstance(module, nn.ConvTranspose3d):
                module.__class__ = _BiasApart
        for name, parameter in self.seg_module.named_parameters():
            parameter.requires_grad_(not name.startswith(UNREACHED))

    def forward(self, images: Tensor, structures: Tensor, owners: Tensor, masks: Tensor, totals: dict) -> dict:
        """images: [B, 1, D, H, W]; structures, owners: [M], which prompt, which image; masks: [M, 4d, 4h, 4w]."""
        # On a CPU, the plain kernel's gradient is faster than the fused one's.
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION] if images.is_cuda else SDPBackend.MATH):
            features = self.seg_module.encode(images)
            prompts = self.prompts(structures)
            logits = self.seg_module.decode_low_res(features[owners], prompts + self.noise * torch.randn_like(prompts))
        loss = mask_loss(logits[:, 0], masks) * len(masks) / totals["mask"]
        return {"loss": loss, "parts": trainer.Exact(mask=loss.detach())}

    def collate(self, items: list[tuple[View, np.random.Generator]], per_view: int) -> dict:
        """Up to `per_view` of the structures in each view."""
        chosen = [
            (k, str(name))
            for k, (view, rng) in enumerate(items)
            for name in rng.permutation(view.visible or view.structures[:1])[:per_view]
        ]
        grid = self.seg_module.config.grid
        masks = [filled_share(items[k][0].mask(name), grid) for k, name in chosen]
        return {
            "images": torch.from_numpy(np.stack([view.image for view, _ in items]))[:, None],
            "structures": torch.tensor([self.names.index(name) for _, name in chosen]),
            "owners": torch.tensor([k for k, _ in chosen]),
            "masks": torch.from_numpy(np.stack(masks)),
            "totals": {"mask": torch.tensor(float(len(masks)))},
        }

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        own = {key.replace("seg_module.", "model.", 1): value.contiguous() for key, value in state.items()}
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "prompts.json", self.names)

    def restore(self, folder: Path) -> None:
        try:
            names = tuple(json.loads((folder / "prompts.json").read_text()))
            found = load_file(folder / "model.safetensors")
        except OSError as error:
            raise CheckpointError(f"{folder} is no `final` of pretrain_segvol: {error}") from None
        if names != self.names:
            raise CheckpointError(
                f"{folder} learned other structures than these scans have: "
                f"{', '.join(sorted(set(names) ^ set(self.names)))}"
            )
        state = {key.replace("model.", "seg_module.", 1): value for key, value in found.items()}
        check_shapes("SegVol of this configuration", str(folder), state, self.state_dict())
        self.load_state_dict(state)

    def predictions(self) -> list[trainer.Prediction]:
        return [trainer.Prediction(f"{len(self.names)} structures: {', '.join(self.names)}")]


def train(settings: Settings) -> Path:
    views = open_views(settings, settings.vision.image_size)
    open_held_out(settings, settings.vision.image_size)
    trainer.check_amount(len(views), settings)
    model = TaughtSegVol(
        settings.vision, {name for scan in views.scans.values() for name in scan.structures}, settings.prompt_noise
    )
    if settings.start:
        model.restore(Path(settings.start))
    model.prompts.requires_grad_(settings.train_prompts)
    return trainer.fit(model, settings, views, lambda items: model.collate(items, views.settings.per_view))


if __name__ == "__main__":
    trainer.main(__doc__.splitlines()[0], Settings, train)
