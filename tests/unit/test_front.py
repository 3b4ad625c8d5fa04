"""The front between clients and a Triton that the tests hold: what passes, whose it is, and what is left behind.

Each test ends with the promise of `running`: no task, no id and no room of the front's is taken any more, and nothing
went wrong that only its log tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import queue
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler

import grpc
import numpy as np
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine import contract
from engine.client import M3DClient, wire
from engine.errors import DeadlineExceeded, InvalidInput, ResourceExhausted, Unavailable, from_wire
from engine.runtime.run_folder import READY, RunFolder
from engine.scan import read_scan
from engine.server import front
from engine.server.requests import Refused
from engine.server.server import free_ports
from engine.server.settings import FrontSettings
from tests.conftest import ROOT
from tests.unit.fake_triton import ANSWER, FINAL, HANDLE, HeldTriton, final, response

PATIENCE_S = 60
EMPTY_FINAL = "triton_enable_empty_final_response"
LARGE = front.LARGE_BYTES + 1
SLOT = LARGE + (1 << 10)  # of room, for a scan of LARGE bytes and what stands around it
SERVICE = "inference.GRPCInferenceService"
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


# --- a front and its clients -----------------------------------------------------------------------------------------
class WatchedFolder(RunFolder):
    """Lets tests wait for its ids."""

    def __init__(self, path):
        super().__init__(path)
        self._changed = threading.Condition()

    def cancel(self, request_id: str) -> None:
        super().cancel(request_id)
        self._tell()

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, ids: set[str]) -> None:
        with self._changed:
            reached = self._changed.wait_for(lambda: self.cancelled() == ids, PATIENCE_S)
        assert reached, f"waited for the cancelled ids {ids}, there are {self.cancelled()}"


class WatchedRoom(front.Room):
    """Lets tests wait until a message waits for room."""

    def __init__(self, total: int):
        super().__init__(total)
        self.total = total
        self.waiting = threading.Semaphore(0)
        self._changed.wait = self._told(self._changed.wait)

    def _told(self, wait):
        def told():
            self.waiting.release()
            return wait()

        return told

    @property
    def is_whole(self) -> bool:
        return self._left == self.total and not self._of_peer and not self._waiting


class Running:
    """A front on an event loop of its own, for gRPC at `url` and HTTP at `pages`."""

    def __init__(self, inside: str, folder: WatchedFolder, inside_metrics: str = "", served=contract.MODELS):
        self.folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front")
        self._thread.start()
        self.run(self._start(inside, served, inside_metrics))

    async def _start(self, inside: str, served, inside_metrics: str) -> None:
        self.front = front.Front(inside, self.folder, served)
        self.room = self.front.room = WatchedRoom(front.IN_WORK_BYTES)
        self._server = grpc.aio.server(handlers=self.front.handlers(), options=front._OPTIONS)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._http = web.AppRunner(front.pages(self.front, inside_metrics), access_log=None, handle_signals=False)
        await self._http.setup()
        await web.TCPSite(self._http, "127.0.0.1", 0).start()
        self.pages = self._http.addresses[0]

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def make_room(self, total: int) -> WatchedRoom:
        """A small room instead of the large one."""

        async def make():
            self.room = self.front.room = WatchedRoom(total)

        self.run(make())
        return self.room

    def settle(self) -> None:
        """Until all that clients asked for has ended."""
        self.run(_ended(self.front))

    def stop(self) -> None:
        """Whatever happened, nothing is left."""
        try:
            self.settle()
            assert self.front._tasks == set() and self.folder.cancelled() == set() and self.room.is_whole
        finally:
            try:
                self.run(self._end())
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    async def _end(self) -> None:
        await self._server.stop(0)
        await self._http.cleanup()
        await self.front.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}  # as asyncio.run does at its end
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def run(work) -> None:
    """`asyncio.run`, which does not wait for what hangs."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(work, PATIENCE_S))
    finally:
        loop.close()


async def _ended(of: front.Front) -> None:
    async with asyncio.timeout(PATIENCE_S / 2):
        while of._tasks:
            await asyncio.wait(set(of._tasks))


class Client:
    def __init__(self, url: str):
        self.channel = grpc.insecure_channel(url, options=OPTIONS)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.calls: list = []
        self._streams: list[Stream] = []

    def infer(self, request) -> service_pb2.ModelInferResponse:
        return self.stub.ModelInfer(request, timeout=PATIENCE_S)

    def send(self, method: str, message: bytes) -> bytes:
        """A unary call of bytes as they are."""
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(message, timeout=PATIENCE_S)

    def stream(self, timeout: float = PATIENCE_S) -> Stream:
        self._streams.append(Stream(self.channel, timeout))
        return self._streams[-1]

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self.channel.close()


class Stream:
    """A stream whose requests are sent one by one."""

    def __init__(self, channel, timeout: float):
        self._to_send: queue.SimpleQueue = queue.SimpleQueue()
        stream = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            service_pb2.ModelStreamInferResponse.FromString,
        )
        self.call = stream(iter(self._to_send.get, None), timeout=timeout)

    def send(self, *requests) -> None:
        for request in requests:
            self._to_send.put(request)

    def receive(self) -> service_pb2.ModelStreamInferResponse:
        return next(self.call)

    def rest(self) -> list[service_pb2.ModelStreamInferResponse]:
        """What comes after the last request."""
        self._to_send.put(None)
        return list(self.call)

    def close(self) -> None:
        self._to_send.put(None)
        self.call.cancel()


def ask(model: str, id_: str = "mine", **inputs) -> service_pb2.ModelInferRequest:
    """A request with these inputs, in this order."""
    tensors = {tensor.name: tensor for tensor in contract.MODELS[model].inputs}
    message = wire.request_of(model, {tensors[name]: value for name, value in inputs.items()}).serialized()
    request = service_pb2.ModelInferRequest.FromString(message)
    request.id = id_
    return request


def study(handle: str = "a", id_: str = "mine", size: int = 0) -> service_pb2.ModelInferRequest:
    """A request of one response, which HeldTriton answers with the same handle. size: bytes of a scan."""
    return ask("study", id_, STUDY=handle, VOLUME=bytes(size) or None)


def chat(handle: str = "a", id_: str = "mine", wants_end: bool | None = None) -> service_pb2.ModelInferRequest:
    """A request of any number of responses."""
    request = ask("m3d_chat", id_, STUDY=handle, QUESTION="what?")
    if wants_end is not None:
        request.parameters[EMPTY_FINAL].bool_param = wants_end
    return request


def handle_of(answered: service_pb2.ModelInferResponse) -> str:
    return wire.outputs_of(answered).text("STUDY")


def said(response: service_pb2.ModelStreamInferResponse) -> tuple[str, str]:
    """Whose a response is, and what it says."""
    return response.infer_response.id, response.error_message or handle_of(response.infer_response)


@contextlib.contextmanager
def fails_as(status: grpc.StatusCode, words: str = "", kind: type = Exception):
    """kind: the typed error that its words stand for."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert (caught.value.code(), caught.value.details()) == (status, caught.value.details())
    assert re.search(words, caught.value.details())
    assert isinstance(from_wire(caught.value.details()), kind)


@pytest.fixture
def held(tmp_path):
    triton = HeldTriton(tmp_path / "grpc")
    yield triton
    triton.stop()


front.keep_log_short()


class Log(logging.Handler):
    """What goes wrong in the front, and nobody else hears of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(self.format(record))


