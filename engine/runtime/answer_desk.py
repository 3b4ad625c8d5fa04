"""Questions from Triton to the decoder, answers back: one asyncio loop on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import triton_python_backend_utils as pb_utils

from engine.errors import Cancelled, StudyNotFound
from engine.prompt import parse_boxes
from engine.runtime import triton_io
from engine.runtime.decoder import Decoder, Delta
from engine.runtime.study_store import StudyStore
from engine.sampling import Sampling
from engine.volume.geometry import Geometry

CANCEL_INTERVAL_S = 0.05
SENDING_THREADS = 4
LAST_ANSWERS_S = 5.0  # for the answers in work to fail, when the language model is broken


@dataclass(frozen=True)
class Asked:
    """What a request asks. wanted: outputs. `return_logits` is not for the decoder: it passes it on."""

    wanted: tuple[str, ...]
    study: str
    question: str
    sampling: Sampling
    stream: bool
    return_logits: bool = False

    @classmethod
    def of(cls, request) -> Asked:
        sampling = triton_io.text(request, "SAMPLING")
        return cls(
            tuple(request.requested_output_names()),
            triton_io.needed_text(request, "STUDY"),
            triton_io.needed_text(request, "QUESTION"),
            Sampling.from_json(sampling) if sampling else Sampling(),
            triton_io.flag(request, "STREAM"),
            triton_io.flag(request, "RETURN_LOGITS"),
        )


@dataclass(frozen=True)
class _Open:
    """An answer in work: where its responses go, and what the front calls its request."""

    sender: Any
    id_: str


class AnswerDesk:
    """Serves the requests of one Triton model instance; many at a time.

    The next delta is fetched when the last one was sent, so that a client that cannot follow makes the decoder join
    tokens instead of filling a queue. Whether a client has cancelled is asked again and again, as nobody tells.

    on_health: is told, on the desk's thread, how the language model is, see `LlmEngine`. on_broken: is told there,
    once, that it will not come back, when the answers in work have failed (after LAST_ANSWERS_S at the latest).
    """

    def __init__(
        self,
        decoder: Decoder,
        store: StudyStore,
        on_health: Callable[[str], None] = lambda words: None,
        on_broken: Callable[[str], None] = lambda words: None,
    ):
        self.decoder = decoder
        self.store = store
        self._on_health = on_health
        self._on_broken = on_broken
        self._cancellations = triton_io.Cancellations()
        self._ending: asyncio.Task | None = None
        self._serving: set[asyncio.Task] = set()
        self._open: dict[asyncio.Task, _Open] = {}  # of those, the ones whose last response is not on its way
        # Triton frees an answer's state with its last response; asking about it then, or meanwhile, is a segfault.
        self._last_or_asking = threading.Lock()
        self._threads = ThreadPoolExecutor(SENDING_THREADS, "send-answers")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)

    def start(self) -> None:
        """Returns when the decoder is ready; raises what `Decoder.start` raises."""
        self._thread.start()
        try:
            self._run(self.decoder.start(self._on_health, self._end_broken))
        except BaseException:
            self._end_loop()
            raise
        self._watch = asyncio.run_coroutine_threadsafe(self._cancel_what_clients_cancelled(), self._loop)

    def execute(self, requests) -> None:
        """Triton's `execute`: returns nothing, the senders answer."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked, id_ = Asked.of(request), self._cancellations.id_of(request)
            except Exception as error:
                triton_io.send(sender, triton_io.error_response(error))
                continue
            asyncio.run_coroutine_threadsafe(self._serve(asked, _Open(sender, id_)), self._loop)

    def close(self) -> None:
        """Cancel what is in work and end the decoder with its processes."""
        self._watch.cancel()
        self._run(self._cancel_all())
        self._run(self.decoder.stop())
        self._end_loop()

    # --- one answer --------------------------------------------------------------------------------------------------
    async def _serve(self, asked: Asked, answer: _Open) -> None:
        task = cast(asyncio.Task, asyncio.current_task())
        self._open[task] = answer
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            last = await self._answer(asked, answer.sender)
        except asyncio.CancelledError:
            last = triton_io.error_response(Cancelled("the request was cancelled by its client, or the server stops"))
        except Exception as error:
            last = triton_io.error_response(error)
        finally:
            self._open.pop(task)
        await self._in_thread(self._send_last, answer.sender, last)

    async def _answer(self, asked: Asked, sender):
        """Sends all responses but the last one, which it returns."""
        geometry = Geometry.from_dict(self.store.info(asked.study)["geometry"])
        visual_tokens = self.store.get(asked.study, "visual_tokens")
        if visual_tokens is None:
            raise StudyNotFound(f"study {asked.study} is not encoded yet: ask through m3d_chat or m3d_segment")
        said, deltas = "", []
        async with aclosing(self.decoder.answer(visual_tokens, asked.question, asked.sampling)) as answer:
            async for delta in answer:
                said += delta.text
                deltas.append(delta)
                if asked.stream and delta.finish_reason is None:
                    await self._in_thread(sender.send, self._response(asked, deltas))
                    deltas = []
        return self._response(asked, deltas, geometry.boxes_to_scan(parse_boxes(said)))

    def _response(self, asked: Asked, deltas: list[Delta], boxes: np.ndarray | None = None):
        boxes = np.zeros((0, 6)) if boxes is None else boxes
        last = deltas[-1]
        no_states = np.zeros((0, self.decoder.manifest.llm_width), np.float32)
        return triton_io.response(
            asked.wanted,
            TEXT="".join(delta.text for delta in deltas),
            TOKEN_IDS=np.array([id_ for delta in deltas for id_ in delta.token_ids], np.int32),
            FINISH_REASON=last.finish_reason or "",
            BOXES=np.asarray(boxes, np.float64),
            ANSWER_INFO="" if last.info is None else json.dumps(asdict(last.info)),
            SEG_STATES=no_states if last.states is None else last.states,
            STUDY=asked.study,
            RETURN_LOGITS=np.array([asked.return_logits]),
        )

    def _send_last(self, sender, response) -> None:
        with self._last_or_asking:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _in_thread(self, send, *arguments) -> None:
        """Sending may block. Waited for even when cancelled: responses keep their order, and the last one goes."""
        sending = self._loop.run_in_executor(self._threads, send, *arguments)
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await sending
            raise

    # --- all answers -------------------------------------------------------------------------------------------------
    async def _cancel_what_clients_cancelled(self) -> None:
        while True:
            await asyncio.sleep(CANCEL_INTERVAL_S)
            for task in await self._loop.run_in_executor(self._threads, self._cancelled, list(self._open.items())):
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
        self._ending = self._loop.create_task(self._end_when_answered(words))

    async def _end_when_answered(self, words: str) -> None:
        if self._serving:
            await asyncio.wait(self._serving, timeout=LAST_ANSWERS_S)
        self._on_broken(words)

    def _run(self, work: Coroutine):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._threads.shutdown()
