"""Questions from Triton become answers on their senders: in order, once, and given up when nobody wants them."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import types
from dataclasses import asdict, replace

import numpy as np
import pytest

from engine.api import AnswerDetails, AnswerInfo, ChosenToken, ScoredToken
from engine.contract import MODELS
from engine.errors import ResourceExhausted, Unavailable
from engine.runtime.decoder import Delta
from engine.runtime.decoder_step import DecoderStep
from engine.runtime.run_folder import VARIABLE, RunFolder
from engine.runtime.study_store import StudyStore
from engine.scan import Scan
from engine.volume import prepare

FINAL = 1
STUDY = "ab" * 32
BOX = "[0.000, 0.000, 0.000, 0.500, 0.500, 0.500]"


class Tensor:
    def __init__(self, name, value):
        self.name, self.value = name, value

    def as_numpy(self):
        return self.value


class Response:
    def __init__(self, output_tensors=(), error=None):
        self.outputs = {tensor.name: tensor.value for tensor in output_tensors}
        self.error = error

    def text(self, name):
        return self.outputs[name][0].decode()


class TritonError(Exception):
    INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED, INTERNAL = (
        "INVALID_ARG",
        "NOT_FOUND",
        "UNAVAILABLE",
        "CANCELLED",
        "INTERNAL",
    )

    def __init__(self, message, code=INTERNAL):
        super().__init__(message)
        self.code = code


class Sender:
    """Collects responses. `gate`, if any, lets sends through one by one, as a slow client does."""

    def __init__(self, gate=None):
        self.sent, self.gate = [], gate
        self.cancelled, self.ended = threading.Event(), threading.Event()

    def is_cancelled(self):
        return self.cancelled.is_set()

    def send(self, response=None, flags=0):
        assert not self.ended.is_set(), "nothing may follow the final response"
        if self.gate:
            self.gate.acquire()
        self.sent.append(response)
        if flags & FINAL:
            self.ended.set()

    def responses(self):
        assert self.ended.wait(30)
        return self.sent


class Request:
    def __init__(self, sender, wanted, id_="", **inputs):
        self.sender, self.wanted = sender, wanted
        self.request_id = lambda: id_
        self.inputs = {
            name: value if isinstance(value, np.ndarray) else np.array([value.encode()], object)
            for name, value in inputs.items()
        }

    def get_response_sender(self):
        return self.sender

    def requested_output_names(self):
        return list(self.wanted)


class FakeDecoder:
    """Says `script`; "wait" in it waits for ever, an exception is raised. Joins nothing: `asked` counts its deltas."""

    manifest = types.SimpleNamespace(llm_width=4)

    def __init__(self):
        self.script, self.closed, self.asked, self.stopped = [], threading.Event(), 0, False

    async def start(self, on_health, on_broken):
        self.on_health, self.on_broken = on_health, on_broken
        on_health("ready")

    async def stop(self):
        self.stopped = True

    async def answer(self, visual_tokens, question, sampling):
        assert visual_tokens.shape == (3, 4)
        self.question = question
        try:
            for item in self.script:
                if item == "wait":
                    await asyncio.Event().wait()
                if isinstance(item, Exception):
                    raise item
                self.asked += 1
                yield item
        finally:
            self.closed.set()


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """As if this process belonged to a server with a front."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return RunFolder(folder)