@pytest.fixture
def running(tmp_path, held):
    log = Log()
    logging.getLogger().addHandler(log)
    running = Running(held.address, WatchedFolder(tmp_path), str(tmp_path / "metrics"))
    running.folder.health = READY
    yield running
    held.gate.set()
    running.stop()
    logging.getLogger().removeHandler(log)
    assert log.words == []


@pytest.fixture
def new_client(running):
    clients = []

    def new() -> Client:
        clients.append(Client(running.url))
        return clients[-1]

    yield new
    for client in clients:
        client.close()


@pytest.fixture
def client(new_client):
    return new_client()


# --- whose a response is ---------------------------------------------------------------------------------------------
def test_a_response_comes_as_triton_gave_it_with_the_clients_own_id(client, held):
    given_ = response(STUDY="abc", STUDY_INFO='{"a": 1}')
    given_.parameters["of_the_model"].string_param = "kept"
    held.answers = lambda request: [given_]
    answered = client.infer(study(id_="mine"))
    expected = service_pb2.ModelInferResponse()
    expected.CopyFrom(given_)
    expected.id = "mine"
    assert answered == expected and answered.model_name == "study"


def test_a_streams_responses_come_as_triton_gave_them_in_their_order(client, held):
    held.answers = lambda request: [response(TEXT=f"{handle} {n}") for handle in ["liver"] for n in range(50)]
    stream = client.stream()
    stream.send(chat(id_="first"), chat(id_="second"))
    answered = stream.rest()
    texts = [(a.infer_response.id, wire.outputs_of(a.infer_response).text("TEXT")) for a in answered]
    assert texts == [(id_, f"liver {n}") for id_ in ("first", "second") for n in range(50)]
    assert {a.infer_response.model_name for a in answered} == {"m3d_chat"}


def test_triton_sees_ids_of_the_fronts_own_and_whose_connection_it_is(new_client, held):
    one, other = new_client(), new_client()
    for client in (one, other, one):
        client.infer(study(id_="mine"))
    stream = one.stream()
    stream.send(study(id_="mine"))
    stream.rest()
    ids = [request.id for request in held.requests]
    assert len(set(ids)) == 4 and all(re.fullmatch("[0-9a-f]{16}", id_) for id_ in ids)
    peers = [request.parameters["m3d_peer"].string_param for request in held.requests]
    assert peers[0] == peers[2] == peers[3] != peers[1]
    assert all(re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", peer) for peer in peers)


def test_triton_sees_the_rest_of_a_request_as_it_is(client, held):
    request = ask("segmentation", STUDY="a", SEG_STATES=[[1.0, 2.0]], RETURN_LOGITS=[True])
    request.outputs.add(name="MASK")
    client.infer(request)
    seen = held.requests[0]
    assert seen.inputs == request.inputs and seen.outputs == request.outputs
    assert list(seen.raw_input_contents) == list(request.raw_input_contents)
    assert set(seen.parameters) == {"m3d_peer", EMPTY_FINAL}


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_answers_of_clients_that_chose_the_same_ids_do_not_mix(new_client, held, streams):
    """All are at Triton at the same time, and answered in no order."""
    held.answers = held.held

    def ask_three(number: int) -> list[str]:
        client = new_client()
        handles = [f"{number} {n}" for n in range(3)]
        if streams:
            stream = client.stream()
            stream.send(*(study(handle, "1") for handle in handles))
            answered = [a.infer_response for a in stream.rest()]
        else:
            calls = [client.stub.ModelInfer.future(study(handle, "1"), timeout=PATIENCE_S) for handle in handles]
            answered = [call.result() for call in calls]
        assert {a.id for a in answered} == {"1"}
        return [handle_of(a) for a in answered]

    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(ask_three, number) for number in range(6)]
        held.wait_for(arrived=6)
        held.gate.set()
        for number, answer in enumerate(answers):
            assert answer.result() == [f"{number} {n}" for n in range(3)]


# --- errors ----------------------------------------------------------------------------------------------------------
def test_an_error_in_a_stream_has_its_requests_id_and_the_stream_goes_on(client, held):
    held.answers = lambda r: ["INVALID_ARGUMENT: no"] if b"bad" in r.raw_input_contents[0] else held.echo(r)
    stream = client.stream()
    stream.send(chat("a", "1"), chat("bad", "2"), chat("b", "3"))
    assert [said(r) for r in stream.rest()] == [("1", "a"), ("2", "INVALID_ARGUMENT: no"), ("3", "b")]


def test_an_error_that_is_not_the_last_response_leaves_no_id_of_the_fronts_behind_it(client, held):
    """A model may send an error, and the end of its answer after it."""
    failed = service_pb2.ModelStreamInferResponse(error_message="INTERNAL: no")
    failed.infer_response.SetInParent()
    held.answers = lambda request: [failed]
    stream = client.stream()
    stream.send(chat("a", "1"), chat("a", "2", wants_end=True))
    answered = [(r.infer_response.id, r.error_message) for r in stream.rest()]
    assert answered == [("1", "INTERNAL: no"), ("2", "INTERNAL: no"), ("2", "")]


@pytest.mark.parametrize(
    "status, words",
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT: the scan has 2 axes"),
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND: study is unknown"),
        (grpc.StatusCode.INTERNAL, "unexpected deadlock"),
        # Triton has no code of its own for it.
        (grpc.StatusCode.UNAVAILABLE, "in ensemble 'm3d_retrieve', RESOURCE_EXHAUSTED: too many wait"),
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: the language model is out of order"),
        (grpc.StatusCode.CANCELLED, "CANCELLED: the request was cancelled by its client, or the server stops"),
    ],
)
def test_what_a_model_says_of_an_error_is_not_replaced(client, held, status, words):
    held.answers = lambda request: [(status, words)]
    with fails_as(status, f"^{re.escape(words)}$"):
        client.infer(study())
    held.on_asked = lambda context: context.abort(status, words)
    with fails_as(status, f"^{re.escape(words)}$"):
        client.stub.ModelConfig(service_pb2.ModelConfigRequest(name="study"), timeout=PATIENCE_S)


@pytest.mark.parametrize("status", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED], ids=lambda s: s.name)
def test_a_call_that_triton_ends_because_it_ends_is_unavailable(client, held, status):
    held.answers = lambda request: [(status, "Socket closed")]
    held.on_asked = lambda context: context.abort(status, "Socket closed")
    with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
        client.infer(study())
    with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
        client.stub.ModelConfig(service_pb2.ModelConfigRequest(name="study"), timeout=PATIENCE_S)
    assert not client.stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=PATIENCE_S).ready
    stream = client.stream()
    stream.send(study())
    with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
        stream.receive()


# --- the end of an answer --------------------------------------------------------------------------------------------
def marks(responses: Iterable[service_pb2.ModelStreamInferResponse]) -> list[tuple[bool, bool | None]]:
    """Of each response whether it has outputs, and whether it says that it is the last; None if it does not say."""
    return [
        (
            bool(r.infer_response.outputs),
            r.infer_response.parameters[FINAL].bool_param if FINAL in r.infer_response.parameters else None,
        )
        for r in responses
    ]


@pytest.mark.parametrize("wants_end", [None, False])
def test_a_client_that_does_not_ask_for_the_end_of_an_answer_is_not_told_of_it(client, held, wants_end):
    held.answers = lambda request: [response(TEXT=str(n)) for n in range(3)]
    stream = client.stream()
    stream.send(chat(wants_end=wants_end))
    assert marks(stream.rest()) == [(True, None)] * 3
    held.answers = lambda request: [response(TEXT="a"), final(response(TEXT="b"))]
    stream = client.stream()
    stream.send(chat(wants_end=wants_end))
    assert marks(stream.rest()) == [(True, None)] * 2
    held.answers = held.echo
    stream = client.stream()
    stream.send(study())
    assert marks(stream.rest()) == [(True, None)]


