"""What a client's request may say: checked in the front, so that Triton never meets the rest.

Triton 2.51 ends with SIGFPE at the parameter `classification` on a text output, and lets anybody name shared memory or
call the models that ours call. So only what the contract has passes: models, tensors, types, and no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc.service_pb2 import ModelInferRequest

from engine.contract import MODELS, Model, Tensor
from engine.errors import InvalidInput, M3DError, shortened

MAX_ID_LENGTH = 256
MAX_FIELDS, MAX_BESIDE_BYTES = 1 << 10, 1 << 16  # of a message, and of what is beside the bytes of its tensors
MAX_SIZE = 1 << 27  # of an axis beside one of 0: NumPy makes no array of 0 x 2**62, which ends the process of a model
MAX_TEXTS = 4096  # of a tensor; a model may allow fewer, and says so
SAID_AXES = 6  # of a shape that does not fit
ITEM_BYTES = {"BOOL": 1, "UINT8": 1, "INT32": 4, "INT64": 8, "FP32": 4, "FP64": 8}  # BYTES are texts
# With it, Triton marks the end of an answer by an empty response: it changes no result.
ALLOWED_PARAMETERS = {"triton_enable_empty_final_response"}


_VARINT, _LENGTH, _FIXED = 0, 2, {1: 8, 5: 4}  # protobuf's wire types, and bytes of the last ones


class Refused(Exception):
    """A request that is not passed on.

    Args:
        status: of the gRPC call.
        words: what the client is told. Those about tensors and models that the contract lacks are Triton's own, by
            which a client of another version is recognised.
    """

    def __init__(self, status: grpc.StatusCode, words: str):
        super().__init__(words)
        self.status = status
        self.words = words

    @classmethod
    def of(cls, error: M3DError) -> Refused:
        return cls(grpc.StatusCode[error.code], error.to_wire())


def unknown_model(name: str) -> tuple[grpc.StatusCode, str]:
    """Status and words for a model that is not served."""
    return grpc.StatusCode.NOT_FOUND, f"unknown model: {shortened(name)} is not found"


def read(message: bytes, served: Container[str]) -> ModelInferRequest:
    """The request in a message. Raises Refused for one that Triton must not see. served: the repository's models."""
    request = _parsed(message)
    check(request, served)
    return request


def id_of(message: bytes) -> str:
    """The id that the client gave; empty in what is no request."""
    try:
        return _parsed(message).id
    except Refused:
        return ""


def _parsed(message: bytes) -> ModelInferRequest:
    if len(message) > MAX_BESIDE_BYTES and not _is_lean(message):
        raise Refused.of(
            InvalidInput(
                f"a message has at most {MAX_FIELDS:,} fields, and {MAX_BESIDE_BYTES:,} bytes beside its tensors' bytes"
            )
        )
    try:
        return ModelInferRequest.FromString(message)
    except DecodeError:
        raise Refused.of(InvalidInput("the message is no ModelInferRequest")) from None


def _is_lean(message: bytes) -> bool:
    """Whether a message is raw contents, but for a little. Read without protobuf, which makes 800 MB of 17 MB of empty
    inputs. Of what is no message it says anything."""
    at = beside = 0
    for _ in range(MAX_FIELDS):
        start = at
        key, at = _varint(message, at)
        if at > len(message):
            return True
        kind = key & 7
        if kind == _LENGTH:
            size, at = _varint(message, at)
            at += size
        else:
            at = _varint(message, at)[1] if kind == _VARINT else at + _FIXED.get(kind, len(message))
        if key >> 3 != ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER:
            beside += at - start
        if beside > MAX_BESIDE_BYTES:
            return False
    return False


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number as protobuf writes it, and where it ends: behind the message, if it does not end in it."""
    number = 0
    for place, byte in enumerate(message[at : at + 10]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    return 0, len(message) + 1


def check(request: ModelInferRequest, served: Container[str]) -> None:
    """Raises Refused for a request that Triton must not see. served: the repository's models."""
    model = MODELS.get(request.model_name)
    if model is None or not model.public or model.name not in served:
        raise Refused(*unknown_model(request.model_name))
    if request.model_version not in ("", "1"):
        raise Refused.of(InvalidInput(f"model_version is 1 or not given, not {shortened(request.model_version)}"))
    if len(request.id) > MAX_ID_LENGTH:
        raise Refused.of(
            InvalidInput(f"a request's id has at most {MAX_ID_LENGTH} characters, not {len(request.id):,}")
        )
    for name in request.parameters:
        if name not in ALLOWED_PARAMETERS:
            raise _parameter(name, "a request")
    _check_inputs(request, model)
    _check_contents(request, model)
    _check_outputs(request, model)


