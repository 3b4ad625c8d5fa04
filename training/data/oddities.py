"""What is odd about data sets, and no single sample shows: repeats across splits, and scans that lie otherwise."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data.sample import Sample

AXES = ("D", "H", "W")
_APART = 0.05  # two structures lie one after the other along an axis if their centres are this share of it apart
_FEWEST_CASES, _FEWEST_PAIRS = 5, 3
_AGREED, _CONTRARY = 0.8, 0.75

Centres = Mapping[str, Mapping[str, np.ndarray]]  # case -> structure -> centre [3], as shares of D, H and W


@dataclass(frozen=True)
class Subject:
    """What must not stand in two splits. text: hash of it. case: hash of whose it is."""

    text: bytes
    case: bytes


def subject(sample: Sample, image: Path) -> Subject:
    """Of a report its words, of a question about a scan both; where questions are drawn, the scan itself.

    The case is the image's folder.
    """
    if sample.task in ("caption", "pair"):
        text = sample.answer
    else:
        text = f"{image}\n{sample.question}" if sample.task.startswith("vqa") else str(image)
    return Subject(_hash(" ".join(text.casefold().split())), _hash(str(image.parent)))


def repeats(train: Iterable[Subject], held_out: Iterable[Subject]) -> tuple[int, int]:
    """(how many of `held_out` are in `train` as well, how many of these in another case than their own)."""
    cases: dict[bytes, set[bytes]] = defaultdict(set)
    for one in train:
        cases[one.text].add(one.case)
    shared = [one for one in held_out if one.text in cases]
    return len(shared), sum(cases[one.text] != {one.case} for one in shared)


def centre(mask: np.ndarray) -> np.ndarray:
    """[3] centre of a mask [D, H, W] that is not empty, as shares of the axes."""
    sums = [mask.sum(tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return np.array([(np.arange(len(part)) + 0.5) @ part / part.sum() / len(part) for part in sums])


def turned_cases(centres: Centres) -> list[tuple[str, str]]:
    """(case, axis) of the cases of one data set in which structures follow each other the other way than in most.

    A mirrored axis, as of slices in the wrong order, turns round every pair of structures along it. Where a data set
    has few structures or cases, nothing can be told.
    """
    signs, pairs = _signs(centres)
    usual = _usual(signs)
    return [
        (case, AXES[axis])
        for case, of_case in zip(centres, signs)
        for axis in range(3)
        if _contrary(of_case[:, axis], usual[:, axis])
    ]


def turned_sets(sets: Mapping[str, Centres]) -> list[tuple[str, str]]:
    """(data set, axis) of the data sets whose structures follow each other the other way than in the others."""
    usual = {}
    for code, centres in sets.items():
        signs, pairs = _signs(centres)
        usual[code] = dict(zip(pairs, _usual(signs)))
    found = []
    for code, own in usual.items():
        shared = [pair for pair in own if any(pair in usual[other] for other in usual if other != code)]
        if not shared:
            continue
        mine = np.array([own[pair] for pair in shared])
        theirs = np.array([sum(usual[other].get(pair, 0) for other in usual if other != code) for pair in shared])
        found += [(code, AXES[axis]) for axis in range(3) if _contrary(mine[:, axis], np.sign(theirs[:, axis]))]
    return found


def _signs(centres: Centres) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """(int8 [cases, pairs, 3]: 1 where a pair's first lies behind its second, -1 before it, 0 neither; the pairs)."""
    names = sorted({name for of_case in centres.values() for name in of_case})
    places = np.full((len(centres), len(names), 3), np.nan, np.float32)
    for row, of_case in enumerate(centres.values()):
        for name, place in of_case.items():
            places[row, names.index(name)] = place
    first, second = np.triu_indices(len(names), 1)
    apart = places[:, first] - places[:, second]
    signs = np.where(np.abs(apart) > _APART, np.sign(apart), 0).astype(np.int8)
    return signs, [(names[a], names[b]) for a, b in zip(first, second)]


def _usual(signs: np.ndarray) -> np.ndarray:
    """int [pairs, 3]: the order that most cases have, 0 where too few do."""
    votes, seen = signs.sum(0, dtype=int), np.abs(signs).sum(0, dtype=int)
    agreed = np.abs(votes) >= (2 * _AGREED - 1) * seen
    return np.where((seen >= _FEWEST_CASES) & agreed, np.sign(votes), 0)


def _contrary(signs: np.ndarray, usual: np.ndarray) -> bool:
    known = signs * usual != 0
    return known.sum() >= _FEWEST_PAIRS and (signs * usual < 0).sum() > _CONTRARY * known.sum()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]
