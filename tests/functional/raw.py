"""Requests as a hostile client writes them: Triton's messages by hand, nothing checked before they go."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine import contract
from engine.client.wire import encode, server_error
from engine.errors import M3DError
from tests.tiny import QUESTION

PATIENCE_S = 120
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
PUBLIC = tuple(model.name for model in contract.MODELS.values() if model.public)
Request = service_pb2.ModelInferRequest


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with responses, or with an error, as our client would tell it, and the words it came with.

    id: of the request, where it was an error in a stream.
    """

    responses: tuple[service_pb2.ModelInferResponse, ...] = ()
    error: M3DError | None = None
    words: str = ""
    id: str = ""

    @property
    def is_typed(self) -> bool:
        return self.error is not None and type(self.error) is not M3DError

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.words}" if self.error else f"{len(self.responses)} responses"


class Raw:
    """A connection of its own to a server's gRPC port."""

    def __init__(self, url: str):
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(url, options=options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_) -> None:
        self.channel.close()

    def infer(self, request: Request) -> Outcome:
        """By ModelInfer."""
        try:
            return Outcome((self.stub.ModelInfer(request, timeout=PATIENCE_S),))
        except grpc.RpcError as error:
            return _failed(error)

    def stream(self, *requests: Request) -> Outcome:
        """By ModelStreamInfer; of its errors, the first."""
        outcomes = self.each(self.stub.ModelStreamInfer(iter(requests), timeout=PATIENCE_S))
        failed = next((outcome for outcome in outcomes if outcome.error), None)
        return failed or Outcome(tuple(response for outcome in outcomes for response in outcome.responses))

    def each(self, responses: Iterable[service_pb2.ModelStreamInferResponse]) -> list[Outcome]:
        """What a stream brings until its end, one by one."""
        outcomes = []
        try:
            for response in responses:
                words, response = response.error_message, response.infer_response
                failed = words and Outcome(error=server_error(words), words=words, id=response.id)
                outcomes.append(failed or Outcome((response,)))
        except grpc.RpcError as error:
            outcomes.append(_failed(error))
        return outcomes

    def bytes(self, method: str, *messages: bytes, **more) -> tuple[str, grpc.StatusCode]:
        """Send these bytes as messages: the error that a stream brought first, or the end of the call; its status."""
        call = self.channel.stream_stream(f"/{SERVICE}/{method}")(iter(messages), timeout=PATIENCE_S, **more)
        words = ""
        try:
            for response in call:
                if method == "ModelStreamInfer":
                    words = words or service_pb2.ModelStreamInferResponse.FromString(response).error_message
        except grpc.RpcError:
            pass
        return words or call.details(), call.code()


def _failed(error: grpc.RpcError) -> Outcome:
    words = error.details() or ""
    return Outcome(error=server_error(words, error.code()), words=words)


# --- good requests ---------------------------------------------------------------------------------------------------
def request_of(model: str, **values) -> Request:
    """A request with these inputs, as the model has them. A text of any size is sent: the server is to refuse it."""
    request = Request(model_name=model)
    tensors = {tensor.name: tensor for tensor in contract.MODELS[model].inputs}
    for name, value in values.items():
        shape, content = encode(replace(tensors[name], max_bytes=0), value)
        request.inputs.add(name=name, datatype=tensors[name].dtype, shape=shape)
        request.raw_input_contents.append(b"".join(content))
    return request


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def good_requests(model: str, handle: str, llm_width: int) -> Iterator[Request]:
    """Requests that are answered within milliseconds and have, together, each input of the model."""
    question = {"QUESTION": QUESTION, "SAMPLING": json.dumps({"max_new_tokens": 2})}
    talk = {"HISTORY": json.dumps([["user", "w1"], ["assistant", "w2"]])}
    scan = npy(np.arange(512, dtype=np.int16).reshape(8, 8, 8))
    by_scan = {"VOLUME": scan, "AFFINE": np.eye(4), "PRESET": "auto", "CROP": [0, 0, 0, 8, 8, 8], "CROP_UNIT": "voxels"}
    part = {"UPLOAD": "whole", "UPLOAD_RANGE": (0, len(scan)), "SEGMENT_HINT": True}
    states = np.zeros((0, llm_width), np.float32)
    for values in {
        "study": ({"STUDY": handle}, {**by_scan, **part}, {"STUDY": handle, "FORGET": False, "DESCRIBE": False}),
        "m3d_chat": ({"STUDY": handle, **question, **talk, "STREAM": False}, {**by_scan, **question}),
        "m3d_segment": (
            {"STUDY": handle, **question, **talk, "RETURN_LOGITS": True, "SEGMENT_HINT": True, "MERGE": "each"},
        ),
        "m3d_retrieve": ({"STUDY": handle, "TEXTS": ["w1", "w2 w3"]},),
        "decoder": ({"STUDY": handle, **question, **talk, "STREAM": True, "RETURN_LOGITS": False, "MERGE": "each"},),
        "segmentation": ({"STUDY": handle, "SEG_STATES": states, "RETURN_LOGITS": False, "MERGE": "reference"},),
        "retrieval": ({"STUDY": handle, "TEXTS": ["w1", "w2 w3"]}, {"TEXTS": ["w1"]}),
    }[model]:
        yield request_of(model, **values)


