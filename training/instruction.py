"""Third stage: language, boxes and masks together (LM + Dice + BCE).

Trained: LoRA, the added tokens and the seg projector. The language model and SegVol stay as they are (the mask loss
reaches the `[SEG]` states through SegVol's decoder), and so do vision tower and projector: trained along at this rate,
the visual tokens of all scans became one soft prompt (correlation 0.99 after 120 steps) and answers ignored the scan.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import workers
from training.data.augment import View
from training.data.questions import draw
from training.data.scans import LabelledScan
from training.lamed import TrainedLamed, tokenizer_of
from training.losses import language_loss, mask_loss
from training.packing import pack, sequence
from training.recipe import Recipe
from training.segmentation import Sampler, TaughtSegVol, filled_share, images_of

STAGE = 3
_SAVE_EVERY = 60
_MASKS_PER_STEP = 4


def train(recipe: Recipe, model: TrainedLamed, scans: list[LabelledScan], taught: TaughtSegVol, out: Path, work: Path,
          report: Callable[[int, dict], None]) -> None:
    """Train, or go on from `work/instruction.pt`; the same in all processes. Writes the checkpoint to `out`."""
    stage, state_file, tokenizer = recipe.instruction, work / "instruction.pt", tokenizer_of(recipe)
    for part in (model.lamed.seg_module, model.lamed.vision_tower, model.lamed.mm_projector):
        part.requires_grad_(False)
    taught.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = workers.Optimizer(stage, trained.values())
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.adam.load_state_dict(state["adam"])
        first = state["step"]
    sampler = Sampler(recipe, {scan.name: scan for scan in scans})
    for step in range(first, stage.steps):
        rng = workers.random_source(recipe.seed, STAGE, step)
        losses = _step(model, tokenizer, taught, recipe, sampler.views(stage.batch, rng), rng)
        optimizer.step(step)
        report(step + 1, losses)
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == stage.steps:
            workers.save_state(state_file, model={name: p.detach() for name, p in trained.items()},
                               adam=optimizer.adam.state_dict(), step=step + 1)
            if workers.rank() == 0:
                model.write(out, recipe)


def _step(model: TrainedLamed, tokenizer, taught: TaughtSegVol, recipe: Recipe, views: list[View],
          rng: np.random.Generator) -> dict[str, float]:
    """Gradients of one batch; returns the losses."""
    asked = [draw(view, rng, recipe.instruction.per_scan) for view in views]
    groups = [[sequence(tokenizer, question, rng.random() < 0.5) for question in group] for group in asked]
    prefix = 1 + model.config.num_visual_tokens
    batch = pack(groups, prefix, model.config.seg_token_id, tokenizer.pad_token_id)
    images, lamed = images_of(views), model.lamed
    segmenting = [(k, q.structure) for k, group in enumerate(asked) for q in group if q.segments]
    with torch.autocast("cpu", torch.bfloat16):
        bos = model.embed(torch.full((len(views), 1), tokenizer.bos_token_id))
        with torch.no_grad():
            visual_tokens = lamed.encode_images(images).float()
        embeddings = torch.cat([bos, visual_tokens, model.embed(batch.ids)], dim=1)
        hidden = model.hidden(embeddings, batch.mask, batch.positions)
        language = language_loss(model.logits(hidden[batch.answer_rows, batch.answer_columns]), batch.answers,
                                 batch.answer_weights)
        loss, losses = language, {"language": language.item(), "mask": 0.0, "prompt": 0.0}
        if segmenting:
            prompts = lamed.seg_projector(hidden[batch.state_rows, batch.state_columns]).float()
            distance = F.mse_loss(prompts, taught.prompt([name for _, name in segmenting]))
            chosen = rng.permutation(len(segmenting))[:_MASKS_PER_STEP]
            with torch.no_grad():
                features = lamed.seg_module.encode(images)
            with sdpa_kernel(SDPBackend.MATH):
                logits = lamed.seg_module.decode_low_res(features[[segmenting[k][0] for k in chosen]], prompts[chosen])
            grid = lamed.seg_module.config.grid
            target = np.stack([filled_share(views[segmenting[k][0]].mask(segmenting[k][1]), grid) for k in chosen])
            masks = mask_loss(logits[:, 0], torch.from_numpy(target))
            loss = loss + recipe.mask_loss_weight * masks + recipe.prompt_loss_weight * distance
            losses |= {"mask": masks.item(), "prompt": distance.item()}
    loss.backward()
    return losses
