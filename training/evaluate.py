"""Measure a demonstration checkpoint on augmentations it was not trained on, and on scans it never saw.

    torchrun --nproc-per-node 2 training/evaluate.py training/configs/demo/8_evaluate.json

Everything goes the long way: the saved checkpoint is read back, questions are answered greedily, and masks come from
the `[SEG]` states of those answers at the model's full volume. An answer without `[SEG]` counts as Dice 0. Beside each
figure stand its 95 % interval, what guessing gives, and what is known without a look at the scan: see `Score`.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from scipy import stats

from engine.cli import console
from engine.errors import InvalidInput
from engine.models import answering
from engine.models.checkpoint import load_clip, load_lamed, load_tokenizer
from engine.prompt import SEG_TOKEN, parse_boxes
from engine.seg_states import merged
from training.config import read
from training.data.augment import Augmentation, View, view_of
from training.data.questions import CLOSED, Question, ask, caption, is_right
from training.data.scans import SOURCES, LabelledScan, load_scans
from training.files import write_json

# Apart from training's seeds, which begin with the recipe's.
SEED = 7_000_000
LARGE = 0.01
# The kinds of tasks, in the order of the card, and which closed questions are of which.
KINDS = (
    "closed VQA",
    "open VQA",
    "yes or no",
    "caption",
    "REC",
    "REG",
    "segmentation",
    "refusal",
    "text retrieval",
    "scan retrieval",
)
KIND_OF = {"modality": "closed VQA", "side": "closed VQA", "box_side": "closed VQA", "part": "open VQA"}
Pair = tuple[np.ndarray, str, tuple[str, str, str]]
DRAWS = 200  # of each closed question about a view, to see which answer is the commonest
RESAMPLES = 4000


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
    """One answer.

    kind: of KINDS, or `unseen wording`. view: number among the scan's. value: 1 or 0 for right or wrong, Dice, or IoU.
    chance: what a guess among the possible answers gets on average. prior: what knowing these scans gets without a look
    at any: the commonest answer to that question, the usual place of that structure. blind: what the model said to the
    same question about an empty volume. structure, share: which one, and how much of the volume it fills.
    """

    kind: str
    task: str
    scan: str
    view: int
    value: float
    chance: float
    prior: float | None = None
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
        self.prompt = config.prompt(self.tokenizer)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, questions: list[Question], new_tokens: int) -> tuple[list[str], list]:
        """(answers, mask [D, H, W] bool or None for each). image: [D, H, W]."""
        image = torch.from_numpy(image)[None, None]
        tokens = self.lamed.encode_images(image)
        start = len(self.prompt.head)
        prompts = [
            self.lamed.prompt_embeddings(torch.tensor([self.prompt.input_ids(q.question)]), tokens, start)[0]
            for q in questions
        ]
        found = answering.answer(
            self.lamed.llm,
            [prompt.to(torch.bfloat16) for prompt in prompts],
            new_tokens,
            eos_token_id=list(self.prompt.stop_ids),
        )
        answers = [self.prompt.text(ids) for ids in found.ids.tolist()]
        return answers, self._masks(image, found.states.float(), found.ids == self.lamed.config.seg_token_id)

    def _masks(self, image: torch.Tensor, states: torch.Tensor, found: torch.Tensor) -> list:
        masks: list = [None] * len(found)
        rows = found.any(dim=1).nonzero()[:, 0].tolist()
        if rows:
            features = self.lamed.seg_module.encode(image)
            for row in rows:
                state = merged(states[row][found[row]])
                masks[row] = (self.lamed.segment(features, state[None])[0, 0] > 0).numpy()
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


# --- what is known without a look ------------------------------------------------------------------------------------
class Priors:
    """What can be known about the scans of `views` without a look at any of them."""

    def __init__(self, views: list[View], unchanged: list[View]):
        rng = np.random.default_rng(SEED)
        self.unchanged = unchanged
        counts = defaultdict(Counter)
        for view in views:
            for task in CLOSED:
                for _ in range(DRAWS):
                    if q := ask(task, view, rng):
                        counts[task, q.about][q.key] += 1
        self._commonest = {asked: keys.most_common(1)[0][0] for asked, keys in counts.items()}
        self.reports = Counter(finding(view) for view in views)

    def closed(self, q: Question) -> float:
        """Whether the commonest answer to a closed question is right."""
        return float(self._commonest.get((q.task, q.about)) == q.key)

    def usual(self, view: View, name: str, score: Callable[[View], float]) -> float | None:
        """The mean score of a structure as it lies in the unchanged scans of the same body part."""
        found = [
            score(other)
            for other in self.unchanged
            if name in other.visible and other.facts["part"] == view.facts["part"]
        ]
        return float(np.mean(found)) if found else None


def finding(view: View) -> tuple[str, str, str]:
    """(modality, part, side of the tumour in view or nothing): what a report must get right."""
    facts = view.facts
    return facts["modality"], facts["part"], facts["tumour_side"] if facts["tumour"] in view.visible else ""


# --- one view --------------------------------------------------------------------------------------------------------
def measure(answerer: Answerer, view: View, number: int, rng: np.random.Generator, priors: Priors) -> list[Score]:
    """Ask about one view: every closed task, boxes, names of boxes, a description, and every visible structure."""

    def score(kind: str, q: Question, value: float, chance: float, **more) -> Score:
        return Score(kind, q.task, view.scan, number, float(value), chance, **more)

    return [
        *_closed(answerer, view, rng, priors, score),
        *_worded(answerer, view, rng, priors, score),
        *_segmented(answerer, view, rng, priors, score),
    ]


def _closed(answerer: Answerer, view: View, rng: np.random.Generator, priors: Priors, score: Callable) -> list[Score]:
    """Short answers: closed questions, in known and in unseen wordings, and a structure that is not there."""
    known = [ask(task, view, rng) for task in CLOSED for _ in range(3 if task == "presence" else 1)]
    unseen = [ask(task, view, rng, "held_out") for task in CLOSED]
    known, unseen = ([q for q in questions if q] for questions in (known, unseen))
    absent = ask("segment_absent", view, rng)
    asked = [*known, *unseen, absent]
    (answers, _), (blind, _) = (answerer(image, asked, 14) for image in (view.image, np.zeros_like(view.image)))
    scores = []
    for k, (q, answer, unseeing) in enumerate(zip(asked[:-1], answers, blind)):
        kind = KIND_OF.get(q.task, "yes or no") if k < len(known) else "unseen wording"
        scores.append(
            score(
                kind, q, is_right(q, answer), CLOSED[q.task], prior=priors.closed(q), blind=float(is_right(q, unseeing))
            )
        )
    return [*scores, score("refusal", absent, _declines(answers[-1]), 0.5, blind=float(_declines(blind[-1])))]


def _declines(answer: str) -> bool:
    return "not visible" in answer and SEG_TOKEN not in answer


def _worded(answerer: Answerer, view: View, rng: np.random.Generator, priors: Priors, score: Callable) -> list[Score]:
    """Longer answers: boxes of named structures, names of boxes, a description. A guess is the box or the name of any
    structure in view, or any report."""
    names = [str(name) for name in rng.permutation(view.visible)[:4]]
    boxes = {name: view.box(name) for name in view.visible}
    questions = [ask(task, view, rng, structure=name) for task in ("box", "name_box") for name in names]
    questions = [q for q in [*questions, ask("describe", view, rng)] if q]
    (answers, _), (blind, _) = (answerer(image, questions, 64) for image in (view.image, np.zeros_like(view.image)))

    def value(q: Question, answer: str) -> float:
        if q.task == "box":
            found = parse_boxes(answer)
            return box_iou(found[0], boxes[q.structure], answerer.size) if len(found) else 0.0
        return float(answer == q.answer if q.task == "name_box" else reports(view, answer))

    scores = []
    for q, answer, unseeing in zip(questions, answers, blind):
        got = {"value": value(q, answer), "blind": value(q, unseeing)}
        if q.task == "box":
            box = boxes[q.structure]
            got |= {
                "chance": float(np.mean([box_iou(other, box, answerer.size) for other in boxes.values()])),
                "prior": priors.usual(
                    view, q.structure, lambda other, q=q, box=box: box_iou(other.box(q.structure), box, answerer.size)
                ),
            }
            scores.append(score("REC", q, **got))
        elif q.task == "name_box":
            scores.append(score("REG", q, chance=1 / len(boxes), **got))
        else:
            commonest = priors.reports.most_common(1)[0][0]
            scores.append(
                score("caption", q, chance=1 / len(priors.reports), prior=float(commonest == finding(view)), **got)
            )
    return scores


def reports(view: View, text: str) -> bool:
    """Whether a description has the right modality and body part, and says whether there is a tumour, and where."""
    modality, part, side = finding(view)
    says_tumour = "tumour" in text and "no tumour" not in text.lower()
    sides = {word for word in ("left", "right") if word in text}
    return modality in text and part in text and (sides == {side} and says_tumour if side else not says_tumour)


def _segmented(
    answerer: Answerer, view: View, rng: np.random.Generator, priors: Priors, score: Callable
) -> list[Score]:
    """Masks of every visible structure. A guess is the right mask of any of them."""
    questions = [ask("segment", view, rng, structure=name) for name in view.visible]
    truths = [view.mask(name) for name in view.visible]
    scores = []
    for q, truth, mask in zip(questions, truths, answerer(view.image, questions, 14)[1]):
        scores.append(
            score(
                "segmentation",
                q,
                0.0 if mask is None else dice(mask, truth),
                float(np.mean([dice(truth, other) for other in truths])),
                prior=priors.usual(
                    view, q.structure, lambda other, q=q, truth=truth: dice(other.mask(q.structure), truth)
                ),
                structure=q.structure,
                share=float(truth.mean()),
            )
        )
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
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, return_tensors="pt", max_length=self.clip.config.text_length
        )
        return self.clip.encode_text(tokens["input_ids"], tokens["attention_mask"])[:, 0].numpy()


def retrieval(images: np.ndarray, texts: np.ndarray, findings: list[tuple]) -> list[Score]:
    """Recall at 1 in both directions, all against all. What is found is right if it has the same finding: the wording
    of a report, and which of the structures in view it names, cannot be told from a scan."""
    similarity = images @ texts.T
    same = np.array([[a == b for b in findings] for a in findings])
    scores = []
    for kind, ranked in (("text retrieval", similarity), ("scan retrieval", similarity.T)):
        scores += [
            Score(kind, f"1 of {len(findings)}", "", row, float(same[row, best]), float(same[row].mean()))
            for row, best in enumerate(ranked.argmax(axis=1))
        ]
    return scores


# --- figures ---------------------------------------------------------------------------------------------------------
def summary(scores: list[Score]) -> dict:
    """What metrics.json says about scores: every task, closed questions together and apart, structures."""
    kinds = _grouped(scores, lambda score: score.kind)
    closed = [s for kind in ("closed VQA", "open VQA", "yes or no") for s in kinds.get(kind, ())]
    structures = _grouped(kinds.get("segmentation", ()), lambda score: f"{score.scan}: {score.structure}")
    dices = {name: float(np.mean([s.value for s in found])) for name, found in structures.items()}
    shares = {name: float(np.mean([s.share for s in found])) for name, found in structures.items()}
    large = [name for name in dices if shares[name] > LARGE]
    return {
        "tasks": {kind: figure(kinds[kind]) for kind in KINDS if kind in kinds},
        "closed_questions": {
            **figure(closed),
            "unseen_wordings": figure(kinds["unseen wording"]),
            "by_task": {task: figure(found) for task, found in _grouped(closed, lambda score: score.task).items()},
        },
        "segmentation": {
            "mean_dice_large": _mean([dices[name] for name in large]),
            "large_structures": len(large),
            "interval": _interval([s for name in large for s in structures[name]]),
            "mean_dice_all": _mean(list(dices.values())),
            "structures": len(dices),
            "by_structure": {
                name: {
                    "n": len(structures[name]),
                    "dice": round(dices[name], 3),
                    "share_of_volume": round(shares[name], 4),
                }
                for name in dices
            },
        },
    }


def figure(scores: list[Score]) -> dict:
    """n, mean, its 95 % interval, and beside it chance, prior and the mean about an empty volume (see `Score`)."""
    known = {"prior": [s.prior for s in scores], "without_the_scan": [s.blind for s in scores]}
    return {
        "n": len(scores),
        "mean": _mean([s.value for s in scores]),
        "interval": _interval(scores),
        "chance": _mean([s.chance for s in scores]),
        **{
            name: _mean([v for v in values if v is not None])
            for name, values in known.items()
            if any(v is not None for v in values)
        },
    }


def _interval(scores: list[Score]) -> list[float] | None:
    """95 % interval of the mean, by resampling views: answers about one view are not independent of each other.
    (Neither are views of one scan, but six scans tell nothing about others.) Where all are right or all wrong, Wilson's
    for as many answers as there are views. None for less than two views."""
    views = [[s.value for s in found] for found in _grouped(scores, lambda s: (s.scan, s.view)).values()]
    if len(views) < 2:
        return None
    values = {v for view in views for v in view}
    if values == {0.0} or values == {1.0}:
        right = len(views) * int(values.pop())
        return [_rounded(end) for end in stats.binomtest(right, len(views)).proportion_ci(method="wilson")]
    sums, counts = np.array([sum(view) for view in views]), np.array([len(view) for view in views])
    drawn = np.random.default_rng(0).integers(len(views), size=(RESAMPLES, len(views)))
    return [_rounded(end) for end in np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))]


def _mean(values: list[float]) -> float | None:
    return _rounded(np.mean(values)) if values else None


def _rounded(value: float) -> float:
    return round(float(value), 4)


def _grouped(scores: Iterable[Score], key: Callable[[Score], Hashable]) -> dict[Hashable, list[Score]]:
    groups = defaultdict(list)
    for score in scores:
        groups[key(score)].append(score)
    return dict(groups)


def table(figures: dict[str, dict]) -> str:
    """Markdown for the card."""
    lines = ["| task | n | mean | 95 % | chance | best guess | empty volume |", "|---|---|---|---|---|---|---|"]
    for name, f in figures.items():
        interval = " to ".join(f"{end:.2f}" for end in f["interval"] or ())
        known = " | ".join(f"{f[key]:.2f}" if key in f else "" for key in ("chance", "prior", "without_the_scan"))
        lines.append(f"| {name} | {f['n']} | {f['mean']:.2f} | {interval} | {known} |")
    return "\n".join(lines)


def measure_share(settings: Settings, rank: int, processes: int) -> tuple[list[Score], list[Pair]]:
    """What one process measures: scores, and (image feature, report, its finding) of each view of a trained scan.

    Views are augmentations from wider ranges than training's; the first of a scan that was held out is the scan as it
    is.
    """
    answerer = Answerer(settings.checkpoint)
    retriever = Retriever(settings.clip) if settings.clip else None
    scans = load_scans((*settings.train, *settings.held_out), settings.fine_grid)

    def seed(scan: LabelledScan, k: int) -> list[int]:
        return [SEED + settings.seed, k, sum(scan.name.encode())]

    def view(scan: LabelledScan, k: int) -> View:
        ranges = None if k == 0 and scan.name in settings.held_out else settings.augmentation
        return view_of(scan, ranges, answerer.size, np.random.default_rng(seed(scan, k)))

    trained = [scan for scan in scans if scan.name in settings.train]
    priors = Priors(
        [view(scan, k) for scan in trained for k in range(settings.views)],
        [view_of(scan, None, answerer.size, np.random.default_rng(0)) for scan in trained],
    )
    jobs = [(scan, k) for k in range(settings.views) for scan in scans][rank::processes]
    scores, pairs = [], []
    for scan, k in track(jobs, description="measuring", disable=rank > 0):
        seen, rng = view(scan, k), np.random.default_rng([*seed(scan, k), 1])
        scores += measure(answerer, seen, k, rng, priors)
        if retriever and scan.name in settings.train:
            pairs.append((retriever.image(seen.image), caption(seen, rng), finding(seen)))
    return scores, pairs


def main() -> int:
    parser = console.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", type=Path, help="a JSON file, e.g. from training/configs")
    path = parser.parse_args().configuration
    return console.run(lambda: evaluate(read(Settings, path)))


def evaluate(settings: Settings) -> None:
    """Measure, write the results and print their table; each process of several takes its share of the views.

    Raises:
        InvalidInput: the settings name a scan that is unknown.
    """
    if unknown := sorted({*settings.train, *settings.held_out} - set(SOURCES)):
        raise InvalidInput(f"train and held_out name {', '.join(unknown)}; known scans: {', '.join(SOURCES)}")
    state = PartialState(cpu=True)
    shares = gather_object([measure_share(settings, state.process_index, state.num_processes)])
    if not state.is_main_process:
        return
    by_scan = _grouped((score for scores, _ in shares for score in scores), lambda score: score.scan)
    trained = [score for name in settings.train for score in by_scan[name]]
    if pairs := [pair for _, pairs in shares for pair in pairs]:
        images, texts, findings = zip(*pairs)
        trained += retrieval(np.stack(images), Retriever(settings.clip).texts(list(texts)), list(findings))
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "views_of_each_scan": settings.views,
        "held_out_augmentations": summary(trained),
        "held_out_scans": {name: summary(by_scan[name]) for name in settings.held_out},
    }
    write_json(settings.out, result)
    print(
        f"on held-out augmentations ({settings.out} has everything):\n"
        f"{table(result['held_out_augmentations']['tasks'])}"
    )


if __name__ == "__main__":
    sys.exit(main())
