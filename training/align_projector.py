"""Bring visual tokens into the language model's space: only the projector (and embeddings) on reports, or by words.

    python training/align_projector.py training/configs/paper/align_projector.json

objective `captions` (the paper): the language model, frozen, is to say the report of a scan. objective `words`: each
visual token is read as the language model reads its output, by comparing it with the embeddings of words: it should
name the modality, the body part and a tumour, and the structures in its part of the scan. That never runs the language
model and costs a fiftieth of the time, at the price of scans with every structure labelled.
`final` holds vision tower, projector and embeddings, for `start` of instruction tuning.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import InvalidInput
from training import trainer
from training.config import StageSettings
from training.data.augment import View
from training.data.jitter import swap_sides
from training.data.scans import LabelledScan
from training.data.selection import open_held_out, open_questions, open_views
from training.data.views import Views
from training.finetune import check_precision, fit_questions
from training.lamed import Start, TrainedLamed, image_size_of
from training.packing import Packer

OBJECTIVES = ("captions", "words")
# A cell is named after every structure that fills this share of it; a tumour is named wherever it reaches.
_NAMED_SHARE = 0.1
_SHARPNESS = 12.0


@dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """train: see `lamed.TRAINABLE`. max_length: tokens of the prompt, scan included, and report (captions only)."""

    start: Start
    objective: str
    train: tuple[str, ...]
    max_length: int = 512


class Lens(nn.Module):
    """Reads visual tokens as words: the embeddings of every token in `texts`, centred and of length 1."""

    def __init__(self, texts: list[str], tokenizer, table_VH: Tensor):
        super().__init__()
        self.tokens = {text: tokenizer(" " + text, add_special_tokens=False)["input_ids"] for text in texts}
        self.ids = sorted({token for tokens in self.tokens.values() for token in tokens})
        centre = table_VH.mean(0)
        self.length = float((table_VH - centre).norm(dim=-1).mean())
        self.register_buffer("mean", centre)
        self.register_buffer("words_WH", F.normalize(table_VH[self.ids] - centre, dim=-1))

    def row(self, texts: list[str]) -> np.ndarray:
        """float32 [W], sums to 1: equal parts of every text, each spread over its tokens."""
        row = np.zeros(len(self.ids), np.float32)
        for text in texts:
            for token in self.tokens[text]:
                row[self.ids.index(token)] += 1 / len(texts) / len(self.tokens[text])
        return row

    def losses(self, tokens_BNH: Tensor, target_BNW: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the words, and the relative error of the tokens' length against that of word embeddings."""
        centred = tokens_BNH.float() - self.mean
        length = centred.norm(dim=-1)
        logits = _SHARPNESS * (centred / length[..., None]) @ self.words_WH.T
        return F.cross_entropy(logits.flatten(0, 1), target_BNW.flatten(0, 1)), ((length / self.length - 1) ** 2).mean()


class WordAligned(trainer.StageModel):
    """Visual tokens that are to name what they show."""

    def __init__(self, model: TrainedLamed, scans: list[LabelledScan]):
        super().__init__()
        self.model = model
        texts = {text for scan in scans for text in (*scan.structures, *about(scan.facts))}
        self.lens = Lens(
            sorted(texts | set(map(swap_sides, texts))),
            model.tokenizer,
            model.lamed.llm.get_input_embeddings().weight.detach().float(),
        )
        # The language model itself is never run.
        model.lamed.llm.requires_grad_(False)

    def forward(self, images: Tensor, target: Tensor, totals: dict[str, Tensor]) -> dict:
        tokens = self.model.lamed.encode_images(images)
        with torch.autocast(images.device.type, enabled=False):
            words, length = (part * len(images) / totals["scans"] for part in self.lens.losses(tokens, target))
        return {"loss": words + length, "parts": trainer.Exact(words=words.detach(), length=length.detach())}

    def collate(self, items: list[tuple[View, np.random.Generator]]) -> dict:
        grid = self.model.lamed.config.visual_grid
        return {
            "images": torch.from_numpy(np.stack([view.image for view, _ in items]))[:, None],
            "target": torch.from_numpy(np.stack([words_of(view, self.lens, grid) for view, _ in items])),
            "totals": {"scans": torch.tensor(float(len(items)))},
        }

    def write(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.model.write(
            folder, {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        )

    def keeps(self, name: str) -> bool:
        return name.startswith("model.") and self.model.keeps(name.removeprefix("model."))

    def restore(self, folder: Path) -> None:
        self.model.restore(folder)

    def predictions(self) -> list[trainer.Prediction]:
        return [trainer.Prediction(f"{len(self.lens.tokens)} names: {', '.join(self.lens.tokens)}")]


def about(facts: dict[str, str]) -> list[str]:
    """What the whole scan is."""
    return [facts["modality"], facts["part"], *([f"{facts['tumour_side']} tumour"] if facts["tumour"] else [])]


def words_of(view: View, lens: Lens, grid: tuple[int, int, int]) -> np.ndarray:
    """float32 [N, W]: what each visual token of a view should name; half of it the scan, half its own structures."""
    shares = []
    for k, name in enumerate(view.structures):
        # Every other row and column is exact enough.
        mask = ((view.bits[:, ::2, ::2] >> k) & 1).astype(np.float32)
        cells = mask.reshape([side for n, m in zip(grid, mask.shape) for side in (n, m // n)]).mean((1, 3, 5)).ravel()
        shares.append(cells > (0 if name == view.facts["tumour"] else _NAMED_SHARE))
    whole = lens.row(about(view.facts))
    inside = np.stack([lens.row([name]) for name in view.structures])
    named = np.stack(shares, axis=1).astype(np.float32)
    count = named.sum(1, keepdims=True)
    return np.where(count > 0, 0.5 * whole + 0.5 * (named @ inside) / np.maximum(count, 1), whole)


def train(settings: Settings) -> Path:
    if settings.objective not in OBJECTIVES:
        raise InvalidInput(f"objective {settings.objective!r} is not known; known: {', '.join(OBJECTIVES)}")
    check_precision(settings, settings.start, settings.train)
    size = image_size_of(settings.start)
    words = settings.objective == "words"
    data = open_views(settings, size) if words else open_questions(settings, size)
    held_out = open_held_out(settings, size)
    trainer.check_amount(len(data), settings)
    model = TrainedLamed(settings.start, settings.train, segmentation=False)
    if isinstance(data, Views):
        aligned = WordAligned(model, list(data.scans.values()))
        return trainer.fit(aligned, settings, data, aligned.collate)
    packer = Packer(model.prompt, size, model.config_json["seg_token_id"], settings.max_length)
    return fit_questions(model, settings, data, packer, held_out)


if __name__ == "__main__":
    trainer.main(__doc__.splitlines()[0], Settings, train)
