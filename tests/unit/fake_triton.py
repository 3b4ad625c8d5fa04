"""gRPC servers that speak Triton's protocol and answer as a test tells them, for tests of the client and the front."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine import contract
from engine.client.wire import decode, encode

ANSWER = ("The ", "liver ", "is ", "normal.")
HANDLE = "ab" * 32
PATIENCE_S = 60
MODEL = {
    "checkpoint": "a checkpoint",
    "checkpoint_sha256": "1" * 64,
    "target": "cpu",
    "precision": "fp32",
    "manifest_sha256": "2" * 64,
}
STUDY_INFO = {
    "preset": "ct",
    "reason": "it was asked for",
    "shape": [3, 4, 5],
    "spacing_mm": [1.0, 2.0, 3.0],
    "orientation": "RAS",
    "prepare_s": 0.25,
    "cached": False,
    "model": MODEL,
    "crop": None,
}
ANSWER_INFO = {
    "prompt_tokens": 3,
    "cached_tokens": 0,
    "answer_tokens": 4,
    "first_token_s": 1e-5,
    "last_token_s": 3e-5,
}
EMBEDDING = np.array([0.6, 0.8], np.float32)


def response(**tensors) -> service_pb2.ModelInferResponse:
    """A response with these contract tensors (by the names of engine.contract's constants)."""
    message = service_pb2.ModelInferResponse()
    for constant, value in tensors.items():
        tensor = getattr(contract, constant)
        shape, content = encode(tensor, value)
        message.outputs.add(name=tensor.name, datatype=tensor.dtype, shape=shape)
        message.raw_output_contents.append(b"".join(content))
    return message


def inputs_of(request) -> dict[str, np.ndarray]:
    return {
        i.name: decode(i.datatype, tuple(i.shape), raw) for i, raw in zip(request.inputs, request.raw_input_contents)
    }


def piece(text: str, ids: list[int], finish: str = "", boxes=np.zeros((0, 6)), info: str = "") -> dict:
    return {
        "TEXT": text,
        "TOKEN_IDS": np.array(ids, np.int32),
        "FINISH_REASON": finish,
        "BOXES": boxes,
        "ANSWER_INFO": info,
    }


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`stream_error` fails each question; `evicted` makes handles unknown until the next upload; `endless` streams
    until the client cancels, and `sent` counts what was handed to gRPC; `on_answer` is called before each answer;
    uploads are answered when `may_answer` is set, and their part number `refused_part` with an error. `parts` has all
    that came of uploads, `uploads` the whole."""

    def __init__(self):
        self.uploads: list[dict] = []
        self.parts: list[dict] = []
        self.refused_part: int | None = None
        self.hints = 0
        self.asked: list[tuple[str, dict]] = []
        self.evicted = False
        self.stream_error: str | None = None
        self.plain_error: tuple[grpc.StatusCode, str] | None = None
        self.handle = HANDLE
        self.endless = False
        self.silent = False
        self.unfinished = False
        self.mask = np.zeros((2, 3, 5), bool)
        self.answer = ANSWER
        self.segments: list[np.ndarray] = []  # masks of the answer's [SEG], for MERGE each; one otherwise
        self.text_limit = 512
        self.study_info = dict(STUDY_INFO)
        self.answer_info = dict(ANSWER_INFO)
        self.info = {"model": MODEL, "models": ["m3d_chat", "m3d_segment"], "version": "1.2"}
        self.sent = 0
        self.on_answer = lambda: None
        self.cancelled = threading.Event()
        self.read_whole = threading.Semaphore(0)  # streams that the client read to their end
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="triton", version="0.0-fake")

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name != "m3d_retrieve")

    def ModelInfer(self, request, context):
        inputs = inputs_of(request)
        if request.model_name == "study" and "SEGMENT_HINT" in inputs:
            self.hints += 1
            if self.evicted:
                context.abort(grpc.StatusCode.NOT_FOUND, "NOT_FOUND: study is unknown")
            return response(STUDY=self.handle, STUDY_INFO=json.dumps(self.study_info), MODEL_INFO="")
        if self.plain_error:
            context.abort(*self.plain_error)
        if "DESCRIBE" in inputs:
            return response(STUDY="", STUDY_INFO="", MODEL_INFO=json.dumps(self.info))
        self.asked.append((request.model_name, inputs))
        if self.evicted:
            context.abort(grpc.StatusCode.NOT_FOUND, "NOT_FOUND: study is unknown")
        if "FORGET" in inputs:
            self.evicted = True
            return response(STUDY="", STUDY_INFO="", MODEL_INFO="")
        if request.model_name == "segmentation":
            each = inputs["MERGE"][0] == b"each"
            bits = [np.packbits(mask) for mask in self.segments]
            return response(
                SEGMENT_MASKS=np.stack(bits) if each else np.zeros((0, 0), np.uint8),
                SEGMENT_SCORES=np.linspace(0.9, 0.6, len(bits)) if each else [0.75],
                MASK=np.packbits(self.mask),
                MASK_SHAPE=np.array(self.mask.shape),
                MASK_AFFINE=np.diag([1.0, 2, 3, 1]),
                MASK_HEADER=np.zeros(0, np.uint8),
                LOGITS=np.zeros((0, 0, 0), np.float32),
            )
        texts = inputs.get("TEXTS", np.array([]))
        return response(
            SCAN_EMBEDDING=EMBEDDING,
            TEXT_EMBEDDINGS=np.tile(EMBEDDING, (texts.size, 1)),
            SCORES=np.linspace(0, 1, texts.size),
            TEXT_CUT=np.array([len(text.split()) > self.text_limit for text in texts]),
            TEXT_LIMIT=self.text_limit,
        )

    def ModelStreamInfer(self, request_iterator, context):
        request = next(request_iterator)
        if request.model_name == "study":
            yield from self._upload(itertools.chain([request], request_iterator), context)
            return
        context.add_callback(self.cancelled.set)
        inputs = inputs_of(request)
        self.asked.append((request.model_name, inputs))
        error = "in ensemble, NOT_FOUND: study is unknown" if self.evicted else self.stream_error
        if error:
            yield service_pb2.ModelStreamInferResponse(error_message=error)
            self.read_whole.release()
            return
        if self.silent:
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(60)
            return
        self.on_answer()
        for outputs in self._outputs(inputs):
            self.sent += 1
            yield service_pb2.ModelStreamInferResponse(infer_response=response(**outputs))
        self.read_whole.release()  # not reached if the client cancels after the last response

    def _upload(self, requests, context):
        parts = []
        for request in requests:
            parts.append(inputs_of(request))
            self.parts.append(parts[-1])
            if len(parts) - 1 == self.refused_part:
                context.add_callback(self.cancelled.set)
                yield service_pb2.ModelStreamInferResponse(error_message="INVALID_ARGUMENT: this part is refused")
            size = parts[-1].get("UPLOAD_RANGE", [0, 0])[1]
            if sum(part["VOLUME"].size for part in parts) < size:
                yield service_pb2.ModelStreamInferResponse(infer_response=response(STUDY="", STUDY_INFO=""))
        if self.unfinished:
            return
        if not self.may_answer.wait(PATIENCE_S):
            context.abort(grpc.StatusCode.INTERNAL, "nobody let this server answer")
        self.uploads.append(parts[-1] | {"VOLUME": np.concatenate([part["VOLUME"] for part in parts])})
        self.evicted = False
        yield service_pb2.ModelStreamInferResponse(
            infer_response=response(STUDY=self.handle, STUDY_INFO=json.dumps(self.study_info))
        )

    def _outputs(self, inputs: dict):
        if self.endless:
            for i in itertools.count():
                yield piece("x" * 10_000, [i])
        info = json.dumps(self.answer_info)
        box = np.array([[0, 1, 2, 3, 4, 5.0]])
        streams = "STREAM" in inputs and bool(inputs["STREAM"][0])
        texts = self.answer if streams else ("".join(self.answer),)
        for i, text in enumerate(texts):
            last = i == len(texts) - 1 and not self.unfinished
            ids = [i] if streams else list(range(len(self.answer)))
            outputs = piece(text, ids, "stop", box, info) if last else piece(text, ids)
            spans = [found.span() for found in re.finditer(r"\[SEG\]", "".join(self.answer))] or [(0, 0)]
            spans = spans if last and self.mask.any() else []
            yield outputs | {
                "SEG_STATES": np.ones((len(spans), 4), np.float32),
                "SEG_SPANS": np.array(spans, np.int64).reshape(-1, 2),
            }


class HeldTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Triton as the front meets it: on the Unix socket at `path`, with ids and final responses as 2.51 has them.

    answers: the responses to a request, one after the other; a text is an error, and a tuple of status and text ends
    the call; what it waits for holds the answer. A stream's requests are answered in turn, when `at_once` have come.
    Of a decoupled model's responses, the last one may be `final`; else an empty one follows, for those who ask.
    `requests` has all that came; `count` how many arrived, responses sent in streams, calls begun, and of those the
    ones that this side ended as whole, the others as cancelled.
    """

    def __init__(self, path: Path):
        self.path = path
        self.answers: Callable[[service_pb2.ModelInferRequest], Iterable] = self.echo
        self.at_once = 1
        self.is_ready = True
        self.requests: list[service_pb2.ModelInferRequest] = []
        self.asked: list = []  # requests of the methods that tell of models
        self.on_asked: Callable = lambda context: None  # called by the methods that tell of the server and its models
        self.count: Counter[str] = Counter()
        self.gate = threading.Event()
        self._changed = threading.Condition()
        self._threads = ThreadPoolExecutor(32)
        self.start()

    def start(self) -> None:
        self._server = grpc.server(self._threads, options=[("grpc.max_receive_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def die(self) -> None:
        """What is in work ends with an error, and the socket is gone."""
        self._server.stop(None).wait()
        self.path.unlink(missing_ok=True)

    def stop(self) -> None:
        self.gate.set()
        self.die()
        self._threads.shutdown()

    @property
    def address(self) -> str:
        return f"unix:{self.path}"

    def counts(self, **more: int) -> None:
        with self._changed:
            self.count.update(more)
            self._changed.notify_all()

    def wait_for(self, **count: int) -> None:
        """Until `count` is at least that."""
        with self._changed:
            reached = self._changed.wait_for(lambda: all(self.count[k] >= n for k, n in count.items()), PATIENCE_S)
        assert reached, f"waited for {count}, Triton has {dict(self.count)}"

    @staticmethod
    def echo(request) -> Iterable[service_pb2.ModelInferResponse]:
        """One response, by which a test knows its request: the first input comes back as STUDY."""
        yield response(STUDY=request.raw_input_contents[0][4:])

    def held(self, request) -> Iterable[service_pb2.ModelInferResponse]:
        """`echo`, when the gate is open."""
        assert self.gate.wait(PATIENCE_S)
        yield from self.echo(request)

    # --- Triton's methods --------------------------------------------------------------------------------------------
    def ServerLive(self, request, context):
        return self._told(context, service_pb2.ServerLiveResponse(live=True))

    def ServerReady(self, request, context):
        return self._told(context, service_pb2.ServerReadyResponse(ready=self.is_ready))

    def ServerMetadata(self, request, context):
        return self._told(context, service_pb2.ServerMetadataResponse(name="triton", version="0.0-fake"))

    def ModelReady(self, request, context):
        return self._told(context, service_pb2.ModelReadyResponse(ready=self.is_ready), request)

    def ModelMetadata(self, request, context):
        return self._told(context, service_pb2.ModelMetadataResponse(name=request.name, platform="fake"), request)

    def ModelConfig(self, request, context):
        message = service_pb2.ModelConfigResponse()
        message.config.name = request.name
        return self._told(context, message, request)

    def ModelStatistics(self, request, context):
        message = service_pb2.ModelStatisticsResponse()
        message.model_stats.add(name=request.name, inference_count=7)
        return self._told(context, message, request)

    def _told(self, context, answered, about=None):
        """about: the request of a method that tells of models."""
        call = _Call(self, context)
        if about is not None:
            self.asked.append(about)
        self.on_asked(context)
        call.is_whole = True
        return answered

    def ModelInfer(self, request, context):
        call = _Call(self, context)
        self._arrived(request)
        answered = next(iter(self.answers(request)))
        call.is_whole = True
        if isinstance(answered, tuple):
            context.abort(*answered)
        return _of(request, answered)

    def ModelStreamInfer(self, request_iterator, context):
        call, waiting = _Call(self, context), []
        for request in request_iterator:
            self._arrived(request)
            waiting.append(request)
            if len(waiting) == self.at_once:
                for one in waiting:
                    yield from self._answered(one, context, call)
                waiting = []
        call.is_whole = True

    def _answered(self, request, context, call: _Call):
        wants_end = request.parameters["triton_enable_empty_final_response"].bool_param
        is_last = False
        for answered in self.answers(request):
            if isinstance(answered, tuple):
                call.is_whole = True
                context.abort(*answered)
            message = _in_stream(request, answered)
            is_last = message.infer_response.parameters[FINAL].bool_param
            yield message
            self.counts(sent=1)
        if not is_last and wants_end:
            yield _in_stream(request, final(service_pb2.ModelInferResponse()))

    def _arrived(self, request) -> None:
        self.requests.append(request)
        self.counts(arrived=1)


class _Call:
    """Counts a call of HeldTriton's when gRPC says that it is over."""

    def __init__(self, triton: HeldTriton, context):
        self.is_whole = False
        self._triton = triton
        triton.counts(begun=1)
        if not context.add_callback(self._over):
            self._over()

    def _over(self) -> None:
        self._triton.counts(**{"whole" if self.is_whole else "cancelled": 1})


FINAL = "triton_final_response"


def final(message: service_pb2.ModelInferResponse) -> service_pb2.ModelInferResponse:
    """Marked as the last response to its request."""
    message.parameters[FINAL].bool_param = True
    return message


def _in_stream(request, answered) -> service_pb2.ModelStreamInferResponse:
    """answered: a response, an error's words, or a whole message."""
    if isinstance(answered, str):
        answered = service_pb2.ModelStreamInferResponse(error_message=answered)
        final(answered.infer_response)
    elif isinstance(answered, service_pb2.ModelInferResponse):
        answered = service_pb2.ModelStreamInferResponse(infer_response=answered)
        if not contract.MODELS[request.model_name].decoupled:
            final(answered.infer_response)
    is_last = _of(request, answered.infer_response).parameters[FINAL]
    is_last.bool_param = is_last.bool_param  # false is said, too
    return answered


def _of(request, answered: service_pb2.ModelInferResponse) -> service_pb2.ModelInferResponse:
    answered.id, answered.model_name, answered.model_version = request.id, request.model_name, "1"
    return answered
