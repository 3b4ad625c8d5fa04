"""Second stage: visual tokens are brought to the language model's own words, without running the language model.

Each token is read as the language model reads its output, by comparing it with the embeddings of words: it should name
the modality, the body part and a tumour, and the structures in its part of the scan. A frozen language model then meets
words it knows instead of noise, and instruction tuning has only to teach it to answer. (LLaVA and M3D align by captions
through the language model, REFERENCE: stage 2; this costs a fiftieth of the time, at the price of labelled scans.)
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import workers
from training.data.augment import View, swap_sides
from training.data.scans import LabelledScan
from training.lamed import TrainedLamed, tokenizer_of
from training.recipe import Recipe
from training.segmentation import Sampler, images_of

STAGE = 2
_SAVE_EVERY = 100
# A cell is named after every structure that fills this share of it; a tumour is named wherever it reaches.
_NAMED_SHARE = 0.1
_SHARPNESS = 12.0


class Lens(nn.Module):
    """Reads visual tokens as words: the embeddings of every token in `texts`, centred and of length 1."""

    def __init__(self, texts: list[str], tokenizer, table_VH: Tensor):
        super().__init__()
        self.tokens = {text: tokenizer(" " + text, add_special_tokens=False)["input_ids"] for text in texts}
        self.ids = sorted({token for tokens in self.tokens.values() for token in tokens})
        self.mean, self.length = table_VH.mean(0), (table_VH - table_VH.mean(0)).norm(dim=-1).mean()
        self.words_WH = F.normalize(table_VH[self.ids] - self.mean, dim=-1)

    def row(self, texts: list[str]) -> np.ndarray:
        """float32 [W], sums to 1: equal parts of every text, each spread over its tokens."""
        row = np.zeros(len(self.ids), np.float32)
        for text in texts:
            for token in self.tokens[text]:
                row[self.ids.index(token)] += 1 / len(texts) / len(self.tokens[text])
        return row

    def loss(self, tokens_BNH: Tensor, target_BNW: Tensor) -> Tensor:
        """Cross-entropy of the words, plus the relative error of the tokens' length against that of word embeddings."""
        centred = tokens_BNH.float() - self.mean
        length = centred.norm(dim=-1)
        logits = _SHARPNESS * (centred / length[..., None]) @ self.words_WH.T
        return F.cross_entropy(logits.flatten(0, 1), target_BNW.flatten(0, 1)) + ((length / self.length - 1) ** 2).mean()


def train(recipe: Recipe, model: TrainedLamed, scans: list[LabelledScan], work: Path,
          report: Callable[[int, dict], None]) -> None:
    """Train vision tower and projector, or go on from `work/alignment.pt`; the same in all processes."""
    stage, state_file = recipe.alignment, work / "alignment.pt"
    sampler = Sampler(recipe, {scan.name: scan for scan in scans})
    texts = {text for scan in scans for text in (*scan.structures, *_about(scan.facts))}
    lens = Lens(sorted(texts | set(map(swap_sides, texts))), tokenizer_of(recipe),
                model.lamed.llm.model.embed_tokens.weight.float())
    trained = {name: p for name, p in model.lamed.named_parameters() if name.startswith(("vision_tower", "mm_projector"))}
    optimizer = workers.Optimizer(stage, trained.values())
    first = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.lamed.load_state_dict(state["model"], strict=False)
        optimizer.adam.load_state_dict(state["adam"])
        first = state["step"]
    for step in range(first, stage.steps):
        rng = workers.random_source(recipe.seed, STAGE, step)
        views = sampler.views(stage.batch, rng)
        target = torch.from_numpy(np.stack([_words(view, lens, model.config.visual_grid) for view in views]))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model.lamed.encode_images(images_of(views))
        loss = lens.loss(tokens, target)
        loss.backward()
        optimizer.step(step)
        report(step + 1, {"loss": loss.item()})
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == stage.steps:
            workers.save_state(state_file, model={name: p.detach() for name, p in trained.items()},
                               adam=optimizer.adam.state_dict(), step=step + 1)


def _about(facts: dict[str, str]) -> list[str]:
    """What the whole scan is."""
    return [facts["modality"], facts["part"], *([f"{facts['tumour_side']} tumour"] if facts["tumour"] else [])]


def _words(view: View, lens: Lens, grid: tuple[int, int, int]) -> np.ndarray:
    """float32 [N, W]: what each visual token of a view should name; half of it the scan, half its own structures."""
    shares = []
    for k, name in enumerate(view.structures):
        # Every other row and column is exact enough.
        mask = ((view.bits[:, ::2, ::2] >> k) & 1).astype(np.float32)
        cells = mask.reshape([side for n, m in zip(grid, mask.shape) for side in (n, m // n)]).mean((1, 3, 5)).ravel()
        shares.append(cells > (0 if name == view.facts["tumour"] else _NAMED_SHARE))
    about = lens.row(_about(view.facts))
    inside = np.stack([lens.row([name]) for name in view.structures])
    named = np.stack(shares, axis=1).astype(np.float32)
    count = named.sum(1, keepdims=True)
    return np.where(count > 0, 0.5 * about + 0.5 * (named @ inside) / np.maximum(count, 1), about)
