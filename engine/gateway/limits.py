"""How much a key may do at a time: rate, concurrency, and the memory of bodies in work. For one event loop."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

from engine.gateway.refusal import Refusal


class Rates:
    """A token bucket an owner: it holds what a minute allows, and fills up evenly. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted

    def take(self, owner: str, per_minute: int) -> None:
        """Raises Refusal (429) if nothing is left."""
        now = self._clock()
        left, counted = self._left.get(owner, (float(per_minute), now))
        left = min(float(per_minute), left + (now - counted) * per_minute / 60)
        if left < 1:
            self._left[owner] = left, now
            wait = ceil((1 - left) * 60 / per_minute)
            message = f"this key may make {per_minute} requests a minute: try again in {wait} s"
            raise Refusal(429, "rate_limit_exceeded", message, retry_after=wait)
        self._left[owner] = left - 1, now


class Concurrency:
    """Requests in work, by owner."""

    def __init__(self) -> None:
        self._in_work: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._in_work.total()

    @contextmanager
    def entered(self, owner: str, most: int) -> Iterator[None]:
        """Raises Refusal (429) if as many are in work as may be."""
        if self._in_work[owner] >= most:
            message = f"{most} requests of this key are in work, as many as may be: wait for one to end"
            raise Refusal(429, "concurrency_exceeded", message, retry_after=1)
        self._in_work[owner] += 1
        try:
            yield
        finally:
            self._in_work[owner] -= 1
            if not self._in_work[owner]:
                del self._in_work[owner]


class Room:
    """Bytes that may be held at the same time. For any thread: what is inside a request is decoded on one."""

    def __init__(self, total: int):
        self._total = total
        self._lock = threading.Lock()
        self.taken = 0

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Raises Refusal (503) if there is no room."""
        with self._lock:
            if self.taken + size > self._total:
                message = "too many large requests are in work: try again shortly"
                raise Refusal(503, "overloaded", message, retry_after=2)
            self.taken += size
        try:
            yield
        finally:
            with self._lock:
                self.taken -= size
