"""Quick requests are answered at once, slow ones from a few threads, so that nobody waits behind a stranger's scan.

A blocking `execute` would occupy its whole Triton instance: as many cold scans as there are instances, and a follow-up
question that needs a millisecond waits for seconds. Responses go through the requests' senders instead, which Triton
allows in models that are not decoupled too.
"""

from __future__ import annotations

import logging
import time

from engine import logs
from engine.errors import Cancelled
from engine.runtime import triton_io
from engine.runtime.request_pool import RequestPool
from engine.runtime.step import Later, Outputs, Step

_log = logging.getLogger(__name__)


class RequestService:
    """Answers a Triton model's requests by a step. pool: for the slow ones."""

    def __init__(self, step: Step, pool: RequestPool):
        self.step = step
        self.pool = pool
        self.cancellations = triton_io.Cancellations()

    def execute(self, requests) -> None:
        """Triton's `execute`: returns nothing, the senders answer."""
        for triton_request in requests:
            request, sender = triton_io.Request(triton_request), triton_request.get_response_sender()
            with logs.request(request.id):
                self._answer_or_submit(request, sender)

    def close(self) -> None:
        self.pool.close()

    def _answer_or_submit(self, request: triton_io.Request, sender) -> None:
        try:
            answered = self.step(request)
            if callable(answered):
                self.pool.submit(self._work, answered, request, sender)
                return
            response = request.response(answered)
        except Exception as error:
            response = triton_io.error_response(error)
        triton_io.send(sender, response)
        _log.debug("answered at once")

    def _work(self, later: Later, request: triton_io.Request, sender) -> None:
        started = time.perf_counter()
        with logs.request(request.id):
            try:
                response = triton_io.answer(lambda: request.response(self._unless_cancelled(later, request)))
                triton_io.send(sender, response)
                _log.info("answered in %.3f s", time.perf_counter() - started)
            except Exception as error:  # nobody looks at this thread's result
                _log.error("a response could not be sent", exc_info=error)

    def _unless_cancelled(self, later: Later, request: triton_io.Request) -> Outputs:
        if self.cancellations.look()(self.cancellations.id_of(request.triton), request.triton):
            raise Cancelled("the request was cancelled before its turn came")
        return later()
