"""Which data a stage learns from: the `data` setting of its configuration.

`{"m3d": {...}}` are sets of M3D-Data under a data root; `{"scans": {...}}` are random views of the scans that packages
carry. Both become map-style data sets `data[epoch, index]` that depend on the seed, epoch and index alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import InvalidInput
from training.config import StageSettings, build
from training.data.sample import BrokenSample, Sample
from training.data.sets import TASKS, Mixture, open_sets, splits_of
from training.data.skip_broken import SkipBroken
from training.data.views import ScanSettings, ViewPairs, ViewQuestions, Views
from training.data.watch import BrokenSampleCheck
from training.record import sha256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSettings:
    """What `trainer.eval_strategy` measures on. samples: of each task, spread over all of it. answers: of these, those
    that are answered and scored, too."""

    split: str = "validation"
    samples: int = 512
    answers: int = 32


@dataclass(frozen=True)
class M3DSettings:
    """root: the data root. tasks: see `training.data.sets.TASKS`; with a number each, how often an epoch has their
    samples (0.5: every other one), where TASK/NNNN is for one data set of M3D-Seg. jitter: whether the recipe's random
    changes are made. words: a file that takes the place of data/templates.json. broken: share of the samples that may
    be broken (they are left out and listed in `broken.jsonl` of the run). per_scan: most questions of a task about one
    scan that share a sequence; it is read and encoded once for them, and a batch counts scans. validation: what is
    measured while a stage trains."""

    root: Path
    tasks: tuple[str, ...] | dict[str, float]
    split: str = "train"
    jitter: bool = True
    words: Path | None = None
    broken: float = 0.01
    per_scan: int = 1
    validation: ValidationSettings | None = None


@dataclass(frozen=True)
class _Choice:
    m3d: M3DSettings | None = None
    scans: ScanSettings | None = None


class M3DSamples:
    """Sets of M3D-Data: [epoch, index] -> Sample, None if it is broken."""

    def __init__(self, settings: M3DSettings, run: StageSettings, size: tuple[int, int, int]):
        self.sets = open_sets(
            settings.tasks,
            settings.root,
            settings.split,
            size,
            settings.per_scan,
            seed=run.seed,
            jitter=settings.jitter,
            words=settings.words,
        )
        run.out.mkdir(parents=True, exist_ok=True)
        self.root = settings.root
        self.samples = SkipBroken(self.sets, run.out / "broken.jsonl", settings.broken)
        self.callbacks = [BrokenSampleCheck(self.samples)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, int]) -> Sample | None:
        return self.samples.at(*place)

    def fingerprint(self) -> dict[str, str]:
        """Of the indexes; hashing the volumes themselves would take hours."""
        files = sorted({file for part in self.sets.sets for file in part.sources})
        return {"samples": str(len(self)), **{self._name(file): sha256(file) for file in files}}

    def _name(self, file: Path) -> str:
        return str(file.relative_to(self.root)) if file.is_relative_to(self.root) else file.name


class M3DQuestions(M3DSamples):
    """[epoch, index] -> list of the Samples about one scan that are not broken."""

    def __getitem__(self, place: tuple[int, int]) -> list[Sample]:
        return self.samples.group(*place)


class HeldOut:
    """Samples of another split than training's, by task: the same ones, unchanged, whenever they are read."""

    def __init__(self, settings: M3DSettings, wanted: ValidationSettings, seed: int, size: tuple[int, int, int]):
        self.tasks: dict[str, Mixture] = {}
        self.chosen: dict[str, list[int]] = {}
        weights = settings.tasks if isinstance(settings.tasks, dict) else dict.fromkeys(settings.tasks, 1.0)
        for task in (task for task, weight in weights.items() if weight and "/" not in task):
            if task in TASKS and splits_of(task, settings.root) == ("train",):
                _log.info("%s was published for training only: it is not measured while this trains", task)
                continue
            found = open_sets([task], settings.root, wanted.split, size, seed=seed, words=settings.words)
            self.tasks[task] = found
            places = np.linspace(0, len(found) - 1, min(len(found), wanted.samples))
            # Those that are answered come first, and are spread over all of it as well.
            first = set(np.linspace(0, len(places) - 1, min(len(places), wanted.answers), dtype=int).tolist())
            order = sorted(range(len(places)), key=lambda k: (k not in first, k))
            self.chosen[task] = [int(places[k]) for k in order]
        if not self.tasks:
            raise InvalidInput(
                "data.m3d.validation: none of the tasks was published with anything but a training split"
            )
        self.answers = wanted.answers

    def read(self, task: str, number: int) -> Sample | None:
        """Sample `number` of those chosen of a task; None if it is broken."""
        try:
            return self.tasks[task].at(0, self.chosen[task][number])
        except BrokenSample as broken:
            _log.warning("a sample of the validation split is left out: %s", broken)
            return None

    def shown(self) -> list[Sample]:
        """One of each task, for predictions that are watched."""
        firsts = (self.read(task, 0) for task in self.tasks)
        return [sample for sample in firsts if sample is not None]