def test_a_client_that_asks_for_the_end_of_an_answer_gets_it(client, held):
    held.answers = lambda request: [response(TEXT=str(n)) for n in range(3)]
    stream = client.stream()
    stream.send(chat(id_="1", wants_end=True))
    answered = stream.rest()
    assert marks(answered) == [(True, False)] * 3 + [(False, True)]
    assert [r.infer_response.id for r in answered] == ["1"] * 4


def test_a_last_response_that_says_so_is_the_end(client, held):
    held.answers = lambda request: [response(TEXT="a"), final(response(TEXT="b"))]
    stream = client.stream()
    stream.send(chat(wants_end=True))
    assert marks(stream.rest()) == [(True, False), (True, True)]


def test_each_request_of_a_stream_asks_for_itself(client, held):
    stream = client.stream()
    stream.send(chat(id_="1"), chat(id_="2", wants_end=True), chat(id_="3"))
    answered = stream.rest()
    assert [r.infer_response.id for r in answered] == ["1", "2", "2", "3"]
    assert marks(answered) == [(True, None), (True, False), (False, True), (True, None)]


def test_a_unary_response_is_not_marked(client):
    """Triton marks those in streams alone."""
    request = study()
    request.parameters[EMPTY_FINAL].bool_param = True
    assert not client.infer(request).parameters


# --- outputs that are not asked for ----------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_of_an_ensemble_only_the_outputs_that_are_asked_for_come(client, held, streams):
    """Triton computes all: it would leave out the steps behind the others, those included that these need."""
    held.answers = lambda request: [response(SCORES=[0.5], STUDY="a", TEXT_CUT=[True])]
    request = ask("m3d_retrieve", STUDY="a", TEXTS=["one"])
    request.outputs.add(name="TEXT_CUT")
    request.outputs.add(name="SCORES")
    if streams:
        stream = client.stream()
        stream.send(request)
        (answered,) = [r.infer_response for r in stream.rest()]
    else:
        answered = client.infer(request)
    outputs = wire.outputs_of(answered)
    assert {name: array.tolist() for name, array in outputs.items()} == {"SCORES": [0.5], "TEXT_CUT": [True]}
    assert not held.requests[0].outputs
    assert list(held.requests[0].raw_input_contents) == list(request.raw_input_contents)


# --- clients that go -------------------------------------------------------------------------------------------------
def start(client: Client, streams: bool, *requests, timeout: float = PATIENCE_S):
    """The calls of a client that sends these, each with a `cancel`."""
    if not streams:
        calls = [client.stub.ModelInfer.future(request, timeout=timeout) for request in requests]
        client.calls += calls  # gRPC cancels those that are dropped
        return calls
    stream = client.stream(timeout)
    stream.send(*requests)
    return [stream.call]


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("how", ["cancels", "closes its channel"])
def test_of_a_client_that_goes_the_models_are_told_and_its_call_is_read_to_the_end(
    new_client, running, held, streams, how
):
    held.answers = held.held
    client = new_client()
    calls = start(client, streams, chat("a") if streams else study("a"))
    held.wait_for(arrived=1)
    assert running.folder.cancelled() == set()
    calls[0].cancel() if how == "cancels" else client.close()
    running.folder.wait_for({held.requests[0].id})
    held.gate.set()
    held.wait_for(whole=1)
    running.folder.wait_for(set())
    assert held.count["cancelled"] == 0


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_of_a_client_whose_deadline_passes_the_models_are_told(new_client, running, held, streams):
    held.answers = held.held
    for deadline in (0.3, 3, 20):  # on a busy machine, the first may pass before Triton has the request
        (call,) = start(new_client(), streams, study("a"), timeout=deadline)
        with pytest.raises(grpc.RpcError) as caught:
            next(call) if streams else call.result()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if held.requests:
            break
    running.folder.wait_for({request.id for request in held.requests})
    held.gate.set()
    held.wait_for(whole=1)
    running.folder.wait_for(set())
    assert held.count["cancelled"] == 0


def test_each_unanswered_request_of_a_stream_that_goes_is_named_to_the_models(client, running, held):
    stream = client.stream()
    stream.send(chat("a"))
    stream.receive()
    held.answers, held.at_once = held.held, 3
    stream.send(chat("b"), chat("c"), chat("d"))
    held.wait_for(arrived=4)
    stream.call.cancel()
    running.folder.wait_for({request.id for request in held.requests[1:]})
    held.gate.set()
    held.wait_for(whole=1)
    running.folder.wait_for(set())


def test_a_client_that_goes_when_the_disk_is_full_leaves_nothing(client, running, held, monkeypatch):
    """Its answer is decoded to the end, as the models cannot be told."""
    here = threading.Event()

    def full(_folder, _id):
        here.set()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "cancel", full)
    held.answers = held.held
    calls = start(client, True, chat("a")) + start(client, False, study("b"))
    held.wait_for(arrived=2)
    for call in calls:
        here.clear()
        call.cancel()
        assert here.wait(PATIENCE_S)
    held.gate.set()
    held.wait_for(whole=2)


def test_an_answer_in_many_responses_is_read_to_its_end_when_its_client_has_gone(client, running, held):
    def long_answer(request):
        yield response(TEXT="first")
        assert held.gate.wait(PATIENCE_S)
        for n in range(500):
            yield response(TEXT="x" * 10_000, TOKEN_IDS=[n])

    held.answers = long_answer
    stream = client.stream()
    stream.send(chat())
    stream.receive()
    stream.call.cancel()
    running.folder.wait_for({held.requests[0].id})
    held.gate.set()
    held.wait_for(whole=1)
    assert held.count["sent"] == 501 and held.count["cancelled"] == 0
    running.folder.wait_for(set())


@pytest.mark.parametrize("sent", [1, 4, 8])
def test_a_client_that_goes_without_reading_leaves_nothing(client, running, held, sent):
    """The responses that wait for it go nowhere, and those that come after them."""
    held.answers = lambda request: [response(TEXT="x" * (1 << 20)) for _ in range(100)]
    stream = client.stream()
    stream.send(chat())
    held.wait_for(sent=sent)
    stream.call.cancel()
    held.wait_for(sent=100, whole=1)
    assert held.count["cancelled"] == 0


def test_no_other_call_of_tritons_is_cancelled_either(new_client, running, held):
    """Such as a look at the configuration, whose client goes while Triton works at it."""
    here = threading.Event()

    def told(context):
        here.set()
        assert held.gate.wait(PATIENCE_S)

    held.on_asked = told
    client = new_client()
    calls = [
        client.stub.ModelConfig.future(service_pb2.ModelConfigRequest(name="study"), timeout=PATIENCE_S),
        client.stub.ServerReady.future(service_pb2.ServerReadyRequest(), timeout=PATIENCE_S),
    ]
    held.wait_for(begun=2)
    for call in calls:
        call.cancel()
    client.infer(study("a"))  # on the same connection, so that the front has the cancellations
    held.gate.set()
    held.wait_for(whole=3)
    assert held.count["cancelled"] == 0


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_a_client_that_goes_while_it_waits_for_room_leaves_nothing_and_triton_does_not_see_it(
    client, running, held, streams
):
    room = running.make_room(2 * SLOT)
    held.answers = held.held
    (first,) = start(client, False, study("a", size=LARGE))
    held.wait_for(arrived=1)
    (second,) = start(client, streams, study("b", size=LARGE))
    assert room.waiting.acquire(timeout=PATIENCE_S)
    second.cancel()
    client.stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=PATIENCE_S)  # the front has the cancellation
    held.gate.set()
    assert handle_of(first.result()) == "a"
    running.settle()
    assert held.count["arrived"] == 1 and room.is_whole


