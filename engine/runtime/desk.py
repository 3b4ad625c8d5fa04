"""Quick requests are answered at once, slow ones from a few threads, so that nobody waits behind a stranger's scan.

A blocking `execute` would occupy its whole Triton instance: as many cold scans as there are instances, and a follow-up
question that needs a millisecond waits for seconds. Responses go through the requests' senders instead, which Triton
allows in models that are not decoupled too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.errors import Cancelled, ResourceExhausted
from engine.runtime import triton_io


class Desk:
    """answer(request): the response, or, if that takes time, a function without arguments that returns it.

    threads: slow requests at the same time. waiting: slow requests that may wait for a thread; more are refused, as
    each holds its scan in memory.
    """

    def __init__(self, answer: Callable, threads: int, waiting: int):
        self.answer = answer
        self.places = threading.BoundedSemaphore(threads + waiting)
        self.capacity = threads + waiting
        self.pool = ThreadPoolExecutor(threads, "slow-requests")
        self.cancellations = triton_io.Cancellations()

    def execute(self, requests) -> None:
        """Triton's `execute`: returns nothing, the senders answer."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                answered = self.answer(request)
                if callable(answered):
                    self._queue(answered, request, sender)
                    continue
            except Exception as error:
                answered = triton_io.error_response(error)
            triton_io.send(sender, answered)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _queue(self, later: Callable, request, sender) -> None:
        if not self.places.acquire(blocking=False):
            raise ResourceExhausted(
                f"{self.capacity} requests like this are in work or waiting, which is this "
                f"server's limit: try again shortly"
            )
        self.pool.submit(self._work, later, request, sender)

    def _work(self, later: Callable, request, sender) -> None:
        try:
            triton_io.send(sender, triton_io.answer(self._unless_cancelled, later, request))
        except Exception as error:  # nobody looks at this thread's result
            triton_io.log_error("a response could not be sent", error)
        finally:
            self.places.release()

    def _unless_cancelled(self, later: Callable, request):
        if self.cancellations.look()(self.cancellations.id_of(request), request):
            raise Cancelled("the request was cancelled before its turn came")
        return later()
