"""The front: the only process of a server that clients reach. It checks what they send, and passes it on to Triton.

Triton listens on a Unix socket in the server's private folder, so that other users and machines cannot talk to it: no
secret is needed to keep them from its model control. What the front adds to Triton:

- Only the contract's public models, tensors and types pass (`engine.server.requests`), in messages of one part of a
  scan.
- No call of Triton's is cancelled: 2.51 loses a call that is cancelled between its last response and its end. The
  models are told that nobody waits (`engine.runtime.run_folder`), and the call is read to its end.
- All clients share one connection to Triton, so that its sockets do not grow with theirs.
- Ready means that the language model is ready, too.
- On a GPU it has Triton load the language model last.

Run as `python -m engine.server.front SETTINGS`; SETTINGS is the JSON of a `FrontSettings`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import secrets
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from engine import logs
from engine.contract import DECODER_MODELS, MAX_PART_BYTES, MODELS
from engine.errors import (
    DeadlineExceeded,
    InvalidInput,
    M3DError,
    ResourceExhausted,
    Unavailable,
    from_wire,
    one_line,
    shortened,
)
from engine.runtime.run_folder import PEER, READY, RunFolder
from engine.server.requests import Refused, id_of, read, unknown_model
from engine.server.settings import FrontSettings, address

# A part, and what stands around it. gRPC refuses a longer message by its announced length, before it takes it in.
MAX_MESSAGE_BYTES = MAX_PART_BYTES + (1 << 20)
# Messages of more than this count: what Triton and its models hold of requests in work grows with them, and stays.
LARGE_BYTES = 1 << 18
IN_WORK_BYTES = 256 << 20
ROOM_S = 60.0  # that a large message waits for room
MAX_CALLS = 8192  # at the same time; each costs some 30 KB
CALLS_OF_CONNECTION = 128  # of those; further ones wait in their client
UNREAD_S = 60.0  # that a client may leave a response unread while it takes room
FIRST_MESSAGE_S = 120.0  # that a stream may be open without one
DRAIN_S = 12.0  # for calls in work when the server stops; Triton itself waits for 10 s
LOOK_S = 0.25  # between two times that Triton is asked whether it has loaded what it loads by itself
TIDY_S = 10.0  # between two times that memory is given back
EMPTY_FINAL, FINAL = "triton_enable_empty_final_response", "triton_final_response"  # parameters of Triton's

_log = logging.getLogger("engine.server.front")  # it runs as __main__

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_HEALTH = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", CALLS_OF_CONNECTION),
    ("grpc.so_reuseport", 0),  # two servers on one port would share its clients
]
_INSIDE_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class Room:
    """How many bytes of large messages are in work at Triton, in all and of each client.

    A client may take half of it, so that none shuts out the others. Twice as much may wait, half of it of one client.
    """

    def __init__(self, total: int = IN_WORK_BYTES):
        self._left = self._waiting_share = total
        self._waiting: Counter[str] = Counter()
        self._share = total // 2
        self._of_peer: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def take(self, peer: str, size: int) -> int:
        """Wait for room for a message of `size` bytes; the bytes to `give_back`. Raises Refused after ROOM_S."""
        if size <= LARGE_BYTES:
            return 0
        all_waiting = sum(self._waiting.values())
        if self._waiting[peer] + size > self._waiting_share or all_waiting + size > 2 * self._waiting_share:
            raise _no_room()
        self._waiting[peer] += size
        try:
            async with asyncio.timeout(ROOM_S), self._changed:
                await self._changed.wait_for(lambda: self._left >= size and self._of_peer[peer] + size <= self._share)
                self._left -= size
                self._of_peer[peer] += size
                return size
        except TimeoutError:
            raise _no_room() from None
        finally:
            self._waiting[peer] -= size
            if not self._waiting[peer]:
                del self._waiting[peer]

    async def give_back(self, peer: str, size: int) -> None:
        if not size:
            return
        async with self._changed:
            self._left += size
            self._of_peer[peer] -= size
            if not self._of_peer[peer]:
                del self._of_peer[peer]
            self._changed.notify_all()


class Front:
    """Passes clients' calls on to the Triton at `inside`, a gRPC address. served: the repository's models."""

    def __init__(self, inside: str, folder: RunFolder, served: Iterable[str]):
        self.folder = folder
        self.served = frozenset(served)
        self.room = Room()
        self.stopping = False
        self.loading = False  # whether models that are loaded last are not there yet
        self._tasks: set[asyncio.Task] = set()
        self._channel = grpc.aio.insecure_channel(inside, options=_INSIDE_OPTIONS)

    async def close(self) -> None:
        await self._channel.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What is served. Triton's other methods, such as model control and shared memory, are unknown here."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        methods = {
            "ServerLive": unary(self._about_server("ServerLive")),
            "ServerReady": unary(self._server_ready),
            "ServerMetadata": unary(self._about_server("ServerMetadata")),
            "ModelReady": unary(self._model_ready),
            "ModelInfer": unary(self._infer),
            "ModelStreamInfer": stream(self._stream),
        }
        for name in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
            methods[name] = unary(self._about_model(name))
        return [
            grpc.method_handlers_generic_handler(_SERVICE, methods),
            grpc.method_handlers_generic_handler(_HEALTH, {"Check": unary(self._health)}),
        ]

    async def load(self, models: Iterable[str]) -> None:
        """Have Triton load `models`, one after the other, when those are there that it loads by itself.

        Raises Unavailable if one does not load; Triton's log says why.
        """
        self.loading = True
        while not await self._says("ServerReady", b""):
            await asyncio.sleep(LOOK_S)
        for model in models:
            request = service_pb2.RepositoryModelLoadRequest(model_name=model)
            try:
                await self._call("RepositoryModelLoad", request.SerializeToString())
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"{model} was not loaded: {error.details()}") from error
        self.loading = False

    # --- whether it works --------------------------------------------------------------------------------------------
    async def is_live(self) -> bool:
        """Whether Triton answers."""
        return not self.stopping and await self._says("ServerLive", b"")

    async def is_ready(self) -> bool:
        """Whether Triton has all its models, and the language model works."""
        if self.stopping or self.loading or not self._decoder_is_ready():
            return False
        return await self._says("ServerReady", b"")

    def why_not_ready(self) -> str:
        """Words for people, which tell what is not ready."""
        if self.stopping:
            return "the server is stopping"
        return "Triton is starting" if self._decoder_is_ready() else f"the language model is {self.folder.health}"

    def _decoder_is_ready(self) -> bool:
        return "decoder" not in self.served or self.folder.health == READY

    async def _says(self, method: str, request: bytes) -> bool:
        """Whether Triton's answer is `true`, the only field of these responses."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            return bool(service_pb2.ServerReadyResponse.FromString(await self._call(method, request, 5.0)).ready)
        return False

    async def _server_ready(self, _request: bytes, _context) -> bytes:
        return service_pb2.ServerReadyResponse(ready=await self.is_ready()).SerializeToString()

    async def _model_ready(self, request: bytes, context) -> bytes:
        name = await self._known(request, context)
        needs_decoder = name in DECODER_MODELS
        ready = not self.stopping and (self._decoder_is_ready() or not needs_decoder)
        ready = ready and await self._says("ModelReady", service_pb2.ModelReadyRequest(name=name).SerializeToString())
        return service_pb2.ModelReadyResponse(ready=ready).SerializeToString()

    async def _health(self, _request: bytes, _context) -> bytes:
        return _SERVING if await self.is_ready() else _NOT_SERVING

    # --- what is passed on -------------------------------------------------------------------------------------------
    # Never the client's own message, which may have 17 MB: what it can say is written anew.
    def _about_server(self, method: str):
        async def about_server(_request: bytes, context) -> bytes:
            return await self._asked(method, b"", context)

        return about_server

    def _about_model(self, method: str):
        """What can be read of all models, those that clients may not call included."""

        async def about_model(request: bytes, context) -> bytes:
            name = await self._known(request, context)
            return await self._asked(method, service_pb2.ModelReadyRequest(name=name).SerializeToString(), context)

        return about_model

    async def _asked(self, method: str, request: bytes, context) -> bytes:
        try:
            return await self._call(method, request, 30.0)
        except grpc.aio.AioRpcError as error:
            return await self._abort(error, context)

    async def _known(self, request: bytes, context) -> str:
        """The model's name; empty where the request is about all. These requests have name and version alike."""
        try:
            asked = service_pb2.ModelReadyRequest.FromString(request)
        except DecodeError:
            error = InvalidInput("these bytes are no message of this method")
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.to_wire())
        if asked.version not in ("", "1"):
            error = InvalidInput(f"version is 1 or not given, not {shortened(asked.version)}")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.to_wire())
        if asked.name and asked.name not in self.served:
            await context.abort(*unknown_model(asked.name))
        return asked.name

    async def _call(self, method: str, request: bytes, timeout: float | None = None) -> bytes:
        return await asyncio.shield(
            self._spawn(self._channel.unary_unary(f"/{_SERVICE}/{method}")(request, timeout=timeout))
        )

    def open_stream(self):
        """A ModelStreamInfer of Triton's."""
        return self._channel.stream_stream(f"/{_SERVICE}/ModelStreamInfer")()

    # --- inference ---------------------------------------------------------------------------------------------------
    async def _infer(self, message: bytes, context) -> bytes:
        work = _Work(self, context.peer())
        inferring = self._spawn(self._inferred(message, work))
        del message
        try:
            return await asyncio.shield(inferring)
        except asyncio.CancelledError:
            work.abandon()
            raise
        except Refused as refused:
            end = refused.status, refused.words
        except grpc.aio.AioRpcError as error:
            end = self._end_of(error)
        finally:
            del inferring
        # Here, and not above: gRPC's context and the error of `abort` keep each other, and with them the errors that
        # this one comes from, with their frames, which have the message: until Python looks for cycles.
        return await context.abort(*end)

    async def _inferred(self, message: bytes, work: _Work) -> bytes:
        try:
            answered = service_pb2.ModelInferResponse.FromString(
                await self._call("ModelInfer", await work.admit(message))
            )
            await work.responded(answered)
            return answered.SerializeToString()
        finally:
            await work.end()

    async def _stream(self, messages: AsyncIterator[bytes], context) -> None:
        stream = _Stream(self, context.peer())
        self._spawn(stream.run(messages))
        try:
            while (response := await stream.answers.get()) is not None:
                if isinstance(response, Exception):
                    raise response
                await self._write(response, stream, context)
        except grpc.aio.AioRpcError as error:
            await self._abort(error, context)
        except Refused as refused:
            await context.abort(refused.status, refused.words)
        except TimeoutError:
            late = DeadlineExceeded(f"no request came in this stream for {FIRST_MESSAGE_S:.0f} s: open it with one")
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, late.to_wire())
        finally:
            stream.abandon()

    async def _write(self, response: bytes, stream: _Stream, context) -> None:
        """Send a response, however slow its client. Raises Refused if the stream keeps room from others meanwhile."""
        writing = asyncio.ensure_future(context.write(response))
        writing.add_done_callback(_look_at)
        try:
            while not (await asyncio.wait({writing}, timeout=UNREAD_S))[0]:
                if stream.takes_room:
                    raise Refused.of(
                        ResourceExhausted(
                            f"no response was read for {UNREAD_S:.0f} s, and large requests of the stream were in work"
                        )
                    )
            await writing
        finally:
            writing.cancel()

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        """Work that goes on when its client has gone: cancelling a task that waits for Triton cancels Triton's call."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        _look_at(task)

    async def _abort(self, error: grpc.aio.AioRpcError, context) -> Any:
        return await context.abort(*self._end_of(error))

    def _end_of(self, error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
        """How to end a call that Triton ended so; what is only known of its socket is said in words for clients."""
        status, words = error.code(), error.details() or ""
        is_typed = type(from_wire(words)) is not M3DError
        if not is_typed and (self.stopping or status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)):
            status, words = grpc.StatusCode.UNAVAILABLE, self.unavailable().to_wire()
        return status, words

    def unavailable(self) -> Unavailable:
        """Why nothing is answered now."""
        state = "is stopping" if self.stopping else "does not answer: it is starting, or has ended"
        return Unavailable(f"the server {state}; try again when it is ready")


class _Work:
    """The requests of one client's call, until they are answered."""

    def __init__(self, front: Front, peer: str):
        self.abandoned = False
        self._front = front
        self._peer = peer
        self._open: dict[str, _Request] = {}

    async def admit(self, message: bytes) -> bytes:
        """The message as Triton is to get it: with an id of its own and its client's name. Raises Refused."""
        if self._front.stopping:
            raise Refused.of(self._front.unavailable())
        request = read(message, self._front.served)
        wanted: frozenset[str] = frozenset()
        if request.outputs and MODELS[request.model_name].ensemble:
            # Triton leaves out the steps behind outputs that are not asked for, those included that others need.
            wanted = frozenset(output.name for output in request.outputs)
            request.ClearField("outputs")
            message = request.SerializeToString()
        id_, client_id, wants_final = secrets.token_hex(8), request.id, request.parameters[EMPTY_FINAL].bool_param
        del request  # it has the tensors once more, and there may be no room for a minute
        taken = await self._front.room.take(self._peer, len(message))
        self._open[id_] = _Request(client_id, taken, wants_final, wanted)
        if self.abandoned:  # while it waited for room; `end` gives it back
            raise Refused(grpc.StatusCode.CANCELLED, "the client has gone")
        marks = service_pb2.ModelInferRequest(id=id_)
        marks.parameters[PEER].string_param = self._peer
        marks.parameters[EMPTY_FINAL].bool_param = True
        return message + marks.SerializeToString()  # protobuf: two messages one behind the other are both in one

    @property
    def takes_room(self) -> bool:
        """Whether large requests of it are in work."""
        return any(request.taken for request in self._open.values())

    async def responded(self, response: service_pb2.ModelInferResponse, error: str = "") -> bool:
        """Give the response its client's id back. Returns whether it is for the client."""
        request = self._open.get(response.id)
        if request is None:
            return True
        id_, response.id = response.id, request.client_id
        if request.wanted:
            _leave_out(response, request.wanted)
        await self._give_back(request)
        final = response.parameters[FINAL].bool_param if FINAL in response.parameters else bool(error)
        if final:
            del self._open[id_]
            self._front.folder.forget(id_) if self.abandoned else None
        if not request.empty_final:
            response.parameters.pop(FINAL, None)
            return bool(error or response.outputs)
        return True

    def abandon(self) -> None:
        """The client has gone: tell the models."""
        self.abandoned = True
        for id_ in self._open:
            with contextlib.suppress(OSError):  # the disk is full: the answer is decoded to its end
                self._front.folder.cancel(id_)

    async def end(self) -> None:
        """Nothing more comes from Triton."""
        while self._open:
            id_, request = self._open.popitem()
            await self._give_back(request)
            if self.abandoned:
                self._front.folder.forget(id_)

    async def _give_back(self, request: _Request) -> None:
        taken, request.taken = request.taken, 0
        await self._front.room.give_back(self._peer, taken)


