"""How the Python models answer Triton, with a stand-in for the module that exists inside its stubs only."""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from engine import contract, logs
from engine.api import ModelInfo, StudyInfo
from engine.contract import IMAGE
from engine.errors import InvalidInput, StudyNotFound, Unavailable
from engine.runtime.request_pool import RequestPool
from engine.runtime.retrieval import RetrievalStep
from engine.runtime.run_folder import VARIABLE, RunFolder
from engine.runtime.segmentation import SegmentationStep
from engine.runtime.step import LocalInputs
from engine.runtime.study_step import StudyStep
from engine.scan.limits import Limits

MODULES = ("engine.runtime.triton_io", "engine.runtime.request_service")


class Tensor(SimpleNamespace):
    def __init__(self, name, array):
        super().__init__(name=name, array=array)

    def as_numpy(self):
        return self.array


class Request:
    """parameters: JSON, as Triton gives them."""

    def __init__(self, cancelled=False, parameters="", id_="", **inputs):
        self.inputs = inputs
        self.cancelled = cancelled
        self.parameters = lambda: parameters
        self.request_id = lambda: id_
        self.answers = []
        self.answered = threading.Event()

    def get_response_sender(self):
        return self

    def requested_output_names(self):
        return ["STUDY"]

    def is_cancelled(self):
        return self.cancelled

    def send(self, response, flags):
        assert flags == "final"
        self.answers.append(response)
        self.answered.set()

    def answer(self):
        assert self.answered.wait(30)
        (response,) = self.answers
        return response


def desk_of(kind, step, threads, waiting):
    return kind(step, RequestPool(threads, waiting))


def said(response):
    """What a response says as STUDY."""
    return response.outputs["STUDY"][0].decode()


