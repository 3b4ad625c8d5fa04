"""From the rows of a run to their scores: every metric of a task, as the reference defines it and as it should be.

A score is a number, None where the metric does not apply to a sample, or a list: the statistics that corpus BLEU is
made of. Beside each stands what it would be without looking at the scan: see `CHANCE`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from benchmarks.bench.layouts import POOLS
from benchmarks.bench.metrics import boxes, choices, retrieval, text
from benchmarks.bench.runner import decoded

REFERENCE, SOUND = "reference", "sound"
SIDES = (REFERENCE, SOUND)
LIKELIEST = "accuracy of the likeliest choice"
TIES = "likeliest choice tied"  # the first of equal ones is taken
Scores = dict[str, dict[str, object]]  # side -> metric -> score

TEXT_TASKS = ("report", "vqa-open", "reg")
MODEL_METRICS = {  # metric -> (side, tasks)
    "BERTScore": (REFERENCE, TEXT_TASKS),
    "RadGraph-F1": (SOUND, ("report",)),
    "RaTEScore": (SOUND, ("report",)),
    "GREEN": (SOUND, ("report",)),
    "LLM judge": (SOUND, ("report", "vqa-open")),
}
CHANCE = {
    "retrieval": "a random order of the pool",
    "report": "the report of another scan",
    "vqa-closed": "one of the choices at random",
    "vqa-open": "the answer to a question of the same type about another scan",
    "rec": "a box around the whole volume",
    "reg": "the answer about another structure of another scan",
    "seg-semantic": "every voxel of the volume",
    "seg-referring": "every voxel of the volume",
}


@dataclass(frozen=True)
class Scorers:
    """What scores texts beside the libraries that are always there.

    meteor: None where WordNet cannot be had. models: metric -> key of a row -> score.
    gaps: metric -> why it is not computed, of METEOR and MODEL_METRICS.
    splits: pool size -> keys of the pairs, of those retrieval pools that M3D_Cap.json names. pairs: how many the index
    has for the test, broken ones included.
    """

    meteor: Callable[[str, str], float] | None = None
    models: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gaps: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[int, Sequence[str]] = field(default_factory=dict)
    pairs: int = 0


def score(task: str, rows: Sequence[dict], scorers: Scorers) -> list[dict]:
    """The rows with `scores` and `chance` (see `Scores`); embeddings are left out."""
    found = _SCORED[task](list(rows), scorers)
    left_out = ("scan_embedding", "text_embedding", "reference", "sound")
    return [
        {**{k: v for k, v in row.items() if k not in left_out}, "scores": scores, "chance": chance}
        for row, (scores, chance) in zip(rows, found, strict=True)
    ]


def gaps_of(task: str, rows: Sequence[dict], scorers: Scorers) -> dict[str, dict[str, str]]:
    """side -> metric -> why it is missing from the table of a task."""
    gaps: dict[str, dict[str, str]] = {REFERENCE: {}, SOUND: {}}
    if task in TEXT_TASKS and scorers.meteor is None:
        gaps[REFERENCE]["METEOR"] = scorers.gaps.get("METEOR", "WordNet was not asked for")
    for metric, (side, tasks) in MODEL_METRICS.items():
        if task in tasks and metric not in scorers.models:
            gaps[side][metric] = scorers.gaps.get(metric, "no model was given")
    if task in TEXT_TASKS and all(row["scores"][SOUND]["CIDEr"] is None for row in rows):
        gaps[SOUND]["CIDEr"] = "all samples have the same answer: no word is rare"
    if task == "retrieval":
        for size, why in _pools(rows, scorers)[1].items():
            for to_texts in (True, False):
                for k in retrieval.RANKS:
                    for side, name in zip(SIDES, _recalls(to_texts, k, size)):
                        gaps[side][name] = why
    if task.startswith("seg"):
        for metric in ("HD95", "NSD"):
            if not any(row["scores"][SOUND].get(metric) is not None for row in rows):
                gaps[SOUND][metric] = "no voxel size: M3D-Data's .npy files have none (IMAGE.spacing.json may say it)"
        if not any("Dice" in row["scores"][REFERENCE] for row in rows):
            gaps[REFERENCE]["Dice"] = "logits are in the model's volume, of which the true mask is not known"
    return gaps


# --- texts -----------------------------------------------------------------------------------------------------------
def _texts(task: str) -> Callable[[list[dict], Scorers], list[tuple[Scores, Scores]]]:
    def scored(rows: list[dict], scorers: Scorers) -> list[tuple[Scores, Scores]]:
        found = _text_scores(rows, [row["prediction"] for row in rows], scorers)
        others = _answers_of_others(task, rows)
        chance = _text_scores(rows, others, scorers)
        for row, other, scores, guessed in zip(rows, others, found, chance):
            if task == "reg":
                for said, into in ((row["prediction"], scores), (other, guessed)):
                    into[SOUND]["structure named"] = float(row["structure"].lower() in said.lower())
            for metric, values in scorers.models.items():
                side, tasks = MODEL_METRICS[metric]
                if task in tasks:
                    scores[side][metric] = values[row["key"]]
        return list(zip(found, chance))

    return scored


def _text_scores(rows: list[dict], predictions: list[str], scorers: Scorers) -> list[Scores]:
    answers = [row["answer"] for row in rows]
    ciders = ciders_of(predictions, answers)
    found: list[Scores] = []
    for prediction, answer, cider in zip(predictions, answers, ciders):
        reference: dict[str, object] = {
            "BLEU-1": text.bleu_1(prediction, answer),
            "ROUGE-1": text.rouge("rouge1", prediction, answer),
        }
        if scorers.meteor is not None:
            reference["METEOR"] = scorers.meteor(prediction, answer)
        sound: dict[str, object] = {
            "BLEU": text.bleu_statistics(prediction, answer),
            "ROUGE-L": text.rouge("rougeL", prediction, answer),
            "CIDEr": cider,
        }
        found.append({REFERENCE: reference, SOUND: sound})
    return found


def ciders_of(predictions: Sequence[str], answers: Sequence[str]) -> list[float | None]:
    """CIDEr of each sample, None where it cannot be had: all samples decide which words are rare."""
    return [None if math.isnan(cider) else float(cider) for cider in text.cider(predictions, answers)]


def _answers_of_others(task: str, rows: list[dict]) -> list[str]:
    """For each row the answer of the next one about another scan, of the same question type if there is one; "" if all
    are about one scan."""
    by_type: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_type.setdefault(row["groups"].get("question type", ""), []).append(number)
    everything = [number for numbers in by_type.values() for number in numbers]
    found = [""] * len(rows)
    if len({row["scan"] for row in rows}) < 2:
        return found
    for numbers in by_type.values():
        for place, number in enumerate(numbers):
            others = chain(numbers[place + 1 :], numbers[:place], everything)
            other = next((i for i in others if _another(task, rows[i], rows[number])), None)
            found[number] = "" if other is None else rows[other]["answer"]
    return found


def _another(task: str, other: dict, row: dict) -> bool:
    return other["scan"] != row["scan"] and (task != "reg" or other["structure"] != row["structure"])


# --- the other tasks -------------------------------------------------------------------------------------------------
def _closed(rows: list[dict], scorers: Scorers) -> list[tuple[Scores, Scores]]:
    found = []
    for row in rows:
        chosen = choices.chosen(row["prediction"], row["choices"])
        likeliest, tied = choices.likeliest(row["logprobs"])
        guess = 1 / len(row["choices"])
        scores: Scores = {
            REFERENCE: {"accuracy": float(choices.substring_right(row["prediction"], row["choice"]))},
            SOUND: {
                "accuracy": float(chosen == row["choice"]),
                "unparseable": float(chosen is None),
                LIKELIEST: float(likeliest == row["choice"]),
                TIES: float(tied),
            },
        }
        chance: Scores = {REFERENCE: {"accuracy": guess}, SOUND: {"accuracy": guess, LIKELIEST: guess}}
        found.append((scores, chance))
    return found


def _located(rows: list[dict], scorers: Scorers) -> list[tuple[Scores, Scores]]:
    found = []
    for row in rows:
        size, box = tuple(row["size"]), row["box"]
        everything = [0.0, 0.0, 0.0, *((n - 1) / n for n in size)]
        scores = {REFERENCE: dict(row["reference"]), SOUND: _box_scores(row["predicted_box"], box, size)}
        chance: Scores = {
            REFERENCE: {"IoU": boxes.hull_iou([0, 0, 0, 1, 1, 1], boxes.reference_box(row["answer"]))},
            SOUND: {k: v for k, v in _box_scores(everything, box, size).items() if "acc" in k or k == "IoU"},
        }
        found.append((scores, chance))
    return found


def _box_scores(predicted: list[float] | None, box: list[float] | None, size: tuple[int, ...]) -> dict[str, object]:
    """An answer without a box has IoU 0; for a structure that is not in the scan, it is right."""
    if box is None:
        names = ("IoU", "acc@0.25", "acc@0.5", "box given")
        return {**dict.fromkeys(names), "absent: no box": float(predicted is None)}
    iou = 0.0 if predicted is None else boxes.iou(np.array(predicted), np.array(box), size)
    return {
        "IoU": iou,
        "acc@0.25": float(iou >= 0.25),
        "acc@0.5": float(iou >= 0.5),
        "box given": float(predicted is not None),
        "absent: no box": None,
    }


def _segmented(rows: list[dict], scorers: Scorers) -> list[tuple[Scores, Scores]]:
    found = []
    for row in rows:
        share = row["share"]
        everything = 2 * share / (1 + share)
        chance: Scores = {REFERENCE: {"Dice": everything}, SOUND: {"Dice": everything if share else None}}
        found.append(({REFERENCE: dict(row["reference"]), SOUND: dict(row["sound"])}, chance))
    return found


def _retrieved(rows: list[dict], scorers: Scorers) -> list[tuple[Scores, Scores]]:
    found: list[tuple[Scores, Scores]] = [({REFERENCE: {}, SOUND: {}}, {REFERENCE: {}, SOUND: {}}) for _ in rows]
    if not rows:
        return found
    scans, reports = (np.stack([decoded(row[f"{what}_embedding"]) for row in rows]) for what in ("scan", "text"))
    for pool in _pools(rows, scorers)[0]:
        scores = retrieval.similarity(scans[pool], reports[pool])
        texts = [rows[i]["answer"] for i in pool]
        for to_texts in (True, False):
            matrix = scores if to_texts else scores.T
            for k in (k for k in retrieval.RANKS if k == 1 or k < len(pool)):
                hit = (
                    retrieval.reference_hits(matrix, k),
                    retrieval.hits(matrix, texts, k, of_texts=to_texts),
                )
                candidates = len(set(texts)) if to_texts else len(pool)
                guess = k / len(pool), min(1.0, k / candidates)
                for side, name, hits, chance in zip(SIDES, _recalls(to_texts, k, len(pool)), hit, guess):
                    for number, right in zip(pool, hits):
                        found[number][0][side][name] = float(right)
                        found[number][1][side][name] = chance
    return found


def _recalls(to_texts: bool, k: int, size: int) -> tuple[str, str]:
    """What recall at k in a pool is called, on each of SIDES."""
    reference, sound = ("IR", "scan to report") if to_texts else ("TR", "report to scan")
    return f"{reference} R@{k} of {size}", f"{sound} R@{k} of {size}"


def _pools(rows: Sequence[dict], scorers: Scorers) -> tuple[list[list[int]], dict[int, str]]:
    """(row numbers of each pool, pool size -> why the rows do not fill it, of those that the index has).

    Pools are of the published sizes; if the rows fill none, there is one of all rows.
    """
    places = {row["key"]: number for number, row in enumerate(rows)}
    # Spread over all cases, and the same in every run.
    mixed = sorted(places, key=lambda key: hashlib.sha256(key.encode()).digest())
    pools, unfilled = [], {}
    for size in POOLS:
        if names := scorers.splits.get(size):
            found = [places[key] for key in names if key in places]
            if len(found) == len(names):
                pools.append(found)
            else:  # another draw of that size would not be the published pool
                unfilled[len(names)] = f"{len(found)} of the {len(names)} pairs of {POOLS[size]} have an answer"
        elif len(rows) >= size:
            pools.append([places[key] for key in mixed[:size]])
        elif scorers.pairs >= size:
            unfilled[size] = f"{len(rows)} of the {scorers.pairs} pairs have an answer"
    return pools or [list(range(len(rows)))], unfilled


_SCORED: dict[str, Callable[[list[dict], Scorers], list[tuple[Scores, Scores]]]] = {
    "retrieval": _retrieved,
    **{task: _texts(task) for task in TEXT_TASKS},
    "vqa-closed": _closed,
    "rec": _located,
    "seg-semantic": _segmented,
    "seg-referring": _segmented,
}
