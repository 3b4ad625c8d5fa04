"""Measure a demonstration checkpoint on augmentations it was not trained on, and on scans it never saw.

    torchrun --nproc-per-node 2 training/evaluate.py training/configs/demo/7_evaluate.json

Everything goes the long way: the saved checkpoint is read back, questions are answered greedily, and masks come from
the `[SEG]` states of those answers at the model's full volume. An answer without `[SEG]` counts as Dice 0.
"""
from __future__ import annotations

import argparse
import os
import platform
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from rich.progress import track  # noqa: E402

from engine.errors import M3DError  # noqa: E402
from engine.models.checkpoint import load_lamed  # noqa: E402
from engine.prompt import Prompt, parse_boxes  # noqa: E402
from training.config import read  # noqa: E402
from training.data.augment import Augmentation, View, view_of  # noqa: E402
from training.data.questions import CLOSED, Question, ask, is_right  # noqa: E402
from training.data.scans import load_scans  # noqa: E402
from training.files import write_json  # noqa: E402

# Apart from training's seeds, which begin with the recipe's.
SEED = 7_000_000
LARGE = 0.01
LONG_VIEWS = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """train, held_out: scans. augmentation: of their views beside the first, which is the scan as it is. out: a JSON
    file."""

    checkpoint: Path
    out: Path
    seed: int
    views: int
    fine_grid: tuple[int, int, int]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    augmentation: Augmentation


class Answerer:
    """Greedy answers to many questions about one view at once."""

    def __init__(self, folder: Path):
        self.lamed, self.tokenizer = load_lamed(folder)
        self.lamed.llm.to(torch.bfloat16)
        config = self.lamed.config
        self.size = config.vision.image_size
        self.prompt = Prompt(self.tokenizer, config.num_visual_tokens, config.context_length)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, questions: list[Question], new_tokens: int) -> tuple[list[str], list]:
        """(answers, mask [D, H, W] bool or None for each). image: [D, H, W]."""
        image = torch.from_numpy(image)[None, None]
        tokens = self.lamed.encode_images(image)
        prompts = [self.lamed.prompt_embeddings(torch.tensor([self.prompt.input_ids(q.question)]), tokens)[0]
                   for q in questions]
        # Padding stands on the left, so that all answers begin at the same step.
        length = max(len(p) for p in prompts)
        embeddings = torch.zeros(len(prompts), length, prompts[0].shape[1], dtype=torch.bfloat16)
        mask = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, p in enumerate(prompts):
            embeddings[row, length - len(p):], mask[row, length - len(p):] = p, 1
        out = self.lamed.llm.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=new_tokens,
                                      do_sample=False, output_hidden_states=True, return_dict_in_generate=True)
        states = torch.stack([step[-1][:, -1] for step in out.hidden_states], dim=1).float()
        answers = [self.tokenizer.decode(ids, skip_special_tokens=False).split(self.tokenizer.eos_token)[0].strip()
                   for ids in out.sequences]
        return answers, self._masks(image, states, out.sequences == self.lamed.config.seg_token_id)

    def _masks(self, image: torch.Tensor, states: torch.Tensor, found: torch.Tensor) -> list:
        masks: list = [None] * len(found)
        rows = found.any(dim=1).nonzero()[:, 0].tolist()
        if rows:
            features = self.lamed.seg_module.encode(image)
            for row in rows:
                state = states[row][found[row]].mean(dim=0, keepdim=True)
                masks[row] = (self.lamed.segment(features, state)[0, 0] > 0).numpy()
        return masks


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def box_iou(a: np.ndarray, b: np.ndarray, size: tuple[int, int, int]) -> float:
    """Intersection over union (a true union, unlike the reference's hull) of boxes given by first and last voxels."""
    def edges(box):
        return box[:3] * size, box[3:] * size + 1
    (a0, a1), (b0, b1) = edges(a), edges(b)
    both = np.prod(np.maximum(0, np.minimum(a1, b1) - np.maximum(a0, b0)))
    return float(both / (np.prod(a1 - a0) + np.prod(b1 - b0) - both))