@dataclass
class _Request:
    """client_id: the id that the client gave. taken: bytes of `Room`. empty_final: whether the client asked for it.
    wanted: the outputs that are left in its responses; all where it is empty.
    """

    client_id: str
    taken: int
    empty_final: bool
    wanted: frozenset[str] = frozenset()


class _Stream(_Work):
    """One stream of Triton's for one of a client's. What is refused is answered in the stream, as Triton does.

    answers: responses for the client, or the error that ends the stream; None after the last.
    """

    def __init__(self, front: Front, peer: str):
        super().__init__(front, peer)
        self.answers: asyncio.Queue[bytes | Exception | None]
        self.answers = asyncio.Queue(maxsize=1)  # a slow reader holds up its own stream

    async def run(self, messages: AsyncIterator[bytes]) -> None:
        """Returns when all is answered."""
        call = receiving = None
        try:
            async for message in _begun(messages):
                try:
                    admitted = await self.admit(message)
                except Refused as refused:
                    await self._answer(_refusal(message, refused))
                    continue
                if call is None:
                    call = self._front.open_stream()
                    receiving = asyncio.ensure_future(self._receive(call))
                await call.write(admitted)
        except (asyncio.CancelledError, grpc.RpcError, asyncio.InvalidStateError):
            pass  # the client has gone, or Triton has ended the stream, which `_receive` tells
        except Exception as error:
            await self._answer(error)
        finally:
            try:
                if call is not None and receiving is not None:
                    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                        await call.done_writing()
                    await receiving
            finally:
                await self.end()
                await self._answer(None)

    def abandon(self) -> None:
        super().abandon()
        self._drop_answers()

    def _drop_answers(self) -> None:
        """What waits for a place has one now, and goes nowhere."""
        while not self.answers.empty():
            self.answers.get_nowait()

    async def _receive(self, call) -> None:
        try:
            async for message in call:
                response = service_pb2.ModelStreamInferResponse.FromString(message)
                if await self.responded(response.infer_response, response.error_message):
                    await self._answer(response.SerializeToString())
        except Exception as error:
            await self._answer(error)

    async def _answer(self, response: bytes | Exception | None) -> None:
        if not self.abandoned:
            await self.answers.put(response)
        if self.abandoned:  # while this waited, and something else may wait behind it
            self._drop_answers()