# --- room ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_a_large_message_waits_until_there_is_room(new_client, running, held, streams):
    room = running.make_room(4 * SLOT)
    held.answers = held.held
    one, other, third = new_client(), new_client(), new_client()
    for client in (one, other):
        start(client, False, *(study("a", size=LARGE) for _ in range(2)))
    held.wait_for(arrived=4)
    (waiting,) = start(third, streams, study("b", size=LARGE))
    assert room.waiting.acquire(timeout=PATIENCE_S)
    held.gate.set()
    answered = next(waiting).infer_response if streams else waiting.result()
    assert handle_of(answered) == "b" and held.count["arrived"] == 5


def test_a_client_may_take_half_of_the_room(new_client, running, held):
    room = running.make_room(4 * SLOT)
    held.answers = held.held
    one, other = new_client(), new_client()
    start(one, False, *(study("a", size=LARGE) for _ in range(3)))
    assert room.waiting.acquire(timeout=PATIENCE_S)
    held.wait_for(arrived=2)
    start(other, False, *(study("b", size=LARGE) for _ in range(2)))
    held.wait_for(arrived=4)  # while the third waits
    held.gate.set()
    held.wait_for(arrived=5)


def test_room_comes_back_with_the_first_response(client, running, held):
    """The stream stays open, and has room for one message at a time."""
    running.make_room(2 * SLOT)
    stream = client.stream()
    for handle in "abcd":
        stream.send(study(handle, size=LARGE))
        assert handle_of(stream.receive().infer_response) == handle


def test_a_stream_uploads_far_more_than_the_room_in_parts(client, running, held):
    running.make_room(4 * SLOT)
    stream = client.stream()
    stream.send(*(study(str(n), size=LARGE) for n in range(40)))
    assert [handle_of(r.infer_response) for r in stream.rest()] == [str(n) for n in range(40)]


@pytest.mark.parametrize("answer", ["INTERNAL: no", (grpc.StatusCode.INTERNAL, "no")], ids=["error", "broken call"])
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_room_comes_back_when_triton_refuses_or_breaks_a_call(client, running, held, answer, streams):
    room = running.make_room(2 * SLOT)
    held.answers = lambda request: [answer if streams else (grpc.StatusCode.INTERNAL, "no")]
    (call,) = start(client, streams, study(size=LARGE))
    with contextlib.suppress(grpc.RpcError):
        assert next(call).error_message if streams else call.result()
    held.answers = held.echo
    assert handle_of(client.infer(study("b", size=LARGE))) == "b"
    call.cancel()
    running.settle()
    assert room.is_whole


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_what_gets_no_room_is_refused_as_too_much(client, running, held, monkeypatch, streams):
    monkeypatch.setattr(front, "ROOM_S", 0.0)
    running.make_room(2 * SLOT)
    held.answers = held.held
    (first,) = start(client, False, study("a", size=LARGE))
    held.wait_for(arrived=1)
    (second,) = start(client, streams, study("b", size=LARGE))
    if streams:
        response = next(second)
        error = from_wire(response.error_message)
        assert response.infer_response.id == "mine"
    else:
        with pytest.raises(grpc.RpcError) as caught:
            second.result()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = from_wire(caught.value.details())
    assert isinstance(error, ResourceExhausted) and "try again" in str(error)
    held.gate.set()
    assert handle_of(first.result()) == "a"
    assert held.count["arrived"] == 1


SIZES = st.integers(LARGE, 4 * LARGE)
PEERS = st.sampled_from("abc")
STEPS = st.integers(0, 9)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(PEERS, SIZES, STEPS, STEPS), max_size=20))
def test_room_is_never_overdrawn_and_all_of_it_comes_back(messages):
    """Whoever takes it, for how long, and whether they give up meanwhile. The last two of a message: after how many
    steps its taker gives up, and how many it keeps its room."""
    total = 8 * LARGE

    async def take(room: front.Room, used: dict, peer: str, size: int, kept: int) -> None:
        try:
            taken = await room.take(peer, size)
        except Refused:
            return
        used[peer] = used.get(peer, 0) + taken
        try:
            assert sum(used.values()) <= total and used[peer] <= total // 2
            for _ in range(kept):
                await asyncio.sleep(0)
        finally:
            used[peer] -= taken
            await room.give_back(peer, taken)

    async def give_up(taking: asyncio.Task, patience: int) -> None:
        for _ in range(patience):
            await asyncio.sleep(0)
        taking.cancel()

    async def all_of_them() -> None:
        room, used = WatchedRoom(total), {}
        taking = [asyncio.ensure_future(take(room, used, peer, size, kept)) for peer, size, _, kept in messages]
        giving_up = [
            give_up(task, patience) for task, (_, _, patience, _) in zip(taking, messages) if patience % 3 == 0
        ]
        ended = await asyncio.gather(*giving_up, *taking, return_exceptions=True)
        assert not [end for end in ended if isinstance(end, Exception)]
        assert room.is_whole

    run(all_of_them())


def test_what_waits_for_room_is_bounded_and_a_client_may_have_half_of_it():
    """It is in memory, too: twice the room, in all."""

    async def check() -> None:
        size, room, taking = 2 * LARGE, WatchedRoom(8 * LARGE), []

        async def send(peer: str, count: int) -> None:
            taking.extend(asyncio.ensure_future(room.take(peer, size)) for _ in range(count))
            await steps()

        await send("a", 2)  # its half of the room
        await send("a", 4)
        with pytest.raises(Refused, match="RESOURCE_EXHAUSTED: .*try again"):
            await asyncio.wait_for(room.take("a", size), PATIENCE_S / 2)
        await send("b", 2)
        await send("b", 4)
        assert [task.done() for task in taking] == [True, True, *[False] * 4, True, True, *[False] * 4]
        with pytest.raises(Refused, match="RESOURCE_EXHAUSTED: .*try again"):
            await asyncio.wait_for(room.take("c", size), PATIENCE_S / 2)
        while taking:
            await room.give_back("a" if len(taking) > 6 else "b", await taking.pop(0))
        assert room.is_whole

    run(check())


def test_small_messages_take_no_room():
    async def check() -> None:
        assert await front.Room(0).take("a", front.LARGE_BYTES) == 0

    run(check())


# --- readers that are slow -------------------------------------------------------------------------------------------
def test_a_slow_reader_holds_up_its_own_stream_alone(new_client, held):
    megabyte, most = "x" * (1 << 20), 400
    held.answers = lambda r: (
        [response(TEXT=megabyte) for _ in range(most)] if r.model_name == "m3d_chat" else held.echo(r)
    )
    slow, other = new_client(), new_client()
    stream = slow.stream()
    stream.send(chat())
    held.wait_for(sent=1)
    quick = slow.stream()  # on the same connection
    for n in range(100):
        assert handle_of(other.infer(study(str(n)))) == str(n)
        quick.send(study(str(n)))
        assert handle_of(quick.receive().infer_response) == str(n)
    assert held.count["sent"] - 100 < most / 4
    texts = [wire.outputs_of(r.infer_response).text("TEXT") for r in stream.rest()]
    assert len(texts) == most and set(texts) == {megabyte}


