"""Measure a demonstration checkpoint on augmentations it was not trained on, and on scans it never saw.

    torchrun --nproc-per-node 2 training/evaluate.py training/configs/demo/7_evaluate.json

Everything goes the long way: the saved checkpoint is read back, questions are answered greedily, and masks come from
the `[SEG]` states of those answers at the model's full volume. An answer without `[SEG]` counts as Dice 0. Beside each
figure stand its 95 % interval and what guessing would give.
"""
from __future__ import annotations

import argparse
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from rich.progress import track  # noqa: E402
from scipy import stats  # noqa: E402

from engine.errors import M3DError  # noqa: E402
from engine.models.checkpoint import load_clip, load_lamed, load_tokenizer  # noqa: E402
from engine.prompt import Prompt, parse_boxes  # noqa: E402
from training.config import read  # noqa: E402
from training.data.augment import Augmentation, View, view_of  # noqa: E402
from training.data.jitter import swap_sides  # noqa: E402
from training.data.questions import CLOSED, Question, ask, caption, is_right  # noqa: E402
from training.data.scans import facts_of, load_scans  # noqa: E402
from training.files import write_json  # noqa: E402

# Apart from training's seeds, which begin with the recipe's.
SEED = 7_000_000
LARGE = 0.01
# The kinds of tasks, in the order of the card, and which closed questions are of which.
KINDS = ("closed VQA", "open VQA", "yes or no", "caption", "REC", "REG", "segmentation", "refusal", "text retrieval",
         "scan retrieval")
