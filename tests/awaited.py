"""`AsyncM3DClient` for tests that wait, so that the same ones hold for it."""

from __future__ import annotations

from engine.client import AsyncM3DClient
from engine.runtime.decoder_step import LoopThread


class Awaited:
    """An `AsyncM3DClient` whose coroutines are awaited on a loop of their own."""

    def __init__(self, url: str, timeout: float | None = 600.0):
        self.thread = LoopThread("awaited")
        self.client = AsyncM3DClient(url, timeout)

    def __getattr__(self, name):
        method = getattr(self.client, name)
        return lambda *arguments, **settings: self.thread.run(method(*arguments, **settings))

    def stream(self, *arguments, **settings):
        return AwaitedStream(self.client.stream(*arguments, **settings), self.thread)

    def end(self) -> None:
        self.close()
        self.thread.close()


class AwaitedStream:
    def __init__(self, stream, thread: LoopThread):
        self.stream, self.thread = stream, thread

    @property
    def answer(self):
        return self.stream.answer

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self.thread.run(anext(self.stream))
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self):
        self.thread.run(self.stream.aclose())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
