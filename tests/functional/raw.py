"""Requests as a hostile client writes them: Triton's messages by hand, nothing checked before they go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine import contract
from engine.client.wire import encode, server_error
from engine.errors import M3DError
from tests.tiny import QUESTION

PATIENCE_S = 120
SAMPLING = json.dumps({"max_new_tokens": 2})
PUBLIC = tuple(model.name for model in contract.MODELS.values() if model.public)


@dataclass(frozen=True)
class Outcome:
    """How a call ended: its responses, or the typed error and the words that it came with."""

    responses: tuple[service_pb2.ModelInferResponse, ...] = ()
    error: M3DError | None = None
    words: str = ""

    @property
    def is_typed(self) -> bool:
        return self.error is not None and type(self.error) is not M3DError


class Raw:
    """A channel of its own to a server's gRPC port."""

    def __init__(self, url: str):
        # Clients of other kinds may send more than ours.
        self.channel = grpc.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_) -> None:
        self.channel.close()

    def infer(self, request: service_pb2.ModelInferRequest) -> Outcome:
        """By ModelInfer."""
        try:
            return Outcome((self.stub.ModelInfer(request, timeout=PATIENCE_S),))
        except grpc.RpcError as error:
            return _failed(error)

    def stream(self, *requests: service_pb2.ModelInferRequest) -> Outcome:
        """By ModelStreamInfer; the first error is the outcome."""
        responses = []
        try:
            for response in self.stub.ModelStreamInfer(iter(requests), timeout=PATIENCE_S):
                if response.error_message:
                    return Outcome(error=server_error(response.error_message), words=response.error_message)
                responses.append(response.infer_response)
        except grpc.RpcError as error:
            return _failed(error)
        return Outcome(tuple(responses))


def _failed(error: grpc.RpcError) -> Outcome:
    return Outcome(error=server_error(error.details() or "", error.code()), words=error.details() or "")


def tensor_of(model: str, name: str) -> contract.Tensor:
    """An input of the model."""
    (tensor,) = (tensor for tensor in contract.MODELS[model].inputs if tensor.name == name)
    return tensor


def put(request: service_pb2.ModelInferRequest, name: str, value) -> service_pb2.ModelInferRequest:
    """Add an input, as the model has it, or give it another value."""
    shape, content = encode(tensor := tensor_of(request.model_name, name), value)
    for given, _ in enumerate(request.inputs):
        if request.inputs[given].name == name:
            request.inputs[given].shape[:] = shape
            request.raw_input_contents[given] = b"".join(content)
            return request
    request.inputs.add(name=name, datatype=tensor.dtype, shape=shape)
    request.raw_input_contents.append(b"".join(content))
    return request


def good_request(model: str, handle: str, llm_width: int) -> service_pb2.ModelInferRequest:
    """A request about the study `handle` that is answered within milliseconds."""
    values = {
        "STUDY": handle,
        "QUESTION": QUESTION,
        "SAMPLING": SAMPLING,
        "TEXTS": ["w1", "w2 w3"],
        "SEG_STATES": np.zeros((0, llm_width), np.float32),
    }
    request = service_pb2.ModelInferRequest(model_name=model)
    for tensor in contract.MODELS[model].inputs:
        if tensor.name in values:
            put(request, tensor.name, values[tensor.name])
    return request


@dataclass(frozen=True)
class Case:
    """A changed request. answered: whether the change is harmless, so that an answer may come; else an error must."""

    name: str
    request: service_pb2.ModelInferRequest
    answered: bool = False


HUGE = "x" * 1_000_000
KINDS = {"bool": (True, False), "int64": (0, 1, 2, 2**31, -1), "string": ("", "5", "m3d"), "double": (0.5,)}
KINDS["uint64"] = (1, 2**63)
CONTENTS = {"bool": [True], "int": [1], "int64": [1], "uint": [1], "uint64": [1], "fp32": [1], "fp64": [1]}
CONTENTS["bytes"] = [b"x"]
DATATYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
DATATYPES += ("BYTES", "BF16", "STRING", "bytes", "", HUGE)
SHAPES = ((), (0,), (2,), (-1,), (1, 1), (0, 0), (-1, -1), (2**31,), (2**63 - 1,), (-(2**63),), (2**31, 2**31))
SHAPES += ((2**32, 2**32), (2**62, 4), (2**61, 8), (0, 2**63 - 1), (1, 2**63 - 1), (1,) * 64)
OF_REQUEST = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output", "m3d_peer")
OF_REQUEST += ("classification", "triton_final_response", "headers", "", HUGE)
OF_TENSOR = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "binary_data")
OF_TENSOR += ("binary_data_size", "classification", "triton_enable_empty_final_response", "unknown", "", HUGE)


