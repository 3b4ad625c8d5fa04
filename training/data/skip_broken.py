"""Training goes on past a few broken samples: they are logged, counted and left out; too many of them stop the run."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, get_worker_info

from engine.errors import InvalidInput, M3DError
from training.data.sample import BrokenSample, Sample

_log = logging.getLogger(__name__)
_WORKERS = 1024
_READ, _BROKEN = 0, 1


class TooManyBroken(M3DError):
    """More samples than allowed are broken; the message says how many, and where each is recorded."""

    code = "INVALID_ARGUMENT"


@dataclass(frozen=True)
class BrokenFile:
    """One entry of the report: how often `paths` could not be used, and why."""

    paths: tuple[str, ...]
    cause: str
    times: int


class SkipBroken(Dataset):
    """A set whose broken samples are None, for a collator that leaves them out (`present`).

    dataset: a TrainingSet or Mixture, which raises BrokenSample. record: a file to which each broken sample is appended
    as one JSON line; processes may share it. limit: share of the samples read that may be broken, counted over
    `minimum` samples at least, so that the first few do not stop a run.

    Reading only counts, in memory shared with the DataLoader's workers; `check` judges. It must be called by all ranks
    alike, as it sums over them, so that they stop together; training/data/watch.py does so for a Trainer.
    """

    def __init__(self, dataset: Dataset, record: Path | str, limit: float = 0.01, minimum: int = 300):
        if not 0 <= limit < 1:
            raise InvalidInput(f"the share of broken samples must be at least 0 and below 1, not {limit}")
        self.dataset, self.record, self.limit, self.minimum = dataset, Path(record), limit, minimum
        self.record.parent.mkdir(parents=True, exist_ok=True)
        # A row for this process and for each worker: none writes to another's, so nothing is lost without locks.
        self._counts = torch.zeros(1 + _WORKERS, 2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> Sample | None:
        return self._read(index, lambda: self.dataset[index])

    def at(self, epoch: int, index: int) -> Sample | None:
        """Sample `index` of any epoch."""
        return self._read(index, lambda: self.dataset.at(epoch, index))

    def group(self, epoch: int, index: int) -> list[Sample]:
        """The samples of group `index` of any epoch of a Mixture that are not broken."""
        return present(self._read(index, read) for read in self.dataset.readers(epoch, index))

    def _read(self, index: int, read: Callable[[], Sample]) -> Sample | None:
        worker = get_worker_info()
        count = self._counts[0 if worker is None else 1 + worker.id]
        count[_READ] += 1
        try:
            return read()
        except BrokenSample as broken:
            count[_BROKEN] += 1
            _log.warning("sample %d is broken and left out: %s", index, broken)
            self._note({"index": index, "paths": broken.paths, "cause": broken.cause})
            return None

    def counts(self) -> tuple[int, int]:
        """(samples read, of these broken) by this process and its workers since the start."""
        read, broken = self._counts.sum(0).tolist()
        return read, broken

    def check(self) -> None:
        """Raises TooManyBroken if, over all ranks, more than the allowed share is broken."""
        total = torch.tensor(self.counts())
        if dist.is_available() and dist.is_initialized():
            total = total.cuda() if dist.get_backend() == "nccl" else total
            dist.all_reduce(total)
        read, broken = total.tolist()
        if broken > self.limit * max(read, self.minimum):
            last = self.report()[-1:]
            raise TooManyBroken(
                f"{broken:,} of {read:,} samples are broken, more than {self.limit:.1%} (of at least "
                f"{self.minimum:,}): see {self.record}"
                + "".join(f"; for example {entry.paths[0]}: {entry.cause}" for entry in last)
            )

    def report(self) -> list[BrokenFile]:
        """What is recorded, of all processes and epochs, the most frequent first."""
        if not self.record.is_file():
            return []
        lines = map(json.loads, self.record.read_text(encoding="utf-8").splitlines())
        found = Counter((tuple(line["paths"]), line["cause"]) for line in lines)
        return [BrokenFile(paths, cause, times) for (paths, cause), times in found.most_common()]

    def _note(self, entry: dict) -> None:
        # One write in append mode: lines of several processes do not mix.
        descriptor = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)


def present(batch: Iterable[Sample | None]) -> list[Sample]:
    """The samples of a batch that are not broken; may be none, which a collator must turn into a batch without loss."""
    return [sample for sample in batch if sample is not None]