# --- everything else -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A changed request. harmless: an answer may come; else an error must."""

    name: str
    request: Request
    harmless: bool = False


HUGE = "x" * 100_000
VALUES = {"bool": True, "int64": 2, "string": "5", "double": 0.5, "uint64": 1 << 63}
CLASSES = (0, 1, 5, 1 << 31, -1)
OF_REQUEST = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output", "m3d_peer")
OF_REQUEST += ("classification", "triton_final_response", "shared_memory_region", "headers", "", HUGE)
OF_TENSOR = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "binary_data", "unknown", "")
OF_TENSOR += ("binary_data_size", "classification", "triton_enable_empty_final_response", HUGE)
CONTENTS = {"bool": True, "int": 1, "int64": 1, "uint": 1, "uint64": 1, "fp32": 1, "fp64": 1, "bytes": b"x"}
DATATYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
DATATYPES += ("BYTES", "BF16", "STRING", "bytes", "", HUGE)
SHAPES = ((), (0,), (2,), (-1,), (1, 1), (0, 0), (-1, -1), (2**31,), (2**63 - 1,), (-(2**63),), (2**31, 2**31))
SHAPES += ((2**32, 2**32), (2**62, 4), (2**61, 8), (0, 2**62), (0, 2**63 - 1), (1, 2**63 - 1), (1,) * 64)


def cases(good: Request) -> Iterator[Case]:
    """Everything that a request may carry and that no client of ours sends, one thing at a time."""
    yield from _parameters(good)
    yield from _outputs(good)
    for place in range(len(good.inputs)):
        yield from _input(good, place)
    for name in (*_tensor_names(), "", HUGE):
        if name not in contract.MODELS[good.model_name].input_names:
            yield _changed(good, f"input {name}", lambda request: _add(request, name))
    for version, harmless in (("1", True), ("0", False), ("2", False), ("-1", False), ("+1", False), (HUGE, False)):
        yield _changed(good, f"version {version}", lambda r: setattr(r, "model_version", version), harmless)
    for id_, harmless in (("x" * 256, True), ("x" * 257, False), (HUGE, False), ("../../x\0\n\u202e", True)):
        yield _changed(good, f"id {id_}", lambda request: setattr(request, "id", id_), harmless)
    for name in ("", HUGE, "../decoder", "decoder/1", f"{good.model_name}\0", *contract.MODELS):
        if name not in PUBLIC:
            yield _changed(good, f"model {name}", lambda request: setattr(request, "model_name", name))
    yield _changed(good, "no raw contents", lambda request: request.ClearField("raw_input_contents"))
    yield _changed(good, "a content less", lambda request: request.raw_input_contents.pop())
    yield _changed(good, "a content more", lambda request: request.raw_input_contents.append(b"\1\0\0\0x"))
    yield _changed(good, "nothing", lambda r: (r.ClearField("inputs"), r.ClearField("raw_input_contents")))


