"""The demonstration's scans as map-style data sets: view `index` of an epoch depends on seed, epoch and index alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from engine.errors import InvalidInput
from training.config import as_json
from training.data.augment import Augmentation, View, view_of
from training.data.questions import SHARES, caption, draw
from training.data.sample import Sample
from training.data.scans import SOURCES, load_scans


@dataclass(frozen=True)
class ScanSettings:
    """train: scan -> how often it is drawn, relative to the others. fine_grid: (D, H, W) to which scans are prepared
    before augmentation. views: how many make an epoch. per_view: structures or questions asked about each. tasks: which
    questions, and how often each is drawn, relative to the others."""

    train: dict[str, int]
    fine_grid: tuple[int, int, int]
    augmentation: Augmentation
    views: int
    per_view: int = 1
    tasks: dict[str, int] = field(default_factory=lambda: dict(SHARES))


class Views:
    """Random views of the scans: [epoch, index] -> (View, the random source that goes on behind it)."""

    def __init__(self, settings: ScanSettings, seed: int, size: tuple[int, int, int]):
        unknown = sorted(set(settings.train) - set(SOURCES))
        if unknown:
            raise InvalidInput(f"data.scans.train names {', '.join(unknown)}; known scans: {', '.join(SOURCES)}")
        if not settings.train or not sum(settings.train.values()):
            raise InvalidInput("data.scans.train draws no scan")
        if unknown := sorted(set(settings.tasks) - set(SHARES)):
            raise InvalidInput(f"data.scans.tasks names {', '.join(unknown)}; known tasks: {', '.join(SHARES)}")
        if not sum(settings.tasks.values()):
            raise InvalidInput("data.scans.tasks draws no task")
        if not settings.per_view or not all(settings.fine_grid):
            raise InvalidInput(
                f"data.scans.per_view and fine_grid must be positive, not {settings.per_view} and "
                f"{list(settings.fine_grid)}"
            )
        self.settings, self.seed, self.size = settings, seed, tuple(size)
        self.scans = {scan.name: scan for scan in load_scans(tuple(settings.train), settings.fine_grid)}

    def __len__(self) -> int:
        return self.settings.views

    def __getitem__(self, place: tuple[int, int]) -> tuple[View, np.random.Generator]:
        rng = np.random.default_rng([self.seed, *place])
        share = np.array(list(self.settings.train.values()), float)
        name = str(rng.choice(list(self.settings.train), p=share / share.sum()))
        return view_of(self.scans[name], self.settings.augmentation, self.size, rng), rng

    def fingerprint(self) -> dict[str, str]:
        hashes = {"settings": hashlib.sha256(repr(as_json(self.settings)).encode()).hexdigest()}
        for name, scan in self.scans.items():
            digest = hashlib.sha256(repr((scan.structures, scan.facts)).encode())
            digest.update(np.ascontiguousarray(scan.image).data)
            digest.update(np.ascontiguousarray(scan.bits).data)
            hashes[name] = digest.hexdigest()
        return hashes


class _OfViews:
    def __init__(self, views: Views):
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def fingerprint(self) -> dict[str, str]:
        return self.views.fingerprint()


class ViewPairs(_OfViews):
    """[epoch, index] -> a view with a report of it."""

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        view, rng = self.views[place]
        return Sample(view.image[None], "", caption(view, rng), None, False, "caption", f"{view.scan} {place}")


class ViewQuestions(_OfViews):
    """[epoch, index] -> several questions about one view; none about a view that allows none of the tasks."""

    def __init__(self, views: Views):
        super().__init__(views)
        unasked = [
            scan.name
            for name, scan in views.scans.items()
            if views.settings.train[name]
            and not draw(
                view_of(scan, None, views.size, np.random.default_rng(0)),
                np.random.default_rng(0),
                1,
                views.settings.tasks,
            )
        ]
        if unasked:
            raise InvalidInput(
                f"data.scans.tasks has no question about {', '.join(unasked)}: draw other tasks, or not this scan"
            )

    def __getitem__(self, place: tuple[int, int]) -> list[Sample]:
        view, rng = self.views[place]
        image, source = view.image[None], f"{view.scan} {place}"
        return [
            Sample(
                image,
                q.question,
                q.answer,
                view.mask(q.structure)[None] if q.segments else None,
                bool(rng.random() < 0.5),
                q.task,
                source,
                q.structure,
            )
            for q in draw(view, rng, self.views.settings.per_view, self.views.settings.tasks)
        ]