KIND_OF = {"modality": "closed VQA", "side": "closed VQA", "box_side": "closed VQA", "part": "open VQA"}
Pair = tuple[str, np.ndarray, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """train, held_out: scans. augmentation: of their views beside the first, which is the scan as it is. clip: an
    M3D-CLIP checkpoint, or null. out: a JSON file."""

    checkpoint: Path
    clip: Path | None
    out: Path
    seed: int
    views: int
    fine_grid: tuple[int, int, int]
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    augmentation: Augmentation


@dataclass(frozen=True)
class Score:
    """One answer. kind: of KINDS, or `unseen wording`. value: 1 or 0 for right or wrong, Dice, or IoU. chance: what a
    guess gets on average. blind: what the same question got about an empty volume. structure, share: which one, and how
    much of the volume it fills."""

    kind: str
    task: str
    scan: str
    value: float
    chance: float
    blind: float | None = None
    structure: str | None = None
    share: float = 0.0


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


# --- one view --------------------------------------------------------------------------------------------------------
def measure(answerer: Answerer, view: View, rng: np.random.Generator, caption_chance: float) -> list[Score]:
    """Ask about one view: every closed task, boxes, names of boxes, a description, and every visible structure."""
    return [*_closed(answerer, view, rng), *_worded(answerer, view, rng, caption_chance),
            *_segmented(answerer, view, rng)]


def _closed(answerer: Answerer, view: View, rng: np.random.Generator) -> list[Score]:
    """Short answers: closed questions, in known and in unseen wordings, and a structure that is not there."""
    known = [ask(task, view, rng) for task in CLOSED for _ in range(3 if task == "presence" else 1)]
    unseen = [ask(task, view, rng, "held_out") for task in CLOSED]
    known, unseen = ([q for q in questions if q] for questions in (known, unseen))
    answers, _ = answerer(view.image, [*known, *unseen, ask("segment_absent", view, rng)], 14)
    blind, _ = answerer(np.zeros_like(view.image), known, 14)
    scores = [Score(KIND_OF.get(q.task, "yes or no"), q.task, view.scan, is_right(q, answer), CLOSED[q.task],
                    is_right(q, unseeing)) for q, answer, unseeing in zip(known, answers, blind)]
    scores += [Score("unseen wording", q.task, view.scan, is_right(q, answer), CLOSED[q.task])
               for q, answer in zip(unseen, answers[len(known):])]
    return [*scores, Score("refusal", "segment_absent", view.scan, "[SEG]" not in answers[-1], 0.5)]


def _worded(answerer: Answerer, view: View, rng: np.random.Generator, caption_chance: float) -> list[Score]:
    """Longer answers: boxes of named structures, names of boxes, a description. A guess is the box or the name of any
    structure in view."""
    names = [str(name) for name in rng.permutation(view.visible)[:4]]
    boxes = {name: view.box(name) for name in view.visible}
    questions = [ask(task, view, rng, structure=name) for task in ("box", "name_box") for name in names]
    questions = [q for q in [*questions, ask("describe", view, rng)] if q]
    answers, _ = answerer(view.image, questions, 64)
    blind, _ = answerer(np.zeros_like(view.image), questions, 64)

    def value(q: Question, answer: str) -> float:
        if q.task == "box":
            found = parse_boxes(answer)
            return box_iou(found[0], boxes[q.structure], answerer.size) if len(found) else 0.0
        if q.task == "name_box":
            return answer == q.answer
        facts = view.facts
        return all(part in answer for part in (facts["part"], facts["modality"], facts["finding"].format(**facts)))

    scores = []
    for q, answer, unseeing in zip(questions, answers, blind):
        kind, chance = {"box": ("REC", 0.0), "name_box": ("REG", 1 / len(boxes)),
                        "describe": ("caption", caption_chance)}[q.task]
        if kind == "REC":
            chance = float(np.mean([box_iou(box, boxes[q.structure], answerer.size) for box in boxes.values()]))
        scores.append(Score(kind, q.task, view.scan, value(q, answer), chance, value(q, unseeing)))
    return scores


def _segmented(answerer: Answerer, view: View, rng: np.random.Generator) -> list[Score]:
    """Masks of every visible structure. A guess is the right mask of any of them."""
    questions = [ask("segment", view, rng, structure=name) for name in view.visible]
    truths = [view.mask(name) for name in view.visible]
    scores = []
    for q, truth, mask in zip(questions, truths, answerer(view.image, questions, 14)[1]):
        chance = float(np.mean([dice(truth, other) for other in truths]))
        scores.append(Score("segmentation", "segment", view.scan, 0.0 if mask is None else dice(mask, truth), chance,
                            structure=q.structure, share=float(truth.mean())))
    return scores


# --- retrieval -------------------------------------------------------------------------------------------------------
class Retriever:
    """Features of M3D-CLIP."""

    def __init__(self, folder: Path):
        self.clip, source = load_clip(folder)
        self.tokenizer = load_tokenizer(source)

    @torch.inference_mode()
    def image(self, image: np.ndarray) -> np.ndarray:
        """[E] of a volume [D, H, W]."""
        return self.clip.encode_image(torch.from_numpy(image)[None, None])[0, 0].numpy()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> np.ndarray:
        """[B, E]"""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                                max_length=self.clip.config.max_text_len)
        return self.clip.encode_text(tokens["input_ids"], tokens["attention_mask"])[:, 0].numpy()


def retrieval(images: np.ndarray, texts: np.ndarray, reports: list[str]) -> list[Score]:
    """Recall at 1 in both directions, all against all; reports of the same words are the same report."""
    similarity = images @ texts.T
    same = np.array([[a == b for b in reports] for a in reports])
    scores = []
    for kind, table in (("text retrieval", similarity), ("scan retrieval", similarity.T)):
        scores += [Score(kind, f"1 of {len(reports)}", "", same[row, best], float(same[row].mean()))
                   for row, best in enumerate(table.argmax(axis=1))]
    return scores


# --- figures ---------------------------------------------------------------------------------------------------------
def summary(scores: list[Score]) -> dict:
    """What metrics.json says about scores: every task, closed questions together and apart, structures."""
    kinds = _grouped(scores, lambda score: score.kind)
    closed = [s for kind in ("closed VQA", "open VQA", "yes or no") for s in kinds.get(kind, ())]
    structures = _grouped(kinds.get("segmentation", ()), lambda score: f"{score.scan}: {score.structure}")
    dices = {name: float(np.mean([s.value for s in found])) for name, found in structures.items()}
    shares = {name: float(np.mean([s.share for s in found])) for name, found in structures.items()}
    large = [dices[name] for name in dices if shares[name] > LARGE]
    return {
        "tasks": {kind: figure(kinds[kind]) for kind in KINDS if kind in kinds},
        "closed_questions": {**figure(closed), "unseen_wordings": figure(kinds["unseen wording"]),
                             "by_task": {task: figure(found) for task, found in _grouped(
                                 closed, lambda score: score.task).items()}},
        "segmentation": {
            "mean_dice_large": _rounded(np.mean(large)), "interval": _interval(large), "large_structures": len(large),
            "mean_dice_all": _rounded(np.mean(list(dices.values()))), "structures": len(dices),
            "by_structure": {name: {"n": len(structures[name]), "dice": round(dices[name], 3),
                                    "share_of_volume": round(shares[name], 4)} for name in dices},
        },
    }


