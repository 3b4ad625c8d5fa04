"""Questions about one scan stand together: it is then read, changed and encoded once for all of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np


class Groups:
    """The samples of a set by their scan, at most `most` in a group.

    The groups of a scan have as many samples as each other, or one less, and each round puts other samples of it
    together. A round has each sample once. How many groups there are does not depend on the round.

    scans: what the scan of each sample is called, in their order. seed: of the draws.
    """

    def __init__(self, scans: Iterable[str], most: int, seed: int):
        self._seed = seed
        numbers: dict[str, int] = {}
        scan_of = np.fromiter((numbers.setdefault(scan, len(numbers)) for scan in scans), np.int64)
        counts = np.bincount(scan_of, minlength=len(numbers))
        # Arrays, as DataLoader workers share them: lists would be copied to each.
        self._samples = np.argsort(scan_of, kind="stable")
        self._ends = np.cumsum(counts)
        parts = -(-counts // most)
        self._first = np.cumsum(parts) - parts
        self._scan = np.repeat(np.arange(len(counts)), parts)
        self._streams = np.array([zlib.crc32(scan.encode()) for scan in numbers], np.int64)

    def __len__(self) -> int:
        return len(self._scan)

    def members(self, round_of_set: int, group: int) -> list[int]:
        """The samples of a group, by their index in the set."""
        scan = int(self._scan[group])
        begin = self._ends[scan - 1] if scan else 0
        samples = self._samples[begin : self._ends[scan]]
        last = scan + 1 == len(self._first)
        parts = (len(self._scan) if last else int(self._first[scan + 1])) - int(self._first[scan])
        if parts > 1:
            rng = np.random.default_rng([self._seed, round_of_set, int(self._streams[scan])])
            samples = rng.permutation(samples)
        return np.array_split(samples, parts)[group - int(self._first[scan])].tolist()