def _look_at(task: asyncio.Task) -> None:
    """At the error of a task that nobody else may look at: asyncio would write it into the log."""
    task.cancelled() or task.exception()


async def _begun(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The messages of a stream. Raises TimeoutError if the first does not come within FIRST_MESSAGE_S."""
    try:
        first = await asyncio.wait_for(anext(messages), FIRST_MESSAGE_S)
    except StopAsyncIteration:
        return
    yield first
    async for message in messages:
        yield message


def _no_room() -> Refused:
    return Refused.of(ResourceExhausted("the server takes in as much as it has memory for: try again shortly"))


def _leave_out(response: service_pb2.ModelInferResponse, wanted: frozenset[str]) -> None:
    """Take out the outputs that are not wanted."""
    for place in reversed(range(len(response.outputs))):
        if response.outputs[place].name not in wanted:
            del response.outputs[place], response.raw_output_contents[place]


def _refusal(message: bytes, refused: Refused) -> bytes:
    """A response as Triton makes it of an error in a stream."""
    response = service_pb2.ModelStreamInferResponse(error_message=refused.words)
    response.infer_response.id = id_of(message)
    return response.SerializeToString()


# --- the process -----------------------------------------------------------------------------------------------------
def keep_log_short() -> None:
    """Leave out of the log what clients could fill it with: that they went in the middle, or do not speak HTTP."""
    theirs = (asyncio.CancelledError, grpc.aio.InternalError, HttpProcessingError, web.RequestPayloadError)
    for name in ("grpc._cython.cygrpc", "aiohttp.server"):
        logging.getLogger(name).addFilter(
            lambda record: not (record.exc_info and isinstance(record.exc_info[1], theirs))
        )


async def serve(settings: FrontSettings) -> None:
    """Serve until SIGTERM. Raises Unavailable if a model that is loaded last does not load."""
    logs.set_up("front")
    keep_log_short()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    front = Front(settings.inside, RunFolder(settings.folder), settings.models)
    server = grpc.aio.server(handlers=front.handlers(), options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    server.add_insecure_port(address(settings.host, settings.grpc_port))
    await server.start()
    http = web.AppRunner(pages(front, settings.inside_metrics), access_log=None, handle_signals=False)
    await http.setup()
    await web.TCPSite(http, settings.metrics_host, settings.metrics_port).start()
    _log.info("listening on %s", address(settings.host, settings.grpc_port))
    tidying = asyncio.ensure_future(give_memory_back())
    if settings.last:
        stopping, loading = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(front.load(settings.last))
        await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
        loading.cancel()
    await stop.wait()
    _log.info("stopping")
    tidying.cancel()
    front.stopping = True
    await server.stop(DRAIN_S)
    await http.cleanup()
    await front.close()


async def give_memory_back() -> None:
    """Now and then, all that is free: 200 messages of 16 MB at once would leave 6 GB here for good.

    gRPC's errors know the frames, and so the messages, that they came through: they go when Python looks for cycles,
    which it does by the number of objects. And what is freed in small pieces stays with the C library.
    """
    gc.freeze()  # what is here from the start need not be looked through each time
    trim = ctypes.CDLL(None).malloc_trim
    while True:
        await asyncio.sleep(TIDY_S)
        gc.collect()
        await asyncio.to_thread(trim, 0)


def pages(front: Front, inside_metrics: str) -> web.Application:
    """/health/live, /health/ready and /metrics, which are Triton's."""

    async def live(_request) -> web.Response:
        return _state(await front.is_live(), "live", "Triton does not answer")

    async def ready(_request) -> web.Response:
        return _state(await front.is_ready(), "ready", front.why_not_ready())

    async def metrics(_request) -> web.Response:
        try:
            connector, limit = aiohttp.UnixConnector(inside_metrics), aiohttp.ClientTimeout(total=10)
            async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
                async with session.get("http://triton/metrics") as response:
                    return web.Response(text=await response.text(), content_type="text/plain")
        except (aiohttp.ClientError, OSError, TimeoutError):
            return web.Response(status=503, text="Triton does not answer\n")

    application = web.Application(client_max_size=1 << 10)
    application.router.add_get("/health/live", live)
    application.router.add_get("/health/ready", ready)
    application.router.add_get("/metrics", metrics)
    return application


def _state(good: bool, word: str, otherwise: str) -> web.Response:
    return web.Response(status=200 if good else 503, text=f"{word if good else otherwise}\n")


if __name__ == "__main__":
    try:
        asyncio.run(serve(FrontSettings(**json.loads(sys.argv[1]))))
    except Unavailable as error:
        sys.exit(f"front: {one_line(error)}")
