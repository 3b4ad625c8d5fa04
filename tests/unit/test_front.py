"""The front between clients and a Triton that the tests hold: what passes, whose it is, and what is left behind.

Each test ends with the promise of `Running.stop`: no task, no id and no room of the front's is taken any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine import contract
from engine.client import wire
from engine.errors import Unavailable, from_wire
from engine.runtime.run_folder import READY, RunFolder
from engine.server import front
from tests.unit.fake_triton import FINAL, HeldTriton, final, response

PATIENCE_S = 30
EMPTY_FINAL = "triton_enable_empty_final_response"
LARGE = front.LARGE_BYTES + 1
SLOT = LARGE + (1 << 10)  # of room, for a scan of LARGE bytes and what stands around it
SERVICE = "inference.GRPCInferenceService"
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
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
        return self._left == self.total and not self._of_peer


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
            self.run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        await self._server.stop(0)
        await self._http.cleanup()
        await self.front.close()


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
    return wire.text_of(wire.outputs_of(answered)["STUDY"])


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


@pytest.fixture
def running(tmp_path, held):
    running = Running(held.address, WatchedFolder(tmp_path), str(tmp_path / "metrics"))
    running.folder.health = READY
    yield running
    held.gate.set()
    running.stop()


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
    texts = [(a.infer_response.id, wire.text_of(wire.outputs_of(a.infer_response)["TEXT"])) for a in answered]
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
    stream.send(study("a"))
    stream.receive()
    held.answers, held.at_once = held.held, 3
    stream.send(study("b"), study("c"), study("d"))
    held.wait_for(arrived=4)
    stream.call.cancel()
    running.folder.wait_for({request.id for request in held.requests[1:]})
    held.gate.set()
    held.wait_for(whole=1)
    running.folder.wait_for(set())


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


def test_a_client_that_goes_without_reading_leaves_nothing(client, running, held):
    """The responses that wait for it go nowhere, and those that come after them."""
    held.answers = lambda request: [response(TEXT="x" * (1 << 20)) for _ in range(100)]
    stream = client.stream()
    stream.send(chat())
    held.wait_for(sent=1)
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
