"""Tensors, requests and errors on Triton's gRPC protocol."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from engine import contract
from engine.contract import DTYPES, Tensor, encoded_texts
from engine.defaults import DEFAULT_URL
from engine.errors import Cancelled, DeadlineExceeded, InvalidInput, M3DError, ResourceExhausted, Unavailable, from_wire
from engine.methods import Outputs, not_served, other_version

PART_BYTES = 4 << 20  # of a scan in one request: so small that all that handle it use the same memory again
MAX_REQUEST_BYTES = (1 << 31) - (1 << 16)  # protobuf's 2 GiB, less the envelope
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted server is found again at once, and one client's failures do not slow down another's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # The scan does not take a detour through a proxy that happens to be configured.
    ("grpc.enable_http_proxy", 0),
]
SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
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
        raw = encoded_texts(tensor, value)
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
        """Serialized size in bytes."""
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


def outputs_of(response: service_pb2.ModelInferResponse) -> Outputs:
    return Outputs(
        (output.name, decode(output.datatype, tuple(output.shape), content))
        for output, content in zip(response.outputs, response.raw_output_contents)
    )


def server_error(message: str, status: grpc.StatusCode | None = None) -> M3DError:
    """The typed error for what Triton or a model said, with the gRPC status where there is one."""
    error = from_wire(message)
    if type(error) is not M3DError:
        return error
    if re.search(r"unknown model|model .*is not (ready|found)", message):
        return not_served(message)
    if re.search(r"unexpected inference (in|out)put|expected \d+ inputs but got", message):
        return other_version(message)
    if "not healthy" in message:  # the process of a Python model died; the server is about to end
        return Unavailable(f"a part of the server died ({message}): it must be started again")
    return _BY_STATUS.get(status, M3DError)(message)


# What gRPC for asyncio says of a call that it could not begin, as its deadline passed meanwhile.
_CORE = "Internal error from Core"


def call_error(url: str, error: grpc.RpcError, cancelled: bool, late: bool = False) -> M3DError:
    """The typed error that a failed call to `url` stands for.

    cancelled: whether this side cancelled it. late: whether its deadline has passed.
    """
    status, details = error.code(), error.details() or ""
    if late and details == _CORE:
        status = grpc.StatusCode.DEADLINE_EXCEEDED
    if cancelled:
        return Cancelled("the request was cancelled by this client")
    went_away = status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    if went_away and type(server_error(details)) is M3DError:
        if any(words in details.lower() for words in ("failed to connect", "connection refused", "resolving")):
            return Unavailable(
                f"no server answers at {url}: start one with `m3d serve`, or give the address of one that runs"
            )
        return Unavailable(f"the server at {url} went away during the request ({details}); see its log")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(
            f"no complete answer from {url} within the client's deadline; give a longer "
            "timeout (seconds), or fewer max_new_tokens"
        )
    return server_error(details or status.name, status)


def closed(url: str) -> Unavailable:
    """The error for a client that was closed."""
    return Unavailable(f"this client of {url} is closed: make a new one")


def checked_url(url: str) -> str:
    """The server's address. Raises InvalidInput for what is none."""
    if not url or "://" in url:
        raise InvalidInput(f"the server's address is host:port of its gRPC port, such as {DEFAULT_URL}, not {url!r}")
    return url


def upload_requests(
    pieces: Sequence[bytes | memoryview], inputs: Mapping[Tensor, object]
) -> Iterator[dict[Tensor, object]]:
    """The inputs of the requests that bring a scan: of one with the whole file, or of one for each part.

    pieces: of the file, one behind the other. inputs: what comes with the scan, which is with the last part.
    """
    parts: list[tuple[bytes | memoryview, ...]] = list(parts_of(pieces)) or [(b"",)]
    size, start, name = sum(map(size_of, parts)), 0, secrets.token_hex(16)
    for part in parts:
        request: dict[Tensor, object] = {contract.VOLUME: part}
        end = start + size_of(part)
        if len(parts) > 1:
            request |= {contract.UPLOAD: name, contract.UPLOAD_RANGE: (start, size)}
        if end == size:
            request |= inputs
        yield request
        start = end


def too_few(responses: int, wanted: int) -> Unavailable:
    """The error for an upload whose stream ended early."""
    return Unavailable(f"the server closed the stream after {responses} of {wanted} responses; see its log")