def _check_inputs(request: ModelInferRequest, model: Model) -> None:
    tensors = {tensor.name: tensor for tensor in model.inputs}
    given = set()
    for given_input in request.inputs:
        tensor = tensors.get(given_input.name)
        if tensor is None:
            raise _unexpected(f"unexpected inference input {shortened(given_input.name)}", model)
        if tensor.name in given:
            raise Refused.of(InvalidInput(f"input {tensor.name} is given twice"))
        given.add(tensor.name)
        if given_input.parameters:
            raise _parameter(next(iter(given_input.parameters)), f"input {tensor.name}")
        if given_input.datatype != tensor.dtype:
            raise Refused.of(
                InvalidInput(f"input {tensor.name} has the type {tensor.dtype}, not {shortened(given_input.datatype)}")
            )
        _check_shape(tensor, given_input.shape)
    for tensor in model.inputs:
        if not tensor.optional and tensor.name not in given:
            raise Refused.of(InvalidInput(f"{model.name} needs the input {tensor.name}: {tensor.doc}"))


def _check_outputs(request: ModelInferRequest, model: Model) -> None:
    asked = set()
    for output in request.outputs:
        if output.name not in model.output_names:
            raise _unexpected(f"unexpected inference output {shortened(output.name)}", model)
        if output.name in asked:
            raise Refused.of(InvalidInput(f"output {output.name} is asked for twice"))
        asked.add(output.name)
        if output.parameters:
            raise _parameter(next(iter(output.parameters)), f"output {output.name}")


def _check_contents(request: ModelInferRequest, model: Model) -> None:
    """Each input has the bytes that its shape says. Triton 2.51 multiplies a shape in 64 bits, and does not look for
    an overflow: a tensor of 2**31 x 2**31 floats without a byte would end the process of its model."""
    if len(request.raw_input_contents) != len(request.inputs) or any(i.HasField("contents") for i in request.inputs):
        raise Refused.of(InvalidInput("inputs come as raw_input_contents, one for each: not as contents, nor without"))
    tensors = {tensor.name: tensor for tensor in model.inputs}
    for given, content in zip(request.inputs, request.raw_input_contents):
        count = math.prod(given.shape)
        size = ITEM_BYTES.get(given.datatype)
        if count == 0 and max(given.shape) > MAX_SIZE:
            raise Refused.of(InvalidInput(f"input {given.name} has an axis of {max(given.shape):,} beside one of 0"))
        if size is None and count > MAX_TEXTS:
            raise Refused.of(InvalidInput(f"input {given.name} has {count:,} texts, at most {MAX_TEXTS:,} are taken"))
        if error := tensors[given.name].too_long(len(content) - 4 * count):
            raise Refused.of(error)
        fits = len(content) == count * size if size else _is_texts(content, count)
        if not fits:
            raise Refused.of(
                InvalidInput(
                    f"input {given.name} has {len(content):,} bytes, which are not {count:,} of {given.datatype}"
                )
            )


def _is_texts(content: bytes, count: int) -> bool:
    """Whether these are `count` texts, each with its length in 4 bytes before it."""
    offset = 0
    for _ in range(count):
        if offset + 4 > len(content):
            return False
        offset += 4 + int.from_bytes(content[offset : offset + 4], "little")
    return offset == len(content)


def _check_shape(tensor: Tensor, shape: Sequence[int]) -> None:
    """A shape may have millions of axes: the first of them tell enough."""
    fits = len(shape) == len(tensor.dims) and all(
        size >= 0 and wanted in (-1, size) for size, wanted in zip(shape, tensor.dims)
    )
    if not fits:
        wanted = " x ".join("any" if size == -1 else str(size) for size in tensor.dims)
        said = " x ".join(str(size) for size in shape[:SAID_AXES]) or "of no axis"
        more = f" x ... ({len(shape):,} axes)" if len(shape) > SAID_AXES else ""
        raise Refused.of(InvalidInput(f"input {tensor.name} has the shape {wanted}, not {said}{more}"))


def _unexpected(what: str, model: Model) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{what} for model {model.name}")


def _parameter(name: str, of: str) -> Refused:
    return Refused.of(InvalidInput(f"{of} takes no parameter {shortened(name)}: leave it out"))