class Context:
    """A client's call, whose `write` takes nothing before `reads` is set."""

    def __init__(self):
        self.reads = asyncio.Event()
        self.written: list[service_pb2.ModelStreamInferResponse] = []

    def peer(self) -> str:
        return "a peer"

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        self.written.append(service_pb2.ModelStreamInferResponse.FromString(message))

    async def abort(self, status: grpc.StatusCode, words: str) -> None:
        raise grpc.aio.AbortError(f"{status.name} {words}")


class Call:
    """A stream of Triton's that answers its first request without end, until it is told to `end_with` something."""

    def __init__(self):
        self.taken = 0
        self.end_with: type | None = None
        self._ids: list[str] = []
        self._written = asyncio.Event()

    async def write(self, message: bytes) -> None:
        self._ids.append(service_pb2.ModelInferRequest.FromString(message).id)
        self._written.set()

    async def done_writing(self) -> None:
        pass

    def __aiter__(self):
        return self

    async def __anext__(self) -> bytes:
        await self._written.wait()
        await asyncio.sleep(0)
        if self.end_with is not None:
            raise self.end_with
        self.taken += 1
        answered = service_pb2.ModelStreamInferResponse(infer_response=response(TEXT=str(self.taken)))
        answered.infer_response.id = self._ids[0]
        return answered.SerializeToString()


async def steps() -> None:
    """All that can go on without anybody's doing has gone on."""
    for _ in range(200):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def streaming(folder, *messages: service_pb2.ModelInferRequest):
    """A stream of the front's, as (context, Triton's call, the handler's task, front), whose client goes on."""

    async def sent() -> AsyncIterator[bytes]:
        for message in messages:
            yield message.SerializeToString()
        await asyncio.Event().wait()

    async def sent_until(handled: asyncio.Task) -> AsyncIterator[bytes]:
        """As gRPC does: without a message any more when the call is over."""
        requests = sent()
        while True:
            following = asyncio.ensure_future(anext(requests))
            await asyncio.wait({following, handled}, return_when=asyncio.FIRST_COMPLETED)
            if handled.done():
                following.cancel()
                return
            yield following.result()

    passing = front.Front("unix:/nowhere", RunFolder(folder), contract.MODELS)
    context, call = Context(), Call()
    passing.open_stream = lambda: call
    handled: asyncio.Task = asyncio.ensure_future(_handle(passing, context, lambda: sent_until(handled)))
    await steps()
    yield context, call, handled, passing
    await asyncio.wait({handled}, timeout=PATIENCE_S)
    await _ended(passing)
    assert passing.folder.cancelled() == set()
    await passing.close()


async def _handle(passing: front.Front, context: Context, messages: Callable) -> None:
    await passing._stream(messages(), context)


def test_of_a_stream_that_nobody_reads_next_to_nothing_is_taken_from_triton_and_all_of_it_comes_in_order(tmp_path):
    async def check() -> None:
        async with streaming(tmp_path, chat()) as (context, call, handled, _):
            assert 1 <= call.taken <= 3 and not context.written
            context.reads.set()
            await steps()
            assert call.taken > 10 and len(context.written) <= call.taken <= len(context.written) + 3
            texts = [wire.outputs_of(r.infer_response).text("TEXT") for r in context.written]
            assert texts == [str(n + 1) for n in range(len(texts))]
            call.end_with = StopAsyncIteration
            handled.cancel()

    run(check())


def test_a_client_that_goes_while_refusals_and_responses_wait_for_it_leaves_nothing(tmp_path):
    async def check() -> None:
        async with streaming(tmp_path, chat(), *(ask_wrong() for _ in range(5))) as (context, call, handled, passing):
            handled.cancel()
            await steps()
            assert len(passing.folder.cancelled()) == 1 and call.taken > 10  # read on, although nobody is there
            call.end_with = StopAsyncIteration

    run(check())


def test_a_stream_that_breaks_while_refusals_wait_for_the_client_leaves_nothing(tmp_path):
    class Broken(grpc.aio.AioRpcError):
        def __init__(self):
            nothing = grpc.aio.Metadata()
            super().__init__(grpc.StatusCode.UNAVAILABLE, nothing, nothing, "Socket closed")

    async def check() -> None:
        async with streaming(tmp_path, chat(), *(ask_wrong() for _ in range(5))) as (context, call, handled, _):
            call.end_with = Broken
            context.reads.set()
            with pytest.raises(grpc.aio.AbortError, match="UNAVAILABLE: the server does not answer"):
                await asyncio.shield(handled)

    run(check())


# --- refusals --------------------------------------------------------------------------------------------------------
def ask_wrong(id_: str = "wrong") -> service_pb2.ModelInferRequest:
    request = study(id_=id_)
    request.outputs.add(name="STUDY").parameters["classification"].int64_param = 2
    return request


@pytest.mark.parametrize(
    "wrong", [ask_wrong("2"), b"\x0a\x05ab"], ids=["a parameter of an output", "bytes that are no request"]
)
def test_a_refused_request_is_answered_in_the_stream_and_those_around_it_too(client, held, wrong):
    stream = client.stream()
    stream.send(study("a", "1"), wrong, study("c", "3"))
    answered = dict(said(r) for r in stream.rest())
    error = from_wire(answered.pop("" if isinstance(wrong, bytes) else "2"))
    assert type(error) is InvalidInput and answered == {"1": "a", "3": "c"}
    assert [r.raw_input_contents[0][4:] for r in held.requests] == [b"a", b"c"]


def test_a_stream_of_refused_requests_alone_never_reaches_triton(client, held):
    stream = client.stream()
    stream.send(*(ask_wrong(str(n)) for n in range(5)))
    assert [r.infer_response.id for r in stream.rest()] == list("01234")
    assert held.count["begun"] == 0


@pytest.mark.parametrize("message", [ask_wrong().SerializeToString(), b"\x0a\x05ab"], ids=["parameter", "no request"])
def test_a_refused_unary_request_never_reaches_triton(client, held, message):
    with fails_as(grpc.StatusCode.INVALID_ARGUMENT, "", InvalidInput):
        client.send("ModelInfer", message)
    assert held.count["begun"] == 0


@pytest.mark.parametrize("method", ["ModelReady", "ModelConfig", "ModelMetadata", "ModelStatistics"])
def test_bytes_that_are_no_request_about_a_model_are_refused(client, held, method):
    with fails_as(grpc.StatusCode.INVALID_ARGUMENT, "", InvalidInput):
        client.send(method, b"\x0a\x05ab")
    assert held.count["begun"] == 0


def test_a_stream_without_a_request_ends_after_a_while(client, held, monkeypatch):
    monkeypatch.setattr(front, "FIRST_MESSAGE_S", 0.1)
    stream = client.stream()
    with fails_as(grpc.StatusCode.DEADLINE_EXCEEDED, "no request came in this stream", DeadlineExceeded):
        stream.receive()
    assert held.count["begun"] == 0


def test_a_stream_that_had_a_request_stays(client, monkeypatch):
    monkeypatch.setattr(front, "FIRST_MESSAGE_S", 0.1)
    for _ in range(100):  # on a busy machine, the first request may take longer
        begun = client.stream()
        begun.send(study("a"))
        with contextlib.suppress(grpc.RpcError):
            begun.receive()
            break
    silent = client.stream()
    with fails_as(grpc.StatusCode.DEADLINE_EXCEEDED):
        silent.receive()
    begun.send(study("b"))
    assert handle_of(begun.receive().infer_response) == "b"


