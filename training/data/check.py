"""Check a data root before training: every sample is read once, and what is broken is listed with its cause.

Beside that it says what an epoch reads, what stands in two splits, and which scans lie otherwise than the others of
their data set (see `training.data.oddities`).

python training/data/check.py ROOT
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engine.cli import console
from engine.errors import InvalidInput
from training.data.jobs import parallel, progress
from training.data.oddities import Subject, centre, repeats, subject, turned_cases, turned_sets
from training.data.reading import read_image
from training.data.sample import BrokenSample
from training.data.sets import CAP, REFSEG, SEG, TASKS, VQA, Structures, TrainingSet, open_sets, splits_of
from training.files import write_json

_FOLDERS = {
    "pair": CAP,
    "caption": CAP,
    "vqa_closed": VQA,
    "vqa_open": VQA,
    "vqa_yes_no": VQA,
    "segmentation": SEG,
    "rec": SEG,
    "reg": SEG,
    "refseg": REFSEG,
}
# The others read the same files.
_DEFAULT = ("caption", "vqa_closed", "vqa_yes_no", "segmentation", "refseg")
_CHUNK, _SHOWN = 64, 20


@dataclass
class Findings:
    """What reading samples of one set has shown. read: bytes of images and masks, as often as samples need them.

    files: bytes of each. broken: how often by (paths, cause). centres: of structures, by image.
    """

    low: float = float("inf")
    high: float = float("-inf")
    masks: int = 0
    read: int = 0
    files: dict[str, int] = field(default_factory=dict)
    broken: Counter = field(default_factory=Counter)
    subjects: list[Subject] = field(default_factory=list)
    centres: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def __iadd__(self, other: Findings) -> Findings:
        self.low, self.high, self.masks = min(self.low, other.low), max(self.high, other.high), self.masks + other.masks
        self.read += other.read
        self.files |= other.files
        self.broken += other.broken
        self.subjects += other.subjects
        for image, places in other.centres.items():
            self.centres[image] = self.centres.get(image, {}) | places
        return self


def examine(sets: Sequence[TrainingSet], workers: int) -> list[Findings]:
    """Reads every sample of every set; samples that share an image follow each other, so that it is read once."""
    chunks = []
    for number, part in enumerate(sets):
        order = sorted(range(len(part)), key=lambda index: _image(part, index))
        chunks += [(number, order[start : start + _CHUNK]) for start in range(0, len(order), _CHUNK)]
    results = [Findings() for _ in sets]
    for k, found in progress(parallel(_examine, chunks, workers, _hold, sets), len(chunks), "checking"):
        results[chunks[k][0]] += found
    return results


def _image(part: TrainingSet, index: int) -> str:
    try:
        return str(part.files(index).image)
    except BrokenSample:
        return ""


_held: list[TrainingSet] = []


def _hold(sets: Sequence[TrainingSet]) -> None:
    """Keeps the sets in a worker, which would else get them anew with each chunk."""
    _held[:] = sets


def _examine(chunk: tuple[int, list[int]]) -> Findings:
    part, found, read = _held[chunk[0]], Findings(), lru_cache(maxsize=1)(read_image)
    for index in chunk[1]:
        try:
            sample = part.at(0, index, read)
        except BrokenSample as broken:
            found.broken[broken.paths, broken.cause] += 1
            continue
        files = part.files(index)
        found.low = min(found.low, float(sample.image.min()))
        found.high = max(found.high, float(sample.image.max()))
        found.masks += sample.mask is not None
        sizes = {str(path): path.stat().st_size for path in (files.image, files.mask) if path}
        found.read += sum(sizes.values())
        found.files |= sizes
        found.subjects.append(subject(sample, files.image))
        if isinstance(part, Structures) and sample.mask is not None:
            found.centres.setdefault(str(files.image), {})[part.name(index)] = centre(sample.mask[0])
    return found


def check(
    root: Annotated[Path, typer.Argument(help="the data root")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help=f"of {', '.join(TASKS)}; may be given several times (default: all sets that are there)"
        ),
    ] = None,
    image_size: Annotated[tuple[int, int, int], typer.Option("--image-size", min=1, help="of the model: D, H, W")] = (
        32,
        256,
        256,
    ),
    limit: Annotated[float, typer.Option(min=0, max=1, help="share of broken samples that training accepts")] = 0.01,
    workers: Annotated[int, typer.Option(min=1, help="processes (default: one per core)")] = os.cpu_count() or 1,
    report: Annotated[Path | None, typer.Option(help="write all findings to this JSON file, too")] = None,
) -> None:
    """Read every sample of a data root: counts by set and split, ranges, and what is broken."""
    if not root.is_dir():
        raise InvalidInput(f"the data root {root} is not a folder")
    if not tasks:
        tasks = [task for task in _DEFAULT if (root / _FOLDERS[task]).is_dir()]
        if not tasks:
            raise InvalidInput(f"{root} holds no set: {', '.join(dict.fromkeys(_FOLDERS.values()))} were looked for")
    sets, problems = [], []
    for task in tasks:
        for split in splits_of(task, root):
            try:
                sets += open_sets([task], root, split, tuple(image_size)).sets
            except InvalidInput as error:
                problems.append({"task": task, "split": split, "cause": str(error)})
    results = examine(sets, workers)
    repeated, turned = _repeated(sets, results), _turned(sets, results)
    files = {path: size for found in results for path, size in found.files.items()}
    read = {"bytes": sum(found.read for found in results), "distinct_bytes": sum(files.values())}
    _show(sets, results, problems)
    _tell(read, repeated, turned)
    if report:
        write_json(
            report,
            {
                "problems": problems,
                "read": read,
                "repeated": repeated,
                "turned": turned,
                "sets": [
                    {
                        "task": part.task,
                        "index": str(part.index),
                        "split": part.split,
                        "samples": len(part),
                        "low": found.low,
                        "high": found.high,
                        "masks": found.masks,
                        "bytes": found.read,
                        "broken": [
                            {"paths": paths, "cause": cause, "times": times}
                            for (paths, cause), times in found.broken.most_common()
                        ],
                    }
                    for part, found in zip(sets, results)
                ],
            },
        )
    samples, broken = sum(map(len, sets)), sum(found.broken.total() for found in results)
    if problems or broken > limit * samples:
        sys.exit(
            f"error: {len(problems)} sets cannot be opened and {broken:,} of {samples:,} samples are broken "
            f"(accepted: {limit:.1%})"
        )


def _repeated(sets: Sequence[TrainingSet], results: Sequence[Findings]) -> list[dict]:
    """How much of each held-out split is in training as well."""
    subjects: dict[tuple[str, str], list[Subject]] = defaultdict(list)
    for part, found in zip(sets, results):
        subjects[part.task, part.split] += found.subjects
    counted = [
        {"task": task, "split": split, "samples": len(held_out)}
        | dict(zip(("in_train", "of_other_cases"), repeats(subjects.get((task, "train"), ()), held_out)))
        for (task, split), held_out in subjects.items()
        if split != "train"
    ]
    return [entry for entry in counted if entry["in_train"]]


def _turned(sets: Sequence[TrainingSet], results: Sequence[Findings]) -> list[dict]:
    """Scans, and whole data sets, whose structures follow each other the other way along an axis."""
    centres: dict[str, dict[str, dict[str, np.ndarray]]] = defaultdict(dict)
    for part, found in zip(sets, results):
        if isinstance(part, Structures):
            centres[part.code] |= found.centres
    cases = [
        {"code": code, "image": image, "axis": axis}
        for code, of_set in centres.items()
        for image, axis in turned_cases(of_set)
    ]
    return [{"code": code, "image": None, "axis": axis} for code, axis in turned_sets(centres)] + cases


def _tell(read: dict, repeated: Sequence[dict], turned: Sequence[dict]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    all_bytes, distinct = (read[key] / 1e9 for key in ("bytes", "distinct_bytes"))
    console.print(
        f"an epoch of these reads {all_bytes:,.1f} GB of images and masks, {distinct:,.1f} GB of them distinct"
    )
    for entry in repeated:
        console.print(
            f"repeated: of {entry['task']}, {entry['split']}, {entry['in_train']:,} of {entry['samples']:,} samples "
            f"are in train as well, {entry['of_other_cases']:,} of them in another case"
        )
    for entry in turned[:_SHOWN]:
        what = f"the structures of {entry['image']}" if entry["image"] else f"all structures of {entry['code']}"
        others = "most scans of its data set" if entry["image"] else "the other data sets"
        console.print(
            f"turned: {what} follow each other along {entry['axis']} the other way than in {others}", markup=False
        )
    if len(turned) > _SHOWN:
        console.print(f"and {len(turned) - _SHOWN:,} more; --report lists them all")


def _show(sets: Sequence[TrainingSet], results: Sequence[Findings], problems: Sequence[dict]) -> None:
    table = Table(box=SIMPLE)
    for column in ("task", "index", "split", "samples", "masks", "values", "broken"):
        table.add_column(column, no_wrap=True)
    for part, found in zip(sets, results):
        values = f"{found.low:.2g} to {found.high:.2g}" if found.low <= found.high else "none read"
        table.add_row(
            part.task,
            part.index.name,
            part.split,
            f"{len(part):,}",
            f"{found.masks:,}",
            values,
            f"{found.broken.total():,}",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for problem in problems:
        console.print(f"{problem['task']}, {problem['split']}: {problem['cause']}", markup=False)
    broken = sum((found.broken for found in results), Counter())
    for (paths, cause), times in broken.most_common(_SHOWN):
        console.print(f"broken: {' and '.join(paths)}: {cause}" + f" ({times} samples)" * (times > 1), markup=False)
    if len(broken) > _SHOWN:
        console.print(f"and {len(broken) - _SHOWN:,} more; --report lists them all")


def main() -> None:
    sys.exit(console.run(lambda: typer.run(check)))


if __name__ == "__main__":
    main()
