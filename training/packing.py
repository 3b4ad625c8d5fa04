"""Questions about scans become one batch; many questions about one scan share a sequence, each as if it stood alone.

The prefix (the prompt's head and the visual tokens) is shared; every question sees the prefix and itself only, and its
positions go on from the prefix. The result equals that of separate sequences, for a fraction of the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from engine.errors import InvalidInput
from engine.prompt import Prompt
from training.data.sample import BrokenSample, Sample
from training.data.selection import M3DQuestions, images_of
from training.data.sets import Mixture

_log = logging.getLogger(__name__)
WEIGHTINGS = ("tokens", "root")


@dataclass(frozen=True)
class Sequence:
    """Token ids of one question with its answer. answer_start: index of the answer's first token."""

    ids: list[int]
    answer_start: int


@dataclass(frozen=True)
class Pack:
    """Questions about several scans, padded to one length L behind the prefix of P positions.

    ids: [B, L]. mask: [B, P + L, P + L], True where a row may attend to a column, and positions: [B, P + L]; both None
    where every scan has one question, since then the ordinary causal ones do. answer_rows, answer_columns, answers:
    [T], where each answer token is predicted (index into B and P + L) and its id. answer_weights: [T], of each answer
    token in the loss. state_rows, state_columns, state_owners: [S], where the `[SEG]` tokens are predicted, and in
    which question (counted through all groups).
    """

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    answer_rows: Tensor
    answer_columns: Tensor
    answers: Tensor
    answer_weights: Tensor
    state_rows: Tensor
    state_columns: Tensor
    state_owners: Tensor


def sequence(prompt: Prompt, sample: Sample, room: int | None = None) -> Sequence:
    """Question (behind a space or not: the reference's tasks differ), answer, and what ends it, as the layout has them.

    What exceeds `room` tokens is cut off.
    """
    ids, answer_start = prompt.answered((" " if sample.space else "") + sample.question, sample.answer)
    return Sequence(ids[:room], answer_start)