def _parameters(good: Request) -> Iterator[Case]:
    def give(parameters, name: str, kind: str, value) -> None:
        setattr(parameters[name], f"{kind}_param", value)

    every = [(name, kind, value) for name in OF_REQUEST for kind, value in VALUES.items()]
    for name, kind, value in every + [("classification", "int64", count) for count in CLASSES]:
        said = f"{name}={value} ({kind})"
        yield _changed(good, said, lambda request: give(request.parameters, name, kind, value))
    for kind, value in VALUES.items():
        name = "triton_enable_empty_final_response"
        yield _changed(good, f"{name} ({kind})", lambda r: give(r.parameters, name, kind, value), harmless=True)
    every = [(name, kind, value) for name in OF_TENSOR for kind, value in VALUES.items()]
    for name, kind, value in every + [("classification", "int64", count) for count in CLASSES]:
        said = f"{name}={value} ({kind})"
        for place, given in enumerate(good.inputs):
            yield _changed(good, f"{given.name} {said}", lambda r: give(r.inputs[place].parameters, name, kind, value))
        for output in contract.MODELS[good.model_name].output_names:
            yield _changed(
                good, f"{output} {said}", lambda r: give(r.outputs.add(name=output).parameters, name, kind, value)
            )


def _outputs(good: Request) -> Iterator[Case]:
    known = contract.MODELS[good.model_name].output_names
    for name in known:
        yield _changed(good, f"only {name}", lambda request: request.outputs.add(name=name), harmless=True)
        yield _changed(good, f"{name} twice", lambda request: [request.outputs.add(name=name) for _ in range(2)])
    for name in (*_tensor_names(), "", HUGE, "../TEXT", "\0"):
        if name not in known:
            yield _changed(good, f"output {name}", lambda request: request.outputs.add(name=name))


def _input(good: Request, place: int) -> Iterator[Case]:
    given, content = good.inputs[place], good.raw_input_contents[place]
    (tensor,) = (tensor for tensor in contract.MODELS[good.model_name].inputs if tensor.name == given.name)
    name = given.name
    for kind, value in CONTENTS.items():

        def fill(request: Request) -> None:
            getattr(request.inputs[place].contents, f"{kind}_contents").append(value)

        yield _changed(good, f"{name} with {kind}_contents", fill)
        yield _changed(good, f"{name} by {kind}_contents", lambda r: (fill(r), r.ClearField("raw_input_contents")))
    yield _changed(good, f"{name} with empty contents", lambda r: r.inputs[place].contents.SetInParent())
    for datatype in DATATYPES:
        if datatype != given.datatype:
            yield _changed(good, f"{name} as {datatype}", lambda r: setattr(r.inputs[place], "datatype", datatype))
    for shape in SHAPES:
        if shape != tuple(given.shape):

            def reshape(request: Request, new: bytes) -> None:
                request.inputs[place].shape[:] = shape
                request.raw_input_contents[place] = new

            # An empty tensor of the right rank may be answered, such as no [SEG] states.
            harmless = len(shape) == len(tensor.dims) and set(tensor.dims) == {-1} and max(shape) == 0
            yield _changed(good, f"{name} of {shape}", lambda r: reshape(r, content), harmless)
            yield _changed(good, f"no {name} of {shape}", lambda r: reshape(r, b""), harmless)
    others = {"a byte less": content[:-1], "a byte more": content + b"\0", "a megabyte more": content + bytes(1 << 20)}
    if tensor.dtype == "BYTES":
        others |= {"said to be of 4 GB": b"\xff\xff\xff\xff" + content[4:]}
        others |= {"said to be of 2 GB": b"\0\0\0\x80" + content[4:]}
    for said, other in others.items():
        if other != content:
            yield _changed(good, f"{name}, {said}", lambda r: r.raw_input_contents.__setitem__(place, other))
    yield _changed(good, f"{name} twice", lambda request: _add(request, name, place))
    yield _changed(
        good, f"without {name}", lambda r: (r.inputs.pop(place), r.raw_input_contents.pop(place)), tensor.optional
    )


def _changed(good: Request, name: str, change: Callable[[Request], object], harmless: bool = False) -> Case:
    request = Request()
    request.CopyFrom(good)
    change(request)
    return Case(name[:100], request, harmless)


def _tensor_names() -> list[str]:
    """Of all models."""
    tensors = [tensor for model in contract.MODELS.values() for tensor in (*model.inputs, *model.outputs)]
    return sorted({tensor.name for tensor in tensors})


def _add(request: Request, name: str, like: int = 0) -> None:
    added = request.inputs.add()
    added.CopyFrom(request.inputs[like])
    added.name = name
    request.raw_input_contents.append(request.raw_input_contents[like])
