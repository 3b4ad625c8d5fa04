"""First and fourth stage: SegVol's encoder and decoder with one learned prompt a structure, without the language model.

The prompts are teachers: in the third stage the language model's `[SEG]` states learn to take their place, so in the
fourth they are fixed. Masks are compared at the decoder's own resolution, where targets are the share of each cell that
the structure fills.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.models.config import LamedConfig
from engine.models.segvol import SegVol
from training import workers
from training.data.augment import View, swap_sides, view_of
from training.data.scans import LabelledScan
from training.losses import mask_loss
from training.recipe import Recipe, Stage

STAGE, REFINEMENT_STAGE = 1, 4
_SAVE_EVERY = 100


class TaughtSegVol(nn.Module):
    """SegVol and a table of prompts, one for each structure in either body half."""

    def __init__(self, config: LamedConfig, scans: list[LabelledScan]):
        super().__init__()
        names = {name for scan in scans for name in scan.structures}
        self.names = tuple(sorted(names | set(map(swap_sides, names))))
        self.seg_module = SegVol(config.segmentation)
        nn.init.trunc_normal_(self.seg_module.image_encoder.patch_embedding.position_embeddings, std=0.02)
        self.prompts = nn.Embedding(len(self.names), config.segmentation.hidden_size)

    def prompt(self, structures: list[str]) -> Tensor:
        """[len(structures), E]"""
        return self.prompts(torch.tensor([self.names.index(name) for name in structures]))


@dataclass(frozen=True)
class Sampler:
    """Draws views of the training scans."""

    recipe: Recipe
    scans: dict[str, LabelledScan]

    def views(self, count: int, rng: np.random.Generator) -> list[View]:
        share = np.array(list(self.recipe.train.values()), float)
        names = rng.choice(list(self.recipe.train), count, p=share / share.sum())
        size = tuple(self.recipe.model["image_size"])
        return [view_of(self.scans[name], self.recipe.augmentation, size, rng) for name in names]


def images_of(views: list[View]) -> Tensor:
    """[B, 1, D, H, W]"""
    return torch.from_numpy(np.stack([view.image for view in views]))[:, None]


def filled_share(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """float32 [4d, 4h, 4w]: the share of each cell of the decoder's grid that a mask [D, H, W] fills."""
    d, h, w = (4 * n for n in grid)
    depth, height, width = mask.shape
    return mask.reshape(d, depth // d, h, height // h, w, width // w).mean((1, 3, 5), dtype=np.float32)


def train(recipe: Recipe, config: LamedConfig, scans: list[LabelledScan], work: Path,
          report: Callable[[int, dict], None]) -> TaughtSegVol:
    """The first stage: train, or go on from `work/segmentation.pt`; the same in all processes."""
    torch.manual_seed(recipe.seed)
    model = TaughtSegVol(config, scans)
    _run(recipe, recipe.segmentation, STAGE, model, scans, work / "segmentation.pt", report, noise=0.0)
    return model


def refine(recipe: Recipe, model: TaughtSegVol, scans: list[LabelledScan], work: Path,
           report: Callable[[int, dict], None]) -> None:
    """The fourth stage: train SegVol further, with its prompts fixed (the `[SEG]` states were led to them) and noise on
    them as large as what `[SEG]` states miss them by."""
    _run(recipe, recipe.refinement, REFINEMENT_STAGE, model, scans, work / "refinement.pt", report, recipe.prompt_noise)


def _run(recipe: Recipe, stage: Stage, number: int, model: TaughtSegVol, scans: list[LabelledScan], state_file: Path,
         report: Callable[[int, dict], None], noise: float) -> None:
    model.requires_grad_(True)
    model.prompts.requires_grad_(number == STAGE)
    optimizer = workers.Optimizer(stage, model.parameters())
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.adam.load_state_dict(state["adam"])
        first = state["step"]
    sampler = Sampler(recipe, {scan.name: scan for scan in scans})
    for step in range(first, stage.steps):
        rng = workers.random_source(recipe.seed, number, step)
        loss = _step(model, sampler.views(stage.batch, rng), stage.per_scan, rng, noise)
        optimizer.step(step)
        report(step + 1, {"loss": loss})
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == stage.steps:
            workers.save_state(state_file, model=model.state_dict(), adam=optimizer.adam.state_dict(), step=step + 1)


def _step(model: TaughtSegVol, views: list[View], per_scan: int, rng: np.random.Generator, noise: float) -> float:
    """Gradients of the mask loss of `per_scan` structures in each view."""
    grid = model.seg_module.config.grid
    chosen = [list(rng.permutation(view.visible)[:per_scan]) for view in views]
    owner = [k for k, names in enumerate(chosen) for _ in names]
    target = torch.from_numpy(np.stack([filled_share(views[k].mask(name), grid)
                                        for k, names in enumerate(chosen) for name in names]))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.seg_module.encode(images_of(views))
        # The decoder's attention has 6 queries: the plain kernel is faster there than the fused one.
        with sdpa_kernel(SDPBackend.MATH):
            prompts = model.prompt([name for names in chosen for name in names])
            prompts = prompts + noise * torch.randn_like(prompts)
            logits = model.seg_module.decode_low_res(features[owner], prompts)
    loss = mask_loss(logits[:, 0], target)
    loss.backward()
    return loss.item()
