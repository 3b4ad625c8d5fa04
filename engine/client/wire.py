"""Tensors and errors on Triton's gRPC protocol, and the connection that carries them.

Each call is a gRPC call of its own on one shared channel (tritonclient's own stream object allows one stream a client),
so that streams are independent, cancelled one by one, and paused by HTTP/2's flow control when nobody reads them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from engine.contract import Tensor
from engine.errors import Cancelled, DeadlineExceeded, InvalidInput, M3DError, ResourceExhausted, Unavailable, from_wire

PART_BYTES = 4 << 20  # of a scan in one request: so small that all that handle it use the same memory again
MAX_REQUEST_BYTES = (1 << 31) - (1 << 16)  # protobuf's 2 GiB, less the envelope
DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted server is found again at once, and one client's failures do not slow down another's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # The scan does not take a detour through a proxy that happens to be configured.
    ("grpc.enable_http_proxy", 0),
]
_SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def encode(tensor: Tensor, value) -> tuple[tuple[int, ...], tuple[bytes | memoryview, ...]]:
    """Shape and raw content of one input, in pieces. BYTES takes a text or a sequence of them, the others an array;
    UINT8 also takes a file, as bytes or in a tuple of pieces, which go out from where they are."""
    if tensor.dtype == "BYTES":
        texts = [value] if isinstance(value, (str, bytes)) else list(value)
        try:
            raw = [text.encode() if isinstance(text, str) else text for text in texts]
        except UnicodeEncodeError:
            raise InvalidInput(f"the {tensor.name.lower()} is not valid Unicode text") from None
        return (len(raw),), tuple(len(text).to_bytes(4, "little") + text for text in raw)
    if tensor.dtype == "UINT8" and isinstance(value, (bytes, tuple)):
        pieces = value if isinstance(value, tuple) else (value,)
        return (size_of(pieces),), pieces
    array = np.asarray(value, DTYPES[tensor.dtype])
    return (array.shape or (1,)), (array.tobytes(),)


def decode(datatype: str, shape, content: bytes) -> np.ndarray:
    """One output: an array in C order; BYTES as an object array of `bytes`."""
    if datatype != "BYTES":
        return np.frombuffer(content, DTYPES[datatype]).reshape(shape)
    texts, offset = [], 0
    while offset < len(content):
        start = offset + 4
        offset = start + int.from_bytes(content[offset:start], "little")
        texts.append(content[start:offset])
    return np.array(texts, object).reshape(shape)


@dataclass(frozen=True)
class InferRequest:
    """A ModelInferRequest, and its raw_input_contents still apart from it: protobuf would copy them three times.

    Messages of protobuf may be sent in pieces, one behind the other.
    """

    message: service_pb2.ModelInferRequest
    contents: tuple[tuple[bytes | memoryview, ...], ...]

    def serialized(self) -> bytes:
        return b"".join(self._pieces())

    def ByteSize(self) -> int:
        """As protobuf's messages tell theirs."""
        return size_of(self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        yield self.message.SerializeToString()
        for content in self.contents:
            yield _CONTENT_TAG + _varint(size_of(content))
            yield from content


def size_of(pieces: Iterable[bytes | memoryview]) -> int:
    """Bytes of all of them."""
    return sum(memoryview(piece).nbytes for piece in pieces)


_CONTENT_TAG = bytes([service_pb2.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER << 3 | 2])


def _varint(number: int) -> bytes:
    """A number as protobuf writes it: 7 bits a byte, the lowest first, all but the last marked."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + _varint(rest)


def request_of(model: str, inputs: Mapping[Tensor, object]) -> InferRequest:
    """A request with all outputs. Inputs whose value is None stay out. Raises InvalidInput if it is too large."""
    request, contents, size = service_pb2.ModelInferRequest(model_name=model), [], 0
    for tensor, value in inputs.items():
        if value is None:
            continue
        shape, content = encode(tensor, value)
        size += size_of(content)
        if size > MAX_REQUEST_BYTES:
            raise InvalidInput(
                f"the request would have {size:,} bytes, one message carries at most {MAX_REQUEST_BYTES:,}"
            )
        request.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=shape)
        contents.append(content)
    return InferRequest(request, tuple(contents))


def parts_of(pieces: Iterable[bytes | memoryview]) -> Iterator[tuple[memoryview, ...]]:
    """A file in parts of PART_BYTES, each as pieces of what `pieces` are one behind the other; nothing is copied."""
    part: tuple[memoryview, ...] = ()
    room = PART_BYTES
    for piece in pieces:
        rest = np.frombuffer(piece, np.uint8) if size_of((piece,)) else np.empty(0, np.uint8)
        while rest.size:
            taken, rest = rest[:room], rest[room:]
            part, room = (*part, taken.data), room - taken.size
            if not room:
                yield part
                part, room = (), PART_BYTES
    if part:
        yield part


class Outputs(dict[str, np.ndarray]):
    """A response's outputs by name. One that the contract has and the server did not send is another version's."""

    def __missing__(self, name: str):
        raise other_version(f"its response has no {name}")


def other_version(what: str) -> Unavailable:
    """The error for a server whose tensors are not this client's."""
    return Unavailable(
        f"the server runs another version of m3d-engine than this client's {importlib.metadata.version('m3d-engine')} "
        f"({what}): install the same version on both sides"
    )


def outputs_of(response: service_pb2.ModelInferResponse) -> Outputs:
    return Outputs(
        (output.name, decode(output.datatype, tuple(output.shape), content))
        for output, content in zip(response.outputs, response.raw_output_contents)
    )


def text_of(array: np.ndarray) -> str:
    """The one text of a BYTES tensor."""
    return array.reshape(-1)[0].decode("utf-8", errors="replace")


def server_error(message: str, status: grpc.StatusCode | None = None) -> M3DError:
    """The typed error for what Triton or a model said, with the gRPC status where there is one."""
    error = from_wire(message)
    if type(error) is not M3DError:
        return error
    if re.search(r"unknown model|model .*is not (ready|found)", message):
        return Unavailable(
            f"the server does not serve this: {message}. A repository serves what its checkpoint has: "
            "ranking needs --clip-checkpoint at export, segmentation a checkpoint with a [SEG] token"
        )
    if re.search(r"unexpected inference (in|out)put|expected \d+ inputs but got", message):
        return other_version(message)
    if "not healthy" in message:  # the process of a Python model died; the server is about to end
        return Unavailable(f"a part of the server died ({message}): it must be started again")
    return _BY_STATUS.get(status, M3DError)(message)


class Connection:
    """A gRPC channel to one server. Thread-safe. The calls raise engine.errors only."""

    def __init__(self, url: str):
        self.url = url
        self._channel = grpc.insecure_channel(url, options=_OPTIONS)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        for name, kind, response in (
            ("ModelInfer", self._channel.unary_unary, service_pb2.ModelInferResponse),
            ("ModelStreamInfer", self._channel.stream_stream, service_pb2.ModelStreamInferResponse),
        ):
            setattr(self.stub, name, kind(f"/{_SERVICE}/{name}", InferRequest.serialized, response.FromString))
        self._closed = False

    def close(self) -> None:
        """Close the channel; calls in progress end with Cancelled."""
        self._closed = True
        self._channel.close()

    def call(self, method: str, request, timeout: float | None):
        """A unary call of Triton's service."""
        self._check_open()
        try:
            return getattr(self.stub, method)(request, timeout=timeout)
        except grpc.RpcError as error:
            raise self.error(error) from None

    def infer(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> dict[str, np.ndarray]:
        """One request, one response."""
        return outputs_of(self.call("ModelInfer", request_of(model, inputs), timeout))

    def infer_in_turn(
        self, model: str, parts: Iterable[Mapping[Tensor, object]], timeout: float | None
    ) -> dict[str, np.ndarray]:
        """Requests in their order, none of which waits for the response to the one before; the last response.

        They are let go once the last is sent. The first that fails ends it all.
        """
        self._check_open()
        requests = [request_of(model, inputs) for inputs in parts]
        wanted, waiting = len(requests), iter(requests)
        del requests  # the iterator has them until the last is sent
        responses = list(ResponseStream(self, self.stub.ModelStreamInfer(waiting, timeout=timeout), alone=wanted == 1))
        if len(responses) < wanted:
            raise Unavailable(f"the server closed the stream after {len(responses)} of {wanted} responses; see its log")
        return responses[-1]

    def stream(self, model: str, inputs: Mapping[Tensor, object], timeout: float | None) -> ResponseStream:
        """One request to a decoupled model, any number of responses. Sent at once."""
        self._check_open()
        call = self.stub.ModelStreamInfer(iter((request_of(model, inputs),)), timeout=timeout)
        return ResponseStream(self, call, alone=True)

    def error(self, error: grpc.RpcError, cancelled: bool = False) -> M3DError:
        """The typed error that a failed call stands for. cancelled: whether this side cancelled it."""
        status, details = error.code(), error.details() or ""
        if cancelled or self._closed:
            return Cancelled("the request was cancelled by this client")
        went_away = status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if went_away and type(server_error(details)) is M3DError:
            if any(words in details.lower() for words in ("failed to connect", "connection refused", "resolving")):
                return Unavailable(
                    f"no server answers at {self.url}: start one with `m3d serve`, or give the address of one that runs"
                )
            return Unavailable(f"the server at {self.url} went away during the request ({details}); see its log")
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(
                f"no complete answer from {self.url} within the client's deadline; give a longer "
                "timeout (seconds), or fewer max_new_tokens"
            )
        return server_error(details or status.name, status)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(f"this client of {self.url} is closed: make a new one")


class ResponseStream(Iterator):
    """The responses of one streaming call, as dicts of output name to array. Cancelled by `close`, or when dropped.

    alone: that one request is all that is sent, so that an error is the last response.
    """

    def __init__(self, connection: Connection, call, alone: bool):
        self._connection = connection
        self._alone = alone
        self._call = call
        self._cancelled = False

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            message = next(self._call)
        except grpc.RpcError as error:
            raise self._connection.error(error, self._cancelled) from None
        if message.error_message:
            self.finish() if self._alone else self.close()
            raise server_error(message.error_message)
        return outputs_of(message.infer_response)

    def finish(self) -> None:
        """Read to the end of a stream whose last response has come, or failed.

        Triton 2.51 keeps the socket of a call that is cancelled between its last response and its end.
        """
        with contextlib.suppress(grpc.RpcError):
            for _ in self._call:
                pass

    def close(self) -> None:
        self._cancelled = True
        self._call.cancel()

    def __del__(self):
        self._call.cancel()
