"""Questions about known studies to the decoder, answers back; and the asyncio loop that it runs on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from engine import contract
from engine.api import AnswerDetails, AnswerInfo
from engine.errors import StudyNotFound
from engine.prompt import Turn, parse_boxes
from engine.prompt.turns import turns_of
from engine.runtime.step import Inputs, Outputs
from engine.runtime.study_store import StudyStore
from engine.sampling import Sampling
from engine.seg_states import REFERENCE, checked_merge
from engine.volume.geometry import Geometry

if TYPE_CHECKING:
    from engine.runtime.decoder import Decoder, Delta


@dataclass(frozen=True)
class Asked:
    """What a request asks. question: or the turns of a conversation that ends with it. `return_logits` and `merge` are
    not for the decoder: it passes them on."""

    study: str
    question: str | list[Turn]
    sampling: Sampling
    stream: bool
    return_logits: bool = False
    merge: str = REFERENCE

    @classmethod
    def of(cls, inputs: Inputs) -> Asked:
        sampling, history = inputs.text(contract.SAMPLING), inputs.text(contract.HISTORY)
        question = inputs.needed_text(contract.QUESTION)
        return cls(
            inputs.needed_text(contract.STUDY),
            turns_of(history, question) if history else question,
            Sampling.from_json(sampling) if sampling else Sampling(),
            inputs.flag(contract.STREAM),
            inputs.flag(contract.RETURN_LOGITS),
            checked_merge(inputs.text(contract.MERGE)),
        )


class DecoderStep:
    """Answers questions about studies whose visual tokens are in the store."""

    def __init__(self, decoder: Decoder, store: StudyStore):
        self.decoder = decoder
        self.store = store

    async def __call__(self, asked: Asked) -> AsyncGenerator[tuple[Outputs, bool], None]:
        """(outputs, whether they are the last) of each response. The next delta is fetched when the last is taken."""
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
                    yield self._outputs(asked, deltas), False
                    deltas = []
        yield self._outputs(asked, deltas, geometry.boxes_to_scan(parse_boxes(said))), True

    def _outputs(self, asked: Asked, deltas: list[Delta], boxes: np.ndarray | None = None) -> Outputs:
        boxes = np.zeros((0, 6)) if boxes is None else boxes
        last = deltas[-1]
        no_states = np.zeros((0, self.decoder.manifest.llm_width), np.float32)
        return {
            contract.TEXT: "".join(delta.text for delta in deltas),
            contract.TOKEN_IDS: np.array([id_ for delta in deltas for id_ in delta.token_ids], np.int32),
            contract.FINISH_REASON: last.finish_reason or "",
            contract.BOXES: np.asarray(boxes, np.float64),
            contract.ANSWER_INFO: "" if last.info is None else _info(last.info, last.details),
            contract.SEG_STATES: no_states if last.states is None else last.states,
            contract.SEG_SPANS: np.array(last.seg_spans, np.int64).reshape(-1, 2),
            contract.STUDY: asked.study,
            contract.RETURN_LOGITS: np.array([asked.return_logits]),
            contract.MERGE: asked.merge,
        }


def _info(info: AnswerInfo, details: AnswerDetails | None) -> str:
    """As ANSWER_INFO has it."""
    return json.dumps(asdict(info) | ({} if details is None else {"details": asdict(details)}))


class LoopThread:
    """An asyncio loop on a thread of its own: the user's thread may have a loop already, or none."""

    def __init__(self, name: str):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._begun: set[asyncio.Task] = set()

    def submit(self, work: Coroutine) -> Future:
        """Begin `work` on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def begin(self, work: Callable[[], Coroutine]) -> Future:
        """Begin `work()` on the loop; `end_begun` cancels it."""

        async def begun() -> Any:
            task = cast(asyncio.Task, asyncio.current_task())
            self._begun.add(task)
            try:
                return await work()
            finally:
                self._begun.discard(task)

        return self.submit(begun())

    def run(self, work: Coroutine) -> Any:
        """What `work` returns, or raises."""
        return self.submit(work).result()

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on the loop, soon; not at all once it is closed."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function)

    async def end_begun(self) -> None:
        """Cancel what `begin` began, and wait until it has ended."""
        tasks = list(self._begun)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