def pack(
    groups: list[list[Sequence]], prefix: int, seg_token_id: int, pad_token_id: int, weighting: str = "tokens"
) -> Pack:
    """Pack one group of sequences for each scan behind `prefix` positions.

    weighting: `tokens`, all answer tokens alike (the reference), or `root`, each 1 / sqrt(length of its answer), so
    that the single words that need a look at the scan do not drown in boxes and reports.
    """
    length = max(sum(len(s.ids) for s in group) for group in groups)
    total = prefix + length
    ids = torch.full((len(groups), length), pad_token_id)
    mask = positions = None
    if any(len(group) != 1 for group in groups):
        positions = torch.zeros(len(groups), total, dtype=torch.long)
        positions[:, :prefix] = torch.arange(prefix)
        # Padding attends to itself, since a row without anything to attend to is not a number.
        mask = torch.eye(total, dtype=torch.bool).repeat(len(groups), 1, 1)
        mask[:, :prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    answers, weights, states, number = [], [], [], 0
    for row, group in enumerate(groups):
        start = 0
        for s in group:
            n = len(s.ids)
            ids[row, start : start + n] = torch.tensor(s.ids)
            if mask is not None:
                block = slice(prefix + start, prefix + start + n)
                positions[row, block] = torch.arange(prefix, prefix + n)
                mask[row, block, :prefix] = True
                mask[row, block, block] = torch.ones(n, n).tril().bool()
            for k in range(s.answer_start, n):
                before = (row, prefix + start + k - 1)
                answers.append((*before, s.ids[k]))
                weights.append((n - s.answer_start) ** -0.5 if weighting == "root" else 1.0)
                if s.ids[k] == seg_token_id:
                    states.append((*before, number))
            start, number = start + n, number + 1
    rows, columns, tokens = torch.tensor(answers).T
    state_rows, state_columns, owners = torch.tensor(states, dtype=torch.long).reshape(-1, 3).T
    return Pack(ids, mask, positions, rows, columns, tokens, torch.tensor(weights), state_rows, state_columns, owners)


def filled_share(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """float32 [4d, 4h, 4w]: the share of each cell of the decoder's grid that a mask [D, H, W] fills."""
    cell = tuple(voxels // (4 * n) for voxels, n in zip(mask.shape, grid))
    return F.avg_pool3d(torch.from_numpy(mask)[None].float(), cell)[0].numpy()


class Packer:
    """Collates groups of Samples about one scan each for `TrainedLamed`.

    prompt, image_size: of the model. max_length: of prompt, visual tokens included, and answer together.
    weighting: see `pack`. grid: SegVol's patches (D, H, W), None for a model without segmentation; masks are compared
    at the model's volume, or if `at_decoder_grid` at four times that grid. mask_limit: of masks in a batch, None for
    all. taught: the structures that a teacher has prompts for, in order.
    """

    def __init__(
        self,
        prompt: Prompt,
        image_size: tuple[int, int, int],
        seg_token_id: int,
        max_length: int,
        *,
        weighting: str = "tokens",
        grid: tuple[int, int, int] | None = None,
        at_decoder_grid: bool = False,
        mask_limit: int | None = None,
        taught: tuple[str, ...] = (),
    ):
        if weighting not in WEIGHTINGS:
            raise InvalidInput(f"answer_weights {weighting!r} is not known; known: {', '.join(WEIGHTINGS)}")
        self.prompt, self.image_size = prompt, tuple(image_size)
        self.prefix = len(prompt.head) + prompt.num_visual_tokens
        self.seg_token_id, self.room, self.weighting = seg_token_id, max_length - self.prefix, weighting
        self.grid, self.at_decoder_grid, self.mask_limit = grid, at_decoder_grid, mask_limit
        self.taught = {name: k for k, name in enumerate(taught)}
        if self.room < 2:
            raise InvalidInput(
                f"max_length {max_length} leaves no room for a question and its answer behind "
                f"{len(prompt.head)} + {prompt.num_visual_tokens} tokens"
            )

    def __call__(self, groups: list[list[Sample]]) -> dict:
        kept = [[(s, q) for s in group for q in (self._sequence(s),) if q] for group in groups]
        kept = [group for group in kept if group]
        if not kept:
            # Everything is broken: a batch that teaches nothing, but that every process can go through.
            blank = Sample(np.zeros((1, *self.image_size), np.float32), "", "", None, False, "", "")
            kept = [[(blank, sequence(self.prompt, blank))]]
        batch = pack(
            [[q for _, q in group] for group in kept],
            self.prefix,
            self.seg_token_id,
            self.prompt.tokenizer.pad_token_id,
            self.weighting,
        )
        nothing = kept[0][0][0].task == ""
        weights = batch.answer_weights * (0 if nothing else 1)
        collated = {
            "images": images_of([group[0][0] for group in kept]),
            "ids": batch.ids,
            "head": torch.tensor(self.prompt.head, dtype=torch.long).repeat(len(kept), 1),
            "answer_rows": batch.answer_rows,
            "answer_columns": batch.answer_columns,
            "answers": batch.answers,
            "answer_weights": weights,
            "totals": {"language": weights.sum()},
        }
        if batch.mask is not None:
            collated |= {"mask": batch.mask, "positions": batch.positions}
        if self.grid:
            self._add_masks(
                collated,
                [s for group in kept for s, _ in group],
                [row for row, group in enumerate(kept) for _ in group],
                batch,
            )
        return collated

    def room_for(self, sample: Sample) -> Sequence | None:
        """The question with its answer; None if the question leaves no room for it."""
        found = sequence(self.prompt, sample, self.room)
        return found if len(found.ids) > found.answer_start else None

    def _sequence(self, sample: Sample) -> Sequence | None:
        found = self.room_for(sample)
        if not found:
            _log.warning(
                "%s: the question leaves no room for its answer and is left out: %.80s", sample.source, sample.question
            )
        return found

    def _add_masks(self, collated: dict, samples: list[Sample], rows: list[int], batch: Pack) -> None:
        """What the masks are learned from: of questions with a mask and a `[SEG]` that predicts it, numbered anew."""
        owners = batch.state_owners.tolist()
        segmenting = [k for k in sorted(set(owners)) if samples[k].mask is not None]
        number = {k: new for new, k in enumerate(segmenting)}
        chosen = torch.tensor([k in number for k in owners], dtype=torch.bool)
        # Which questions stand first is random already.
        masked = segmenting[: self.mask_limit]
        shape = tuple(4 * n for n in self.grid) if self.at_decoder_grid else self.image_size
        masks = [
            filled_share(samples[k].mask[0], self.grid)
            if self.at_decoder_grid
            else samples[k].mask[0].astype(np.float32)
            for k in masked
        ]
        taught = [self.taught.get(samples[k].structure, -1) for k in segmenting]
        collated |= {
            "state_rows": batch.state_rows[chosen],
            "state_columns": batch.state_columns[chosen],
            "state_owner": torch.tensor([number[k] for k in owners if k in number], dtype=torch.long),
            "mask_rows": torch.tensor([rows[k] for k in masked], dtype=torch.long),
            "masks": torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *shape),
            "taught": torch.tensor(taught, dtype=torch.long),
        }
        collated["totals"] |= {
            "mask": torch.tensor(float(len(masked))),
            "prompt": torch.tensor(float(sum(k >= 0 for k in taught))),
        }


class Fitting(Dataset):
    """A Mixture in which a question that leaves no room for its answer is a broken sample."""

    def __init__(self, mixture: Mixture, packer: Packer):
        self.mixture, self.packer = mixture, packer

    def __len__(self) -> int:
        return len(self.mixture)

    def readers(self, epoch: int, index: int) -> list[Callable[[], Sample]]:
        return [partial(self._fitting, read) for read in self.mixture.readers(epoch, index)]

    def _fitting(self, read: Callable[[], Sample]) -> Sample:
        sample = read()
        if not self.packer.room_for(sample):
            raise BrokenSample(sample.source, f"the question leaves no room for its answer: {sample.question:.80}")
        return sample


def count_too_long(questions, packer: Packer) -> None:
    """From now on, questions of M3D-Data that are too long are recorded and counted as broken samples."""
    if isinstance(questions, M3DQuestions):
        questions.samples.dataset = Fitting(questions.samples.dataset, packer)
