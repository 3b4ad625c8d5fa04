"""Scans that come in parts, a request each: put together in memory, and digested, as they come.

A whole scan in one message is copied, as a whole, by each of the hands it passes through, into memory that none of them
has touched yet. Parts use the same memory again, and while one is sent another is taken in.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from engine.errors import InvalidInput, Unavailable
from engine.runtime.study_store import new_digest
from engine.scan.limits import Limits

IDLE_S = 600.0  # as long as our client waits, unless it is told otherwise
MOST = 1000  # uploads at a time, however small


@dataclass
class Upload:
    """data: uint8 [size], of which the first `received` bytes are here. digest: of those."""

    data: np.ndarray
    digest: blake3 = field(default_factory=new_digest)
    received: int = 0
    last_part: float = 0.0


class Uploads:
    """The uploads in progress of one process, by name.

    Bounded: what has come of them may be twice as large as the largest scan, and they MOST in number. Those that have
    waited longest for a part give way to what does not fit, and those that have waited for IDLE_S to the next part of
    any. What is only announced takes no memory, and so nobody's place. clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self.clock = clock
        self._uploads: dict[str, Upload] = {}  # the one that waits longest comes first
        self._lock = threading.Lock()

    def add(self, name: str, start: int, size: int, part: np.ndarray) -> Upload | None:
        """Add `part` (uint8), whose place in a file of `size` bytes begins at `start`. The upload, once it is complete.

        Raises InvalidInput for a part that is not the next one or a file that is too large, Unavailable for a part of
        an upload that gave way; either ends the upload.
        """
        end = start + part.size
        with self._lock:
            upload = self._uploads.pop(name, None)
            if not 0 <= start < end <= size:
                raise InvalidInput(f"bytes {start:,} to {end:,} are no part of a file of {size:,} bytes")
            self.limits.check_bytes(size, "the file")
            if start == 0:
                upload = Upload(np.empty(size, np.uint8))
            elif upload is None:
                raise Unavailable("this server does not know the upload (any more): it waited too long for a part, or "
                                  "had to give way to others; upload the scan again")
            if (start, size) != (upload.received, upload.data.size):
                raise InvalidInput(f"bytes {start:,} to {end:,} of {size:,} are not the next part of an upload that "
                                   f"has {upload.received:,} of {upload.data.size:,}: send its parts in their order")
            self._make_room(end)
            upload.data[start:end] = part
            upload.digest.update(part)
            upload.received, upload.last_part = end, self.clock()
            if end == size:
                return upload
            self._uploads[name] = upload

    def _make_room(self, size: int) -> None:
        now, room = self.clock(), 2 * self.limits.max_bytes - sum(upload.received for upload in self._uploads.values())
        for name, upload in list(self._uploads.items()):
            if room < size or len(self._uploads) >= MOST or now - upload.last_part > IDLE_S:
                del self._uploads[name]
                room += upload.received
