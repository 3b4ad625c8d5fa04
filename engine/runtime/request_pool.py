"""Slow requests on a few threads: so many at a time, so many waiting, and no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from engine.errors import ResourceExhausted


class RequestPool:
    """threads: requests in work at the same time. waiting: those that may wait for a thread; more are refused, as each
    holds its scan in memory.
    """

    def __init__(self, threads: int, waiting: int):
        self.places = threading.BoundedSemaphore(threads + waiting)
        self.capacity = threads + waiting
        self._threads = ThreadPoolExecutor(threads, "slow-requests")

    def submit(self, work: Callable, *arguments: object) -> Future:
        """Do `work(*arguments)` when its turn comes. Raises ResourceExhausted if there is no place to wait in."""
        if not self.places.acquire(blocking=False):
            raise ResourceExhausted(
                f"{self.capacity} requests like this are in work or waiting, which is this "
                f"server's limit: try again shortly"
            )
        future = self._threads.submit(work, *arguments)
        future.add_done_callback(lambda _: self.places.release())
        return future

    def close(self) -> None:
        """Wait for what is in work; what waits is dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)