def test_an_unknown_model_is_refused_with_the_status_of_an_unknown_one(client, held):
    request = study()
    request.model_name = "vision_encoder"
    with fails_as(grpc.StatusCode.NOT_FOUND, "^unknown model: 'vision_encoder' is not found$"):
        client.infer(request)
    assert held.count["begun"] == 0


# --- messages that are too large -------------------------------------------------------------------------------------
def test_the_largest_part_of_a_scan_passes(client, held):
    assert handle_of(client.infer(study("a", size=contract.MAX_PART_BYTES))) == "a"
    assert len(held.requests[0].raw_input_contents[1]) == contract.MAX_PART_BYTES


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip], ids=["plain", "gzip"])
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_a_message_that_is_too_large_is_refused_and_triton_sees_nothing_of_it(client, held, streams, compression):
    """However small it is before it is unpacked."""
    request = study("a", size=front.MAX_MESSAGE_BYTES)
    with fails_as(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"):
        if streams:
            list(client.stub.ModelStreamInfer(iter([request]), timeout=PATIENCE_S, compression=compression))
        else:
            client.stub.ModelInfer(request, timeout=PATIENCE_S, compression=compression)
    assert held.count["begun"] == 0
    assert handle_of(client.infer(study("b"))) == "b"


def test_a_compressed_message_of_allowed_size_passes(client):
    request = study("a", size=1 << 20)
    answered = client.stub.ModelInfer(request, timeout=PATIENCE_S, compression=grpc.Compression.Gzip)
    assert handle_of(answered) == "a"


def test_a_message_that_is_too_large_in_a_stream_ends_it_and_leaves_nothing(client, running, held):
    held.answers = held.held
    stream = client.stream()
    stream.send(study("a"))
    held.wait_for(arrived=1)
    stream.send(study("b", size=front.MAX_MESSAGE_BYTES))
    with fails_as(grpc.StatusCode.RESOURCE_EXHAUSTED):
        stream.receive()
    running.folder.wait_for({held.requests[0].id})
    held.gate.set()
    held.wait_for(whole=1)
    running.folder.wait_for(set())


# --- Triton's end ----------------------------------------------------------------------------------------------------
def ready(client: Client) -> bool:
    return client.stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=PATIENCE_S).ready


def test_when_triton_dies_all_its_clients_are_told(new_client, running, held):
    idle = new_client().stream()
    idle.send(study("a"))
    idle.receive()
    held.answers = held.held
    (unary,) = start(new_client(), False, study("b"))
    (stream,) = start(new_client(), True, chat("c"))
    held.wait_for(arrived=3)
    held.die()
    unavailable = grpc.StatusCode.UNAVAILABLE, "^UNAVAILABLE: the server does not answer", Unavailable
    with fails_as(*unavailable):
        unary.result()
    with fails_as(*unavailable):
        next(stream)
    with fails_as(*unavailable):
        idle.receive()
    client = new_client()
    with fails_as(*unavailable):
        client.infer(study())
    late = client.stream()
    late.send(study())
    with fails_as(*unavailable):
        late.receive()
    with fails_as(*unavailable):
        client.stub.ModelConfig(service_pb2.ModelConfigRequest(name="study"), timeout=PATIENCE_S)
    assert not ready(client)


def test_a_stream_without_a_request_outlives_triton_and_its_first_one_is_refused(client, running, held):
    stream = client.stream()
    stream.send(ask_wrong())
    assert stream.receive().error_message
    held.die()
    stream.send(study())
    with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
        stream.receive()


@pytest.mark.integration
def test_a_triton_that_is_killed_is_unavailable(tmp_path):
    """Another process, whose sockets close without a word."""
    plays = """
import sys, pathlib, threading
from tests.unit.fake_triton import HeldTriton
triton = HeldTriton(pathlib.Path(sys.argv[1]))
triton.answers = lambda request: threading.Event().wait()
triton.wait_for(arrived=2)
print("here", flush=True)
threading.Event().wait()
"""
    path = tmp_path / "grpc"
    command = [sys.executable, "-c", plays, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as triton:
        running = Running(f"unix:{path}", WatchedFolder(tmp_path))
        client = Client(running.url)
        try:
            running.run(running.front._channel.channel_ready())
            (unary,) = start(client, False, study())
            (stream,) = start(client, True, chat())
            assert triton.stdout.readline() == b"here\n"
            triton.kill()
            with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
                unary.result()
            with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
                next(stream)
        finally:
            triton.kill()
            client.close()
            running.stop()


def test_a_triton_that_is_there_again_is_found_again(client, running, held):
    held.die()
    assert not ready(client)
    held.start()
    running.run(running.front._channel.channel_ready())
    assert ready(client) and handle_of(client.infer(study("a"))) == "a"


# --- whether it works ------------------------------------------------------------------------------------------------
def page(running: Running, path: str) -> tuple[int, str]:
    """Status and words of a page."""
    connection = http.client.HTTPConnection(*running.pages, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def model_ready(client: Client, name: str) -> bool:
    return client.stub.ModelReady(service_pb2.ModelReadyRequest(name=name), timeout=PATIENCE_S).ready


def serving(client: Client, request: bytes = b"") -> bytes:
    """A grpc.health.v1.HealthCheckResponse."""
    return client.channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=PATIENCE_S)


SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
OF_THE_DECODER, OTHERS = ("decoder", "m3d_chat", "m3d_segment"), ("study", "segmentation", "m3d_retrieve")


def test_all_is_ready_when_triton_and_the_language_model_are(client, running):
    assert ready(client) and serving(client) == SERVING
    assert all(model_ready(client, name) for name in (*OF_THE_DECODER, *OTHERS))
    assert page(running, "/health/ready") == (200, "ready\n")
    assert page(running, "/health/live") == (200, "live\n")


@pytest.mark.parametrize("words", ["out of order", "starting", None])
def test_without_its_language_model_a_server_is_live_and_not_ready(client, running, words):
    """None: it has not said anything yet."""
    (running.folder.path / "health").unlink()
    RunFolder(running.folder.path)
    if words:
        running.folder.health = words
    assert not ready(client) and serving(client) == NOT_SERVING
    assert not any(model_ready(client, name) for name in OF_THE_DECODER)
    assert all(model_ready(client, name) for name in OTHERS)
    assert page(running, "/health/ready") == (503, f"the language model is {words or 'starting'}\n")
    assert page(running, "/health/live") == (200, "live\n")


def test_a_repository_without_a_decoder_is_ready_without_one(tmp_path, held):
    served = [name for name in contract.MODELS if name not in OF_THE_DECODER]
    running = Running(held.address, WatchedFolder(tmp_path), served=served)
    client = Client(running.url)
    try:
        assert ready(client) and serving(client) == SERVING and model_ready(client, "m3d_retrieve")
        assert page(running, "/health/ready") == (200, "ready\n")
        with fails_as(grpc.StatusCode.NOT_FOUND, "unknown model: 'm3d_chat' is not found"):
            model_ready(client, "m3d_chat")
    finally:
        client.close()
        running.stop()


def test_a_triton_that_still_loads_is_live_and_not_ready(client, running, held):
    held.is_ready = False
    assert not ready(client) and serving(client) == NOT_SERVING
    assert not model_ready(client, "m3d_chat") and not model_ready(client, "study")
    assert page(running, "/health/ready") == (503, "Triton is starting\n")
    assert page(running, "/health/live") == (200, "live\n")


def test_without_triton_nothing_is_live(client, running, held):
    held.die()
    assert not ready(client) and not model_ready(client, "study") and serving(client) == NOT_SERVING
    assert page(running, "/health/ready")[0] == 503
    assert page(running, "/health/live") == (503, "Triton does not answer\n")
    with fails_as(grpc.StatusCode.UNAVAILABLE, "the server does not answer", Unavailable):
        client.stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=PATIENCE_S)