def figure(scores: list[Score]) -> dict:
    """n, mean, its 95 % interval (as if the scores were independent), chance, and the mean about an empty volume."""
    blind = [s.blind for s in scores if s.blind is not None]
    return {"n": len(scores), "mean": _rounded(np.mean([s.value for s in scores])),
            "interval": _interval([s.value for s in scores]), "chance": _rounded(np.mean([s.chance for s in scores])),
            **({"without_the_scan": _rounded(np.mean(blind))} if blind else {})}


def _interval(values: list[float]) -> list[float]:
    """Wilson's for shares of right answers, else of the mean by Student's t."""
    if set(values) <= {0, 1}:
        return list(map(_rounded, stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")))
    return list(map(_rounded, stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))))


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _grouped(scores: Iterable[Score], key: Callable[[Score], str]) -> dict[str, list[Score]]:
    groups = defaultdict(list)
    for score in scores:
        groups[key(score)].append(score)
    return dict(groups)


def table(figures: dict[str, dict]) -> str:
    """Markdown for the card."""
    lines = ["| task | n | mean | 95 % | chance | without the scan |", "|---|---|---|---|---|---|"]
    for name, f in figures.items():
        low, high = f["interval"]
        blind = f"{f['without_the_scan']:.2f}" if "without_the_scan" in f else ""
        lines.append(f"| {name} | {f['n']} | {f['mean']:.2f} | {low:.2f} to {high:.2f} | {f['chance']:.2f} | {blind} |")
    return "\n".join(lines)


def measure_share(settings: Settings, rank: int, processes: int) -> tuple[list[Score], list[Pair]]:
    """What one process measures: scores, and (scan, image feature, report) of each view. Views are augmentations from
    wider ranges than training's; the first of a scan that was held out is the scan as it is."""
    answerer = Answerer(settings.checkpoint)
    retriever = Retriever(settings.clip) if settings.clip else None
    facts = facts_of()
    reports = {tuple(turn(facts[name][key].format(**facts[name])) for key in ("modality", "part", "finding"))
               for name in settings.train for turn in (str, swap_sides)}
    scans = load_scans((*settings.train, *settings.held_out), settings.fine_grid)
    jobs = [(scan, k) for k in range(settings.views) for scan in scans][rank::processes]
    scores, pairs = [], []
    for scan, k in track(jobs, description="measuring", disable=rank > 0):
        seed = [SEED + settings.seed, k, sum(scan.name.encode())]
        ranges = None if k == 0 and scan.name in settings.held_out else settings.augmentation
        view = view_of(scan, ranges, answerer.size, np.random.default_rng(seed))
        rng = np.random.default_rng([*seed, 1])
        scores += measure(answerer, view, rng, 1 / len(reports))
        if retriever:
            pairs.append((scan.name, retriever.image(view.image), caption(view, rng)))
    return scores, pairs


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
    by_scan = _grouped((score for scores, _ in shares for score in scores), lambda score: score.scan)
    trained = [score for name in settings.train for score in by_scan[name]]
    pairs = [pair for _, pairs in shares for pair in pairs if pair[0] in settings.train]
    if pairs:
        _, images, reports = zip(*pairs)
        trained += retrieval(np.stack(images), Retriever(settings.clip).texts(list(reports)), list(reports))
    result = {
        "date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "views_of_each_scan": settings.views, "held_out_augmentations": summary(trained),
        "held_out_scans": {name: summary(by_scan[name]) for name in settings.held_out}}
    write_json(settings.out, result)
    print(f"on held-out augmentations ({settings.out} has everything):\n"
          f"{table(result['held_out_augmentations']['tasks'])}")


if __name__ == "__main__":
    main()