@pytest.fixture
def service(tmp_path, monkeypatch):
    fake = types.ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.InferenceResponse, fake.TritonError = Tensor, Response, TritonError
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    fake.get_input_tensor_by_name = lambda request, name: (
        Tensor(name, request.inputs[name]) if name in request.inputs else None
    )
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for name in ("engine.runtime.triton_io", "engine.runtime.decoder_service"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from engine.runtime.decoder_service import DecoderService

    store = StudyStore(tmp_path / "store")
    array = np.random.default_rng(0).random((1, 4, 8, 8), dtype=np.float32)
    prepared = prepare(Scan(array[0], np.eye(4), "npy", None), (4, 8, 8), "raw")
    store.add(STUDY, {"geometry": prepared.geometry.to_dict()}, prepared.image)
    store.put(STUDY, "visual_tokens", np.ones((3, 4), np.float32))
    told, broken = [], queue.Queue()
    service = DecoderService(DecoderStep(FakeDecoder(), store), told.append, broken.put)
    service.told, service.broken, service.decoder = told, broken, service.step.decoder
    service.start()
    yield service
    if not service.decoder.stopped:
        service.close()
    store.close()


def ask(service, sender=None, wanted=MODELS["decoder"].output_names, id_="", **inputs):
    sender = sender or Sender()
    inputs = {"STUDY": STUDY, "QUESTION": "where?", **inputs}
    given = {name: value for name, value in inputs.items() if value is not None}
    service.execute([Request(sender, wanted, id_, **given)])
    return sender


STREAM = np.array([True])
INFO = AnswerInfo(10, 4, 3, 0.1, 0.2)
ANSWER = [Delta("at ", (5,)), Delta(BOX, (6, 7)), Delta(".", (2,), "stop", np.ones((2, 4), np.float32), INFO)]


def test_a_stream_has_one_response_per_delta_and_the_rest_on_the_last(service):
    service.decoder.script = ANSWER
    responses = ask(service, STREAM=STREAM).responses()
    assert [response.text("TEXT") for response in responses] == ["at ", BOX, "."]
    assert [response.outputs["TOKEN_IDS"].tolist() for response in responses] == [[5], [6, 7], [2]]
    assert [response.text("FINISH_REASON") for response in responses] == ["", "", "stop"]
    assert [len(response.outputs["BOXES"]) for response in responses] == [0, 0, 1]
    assert [len(response.outputs["SEG_STATES"]) for response in responses] == [0, 0, 2]
    assert [bool(response.text("ANSWER_INFO")) for response in responses] == [False, False, True]
    assert json.loads(responses[-1].text("ANSWER_INFO"))["cached_tokens"] == 4
    assert {response.text("STUDY") for response in responses} == {STUDY}


def test_without_stream_there_is_one_response_in_all(service):
    service.decoder.script = ANSWER
    (response,) = ask(service).responses()
    assert response.text("TEXT") == f"at {BOX}."
    assert response.outputs["TOKEN_IDS"].tolist() == [5, 6, 7, 2] and response.outputs["TOKEN_IDS"].dtype == np.int32
    assert response.outputs["BOXES"].tolist() == [[0, 0, 0, 3, 5, 5]], "voxel edges of the scan's own array"


def test_earlier_turns_come_before_the_question(service):
    service.decoder.script = ANSWER
    ask(service).responses()
    assert service.decoder.question == "where?"
    ask(service, HISTORY='[["user", "what?"], ["assistant", "a scan"]]').responses()
    assert service.decoder.question == [("user", "what?"), ("assistant", "a scan"), ("user", "where?")]


@pytest.mark.parametrize("stream", [None, STREAM])
def test_details_are_on_the_last_response_where_there_are_any(service, stream):
    top = (ScoredToken(5, "at", -0.5), ScoredToken(9, "in", -2.0))
    details = AnswerDetails(logprobs=(ChosenToken(5, "at", -0.5, top),), choices={"yes": -1.5}, history_used=False)
    service.decoder.script = [*ANSWER[:-1], replace(ANSWER[-1], details=details)]
    said = json.loads(ask(service, STREAM=stream).responses()[-1].text("ANSWER_INFO"))
    assert said.pop("details") == json.loads(json.dumps(asdict(details)))
    service.decoder.script = ANSWER
    assert json.loads(ask(service).responses()[-1].text("ANSWER_INFO")) == said


def test_responses_hold_what_was_asked_for_only(service):
    """Triton's response sender drops the rest without Python's lock, as it does for ensembles that use less."""
    service.decoder.script = ANSWER
    responses = ask(service, STREAM=STREAM, wanted=("TEXT", "FINISH_REASON")).responses()
    assert [set(response.outputs) for response in responses] == [{"TEXT", "FINISH_REASON"}] * 3


@pytest.mark.parametrize(
    "inputs, code, words",
    [
        ({"STUDY": "cd" * 32}, "NOT_FOUND", "NOT_FOUND: unknown study"),
        ({"SAMPLING": '{"temperature": 9}'}, "INVALID_ARG", "INVALID_ARGUMENT: temperature must be"),
        ({"SAMPLING": "{"}, "INVALID_ARG", "INVALID_ARGUMENT: SAMPLING is not JSON"),
        ({"HISTORY": "{"}, "INVALID_ARG", "INVALID_ARGUMENT: HISTORY is not JSON"),
        ({"HISTORY": "{}"}, "INVALID_ARG", "INVALID_ARGUMENT: HISTORY must be a JSON list of turns"),
        ({"HISTORY": '[["user", "what?"]]'}, "INVALID_ARG", "INVALID_ARGUMENT: the roles of the turns are user, user"),
        ({"HISTORY": "[3]"}, "INVALID_ARG", "INVALID_ARGUMENT: a turn is a role and a text, not 3"),
        ({"QUESTION": None}, "INVALID_ARG", "INVALID_ARGUMENT: the request has no QUESTION"),
        ({"STUDY": None}, "INVALID_ARG", "INVALID_ARGUMENT: the request has no STUDY"),
    ],
)
def test_a_bad_request_gets_its_error_and_the_next_one_its_answer(service, inputs, code, words):
    service.decoder.script = ANSWER
    (response,) = ask(service, **inputs).responses()
    assert response.error.code == code and str(response.error).startswith(words)
    assert len(ask(service).responses()[0].outputs["TOKEN_IDS"]) == 4


@pytest.mark.parametrize(
    "error, words",
    [(ResourceExhausted("full"), "RESOURCE_EXHAUSTED: full"), (KeyError("secret"), "INTERNAL: unexpected KeyError")],
)
def test_an_error_midway_ends_the_stream_with_its_kind(service, error, words):
    service.decoder.script = [ANSWER[0], error]
    first, last = ask(service, STREAM=STREAM).responses()
    assert first.text("TEXT") == "at " and str(last.error).startswith(words)


@pytest.mark.parametrize("script", [["wait"], [ANSWER[0], "wait"]])
def test_a_cancelled_request_stops_decoding_also_before_its_first_token(service, script):
    service.decoder.script = script
    sender = ask(service, STREAM=STREAM)
    sender.cancelled.set()
    assert sender.responses()[-1].error.code == "CANCELLED"
    assert service.decoder.closed.is_set()


class Unasked(Sender):
    """Of a request with an id of the front's, about which Triton is not to be asked: it may have freed the answer."""

    def is_cancelled(self):
        raise AssertionError("Triton was asked")


def test_a_request_that_the_front_gives_up_is_cancelled_and_no_other(run_folder, service):
    service.decoder.script = ["wait"]
    gone, other = (ask(service, Unasked(), id_=id_) for id_ in "12")
    past_the_front = ask(service)
    run_folder.cancel("1")
    assert gone.responses()[-1].error.code == "CANCELLED"
    past_the_front.cancelled.set()
    assert past_the_front.responses()[-1].error.code == "CANCELLED"
    assert not other.ended.is_set()
    run_folder.cancel("2")
    assert other.responses()[-1].error.code == "CANCELLED"


def test_without_a_front_triton_is_asked_about_a_request_with_an_id(service):
    service.decoder.script = ["wait"]
    sender = ask(service, id_="1")
    sender.cancelled.set()
    assert sender.responses()[-1].error.code == "CANCELLED"


# --- a language model that is broken ---------------------------------------------------------------------------------
BROKEN = "the language model is out of order"


def break_down(service):
    """As the engine does it: on the service's loop, when the model has died."""
    service._thread.loop.call_soon_threadsafe(service.decoder.on_broken, BROKEN)


def test_health_is_told_as_it_changes(service):
    service._thread.loop.call_soon_threadsafe(service.decoder.on_health, "restarting")
    service.close()
    assert service.told == ["ready", "restarting"]


def test_a_broken_model_is_told_when_its_answers_have_failed(service, monkeypatch):
    gate = threading.Semaphore(0)
    service.decoder.script = [ANSWER[0], Unavailable("the language model stopped")]
    sender = ask(service, Sender(gate), STREAM=STREAM)
    break_down(service)
    ask(service, STUDY="cd" * 32).responses()  # the loop has had its turns
    assert service.broken.empty()
    gate.release(2)
    assert service.broken.get(timeout=30) == BROKEN
    assert str(sender.sent[-1].error) == "UNAVAILABLE: the language model stopped"


def test_a_broken_model_is_told_though_an_answer_does_not_end(service, monkeypatch):
    monkeypatch.setattr(sys.modules["engine.runtime.decoder_service"], "LAST_ANSWERS_S", 0.01)
    service.decoder.script = ["wait"]
    ask(service)
    break_down(service)
    assert service.broken.get(timeout=30) == BROKEN


def test_a_broken_model_without_answers_is_told_at_once(service):
    break_down(service)
    assert service.broken.get(timeout=30) == BROKEN


def test_a_desk_that_closes_tells_of_no_broken_model_any_more(service):
    service.decoder.script = ["wait"]
    sender = ask(service)
    break_down(service)
    service.close()
    assert sender.responses()[-1].error.code == "CANCELLED" and service.broken.empty()


def test_a_client_that_does_not_follow_holds_the_decoder_up(service):
    service.decoder.script = [Delta("x", (i,)) for i in range(100)] + ANSWER[-1:]
    gate = threading.Semaphore(0)
    sender = ask(service, Sender(gate), STREAM=STREAM)
    gate.release(3)
    other = Sender()
    ask(service, other, STUDY="cd" * 32).responses()  # the loop has had its turns
    assert service.decoder.asked <= 4 + 1
    gate.release(1000)
    assert [i for r in sender.responses() for i in r.outputs["TOKEN_IDS"].tolist()] == [*range(100), 2]


class Watched(Sender):
    """Its first question about cancellation is not answered before the last response goes out, or time is up."""

    def __init__(self, gate):
        super().__init__(gate)
        self.asked, self.ended_meanwhile = threading.Event(), None

    def is_cancelled(self):
        assert not self.ended.is_set(), "Triton has freed the answer"
        if not self.asked.is_set():
            self.asked.set()
            self.ended_meanwhile = self.ended.wait(0.5)
        return False


def test_the_last_response_waits_while_triton_is_asked_about_the_answer(service):
    """Triton frees the answer with it, and a server that is asked then dies of a segfault."""
    service.decoder.script = ANSWER
    gate = threading.Semaphore(0)
    sender = ask(service, Watched(gate), STREAM=STREAM)
    assert sender.asked.wait(30)
    gate.release(3)
    assert len(sender.responses()) == 3
    assert sender.ended_meanwhile is False


def test_closing_ends_what_is_in_work(service):
    service.decoder.script = ["wait"]
    sender = ask(service)
    service.close()
    assert sender.responses()[-1].error.code == "CANCELLED"
    assert service.decoder.stopped and service.decoder.closed.is_set()
