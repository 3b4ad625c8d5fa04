"""A gRPC server that speaks Triton's protocol and answers as a test tells it, for tests of the client."""

from __future__ import annotations

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine import contract
from engine.client.wire import decode, encode

ANSWER = ("The ", "liver ", "is ", "normal.")
HANDLE = "ab" * 32
PATIENCE_S = 10


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
        self.text_limit = 512
        self.study_info = {"preset": "ct"}
        self.answer_info = {"prompt_tokens": 3}
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
            return response(STUDY=self.handle, STUDY_INFO=json.dumps(self.study_info))
        if self.plain_error:
            context.abort(*self.plain_error)
        self.asked.append((request.model_name, inputs))
        if self.evicted:
            context.abort(grpc.StatusCode.NOT_FOUND, "NOT_FOUND: study is unknown")
        if request.model_name == "segmentation":
            return response(
                MASK=np.packbits(self.mask),
                MASK_SHAPE=np.array(self.mask.shape),
                MASK_AFFINE=np.diag([1.0, 2, 3, 1]),
                MASK_HEADER=np.zeros(0, np.uint8),
                LOGITS=np.zeros((0, 0, 0), np.float32),
            )
        texts = inputs["TEXTS"]
        return response(
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
        texts = ANSWER if streams else ("".join(ANSWER),)
        for i, text in enumerate(texts):
            last = i == len(texts) - 1 and not self.unfinished
            ids = [i] if streams else list(range(len(ANSWER)))
            outputs = piece(text, ids, "stop", box, info) if last else piece(text, ids)
            yield outputs | {"SEG_STATES": np.ones((int(last and self.mask.any()), 4), np.float32)}