def cases(good: service_pb2.ModelInferRequest) -> Iterator[Case]:
    """Everything that a request may carry and that no client of ours does, one at a time."""
    model = contract.MODELS[good.model_name]

    def changed(name: str, change: Callable, answered: bool = False) -> Case:
        request = service_pb2.ModelInferRequest()
        request.CopyFrom(good)
        change(request)
        return Case(name[:120], request, answered)

    for kind, value in ((kind, value) for kind, values in KINDS.items() for value in values):

        def give(parameters, name, kind=kind, value=value):
            setattr(parameters[name], f"{kind}_param", value)

        said = f"={value} ({kind})"
        for name in OF_REQUEST:
            yield changed(f"parameter {name}{said}", lambda request: give(request.parameters, name))
        yield changed(
            f"empty final{said}",
            lambda request: give(request.parameters, "triton_enable_empty_final_response"),
            answered=True,
        )
        for name in OF_TENSOR:
            for at, given in enumerate(good.inputs):
                yield changed(f"{given.name}, {name}{said}", lambda request: give(request.inputs[at].parameters, name))
            for output in model.output_names:
                yield changed(
                    f"{output}, {name}{said}",
                    lambda request: give(request.outputs.add(name=output).parameters, name),
                )
    for at, given in enumerate(good.inputs):
        yield from _of_input(changed, at, given, good.raw_input_contents[at])
    for output in model.output_names:
        yield changed(f"output {output} alone", lambda request: request.outputs.add(name=output), answered=True)
        yield changed(f"output {output} twice", lambda r: [r.outputs.add(name=output) for _ in range(2)])
    every = {tensor.name for other in contract.MODELS.values() for tensor in (*other.inputs, *other.outputs)}
    for name in (*every, "", HUGE, "../TEXT", "\0"):
        if name not in model.output_names:
            yield changed(f"output {name}", lambda request: request.outputs.add(name=name))
        if name not in model.input_names:
            yield changed(f"input {name}", lambda request: _add(request, name))
    for version, answered in (("1", True), ("0", False), ("2", False), ("-1", False), ("+1", False), (HUGE, False)):
        yield changed(f"version {version}", lambda request: setattr(request, "model_version", version), answered)
    for id_, answered in (("x" * 256, True), ("x" * 257, False), (HUGE, False), ("../../x\0\n\u202e", True)):
        yield changed(f"id {id_}", lambda request: setattr(request, "id", id_), answered)
    for name in ("", HUGE, "../decoder", "decoder/1", f"{model.name}\0", *contract.MODELS):
        if name not in PUBLIC:
            yield changed(f"model {name}", lambda request: setattr(request, "model_name", name))
    yield changed("no raw contents", lambda request: request.ClearField("raw_input_contents"))
    yield changed("one content less", lambda request: request.raw_input_contents.pop())
    yield changed("one content more", lambda request: request.raw_input_contents.append(b"\1\0\0\0x"))
    yield changed("no inputs", lambda request: request.ClearField("inputs"))
    yield changed("no inputs and no contents", lambda r: (r.ClearField("inputs"), r.ClearField("raw_input_contents")))


def _of_input(changed: Callable, at: int, given, content: bytes) -> Iterator[Case]:
    name = given.name
    for kind, values in CONTENTS.items():

        def fill(request, kind=kind, values=values):
            getattr(request.inputs[at].contents, f"{kind}_contents").extend(values)

        yield changed(f"{name}, {kind}_contents too", fill)
        yield changed(f"{name}, {kind}_contents", lambda r, fill=fill: (fill(r), r.ClearField("raw_input_contents")))
    yield changed(f"{name}, contents without any", lambda request: request.inputs[at].contents.SetInParent())
    for datatype in DATATYPES:
        if datatype != given.datatype:
            yield changed(f"{name} as {datatype}", lambda request: setattr(request.inputs[at], "datatype", datatype))
    for shape in SHAPES:
        if shape != tuple(given.shape):

            def reshape(request, shape=shape):
                request.inputs[at].shape[:] = shape

            yield changed(f"{name} of {shape}", reshape)
            yield changed(f"{name} of {shape}, empty", lambda r, reshape=reshape: (reshape(r), _fill(r, at, b"")))
    for said, other in (
        ("one byte less", content[:-1]),
        ("one byte more", content + b"\0"),
        ("a MB more", content + bytes(1 << 20)),
        ("a text of 4 GB", b"\xff\xff\xff\xff" + content[4:]),
        ("a text of 2 GB", b"\0\0\0\x80" + content[4:]),
        ("a text one byte longer", bytes([(*content, 0)[0] + 1, *content[1:]])),
    ):
        if other != content:
            yield changed(f"{name}, {said}", lambda request: _fill(request, at, other))
    yield changed(f"{name} twice", lambda request: _add(request, name, like=at))
    yield changed(f"without {name}", lambda r: (r.inputs.pop(at), r.raw_input_contents.pop(at)))


def _fill(request: service_pb2.ModelInferRequest, at: int, content: bytes) -> None:
    request.raw_input_contents[at] = content


def _add(request: service_pb2.ModelInferRequest, name: str, like: int = 0) -> None:
    added = request.inputs.add()
    added.CopyFrom(request.inputs[like])
    added.name = name
    request.raw_input_contents.append(request.raw_input_contents[like])
