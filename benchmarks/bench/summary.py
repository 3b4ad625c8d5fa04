"""bench.json: the figures of each task, with intervals, from scored rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.bench.metrics.text import corpus_bleu
from benchmarks.bench.scoring import SIDES, TIES
from benchmarks.bench.statistics import LEAST_SCANS, ValueOf, as_statistics, interval, mean_of

LOWER_IS_BETTER = ("HD95", "unparseable", TIES)
MILLIMETRES = ("HD95",)
PLAIN = ("CIDEr",)  # neither a share nor a length
_MOST_GROUPS = 200


def summarise(rows: Sequence[dict], gaps: dict[str, dict[str, str]]) -> dict:
    """What bench.json says about a task.

    Args:
        rows: scored, see `scoring.score`.
        gaps: side -> metric -> why it is missing.

    Returns:
        n, scans: how many. no_interval: why low and high are None everywhere, or None.
        reference, sound: metric -> {"value", "low", "high", "n"}; of a gap {"value": None, "low": None, "high": None,
        "gap": why}. chance: side -> metric -> value. groups: kind -> name -> side -> metric -> {"value", "n"}.
    """
    scans = len({row["scan"] for row in rows})
    found = {
        "n": len(rows),
        "scans": scans,
        "no_interval": None if scans >= LEAST_SCANS else f"{scans} scans; an interval is given from {LEAST_SCANS} on",
    }
    for side in SIDES:
        found[side] = {name: figure(rows, side, name) for name in metrics_of(rows, side)}
        found[side] |= {
            name: {"value": None, "low": None, "high": None, "gap": why} for name, why in gaps.get(side, {}).items()
        }
    chance = [{**row, "scores": row["chance"]} for row in rows]
    found["chance"] = {side: {name: value(chance, side, name) for name in metrics_of(chance, side)} for side in SIDES}
    found["groups"] = _groups(rows)
    return found


def metrics_of(rows: Sequence[dict], side: str) -> list[str]:
    """The metrics that have a score in some row, in the order of the first row that has each."""
    names: dict[str, None] = {}
    for row in rows:
        names |= {name: None for name, score in row["scores"][side].items() if score is not None}
    return list(names)


def figure(rows: Sequence[dict], side: str, name: str) -> dict:
    """{"value", "low", "high", "n"}; low and high are None where no interval can be given."""
    statistics, value_of = statistics_of(rows, side, name)
    ends = interval(statistics, [row["scan"] for row in rows], value_of)
    low, high = (None, None) if ends is None else map(_rounded, ends)
    return {"value": value(rows, side, name), "low": low, "high": high, "n": applies(rows, side, name)}


def value(rows: Sequence[dict], side: str, name: str) -> float:
    statistics, value_of = statistics_of(rows, side, name)
    return _rounded(float(value_of(statistics.sum(axis=0))))


def statistics_of(rows: Sequence[dict], side: str, name: str) -> tuple[np.ndarray, ValueOf]:
    """([n, k], what their sums say): see `statistics.interval`."""
    scores = [row["scores"][side].get(name) for row in rows]
    if any(isinstance(score, list) for score in scores):
        return np.array(scores, float), corpus_bleu
    return as_statistics(scores), mean_of


def applies(rows: Sequence[dict], side: str, name: str) -> int:
    """To how many rows a metric applies."""
    return sum(row["scores"][side].get(name) is not None for row in rows)


def _groups(rows: Sequence[dict]) -> dict:
    """Figures by question type, structure, data set and so on: of each kind that parts the rows."""
    kinds: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        for kind, name in row["groups"].items():
            kinds.setdefault(kind, {}).setdefault(name, []).append(row)
    return {
        kind: {
            name: {
                side: {
                    m: {"value": value(found, side, m), "n": applies(found, side, m)} for m in metrics_of(found, side)
                }
                for side in SIDES
            }
            for name, found in sorted(named.items())
        }
        for kind, named in sorted(kinds.items())
        if 1 < len(named) <= _MOST_GROUPS
    }


def _rounded(value: float) -> float:
    """Six decimals: what is beyond them depends on the order of sums."""
    return round(float(value), 6)