def test_a_server_that_stops_is_not_ready(client, running, held):
    running.front.stopping = True
    assert not ready(client) and serving(client) == NOT_SERVING and not model_ready(client, "study")
    assert page(running, "/health/ready") == (503, "the server is stopping\n")
    with fails_as(grpc.StatusCode.UNAVAILABLE, "the server is stopping", Unavailable):
        client.infer(study())
    assert held.count["arrived"] == 0


def test_health_is_that_of_the_server_whatever_service_is_asked_about(client):
    assert serving(client, b"\x0a\x05other") == SERVING


# --- Triton's other methods ------------------------------------------------------------------------------------------
PUBLIC_METHODS = {
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "ModelInfer",
    "ModelStreamInfer",
}
METHODS = {method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}


@pytest.mark.parametrize("method", sorted(METHODS - PUBLIC_METHODS))
def test_methods_that_change_triton_are_unknown(client, held, method):
    """With the secret header that a Triton could ask for, too."""
    call = client.channel.unary_unary(f"/{SERVICE}/{method}")
    with fails_as(grpc.StatusCode.UNIMPLEMENTED):
        call(b"", timeout=PATIENCE_S, metadata=[("triton-grpc-protocol-m3d-admin", "secret")])
    assert held.count["begun"] == 0


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_what_triton_tells_of_a_served_model_passes(client, held, method):
    request = getattr(service_pb2, f"{method}Request")(name="vision_encoder", version="1")
    told = getattr(client.stub, method)(request, timeout=PATIENCE_S)
    assert "vision_encoder" in str(told)
    assert [asked.name for asked in held.asked] == ["vision_encoder"]


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"])
def test_of_a_request_about_a_model_triton_sees_its_name_alone(client, held, method):
    """A message may have 16 MB more in it, of fields that nobody knows."""
    unknown = b"\x7a\x80\x80\x40" + bytes(1 << 20)
    client.send(method, service_pb2.ModelReadyRequest(name="study").SerializeToString() + unknown)
    assert [asked.ByteSize() for asked in held.asked] == [len("study") + 2]


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"])
def test_a_model_has_one_version(client, held, method):
    with fails_as(grpc.StatusCode.INVALID_ARGUMENT, "version is 1 or not given, not '2'", InvalidInput):
        client.send(method, service_pb2.ModelReadyRequest(name="study", version="2").SerializeToString())
    assert held.count["begun"] == 0


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics", "ModelReady"])
def test_of_other_models_nothing_is_told(client, held, method):
    request = getattr(service_pb2, f"{method}Request")(name="another", version="1")
    with fails_as(grpc.StatusCode.NOT_FOUND, "^unknown model: 'another' is not found$"):
        getattr(client.stub, method)(request, timeout=PATIENCE_S)
    assert held.count["begun"] == 0


def test_statistics_of_all_models_pass(client, held):
    client.stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=PATIENCE_S)
    assert held.asked == [service_pb2.ModelStatisticsRequest()]


def test_what_the_server_is_passes(client):
    told = client.stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=PATIENCE_S)
    assert (told.name, told.version) == ("triton", "0.0-fake")
    assert client.stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=PATIENCE_S).live


# --- pages -----------------------------------------------------------------------------------------------------------
METRICS = "# HELP nv_inference_request_success Number of successful requests\nnv_inference_request_success 7\n"


class Metrics(BaseHTTPRequestHandler):
    """Triton's, as libevent serves them."""

    def do_GET(self):
        content = METRICS.encode() if self.path == "/metrics" else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_words):
        pass