@pytest.fixture
def triton(monkeypatch, caplog):
    """The modules under test, on a fake `triton_python_backend_utils`. log: what was logged as an error."""
    called = []
    codes = ("INTERNAL", "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "CANCELLED")

    class Call(SimpleNamespace):
        def exec(self):
            return called.pop()

    backend = SimpleNamespace(
        Tensor=Tensor,
        PreferredMemory=lambda kind: kind,
        TRITONSERVER_MEMORY_CPU="cpu",
        TRITONSERVER_RESPONSE_COMPLETE_FINAL="final",
        InferenceRequest=Call,
        InferenceResponse=lambda outputs=(), error=None: SimpleNamespace(
            outputs={tensor.name: tensor.array for tensor in outputs}, error=error, has_error=lambda: error is not None
        ),
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
        get_output_tensor_by_name=lambda response, name: Tensor(name, response.outputs[name]),
    )
    backend.TritonError = type(
        "TritonError",
        (SimpleNamespace,),
        {code: code for code in codes}
        | {"__init__": lambda self, message, code: SimpleNamespace.__init__(self, text=message, code=code)},
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    io, service = map(importlib.import_module, MODULES)
    yield SimpleNamespace(
        io=io, service=partial(desk_of, service.RequestService), log=caplog, called=called, backend=backend
    )
    for name in MODULES:  # no other test shall find modules that hold on to the fake
        del sys.modules[name]
        delattr(sys.modules["engine.runtime"], name.rpartition(".")[2])


def test_a_request_is_logged_by_its_id_and_outcome_without_what_it_asks(triton, capsys, engine_log):
    logs.set_up("study", "info")

    def step(inputs):
        if inputs.id == "wrong":
            raise InvalidInput("the question 'Is there a tumour?' is refused")
        return lambda: {"STUDY": "a handle"}

    service = triton.service(step, threads=1, waiting=8)
    requests = Request(id_="right", question="Is there a tumour?"), Request(id_="wrong", question="Is there a tumour?")
    service.execute(requests)
    for request in requests:
        request.answer()
    service.close()
    log = capsys.readouterr().err
    assert re.search(r"INFO study right engine\.runtime\.request_service: answered in \d", log)
    assert "INFO study wrong engine.runtime.triton_io: refused: INVALID_ARGUMENT" in log
    assert "tumour" not in log and "handle" not in log


def test_a_quick_request_is_answered_while_slow_ones_are_in_work(triton):
    go = threading.Event()

    def later():
        assert go.wait(30)
        return {"STUDY": "slow"}

    service = triton.service(lambda inputs: inputs.triton.inputs.get("quick", later), threads=2, waiting=8)
    slow, quick = [Request() for _ in range(5)], Request(quick={"STUDY": "quick"})
    assert service.execute([*slow, quick]) is None
    assert said(quick.answer()) == "quick" and not any(request.answers for request in slow)
    go.set()
    assert [said(request.answer()) for request in slow] == ["slow"] * 5
    service.close()


def test_more_slow_requests_than_there_are_places_are_refused_and_places_become_free_again(triton):
    go = threading.Event()

    def later():
        assert go.wait(30)
        return {"STUDY": "slow"}

    service = triton.service(lambda inputs: later, threads=1, waiting=2)
    requests = [Request() for _ in range(4)]
    service.execute(requests)
    error = requests[-1].answer().error
    assert error.code == "UNAVAILABLE" and error.text.startswith("RESOURCE_EXHAUSTED: 3 requests")
    go.set()
    assert [said(request.answer()) for request in requests[:-1]] == ["slow"] * 3
    service.close()
    assert all(service.pool.places.acquire(blocking=False) for _ in range(3))


def test_a_request_cancelled_while_it_waited_is_not_worked_on(triton):
    worked = []
    service = triton.service(lambda inputs: partial(worked.append, inputs), threads=1, waiting=1)
    request = Request(cancelled=True)
    service.execute([request])
    assert request.answer().error.code == "CANCELLED" and not worked
    service.close()


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """As if this process belonged to a server with a front."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return RunFolder(tmp_path)


def test_a_request_that_the_front_gave_up_while_it_waited_is_not_worked_on(triton, run_folder):
    worked, go = [], threading.Event()

    def later(inputs):
        assert go.wait(30)
        worked.append(inputs.triton)
        return {"STUDY": "done"}

    def never_asked():
        raise AssertionError("Triton is not to be asked about a request of the front")

    service = triton.service(lambda inputs: partial(later, inputs), threads=1, waiting=4)
    first, gone, other = (Request(id_=id_) for id_ in "123")
    for request in (first, gone, other):
        request.is_cancelled = never_asked
    direct = Request(cancelled=True)  # came past the front
    service.execute([first, gone, other, direct])
    run_folder.cancel("2")
    go.set()
    assert gone.answer().error.code == direct.answer().error.code == "CANCELLED"
    assert said(other.answer()) == "done" and worked == [first, other]
    service.close()


def test_without_a_front_triton_is_asked_about_a_request_with_an_id(triton):
    service = triton.service(lambda inputs: lambda: {"STUDY": "done"}, threads=1, waiting=1)
    request = Request(cancelled=True, id_="1")
    service.execute([request])
    assert request.answer().error.code == "CANCELLED"
    service.close()


@pytest.mark.parametrize(
    "error, code, text",
    [
        (InvalidInput("too large"), "INVALID_ARG", "INVALID_ARGUMENT: too large"),
        (StudyNotFound("unknown"), "NOT_FOUND", "NOT_FOUND: unknown"),
        (Unavailable("not loaded"), "UNAVAILABLE", "UNAVAILABLE: not loaded"),
        (
            ZeroDivisionError("secret detail"),
            "INTERNAL",
            "INTERNAL: unexpected ZeroDivisionError; the server's log has the details",
        ),
    ],
)
@pytest.mark.parametrize("slow", [False, True], ids=["at once", "later"])
def test_an_error_reaches_the_client_with_its_code_and_the_desk_goes_on(triton, error, code, text, slow):
    def fail(inputs):
        if inputs.triton.inputs.get("bad"):
            raise error
        return {"STUDY": "fine"}

    service = triton.service(partial(partial, fail) if slow else fail, threads=1, waiting=4)
    bad, good = Request(bad=True), Request()
    service.execute([bad, good])
    assert (bad.answer().error.code, bad.answer().error.text) == (code, text)
    assert said(good.answer()) == "fine"
    assert bool(triton.log.text) == (code == "INTERNAL")
    if triton.log.text:
        assert "secret detail" in triton.log.text and "Traceback" in triton.log.text
    service.close()


def test_inputs_are_optional_and_texts_must_be_utf8(triton):
    request = Request(
        TEXTS=Tensor("TEXTS", np.array(["ä".encode(), b"b"], object)),
        NO=Tensor("NO", np.array([False])),
        EMPTY=Tensor("EMPTY", np.array([b""], object)),
        BAD=Tensor("BAD", np.array([b"\xff"], object)),
    )
    inputs = triton.io.Request(request)
    assert inputs.texts("TEXTS") == ["ä", "b"] and inputs.texts("absent") == []
    assert inputs.text("TEXTS") == "ä" and inputs.text("EMPTY") is None and inputs.text("absent") is None
    assert not inputs.flag("NO") and not inputs.flag("absent") and inputs.array("absent") is None
    with pytest.raises(InvalidInput, match="BAD must be UTF-8"):
        inputs.text("BAD")


@pytest.mark.parametrize(
    "parameters, said",
    [
        ('{"m3d_peer": "ipv4:127.0.0.1:5", "other": 3}', "ipv4:127.0.0.1:5"),
        ('{"other": "x"}', ""),
        ('{"m3d_peer": 3}', ""),
        ('["m3d_peer"]', ""),
        ("", ""),
        ("{", ""),
        (None, ""),
    ],
)
def test_a_requests_peer_is_known_where_the_front_tells_it(triton, parameters, said):
    assert triton.io.Request(Request(parameters=parameters)).peer() == said
    assert triton.io.Request(SimpleNamespace()).peer() == ""  # of another Triton


def test_an_input_that_is_needed_and_missing_is_named(triton):
    inputs = triton.io.Request(Request(STUDY=Tensor("STUDY", np.array([b""], object))))
    assert inputs.needed_text("STUDY") == ""
    for needed in (inputs.needed_array, inputs.needed_text):
        with pytest.raises(InvalidInput, match="no QUESTION"):
            needed("QUESTION")


@pytest.mark.parametrize(
    "step, given, missing",
    [
        (SegmentationStep(None), (), "no SEG_STATES"),
        (SegmentationStep(None), (contract.SEG_STATES,), "no STUDY"),
        (RetrievalStep(None), (), "neither STUDY nor TEXTS"),
    ],
)
def test_a_step_without_an_input_says_so(step, given, missing):
    values = {contract.SEG_STATES: np.ones((1, 4), np.float32)}
    with pytest.raises(InvalidInput, match=missing):
        step(LocalInputs({tensor: values[tensor] for tensor in given}))()


def test_another_models_answer_is_copied_out_of_tritons_memory(triton):
    tokens = np.ones((1, 2, 3), np.float32)
    triton.called.append(triton.io.response(["VISUAL_TOKENS"], {"VISUAL_TOKENS": tokens}))
    answered = triton.io.infer("vision_encoder", {IMAGE: np.zeros((1, 1, 2, 2, 2), np.float32)})
    tokens[:] = 0
    assert answered["VISUAL_TOKENS"].all()


@pytest.mark.parametrize(
    "message, kind, text",
    [
        ("INVALID_ARGUMENT: IMAGE must be FP32", InvalidInput, "IMAGE must be FP32"),
        (
            "Stub process 'vision_encoder_0_0' is not healthy.",
            Unavailable,
            "vision_encoder cannot be run: Stub process",
        ),
    ],
)
def test_another_models_error_is_raised_as_its_kind(triton, message, kind, text):
    error = SimpleNamespace(message=lambda: message)
    triton.called.append(SimpleNamespace(has_error=lambda: True, error=lambda: error))
    with pytest.raises(kind, match=text):
        triton.io.infer("vision_encoder", {IMAGE: np.zeros((1, 1, 2, 2, 2), np.float32)})


@pytest.mark.parametrize("part_bytes", [1000, 100], ids=["at once", "in parts"])
def test_a_scan_is_decoded_where_it_was_put_together(triton, part_bytes):
    info = StudyInfo("ct", "", (1, 1, 1), (1, 1, 1), "RAS", 0, False, ModelInfo("", "", "", "", ""))
    added, opened = [], []
    step = StudyStep(SimpleNamespace(limits=Limits(), open=lambda scan: opened.append(scan) or ("handle", info)))
    add = step.uploads.add
    step.uploads.add = lambda *part: added.append(add(*part)) or added[-1]
    parameters = json.dumps({"m3d_peer": "a client's connection"})
    file = np.arange(1000).astype(np.uint8)
    for start in range(0, file.size, part_bytes):
        inputs = {"VOLUME": file[start : start + part_bytes]}
        if part_bytes < file.size:
            inputs |= {"UPLOAD": np.array([b"name"], object), "UPLOAD_RANGE": np.array([start, file.size])}
        tensors = {name: Tensor(name, array) for name, array in inputs.items()}
        answer = step(triton.io.Request(Request(parameters=parameters, **tensors)))
    assert answer()["STUDY"] == "handle"
    assert opened[0].data is (added[-1].data if added else inputs["VOLUME"])
    assert all(upload.peer == "a client's connection" for upload in added[-1:])
    np.testing.assert_array_equal(opened[0].data, file)
