"""What a model in training is worth on a split that it does not learn from: `trainer.eval_strategy` asks for it.

Losses and token accuracy by task, and scores of greedy answers by the functions that the demonstration is measured
with. Every process measures its share. Where no process has the whole model (ZeRO-3, FSDP), nothing is answered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from engine.prompt import SEG_TOKEN, parse_boxes
from training.data.sample import Sample
from training.data.selection import HeldOut
from training.evaluate import box_iou, dice, retrieval
from training.packing import Packer
from training.trainer import Exact, StageTrainer

if TYPE_CHECKING:
    from training.lamed import Reply
    from training.pretrain_clip import ContrastiveClip


def score(sample: Sample, reply: Reply) -> dict[str, float]:
    """An answer's scores, 0 to 1, by name: nothing for what has no single right answer.

    dice, iou: of the mask, and of the first box; 0 where there is none. named: whether the structure in a box is named.
    right: the right choice, or the very words. denied: that a structure is not in the scan, without a mask or a box.
    """
    found, wanted = parse_boxes(reply.text), parse_boxes(sample.answer)
    if sample.mask is not None:
        return {"dice": 0.0 if reply.mask is None else dice(reply.mask, sample.mask[0])}
    if sample.task == "segmentation":
        return {"denied": float(SEG_TOKEN not in reply.text)}
    if sample.task == "rec" and not len(wanted):
        return {"denied": float(not len(found))}
    if sample.task == "rec":
        return {"iou": box_iou(found[0], wanted[0], sample.image.shape[1:]) if len(found) else 0.0}
    if sample.task == "reg" and sample.structure and len(parse_boxes(sample.question)):
        return {"named": float(sample.structure.lower() in reply.text.lower())}
    if sample.task == "vqa_closed":
        return {"right": float(reply.text.strip()[:2] == sample.answer[:2])}
    if sample.task in ("vqa_open", "vqa_yes_no"):
        return {"right": float(_plain(reply.text) == _plain(sample.answer))}
    return {}


class AnswerValidation:
    """Measures a model that answers questions."""

    def __init__(self, held_out: HeldOut, packer: Packer):
        self.held_out, self.packer = held_out, packer

    def __call__(self, trainer: StageTrainer) -> dict[str, float]:
        found = self._losses(trainer)
        return found if trainer.sharded else found | self._scores(trainer)

    def _losses(self, trainer: StageTrainer) -> dict[str, float]:
        sums: dict[str, torch.Tensor] = {}
        batches = _Batches(self.held_out, self._collate, trainer)
        for task, batch in DataLoader(batches, batch_size=None, num_workers=trainer.args.dataloader_num_workers):
            totals = batch.pop("totals")
            inputs = trainer._prepare_inputs(batch)
            ones = Exact({name: torch.ones((), device=trainer.args.device) for name in totals})
            with trainer.accelerator.autocast():
                parts = trainer.model(**inputs, totals=ones)["parts"]
            for part, value in parts.items():
                total = totals["language" if part == "token_accuracy" else part].to(value)
                name = f"{task}_{part}" if part == "token_accuracy" else f"{task}_loss_{part}"
                sums[name] = sums.get(name, 0) + torch.stack([value, total])
        names = sorted(sums)
        # Every process has the same names, since it has batches of every task.
        both = trainer.accelerator.reduce(torch.stack([sums[name] for name in names]), reduction="sum").tolist()
        found = {name: value / total for name, (value, total) in zip(names, both) if total}
        language = [value for name, value in found.items() if name.endswith("_loss_language")]
        return found | ({"loss": float(np.mean(language))} if language else {})

    def _collate(self, samples: list[Sample]) -> dict:
        return self.packer([[sample] for sample in samples])

    def _scores(self, trainer: StageTrainer) -> dict[str, float]:
        scores = defaultdict(list)
        for task, sample in _share(self.held_out, trainer):
            with trainer.accelerator.autocast():
                reply = trainer.model.answer(sample)
            for name, value in score(sample, reply).items():
                scores[f"{task}_{name}"].append(value)
        return _means(gather_object([dict(scores)]))


class RetrievalValidation:
    """Measures M3D-CLIP: whether a report, or a scan, that comes first belongs to the scan, or the report, asked for.

    Scans with the same report count as the same.
    """

    def __init__(self, held_out: HeldOut):
        self.held_out = held_out

    def __call__(self, trainer: StageTrainer) -> dict[str, float]:
        if trainer.sharded:
            return {}
        model: ContrastiveClip = trainer.model
        features: list[tuple[np.ndarray, np.ndarray, str]] = []
        for _, samples in _Batches(self.held_out, list, trainer):
            if not samples:
                continue
            inputs = trainer._prepare_inputs(model.collate(samples))
            with trainer.accelerator.autocast():
                image = model.clip.encode_image(inputs["images"])[:, 0].float().cpu().numpy()
                text = model.clip.encode_text(inputs["input_ids"], inputs["attention_mask"])[:, 0].float().cpu().numpy()
            features += zip(image, text, (sample.answer for sample in samples), strict=True)
        images, texts, reports = zip(*gather_object(features))
        scores = retrieval(np.stack(images), np.stack(texts), [(report,) for report in reports])
        by_kind = defaultdict(list)
        for found in scores:
            by_kind[found.kind.replace(" ", "_")].append(found.value)
        return _means([by_kind])


class _Batches(Dataset):
    """(task, collated batch) of a process' share; every process has as many of each task, some of them empty."""

    def __init__(self, held_out: HeldOut, collate: Callable[[list[Sample]], Any], trainer: StageTrainer):
        self.held_out, self.collate = held_out, collate
        size, processes = trainer.args.per_device_eval_batch_size, trainer.args.world_size
        self.places: list[tuple[str, range]] = []
        for task, chosen in held_out.chosen.items():
            for first in range(0, len(chosen), size * processes):
                begin = first + size * trainer.args.process_index
                self.places.append((task, range(begin, min(begin + size, len(chosen)))))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        task, numbers = self.places[index]
        samples = (self.held_out.read(task, number) for number in numbers)
        return task, self.collate([sample for sample in samples if sample is not None])


def _share(held_out: HeldOut, trainer: StageTrainer) -> Iterator[tuple[str, Sample]]:
    """The samples that this process answers."""
    for task, chosen in held_out.chosen.items():
        for number in range(min(len(chosen), held_out.answers))[trainer.args.process_index :: trainer.args.world_size]:
            if sample := held_out.read(task, number):
                yield task, sample


def _means(of_processes: list[Mapping[str, list[float]]]) -> dict[str, float]:
    values = defaultdict(list)
    for scores in of_processes:
        for name, found in scores.items():
            values[name] += found
    return {name: float(np.mean(found)) for name, found in sorted(values.items())}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")
