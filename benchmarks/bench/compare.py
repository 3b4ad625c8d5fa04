"""Two runs over the same samples: which differences are beyond noise, by a paired bootstrap over scans."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench.rows import read_rows
from benchmarks.bench.scoring import SIDES, SOUND, TEXT_TASKS, ciders_of
from benchmarks.bench.statistics import LEAST_SCANS, paired
from benchmarks.bench.summary import LOWER_IS_BETTER, applies, metrics_of, statistics_of, value
from engine.errors import InvalidInput, shortened
from training.data.reading import read_json

SAMPLES = "samples"  # the folder beside bench.json that has the scored rows


# What the header of a task's rows says beside the model, which is what is compared.
_CONDITIONS = {
    "data": "the indices of the data",
    "new_tokens": "the length that an answer may have",
    "nsd_mm": "the tolerance of NSD",
}


@dataclass(frozen=True)
class Difference:
    """B against A in one metric, over the samples that both have; n: of them, those to which the metric applies.

    low, high: of b - a, 95 %; None where fewer than LEAST_SCANS scans are shared. verdict: better, worse, within noise,
    equal, or unknown.
    """

    task: str
    side: str
    metric: str
    n: int
    a: float
    b: float
    low: float | None
    high: float | None

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "unknown"
        if self.low == self.high == 0:
            return "equal"
        if self.low <= 0 <= self.high:
            return "within noise"
        return "better" if (self.difference > 0) != (self.metric in LOWER_IS_BETTER) else "worse"


@dataclass(frozen=True)
class Compared:
    """differences: of all metrics that both have. same: task -> (samples, answers that are the same word for word), of
    tasks with answers. notes: what was not compared, and why."""

    differences: tuple[Difference, ...]
    same: dict[str, tuple[int, int]]
    notes: tuple[str, ...]


def compare(a: Path, b: Path) -> Compared:
    """Compare two bench.json, by the rows that lie beside each.

    Raises:
        InvalidInput: for a file that is none, or without its rows, and if no task is in both.
    """
    tasks_a, tasks_b = (set(_tasks(path)) for path in (a, b))
    if not tasks_a & tasks_b:
        raise InvalidInput(f"{a} and {b} have no task in common")
    notes = [f"{task}: only in {a if task in tasks_a else b}" for task in sorted(tasks_a ^ tasks_b)]
    differences: list[Difference] = []
    same: dict[str, tuple[int, int]] = {}
    for task in sorted(tasks_a & tasks_b):
        (header_a, rows_a), (header_b, rows_b) = (_rows(path, task) for path in (a, b))
        for name, what in _CONDITIONS.items():
            if header_a.get(name) != header_b.get(name):
                said = f"{shortened(header_a.get(name))} in A, {shortened(header_b.get(name))} in B"
                notes.append(f"{task}: the runs differ in {what}: {name} is {said}")
        keys = sorted(rows_a.keys() & rows_b.keys())
        other = len(rows_a.keys() ^ rows_b.keys())
        if other and task == "retrieval":
            notes.append(f"{task}: {other} pairs are in one of both runs only, so that the pools differ: not compared")
            continue
        if other:
            notes.append(f"{task}: {other} samples are in one of both runs only and are left out")
        for name, what in (("question", "were asked otherwise"), ("answer", "have another true answer")):
            if others := [k for k in keys if rows_a[k].get(name) != rows_b[k].get(name)]:
                raise InvalidInput(f"{task}: {len(others)} samples {what} in the two runs, such as {others[0]}")
        if not keys:
            notes.append(f"{task}: no sample in common")
            continue
        if all("prediction" in rows_a[k] for k in keys):
            same[task] = len(keys), sum(rows_a[k]["prediction"] == rows_b[k]["prediction"] for k in keys)
        shared = [[rows[k] for k in keys] for rows in (rows_a, rows_b)]
        if other and task in TEXT_TASKS:
            shared = [_with_cider(rows) for rows in shared]
        unlike = () if header_a.get("nsd_mm") == header_b.get("nsd_mm") else ("NSD",)
        found, left_out = _differences(task, *shared, unlike)
        differences += found
        notes += left_out
        if (scans := len({rows_a[k]["scan"] for k in keys})) < LEAST_SCANS:
            notes.append(f"{task}: {scans} scans in common; what is noise can be told from {LEAST_SCANS} on")
    return Compared(tuple(differences), same, tuple(notes))


def words(compared: Compared, a: Path, b: Path) -> str:
    """A table, what is beyond noise first in words."""
    lines = [f"A: {a}", f"B: {b}", ""]
    lines += ["| task | metric | n | A | B | B - A | 95 % | verdict |", "|---|---|---|---|---|---|---|---|"]
    for d in compared.differences:
        ends = "" if d.low is None else f"{d.low:+.4f} to {d.high:+.4f}"
        metric = f"{d.metric} ({d.side})"
        lines.append(
            f"| {d.task} | {metric} | {d.n} | {d.a:.4f} | {d.b:.4f} | {d.difference:+.4f} | {ends} | {d.verdict} |"
        )
    beyond = [d for d in compared.differences if d.verdict in ("better", "worse")]
    judged = [d for d in compared.differences if d.verdict != "unknown"]
    lines += [
        "",
        f"{len(beyond)} of {len(judged)} differences are beyond noise. "
        f"By chance alone about {0.05 * len(judged):.1f} would be.",
        *(f"{task}: {same} of {n} answers are the same, word for word" for task, (n, same) in compared.same.items()),
        *compared.notes,
    ]
    return "\n".join(lines)


def _differences(
    task: str, a: Sequence[dict], b: Sequence[dict], unlike: Collection[str]
) -> tuple[list[Difference], list[str]]:
    """(the differences, notes on what is not compared). unlike: metrics that are not the same thing in both runs."""
    scans, found, notes = [row["scan"] for row in a], [], []
    for side in SIDES:
        metrics_a, metrics_b = (metrics_of(rows, side) for rows in (a, b))
        for metric in metrics_a:
            if metric not in metrics_b:
                continue  # noted below
            if metric in unlike:
                notes.append(f"{task}: {metric} ({side}) is not compared: its conditions differ")
                continue
            (statistics_a, value_of), (statistics_b, _) = (statistics_of(rows, side, metric) for rows in (a, b))
            _, ends = paired(statistics_a, statistics_b, scans, value_of)
            low, high = ends or (None, None)
            value_a, value_b = (value(rows, side, metric) for rows in (a, b))
            found.append(Difference(task, side, metric, applies(a, side, metric), value_a, value_b, low, high))
        for run, here, there in (("A", metrics_a, metrics_b), ("B", metrics_b, metrics_a)):
            notes += [f"{task}: {metric} ({side}) is only in {run}" for metric in here if metric not in there]
    return found, notes


def _with_cider(rows: Sequence[dict]) -> list[dict]:
    """The rows with CIDEr among themselves: which words are rare depends on all rows of a run."""
    ciders = ciders_of([row["prediction"] for row in rows], [row["answer"] for row in rows])
    return [
        {**row, "scores": {**row["scores"], SOUND: {**row["scores"][SOUND], "CIDEr": cider}}}
        for row, cider in zip(rows, ciders, strict=True)
    ]


def _tasks(path: Path) -> dict:
    bench = read_json(path)
    if not isinstance(bench, dict) or not isinstance(bench.get("tasks"), dict):
        raise InvalidInput(f"{path} is no bench.json: it has no tasks")
    return bench["tasks"]


def _rows(path: Path, task: str) -> tuple[dict, dict[str, dict]]:
    """(header, key -> scored row)."""
    file = path.parent / SAMPLES / f"{task}.jsonl"
    if not file.is_file():
        raise InvalidInput(f"{path} has no rows beside it: {file} is missing, and a paired comparison needs it")
    header, rows = read_rows(file)
    return header, {row["key"]: row for row in rows}