class Tally:
    """What was measured on a set of scans."""

    def __init__(self):
        self.closed, self.worded, self.blind = defaultdict(list), defaultdict(list), defaultdict(list)
        self.dices, self.shares, self.boxes, self.refusals, self.described = (
            defaultdict(list), defaultdict(list), [], [], [])

    def add(self, other: "Tally") -> None:
        for name, mine in vars(self).items():
            theirs = vars(other)[name]
            if isinstance(mine, list):
                mine += theirs
            else:
                for key, values in theirs.items():
                    mine[key] += values

    def summary(self) -> dict:
        dices = {key: float(np.mean(values)) for key, values in self.dices.items()}
        large = {key for key, values in self.shares.items() if np.mean(values) > LARGE}
        flat = [right for values in self.closed.values() for right in values]
        return {
            "closed_questions": {
                "n": len(flat), "accuracy": _mean(flat), "chance": _mean(
                    [CLOSED[task] for task, values in self.closed.items() for _ in values]),
                "accuracy_without_the_scan": _mean([right for values in self.blind.values() for right in values]),
                "by_task": {task: {"n": len(values), "accuracy": _mean(values), "chance": round(CLOSED[task], 3),
                                   "accuracy_without_the_scan": _mean(self.blind[task])}
                            for task, values in self.closed.items()},
                "unseen_wordings": {"n": sum(map(len, self.worded.values())),
                                    "accuracy": _mean([right for values in self.worded.values() for right in values])},
            },
            "segmentation": {
                "mean_dice_large": _mean([dices[key] for key in large]), "large_structures": len(large),
                "mean_dice_all": _mean(list(dices.values())), "structures": len(dices),
                "masks": sum(map(len, self.dices.values())),
                "by_structure": {f"{scan}: {name}": {
                    "n": len(self.dices[scan, name]), "dice": round(dices[scan, name], 3),
                    "share_of_volume": round(float(np.mean(self.shares[scan, name])), 4)} for scan, name in dices},
            },
            "absent_structures_refused": {"n": len(self.refusals), "share": _mean(self.refusals)},
            "boxes": {"n": len(self.boxes), "mean_iou": _mean(self.boxes)},
            "descriptions_exact": {"n": len(self.described), "share": _mean(self.described)},
        }


def _mean(values: list) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def measure(answerer: Answerer, view: View, seed: list[int], long_answers: bool) -> Tally:
    """Ask about one view: every closed task, every visible structure, and if `long_answers` boxes and a description."""
    tally, rng = Tally(), np.random.default_rng(seed)
    closed = [ask(task, view, rng) for task in CLOSED for _ in range(3 if task == "presence" else 1)]
    worded = [ask(task, view, rng, "held_out") for task in CLOSED]
    closed, worded = ([q for q in questions if q] for questions in (closed, worded))
    absent = ask("segment_absent", view, rng)
    quick = [*closed, *worded, absent]
    answers, _ = answerer(view.image, quick, 14)
    blind, _ = answerer(np.zeros_like(view.image), closed, 14)
    for group, results, table in ((closed, answers, tally.closed), (closed, blind, tally.blind),
                                  (worded, answers[len(closed):], tally.worded)):
        for question, answer in zip(group, results):
            table[question.task].append(is_right(question, answer))
    tally.refusals.append("[SEG]" not in answers[-1])
    segment = [ask("segment", view, rng, structure=name) for name in view.visible]
    for question, mask in zip(segment, answerer(view.image, segment, 14)[1]):
        truth = view.mask(question.structure)
        tally.dices[view.scan, question.structure].append(0.0 if mask is None else dice(mask, truth))
        tally.shares[view.scan, question.structure].append(truth.mean())
    if long_answers:
        names = rng.permutation(view.visible)[:4]
        questions = [ask("box", view, rng, structure=name) for name in names] + [ask("describe", view, rng)]
        questions = [q for q in questions if q]
        answers, _ = answerer(view.image, questions, 64)
        for question, answer in zip(questions, answers):
            if question.task == "describe":
                tally.described.append(view.facts["part"] in answer and view.facts["modality"] in answer
                                       and view.facts["finding"].format(**view.facts) in answer)
            else:
                found, truth = parse_boxes(answer), view.box(question.structure)
                tally.boxes.append(box_iou(found[0], truth, answerer.size) if len(found) else 0.0)
    return tally


def measure_share(settings: Settings, rank: int, processes: int) -> dict[str, Tally]:
    """What one process measures: augmentations of each scan from wider ranges than training's, and as its first view
    a scan that was held out whole as it is."""
    answerer = Answerer(settings.checkpoint)
    scans = load_scans((*settings.train, *settings.held_out), settings.fine_grid)
    jobs = [(scan, k) for k in range(settings.views) for scan in scans][rank::processes]
    tallies = defaultdict(Tally)
    for scan, k in track(jobs, description="measuring", disable=rank > 0):
        seed = [SEED + settings.seed, k, sum(scan.name.encode())]
        ranges = None if k == 0 and scan.name in settings.held_out else settings.augmentation
        view = view_of(scan, ranges, answerer.size, np.random.default_rng(seed))
        tallies[scan.name].add(measure(answerer, view, [*seed, 1], k < LONG_VIEWS))
    return dict(tallies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", type=Path, help="a JSON file, e.g. from training/configs")
    try:
        settings = read(Settings, parser.parse_args().configuration)
        state = PartialState(cpu=True)
        shares = gather_object([measure_share(settings, state.process_index, state.num_processes)])
    except M3DError as error:
        sys.exit(f"error: {error}")
    if not state.is_main_process:
        return
    tallies = defaultdict(Tally)
    for share in shares:
        for name, tally in share.items():
            tallies[name].add(tally)
    together = Tally()
    for name in settings.train:
        together.add(tallies[name])
    write_json(settings.out, {
        "date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "views_of_each_scan": settings.views,
        "held_out_augmentations": together.summary(),
        "held_out_scans": {name: tallies[name].summary() for name in settings.held_out},
    })


if __name__ == "__main__":
    main()