def open_held_out(run: StageSettings, size: tuple[int, int, int]) -> HeldOut | None:
    """What is measured while a stage trains, None if nothing is.

    Raises InvalidInput where `trainer.eval_strategy` and the data do not fit together.
    """
    choice = _choice(run)
    wanted = choice.m3d.validation if choice.m3d else None
    asked = run.trainer.get("eval_strategy", "no") != "no"
    if asked and choice.m3d and not wanted:
        raise InvalidInput(
            'trainer.eval_strategy needs data.m3d.validation, for example {"samples": 512, "answers": 32}'
        )
    if asked and not choice.m3d:
        raise InvalidInput(
            "trainer.eval_strategy: data.scans have no validation split; training/evaluate.py measures the demo"
        )
    if wanted and not asked:
        raise InvalidInput('data.m3d.validation needs trainer.eval_strategy, "steps" or "epoch"')
    return HeldOut(choice.m3d, wanted, run.seed, size) if choice.m3d and wanted else None


def open_views(run: StageSettings, size: tuple[int, int, int]) -> Views:
    """Random views with all their structures."""
    choice = _choice(run)
    if choice.scans is None:
        raise InvalidInput("data.scans is needed here: only those scans have every structure labelled")
    return Views(choice.scans, run.seed, size)


def open_pairs(run: StageSettings, size: tuple[int, int, int]) -> M3DSamples | ViewPairs:
    """[epoch, index] -> Sample: a scan and its report."""
    choice = _choice(run)
    if choice.m3d and tuple(choice.m3d.tasks) != ("pair",):
        raise InvalidInput(f'data.m3d.tasks must be ["pair"] for contrastive pairs, not {list(choice.m3d.tasks)}')
    if choice.m3d and choice.m3d.per_scan != 1:
        raise InvalidInput("data.m3d.per_scan is for questions: a scan has one report to be compared with")
    return M3DSamples(choice.m3d, run, size) if choice.m3d else ViewPairs(Views(choice.scans, run.seed, size))


def open_questions(run: StageSettings, size: tuple[int, int, int]) -> M3DQuestions | ViewQuestions:
    """[epoch, index] -> list of Samples about the same scan."""
    choice = _choice(run)
    if choice.m3d and "pair" in choice.m3d.tasks:
        raise InvalidInput("data.m3d.tasks: pairs have no question; reports to answer with are the task caption")
    return M3DQuestions(choice.m3d, run, size) if choice.m3d else ViewQuestions(Views(choice.scans, run.seed, size))


def shown(data, count: int) -> list[Sample]:
    """Whole samples for predictions that are watched: the first of every task of M3D-Data, then the first at all."""
    firsts = data.sets.firsts() if isinstance(data, M3DSamples) else []
    count, samples = max(count, len(firsts)), []
    for index in [*firsts, *(k for k in range(len(data)) if k not in firsts)]:
        if len(samples) >= count:
            break
        try:
            found = data[0, index]
        except BrokenSample:
            continue
        samples += found if isinstance(found, list) else [found] if found else []
    return samples[:count]


def images_of(samples: list[Sample]) -> Tensor:
    """float32 [B, 1, D, H, W]"""
    return torch.from_numpy(np.stack([sample.image for sample in samples]).astype(np.float32, copy=False))


def _choice(run: StageSettings) -> _Choice:
    choice = build(_Choice, run.data, "data.")
    if choice.m3d and choice.m3d.per_scan < 1:
        raise InvalidInput("data.m3d.per_scan must be 1 or more")
    if (choice.m3d is None) == (choice.scans is None):
        raise InvalidInput("data must have either m3d (sets of M3D-Data) or scans (the demonstration's)")
    return choice
