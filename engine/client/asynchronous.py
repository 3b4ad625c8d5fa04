"""The client for asyncio: the methods of `M3DClient` as coroutines.

async with AsyncM3DClient("localhost:8001") as client:
    study = await client.upload("scan.nii.gz")
    async for text in client.stream(study, "Describe the findings."):
        print(text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from engine.api import Answer, EngineInfo, Messages, Ranking, Segmentation, Study, TextEmbeddings
from engine.client import wire
from engine.client.connection import READY_S
from engine.contract import Tensor
from engine.errors import Cancelled, M3DError
from engine.methods import STUDY, Asked, File, Methods, Outputs, Steps

if TYPE_CHECKING:  # it would bring SciPy into every program that asks
    from engine.volume.crop import Crop

T = TypeVar("T")


class AsyncM3DClient:
    """A connection to one server, for one asyncio loop, with the methods of `engine.api.M3D`: `stream` returns an
    asynchronous iterator, `is_ready`, `close` and all others are awaited. Arguments, results and errors are the same.

    A call is cancelled, on the server too, when its task is, when its deadline passes, and when its stream is closed.

    url: host:port of the server's gRPC port. timeout: as of `M3DClient`.
    """

    def __init__(self, url: str = wire.DEFAULT_URL, timeout: float | None = 600.0):
        self._methods = Methods(timeout)
        self._transport = AsyncConnection(wire.checked_url(url))

    @property
    def url(self) -> str:
        return self._transport.url

    @property
    def timeout(self) -> float | None:
        return self._methods.timeout

    async def __aenter__(self) -> AsyncM3DClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def upload(
        self,
        scan: object,
        affine: np.ndarray | None = None,
        preset: str = "auto",
        *,
        crop: Crop | str | np.ndarray | None = None,
        timeout: float | None = None,
    ) -> Study:
        """See `engine.api.M3D.upload`. The scan is read on a thread."""
        return await self._run(self._methods.upload(scan, affine, preset, crop, timeout))

    async def ask(
        self,
        study: object,
        question: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """See `engine.api.M3D.ask`."""
        return await self._run(self._methods.ask(study, question, messages, timeout, sampling))

    def stream(
        self,
        study: object,
        question: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> AsyncTextStream:
        """See `engine.api.M3D.stream`. The question is sent when the first text is waited for."""
        return AsyncTextStream(self._methods.asked(study, question, messages, sampling, True, timeout), self._transport)

    async def segment(
        self,
        study: object,
        question: str | None = None,
        return_logits: bool = False,
        *,
        messages: Messages | None = None,
        merge: str = "reference",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Segmentation:
        """See `engine.api.M3D.segment`."""
        steps = self._methods.segment(study, question, messages, return_logits, merge, timeout, sampling)
        return await self._run(steps)

    async def rank(self, study: object, texts: Sequence[str], *, timeout: float | None = None) -> Ranking:
        """See `engine.api.M3D.rank`."""
        return await self._run(self._methods.rank(study, texts, timeout))

    async def embed(self, study: object, *, timeout: float | None = None) -> np.ndarray:
        """See `engine.api.M3D.embed`."""
        return await self._run(self._methods.embed(study, timeout))

    async def embed_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> TextEmbeddings:
        """See `engine.api.M3D.embed_texts`."""
        return await self._run(self._methods.embed_texts(texts, timeout))

    async def forget(self, study: Study, *, timeout: float | None = None) -> None:
        """See `engine.api.M3D.forget`."""
        await self._run(self._methods.forget(study, timeout))

    async def is_ready(self) -> bool:
        """See `engine.api.M3D.is_ready`."""
        return await self._transport.is_ready()

    async def info(self, *, timeout: float | None = None) -> EngineInfo:
        """See `engine.api.M3D.info`."""
        return await self._run(self._methods.info(timeout))

    async def close(self) -> None:
        """See `engine.api.M3D.close`."""
        await self._transport.close()

    async def _run(self, steps: Steps[T]) -> T:
        return await run(steps, self._transport)


class AsyncTextStream(AsyncIterator[str]):
    """An answer as it grows: iterate over its pieces of text; `answer` is the whole when the iteration is over.

    `aclose`, leaving an `async with` block, or dropping the object cancels the request on the server.
    """

    def __init__(self, asked: Asked, transport: AsyncConnection):
        self._asked = asked
        self._transport = transport
        self._is_open = False

    @property
    def answer(self) -> Answer | None:
        return self._asked.answer

    async def __anext__(self) -> str:
        if not self._is_open:
            self._is_open = True
            try:
                await run(self._asked.open(), self._transport)
            except BaseException:  # the question was not sent: what is read next says so
                self._asked.close()
                raise
        text = await run(self._asked.next_text(), self._transport)
        if text is None:
            raise StopAsyncIteration
        return text

    async def aclose(self) -> None:
        self._asked.close()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


async def run(steps: Steps[T], transport: AsyncConnection) -> T:
    """As `engine.methods.run`, on a transport whose calls are awaited."""
    try:
        call = next(steps)
        while True:
            try:
                result = await call(transport)
            except BaseException as error:
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as end:
        return end.value


class AsyncConnection:
    """A gRPC channel to one server, as an asynchronous transport of `engine.methods`, see `Connection`."""

    def __init__(self, url: str):
        self.url = url
        self._closed = False

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        """Made by the first call: it belongs to the loop that runs then."""
        return grpc.aio.insecure_channel(self.url, options=wire.OPTIONS)

    async def close(self) -> None:
        """Close the channel; calls in progress end with Cancelled."""
        self._closed = True
        await self._channel.close()

    async def is_ready(self) -> bool:
        try:
            self._check_open()
            call = self._channel.unary_unary(
                f"/{wire.SERVICE}/ServerReady",
                service_pb2.ServerReadyRequest.SerializeToString,
                service_pb2.ServerReadyResponse.FromString,
            )
            return (await self._awaited(call(service_pb2.ServerReadyRequest(), timeout=READY_S))).ready
        except M3DError:
            return False

    async def work(self, function: Callable, *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)

    async def infer(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> Outputs:
        self._check_open()
        call = self._channel.unary_unary(
            f"/{wire.SERVICE}/ModelInfer", wire.InferRequest.serialized, service_pb2.ModelInferResponse.FromString
        )
        return wire.outputs_of(await self._awaited(call(wire.request_of(model, inputs), timeout=timeout)))

    async def upload(self, file: File, inputs: Mapping[Tensor, object], timeout: float | None) -> Outputs:
        requests = [wire.request_of(STUDY, request) for request in wire.upload_requests(file.take(), inputs)]
        wanted, waiting = len(requests), iter(requests)
        del requests  # the iterator has them until the last is sent
        responses, last, count = self._stream(waiting, timeout, alone=wanted == 1), Outputs(), 0
        while (outputs := await responses.read()) is not None:
            last, count = outputs, count + 1
        if count < wanted:
            raise wire.too_few(count, wanted)
        return last

    async def stream(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> AsyncResponseStream:
        return self._stream(iter((wire.request_of(model, inputs),)), timeout, alone=True)

    def error(self, error: grpc.RpcError, call: grpc.aio.Call, cancelled: bool = False) -> M3DError:
        """The typed error that a failed call stands for. cancelled: whether this side cancelled it."""
        return wire.call_error(self.url, error, cancelled or self._closed, late=call.time_remaining() == 0)

    def was_closed(self) -> bool:
        return self._closed

    def _stream(self, requests, timeout: float | None, alone: bool) -> AsyncResponseStream:
        self._check_open()
        call = self._channel.stream_stream(
            f"/{wire.SERVICE}/ModelStreamInfer",
            wire.InferRequest.serialized,
            service_pb2.ModelStreamInferResponse.FromString,
        )
        return AsyncResponseStream(self, call(requests, timeout=timeout), alone)

    async def _awaited(self, call) -> Any:
        try:
            return await call
        except grpc.RpcError as error:
            raise self.error(error, call) from None
        except asyncio.CancelledError:
            if self._closed:
                raise Cancelled("the request was cancelled by this client") from None
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise wire.closed(self.url)


class AsyncResponseStream:
    """As `ResponseStream`, awaited."""

    def __init__(self, connection: AsyncConnection, call, alone: bool):
        self._connection = connection
        self._alone = alone
        self._call = call
        self._cancelled = False

    async def read(self) -> Outputs | None:
        """The next one; None after the last."""
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise self._connection.error(error, self._call, self._cancelled) from None
        except asyncio.CancelledError:  # gRPC's, or that of the task that waits
            if self._cancelled or self._connection.was_closed():
                raise Cancelled("the request was cancelled by this client") from None
            self.close()
            raise
        if message is grpc.aio.EOF:
            return None
        if message.error_message:
            if self._alone:
                await self.finish()
            else:
                self.close()
            raise wire.server_error(message.error_message)
        return wire.outputs_of(message.infer_response)

    async def finish(self) -> None:
        """See `ResponseStream.finish`."""
        with contextlib.suppress(grpc.RpcError):
            while await self._call.read() is not grpc.aio.EOF:
                pass

    def close(self) -> None:
        self._cancelled = True
        self._call.cancel()

    def __del__(self):
        self._call.cancel()
