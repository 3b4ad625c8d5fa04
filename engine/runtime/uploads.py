"""Scans that come in parts, a request each: put together in memory, and digested, as they come.

If a scan comes in one message, each process copies a whole message, into memory that it has not touched yet. Parts use
the same memory again, and while one is sent another is taken in.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from blake3 import blake3

from engine.contract import MAX_PART_BYTES
from engine.errors import InvalidInput, ResourceExhausted, Unavailable
from engine.runtime.study_store import new_digest
from engine.scan.limits import Limits

MAX_NAME_LENGTH = 64
MAX_UPLOADS = 1000  # uploads at a time, however small
MAX_UPLOADS_PER_CONNECTION = 100
IDLE_S = 600.0  # as long as our client waits by default
SLOW_S = 90.0  # between two parts of our client on a line of half a megabit per second, and half as long again
PROGRESS_BYTES = 1 << 20  # that an upload brings within SLOW_S, or others may have its memory
DEADLINE_S = 7200.0  # of a whole upload; the largest scan takes it on a line of 2.4 megabit per second


@dataclass
class Upload:
    """data: uint8 [size], of which the first `received` bytes are here. peer: whose it is. digest: of those bytes.
    started, last_part: times. progress: how many bytes were here, and when, as PROGRESS_BYTES more had come for the
    last time.
    """

    data: np.ndarray
    peer: str = ""
    digest: blake3 = field(default_factory=new_digest)
    received: int = 0
    started: float = 0.0
    last_part: float = 0.0
    progress: tuple[int, float] = (0, 0.0)

    def add(self, part: np.ndarray, now: float) -> None:
        self.data[self.received : self.received + part.size] = part
        self.digest.update(part.data)
        self.received, self.last_part = self.received + part.size, now
        if self.received - self.progress[0] >= PROGRESS_BYTES:
            self.progress = (self.received, now)


class Uploads:
    """The uploads in progress of one process, by name. One thread calls it.

    The parts that have arrived, and complete uploads until their data is released, may take twice the memory of the
    largest scan; those of one peer, a client's connection, half of that, so that it cannot shut the others out. A part
    that does not fit takes the memory of uploads that brought less than PROGRESS_BYTES within SLOW_S, and is refused if
    there are none. An upload takes memory as its parts arrive. At most MAX_UPLOADS are in progress, and
    MAX_UPLOADS_PER_CONNECTION of one peer; beyond that, the one with the fewest bytes ends. clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self.limits = limits
        self.clock = clock
        self._uploads: dict[str, Upload] = {}  # the one that waits longest comes first
        # Peers and bytes of complete ones, until their data is let go, by any thread.
        self._held: dict[int, tuple[str, int]] = {}

    def add(self, name: str, start: int, size: int, part: np.ndarray, peer: str = "") -> Upload | None:
        """Add a part to the upload of its name.

        Args:
            name: of the upload; all peers share the names.
            start: where the part begins in the file.
            size: bytes of the file.
            part: uint8.
            peer: the connection that it came over; "" if that is not known, to which no share applies.

        Returns:
            The upload, once it is complete; None before.

        Raises:
            InvalidInput: for a part that is not the next one or comes from another peer, and for a part, a file or a
                name that is too large.
            Unavailable: for a part of an upload that gave way.
            ResourceExhausted: for a part that finds no room. Each of them ends the upload.
        """
        end, upload = start + part.size, self._uploads.pop(name, None)
        if len(name) > MAX_NAME_LENGTH:
            raise InvalidInput(f"an upload's name has at most {MAX_NAME_LENGTH} characters, not {len(name):,}")
        if part.size > MAX_PART_BYTES:
            raise InvalidInput(f"a part has at most {MAX_PART_BYTES:,} bytes, not {part.size:,}: send more parts")
        if not 0 <= start < end <= size:
            raise InvalidInput(f"bytes {start:,} to {end:,} are no part of a file of {size:,} bytes")
        self.limits.check_bytes(size, "the file")
        if start == 0 and upload is not None:
            raise InvalidInput(
                "an upload of this name is in progress; both are ended, since their parts could not be told apart: "
                "give each upload a name of its own, such as a random one"
            )
        if start == 0:
            now = self.clock()
            upload = Upload(_memory(size), peer, started=now, progress=(0, now))
        elif upload is None:
            raise Unavailable(
                "this server does not know the upload (any more): it waited too long for a part, had to give way to "
                "others, or was ended by a part under its name that was not its own; upload the scan again"
            )
        elif upload.peer != peer:
            raise InvalidInput(
                "an upload of this name is in progress over another connection; it is ended, since the part may be "
                "another scan's: send all parts of an upload over one connection, under a name of its own, such as a "
                "random one"
            )
        if (start, size) != (upload.received, upload.data.size):
            raise InvalidInput(
                f"bytes {start:,} to {end:,} of {size:,} are not the next part of an upload that has "
                f"{upload.received:,} of {upload.data.size:,}: send its parts in their order"
            )
        self._make_room(end, peer)
        upload.add(part, self.clock())
        if end < size:
            self._make_place(peer)
            self._uploads[name] = upload
            return None
        self._held[id(upload.data)] = peer, size
        weakref.finalize(upload.data, self._held.pop, id(upload.data))
        return upload

    def forget_idle(self) -> None:
        """End the uploads that have waited for a part for IDLE_S, or are not complete after DEADLINE_S."""
        now = self.clock()
        self._forget(lambda upload: now - upload.last_part > IDLE_S or now - upload.started > DEADLINE_S)

    def _make_room(self, size: int, peer: str) -> None:
        """For an upload of which `size` bytes are here then. Raises ResourceExhausted."""

        def is_slow(upload: Upload) -> bool:
            return self.clock() - upload.progress[1] > SLOW_S

        self._forget(lambda upload: upload.peer == peer and is_slow(upload) and not self._has_share(size, peer))
        if not self._has_share(size, peer):
            raise ResourceExhausted(
                f"the uploads over this connection take the memory that one may have, {self.limits.max_bytes:,} bytes: "
                "try again when they are done"
            )
        self._forget(lambda upload: is_slow(upload) and not self._has_room(size))
        if not self._has_room(size):
            raise ResourceExhausted("this server takes in as much as it has memory for: try again shortly")

    def _has_share(self, size: int, peer: str) -> bool:
        here = sum(bytes_here for whose, bytes_here in self._here() if whose == peer)
        return not peer or here + size <= self.limits.max_bytes

    def _has_room(self, size: int) -> bool:
        return sum(bytes_here for _, bytes_here in self._here()) + size <= 2 * self.limits.max_bytes

    def _here(self) -> list[tuple[str, int]]:
        """Whose bytes are here, and how many, of each upload."""
        return [(upload.peer, upload.received) for upload in self._uploads.values()] + list(self._held.values())

    def _make_place(self, peer: str) -> None:
        """For one more upload in progress."""
        of_peer = [name for name, upload in self._uploads.items() if peer and upload.peer == peer]
        for names, most in ((of_peer, MAX_UPLOADS_PER_CONNECTION), (list(self._uploads), MAX_UPLOADS)):
            if len(names) == most:
                del self._uploads[min(names, key=lambda name: self._uploads[name].received)]
                return

    def _forget(self, gives_way: Callable[[Upload], bool]) -> None:
        for name, upload in list(self._uploads.items()):
            if gives_way(upload):
                del self._uploads[name]


def _memory(size: int) -> np.ndarray:
    try:
        return np.empty(size, np.uint8)
    except MemoryError:
        raise ResourceExhausted(f"this server has no memory for {size:,} bytes now: try again shortly") from None
