"""Questions from Triton to the decoder, answers back: one asyncio loop on a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import triton_python_backend_utils as pb_utils

from engine import logs
from engine.errors import Cancelled
from engine.runtime import triton_io
from engine.runtime.decoder_step import Asked, DecoderStep, LoopThread

CANCEL_INTERVAL_S = 0.05
SENDING_THREADS = 4
LAST_ANSWERS_S = 5.0  # for the answers in work to fail, when the language model is broken

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Open:
    """An answer in work: where its responses go, what the front calls its request, and which outputs it wants.

    Not the request itself, whose shared memory would be kept as long.
    """

    sender: Any
    id_: str
    wanted: tuple[str, ...]


class DecoderService:
    """Serves the requests of one Triton model instance; many at a time.

    The next delta is fetched when the last one was sent, so that a client that cannot follow makes the decoder join
    tokens instead of filling a queue. Whether a client has cancelled is asked again and again, as nobody tells.

    on_health: is told, on the service's thread, how the language model is, see `LlmEngine`. on_broken: is told there,
    once, that it will not come back, when the answers in work have failed (after LAST_ANSWERS_S at the latest).
    """

    def __init__(
        self,
        step: DecoderStep,
        on_health: Callable[[str], None] = lambda words: None,
        on_broken: Callable[[str], None] = lambda words: None,
    ):
        self.step = step
        self._on_health = on_health
        self._on_broken = on_broken
        self._cancellations = triton_io.Cancellations()
        self._ending: asyncio.Task | None = None
        self._serving: set[asyncio.Task] = set()
        self._open: dict[asyncio.Task, _Open] = {}  # of those, the ones whose last response is not on its way
        # Triton frees an answer's state with its last response; asking about it then, or meanwhile, is a segfault.
        self._last_or_asking = threading.Lock()
        self._threads = ThreadPoolExecutor(SENDING_THREADS, "send-answers")

    def start(self) -> None:
        """Returns when the decoder is ready; raises what `Decoder.start` raises."""
        self._thread = LoopThread("answers")
        try:
            self._thread.run(self.step.decoder.start(self._on_health, self._end_broken))
        except BaseException:
            self._end_loop()
            raise
        self._watch = self._thread.submit(self._cancel_what_clients_cancelled())

    def execute(self, requests) -> None:
        """Triton's `execute`: returns nothing, the senders answer."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = Asked.of(triton_io.Request(request))
                answer = _Open(sender, self._cancellations.id_of(request), tuple(request.requested_output_names()))
            except Exception as error:
                triton_io.send(sender, triton_io.error_response(error))
                continue
            self._thread.submit(self._serve(asked, answer))

    def close(self) -> None:
        """Cancel what is in work and end the decoder with its processes."""
        self._watch.cancel()
        self._thread.run(self._cancel_all())
        self._thread.run(self.step.decoder.stop())
        self._end_loop()

    # --- one answer --------------------------------------------------------------------------------------------------
    async def _serve(self, asked: Asked, answer: _Open) -> None:
        with logs.request(answer.id_):
            await self._serve_one(asked, answer)

    async def _serve_one(self, asked: Asked, answer: _Open) -> None:
        started = time.perf_counter()
        task = cast(asyncio.Task, asyncio.current_task())
        self._open[task] = answer
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            last = await self._answer(asked, answer)
        except asyncio.CancelledError:
            last = triton_io.error_response(Cancelled("the request was cancelled by its client, or the server stops"))
        except Exception as error:
            last = triton_io.error_response(error)
        finally:
            self._open.pop(task)
        await self._in_thread(self._send_last, answer.sender, last)
        _log.info("answered in %.3f s", time.perf_counter() - started)

    async def _answer(self, asked: Asked, answer: _Open):
        """Sends all responses but the last one, which it returns."""
        async with aclosing(self.step(asked)) as responses:
            async for outputs, is_last in responses:
                response = triton_io.response(answer.wanted, outputs)
                if is_last:
                    return response
                await self._in_thread(answer.sender.send, response)

    def _send_last(self, sender, response) -> None:
        with self._last_or_asking:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _in_thread(self, send, *arguments) -> None:
        """Sending may block. Waited for even when cancelled: responses keep their order, and the last one goes."""
        sending = self._thread.loop.run_in_executor(self._threads, send, *arguments)
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await sending
            raise

    # --- all answers -------------------------------------------------------------------------------------------------
    async def _cancel_what_clients_cancelled(self) -> None:
        while True:
            await asyncio.sleep(CANCEL_INTERVAL_S)
            looking = self._thread.loop.run_in_executor(self._threads, self._cancelled, list(self._open.items()))
            for task in await looking:
                task.cancel()

    def _cancelled(self, answers: list[tuple[asyncio.Task, _Open]]) -> list[asyncio.Task]:
        found, is_cancelled = [], self._cancellations.look()
        for task, answer in answers:
            with self._last_or_asking:
                if task in self._open and is_cancelled(answer.id_, answer.sender):
                    found.append(task)
        return found

    async def _cancel_all(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _end_broken(self, words: str) -> None:
        """The language model calls this in the middle of an answer that it fails."""
        self._ending = self._thread.loop.create_task(self._end_when_answered(words))

    async def _end_when_answered(self, words: str) -> None:
        if self._serving:
            await asyncio.wait(self._serving, timeout=LAST_ANSWERS_S)
        self._on_broken(words)

    def _end_loop(self) -> None:
        self._thread.close()
        self._threads.shutdown()