@contextlib.contextmanager
def serving_metrics(folder, handler: type[socketserver.BaseRequestHandler]):
    with socketserver.ThreadingUnixStreamServer(str(folder / "metrics"), handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield
        served.shutdown()
        thread.join()


@pytest.fixture
def metrics(tmp_path):
    with serving_metrics(tmp_path, Metrics):
        yield


def test_metrics_are_tritons(running, metrics):
    assert page(running, "/metrics") == (200, METRICS)
    assert page(running, "/metrics") == (200, METRICS)


def test_without_triton_there_are_no_metrics(running):
    assert page(running, "/metrics") == (503, "Triton does not answer\n")


def test_a_triton_that_breaks_off_its_metrics_has_none(running, tmp_path):
    with serving_metrics(tmp_path, socketserver.BaseRequestHandler):
        assert page(running, "/metrics") == (503, "Triton does not answer\n")


def test_other_pages_are_not_there(running):
    assert page(running, "/v2/health/ready")[0] == 404 and page(running, "/")[0] == 404


BODIES = {
    "large": b"Content-Length: 10000000000\r\n\r\n" + bytes(1 << 16),
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n10000\r\n" + bytes(1 << 16) + b"\r\n10000\r\n",
    "packed": b"Content-Encoding: deflate\r\nContent-Length: 100000\r\n\r\n" + bytes(1 << 10),
    "endless headers": b"A: " + b"a" * (1 << 16),
}


@pytest.mark.parametrize("path", ["/metrics", "/health/ready", "/health/live"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_page_takes_no_body(running, metrics, path, body):
    with socket.create_connection(running.pages, timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST " + path.encode() + b" HTTP/1.1\r\nHost: here\r\n" + body)
        status = connection.recv(1 << 10).split(b"\r\n")[0]
    assert status in (b"HTTP/1.1 405 Method Not Allowed", b"HTTP/1.1 400 Bad Request", b"HTTP/1.0 400 Bad Request")
    assert page(running, path)[0] == 200


@pytest.mark.parametrize("body", list(BODIES.values())[:3], ids=list(BODIES)[:3])
def test_a_page_is_read_without_the_body_that_comes_with_it(running, metrics, body):
    with socket.create_connection(running.pages, timeout=PATIENCE_S) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n" + body)
        assert connection.recv(1 << 10).startswith(b"HTTP/1.1 200 OK")
    assert page(running, "/metrics") == (200, METRICS)


def test_a_server_is_not_ready_before_all_that_is_loaded_last_is_there(tmp_path):
    seen = []

    class Loading(front.Front):
        async def _says(self, method, request):
            return True

        async def _call(self, method, request, timeout=None):
            name = service_pb2.RepositoryModelLoadRequest.FromString(request).model_name
            self.folder.health = READY  # the language model is there from the first on
            seen.append((name, await self.is_ready()))
            return b""

    async def run():
        loading = Loading("unix:/nowhere", RunFolder(tmp_path), contract.MODELS)
        await loading.load(contract.DECODER_MODELS)
        ready = await loading.is_ready()
        await loading.close()
        return ready

    assert asyncio.run(run()) and seen == [(name, False) for name in contract.DECODER_MODELS]


# --- the process -----------------------------------------------------------------------------------------------------
class Process:
    """`python -m engine.server.front` between `url` and Triton."""

    def __init__(self, inside: str, folder, **settings):
        ports = free_ports()
        of_all = {
            "host": "127.0.0.1",
            "metrics_host": "127.0.0.1",
            "inside": inside,
            "inside_metrics": str(folder / "metrics"),
            "models": tuple(contract.MODELS),
            "last": (),
            "folder": str(folder),
        }
        self.settings = FrontSettings(**(of_all | ports | settings))
        self.url = f"127.0.0.1:{self.settings.grpc_port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.server.front", json.dumps(asdict(self.settings))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> tuple[int, str]:
        """How it ends, and what it said."""
        words = self.process.communicate(timeout=PATIENCE_S)[0]
        return self.process.returncode, words

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def process(tmp_path, held):
    process = Process(held.address, tmp_path)
    yield process
    held.gate.set()
    process.stop()


@pytest.fixture
def of_process(process):
    client = Client(process.url)
    grpc.channel_ready_future(client.channel).result(PATIENCE_S)
    yield client
    client.close()


@pytest.mark.integration
def test_a_front_that_is_told_to_stop_finishes_what_is_in_work_and_takes_nothing_new(process, of_process, held):
    held.answers = lambda r: held.held(r) if b"held" in r.raw_input_contents[0] else held.echo(r)
    (unary,) = start(of_process, False, study("held 1"))
    running, going_on = of_process.stream(), of_process.stream()
    running.send(chat("held 2"))
    held.wait_for(arrived=2)
    going_on.send(study("before"))
    assert handle_of(going_on.receive().infer_response) == "before"
    process.process.send_signal(signal.SIGTERM)
    answered = service_pb2.ModelStreamInferResponse()
    while not answered.error_message:  # the signal takes effect some time
        going_on.send(study("after"))
        answered = going_on.receive()
    error = from_wire(answered.error_message)
    assert isinstance(error, Unavailable) and "the server is stopping" in str(error)
    assert answered.infer_response.id == "mine"
    with fails_as(grpc.StatusCode.UNAVAILABLE):
        of_process.infer(study("new"))
    assert process.process.poll() is None
    held.gate.set()
    assert handle_of(unary.result()) == "held 1"
    assert [handle_of(r.infer_response) for r in running.rest()] == ["held 2"]
    assert going_on.rest() == []
    assert process.wait() == (0, "")
    assert not [r for r in held.requests if b"new" in r.raw_input_contents[0]]


@pytest.mark.integration
def test_a_front_without_work_ends_when_it_is_told_to(process, of_process):
    of_process.infer(study())
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == (0, "")


@pytest.mark.integration
def test_clients_that_go_or_do_not_speak_http_write_nothing_into_the_log(process, of_process, held):
    """They could fill it."""
    held.answers = lambda request: [response(TEXT="x" * (1 << 20)) for _ in range(50)]
    for n in range(1, 9):
        stream = of_process.stream()
        stream.send(chat())
        held.wait_for(sent=50 * (n - 1) + n)
        stream.call.cancel()
        held.wait_for(whole=n)
    for body in BODIES.values():
        with socket.create_connection(("127.0.0.1", process.settings.metrics_port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"POST /metrics HTTP/1.1\r\nHost: here\r\n" + body)
            assert connection.recv(1 << 10)
    process.process.send_signal(signal.SIGTERM)
    assert process.wait() == (0, "")


def test_a_front_that_ends_while_triton_works_leaves_nothing(new_client, running, held):
    held.answers = held.held
    start(new_client(), False, study("a", size=LARGE))
    start(new_client(), True, chat("b"))
    held.wait_for(arrived=2)
    running.run(running._end())


@pytest.mark.integration
def test_two_fronts_do_not_share_a_port(tmp_path, process, of_process, held):
    """Clients would come to either."""
    second = Process(held.address, tmp_path, grpc_port=process.settings.grpc_port)
    try:
        code, words = second.wait()
        assert code != 0 and "address already in use" in words.lower()
    finally:
        second.stop()
    assert handle_of(of_process.infer(study("a"))) == "a"


# --- this project's client -------------------------------------------------------------------------------------------
def test_this_client_gets_through(tmp_path, triton):
    """Uploads in parts, questions, streams, masks and rankings."""
    running = Running(triton.url, WatchedFolder(tmp_path))
    running.folder.health = READY
    scan = np.random.default_rng(0).random((1, 20, 300, 400), np.float32)  # 9.6 MB
    try:
        with M3DClient(running.url, timeout=PATIENCE_S) as client:
            assert client.is_ready()
            study = client.upload(scan)
            assert study.handle == HANDLE and len(triton.parts) > 1
            assert np.array_equal(read_scan(triton.uploads[0]["VOLUME"].tobytes()).array, scan[0])
            assert client.ask(study, "What?").text == "".join(ANSWER)
            assert list(client.stream(study, "What?")) == list(ANSWER)
            triton.mask[:] = True
            assert client.segment(study, "Where?").mask.all()
            assert client.rank(study, ["a liver", "a lung"]).scores.tolist() == [0, 1]
            triton.stream_error = "RESOURCE_EXHAUSTED: too many wait"
            with pytest.raises(ResourceExhausted, match="too many wait"):
                client.ask(study, "What?")
    finally:
        running.stop()


# --- shares of calls -------------------------------------------------------------------------------------------------
def test_calls_of_one_connection_beyond_its_share_wait_and_those_of_another_do_not(new_client):
    """They wait in their client: the front never has them."""
    greedy = new_client()
    idle = [greedy.stream() for _ in range(front.CALLS_OF_CONNECTION)]
    for stream in idle:  # each is at the front: it answers what it refuses at once
        stream.send(b"\xff")
        assert stream.receive().error_message
    late = greedy.stub.ServerReady.future(service_pb2.ServerReadyRequest(), timeout=PATIENCE_S)
    assert new_client().stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=PATIENCE_S).ready
    assert not late.done()
    idle[0].rest()
    assert late.result().ready


def test_a_stream_without_a_request_ends(client, monkeypatch):
    monkeypatch.setattr(front, "FIRST_MESSAGE_S", 0.1)
    with fails_as(grpc.StatusCode.DEADLINE_EXCEEDED, "no request came", DeadlineExceeded):
        client.stream().receive()


def test_a_stream_may_wait_for_its_next_request(client, monkeypatch):
    monkeypatch.setattr(front, "FIRST_MESSAGE_S", 0.1)
    stream, other = client.stream(), client.stream()
    stream.send(study("first"))
    assert said(stream.receive())[1] == "first"
    with fails_as(grpc.StatusCode.DEADLINE_EXCEEDED, "no request came"):
        other.receive()  # so as much time has gone by
    stream.send(study("second"))
    assert said(stream.receive())[1] == "second"


@pytest.mark.parametrize("method", ["ModelConfig", "ModelReady", "ModelStatistics", "ModelMetadata"])
def test_what_is_asked_about_a_model_carries_nothing_else_to_triton(client, held, method):
    large = service_pb2.ModelReadyRequest(name="study", version="9" * 100_000).SerializeToString()
    with fails_as(grpc.StatusCode.INVALID_ARGUMENT, "^INVALID_ARGUMENT: version is 1.{0,120}$", InvalidInput):
        client.send(method, large)
    padded = service_pb2.ModelReadyRequest(name="study").SerializeToString() + b"\x7a\x80\x08" + bytes(1024)
    client.send(method, padded)
    assert [request.ByteSize() < 20 for request in held.asked] == [True]


def test_a_client_that_reads_nothing_cannot_keep_room_from_others(tmp_path, held, monkeypatch):
    """While it takes none, it may read as slowly as it likes."""
    monkeypatch.setattr(front, "UNREAD_S", 0.01)

    async def leave_unread():
        of = front.Front(held.address, RunFolder(tmp_path), contract.MODELS)
        stream, context = front._Stream(of, "a"), Context()
        writing = asyncio.ensure_future(of._write(b"", stream, context))
        await asyncio.wait({writing}, timeout=0.1)
        assert not writing.done()
        stream._open["id"] = front._Request("", LARGE, False)
        with pytest.raises(Refused, match="no response was read"):
            await writing
        await of.close()

    run(leave_unread())
