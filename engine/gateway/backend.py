"""Who answers behind the gateway: a server, or an engine in this process, with the same methods as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from engine.api import (
    M3D,
    Answer,
    AnswerStream,
    EngineInfo,
    Messages,
    Ranking,
    Segmentation,
    Study,
    StudyInfo,
    TextEmbeddings,
)

THREADS = 128  # calls at the same time of an engine in this process
T = TypeVar("T")


class AsyncAnswerStream(Protocol):
    """See `engine.api.AnswerStream`."""

    @property
    def answer(self) -> Answer | None: ...

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def __anext__(self) -> str: ...

    async def aclose(self) -> None: ...


class AsyncM3D(Protocol):
    """`engine.api.M3D` as coroutines, as far as the gateway needs it: `AsyncM3DClient` is one."""

    async def upload(
        self, scan: object, affine: Any = None, preset: str = "auto", *, crop: Any = None, timeout: float | None = None
    ) -> Study: ...

    def stream(
        self, study: object, *, messages: Messages, timeout: float | None = None, **sampling: Any
    ) -> AsyncAnswerStream: ...

    async def segment(
        self,
        study: object,
        question: str,
        *,
        merge: str = "reference",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Segmentation: ...

    async def rank(self, study: object, texts: Sequence[str], *, timeout: float | None = None) -> Ranking: ...

    async def embed(self, study: object, *, timeout: float | None = None) -> np.ndarray: ...

    async def embed_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> TextEmbeddings: ...

    async def forget(self, study: Study, *, timeout: float | None = None) -> None: ...

    async def describe(self, study: Study, *, timeout: float | None = None) -> StudyInfo: ...

    async def info(self, *, timeout: float | None = None) -> EngineInfo: ...

    async def is_ready(self) -> bool: ...

    async def close(self) -> None: ...


class ThreadedM3D:
    """An `M3D` that blocks, called on threads: for an `M3DEngine` in this process.

    A stream ends when it is closed, or the task that reads it is cancelled. The other calls go on to their end when
    their task is cancelled; it waits for that: who cancels calls has no more of them in work than who waits.
    """

    def __init__(self, m3d: M3D):
        self._m3d = m3d
        self._threads = ThreadPoolExecutor(THREADS, "m3d")
        self._readiness = ThreadPoolExecutor(1, "m3d-ready")  # of its own: to be busy is not to be unready

    async def upload(
        self, scan: object, affine: Any = None, preset: str = "auto", *, crop: Any = None, timeout: float | None = None
    ) -> Study:
        return await self._called(lambda: self._m3d.upload(scan, affine, preset, crop=crop, timeout=timeout))

    def stream(
        self, study: object, *, messages: Messages, timeout: float | None = None, **sampling: Any
    ) -> AsyncAnswerStream:
        return _ThreadedStream(
            self._called, lambda: self._m3d.stream(study, messages=messages, timeout=timeout, **sampling)
        )

    async def segment(
        self,
        study: object,
        question: str,
        *,
        merge: str = "reference",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Segmentation:
        return await self._called(lambda: self._m3d.segment(study, question, merge=merge, timeout=timeout, **sampling))

    async def rank(self, study: object, texts: Sequence[str], *, timeout: float | None = None) -> Ranking:
        return await self._called(lambda: self._m3d.rank(study, texts, timeout=timeout))

    async def embed(self, study: object, *, timeout: float | None = None) -> np.ndarray:
        return await self._called(lambda: self._m3d.embed(study, timeout=timeout))

    async def embed_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> TextEmbeddings:
        return await self._called(lambda: self._m3d.embed_texts(texts, timeout=timeout))

    async def forget(self, study: Study, *, timeout: float | None = None) -> None:
        await self._called(lambda: self._m3d.forget(study, timeout=timeout))

    async def info(self, *, timeout: float | None = None) -> EngineInfo:
        return await self._called(lambda: self._m3d.info(timeout=timeout))

    async def describe(self, study: Study, *, timeout: float | None = None) -> StudyInfo:
        return await self._called(lambda: self._m3d.describe(study, timeout=timeout))

    async def is_ready(self) -> bool:
        return await asyncio.get_running_loop().run_in_executor(self._readiness, self._m3d.is_ready)

    async def close(self) -> None:
        await asyncio.to_thread(self._m3d.close)
        self._threads.shutdown(wait=False)
        self._readiness.shutdown(wait=False)

    async def _called(self, call: Callable[[], T], stop: Callable[[], None] | None = None) -> T:
        """What the call returns. stop: ends it sooner, when the task is cancelled."""
        called = self._threads.submit(call)
        result = asyncio.wrap_future(called)
        # Of a cancelled task no code looks at the result: asyncio would log its exception.
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            if stop is not None:
                stop()
            if not called.cancel():  # else it had not begun
                await asyncio.wait({result})
            raise


class _ThreadedStream:
    def __init__(
        self, called: Callable[[Callable[[], Any], Callable[[], None]], Any], begin: Callable[[], AnswerStream]
    ):
        self._called = called
        self._begin = begin
        self._stream: AnswerStream | None = None
        self._closed = False

    @property
    def answer(self) -> Answer | None:
        return self._stream.answer if self._stream is not None else None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        text = await self._called(self._next, self._close)
        if text is None:
            raise StopAsyncIteration
        return text

    def _next(self) -> str | None:
        """On a thread."""
        if self._stream is None:
            self._stream = self._begin()
            if self._closed:  # meanwhile
                self._stream.close()
        return next(self._stream, None)

    def _close(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.close()

    async def aclose(self) -> None:
        self._close()
