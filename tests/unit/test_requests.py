"""What may pass the front: every public model's good requests, and nothing that the contract does not have."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc.service_pb2 import ModelInferRequest

from engine.client import wire
from engine.contract import DTYPES, MODELS, Tensor
from engine.errors import InvalidInput, Unavailable, from_wire
from engine.server import requests
from engine.server.requests import Refused

PUBLIC = [model for model in MODELS.values() if model.public]
LARGEST_WORDS = 300  # characters; a log and a screen take them
SIZE_OF_ANY = 3  # where the contract has -1


def content_of(tensor: Tensor, shape: tuple[int, ...]) -> bytes:
    count = 1
    for size in shape:
        count *= size
    if tensor.dtype == "BYTES":
        return b"".join(len(text).to_bytes(4, "little") + text for text in [b"some words"] * count)
    return bytes(count * np.dtype(DTYPES[tensor.dtype]).itemsize)


def add(request: ModelInferRequest, tensor: Tensor) -> None:
    shape = tuple(SIZE_OF_ANY if size == -1 else size for size in tensor.dims)
    request.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=shape)
    request.raw_input_contents.append(content_of(tensor, shape))


def full(name: str) -> ModelInferRequest:
    """A request with all that the contract has of a model."""
    model = MODELS[name]
    request = ModelInferRequest(model_name=name, model_version="1", id="mine")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for tensor in model.inputs:
        add(request, tensor)
    for output in model.output_names:
        request.outputs.add(name=output)
    return request


def retrieve() -> ModelInferRequest:
    """A request to rank texts, with a scan's affine: its inputs are AFFINE and TEXTS."""
    request = ModelInferRequest(model_name="m3d_retrieve")
    for tensor in MODELS["m3d_retrieve"].inputs:
        if tensor.name in ("AFFINE", "TEXTS"):
            add(request, tensor)
    return request


def refused(request: ModelInferRequest, served=MODELS) -> Refused:
    with pytest.raises(Refused) as caught:
        requests.check(request, served)
    return caught.value


# --- what passes -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [model.name for model in PUBLIC])
def test_a_request_with_all_that_a_public_model_has_passes(model):
    requests.check(full(model), MODELS)


@pytest.mark.parametrize("model", PUBLIC, ids=lambda model: model.name)
def test_a_request_with_what_a_public_model_needs_alone_passes(model):
    request = ModelInferRequest(model_name=model.name)
    for tensor in model.inputs:
        if not tensor.optional:
            add(request, tensor)
    requests.check(request, MODELS)


def test_what_this_client_sends_passes():
    by_name = {tensor.name: tensor for tensor in MODELS["m3d_retrieve"].inputs}
    sent = {by_name["VOLUME"]: b"a scan", by_name["PRESET"]: None, by_name["TEXTS"]: ["a liver", "", "\N{LUNGS}"]}
    message = wire.request_of("m3d_retrieve", sent).serialized()
    assert requests.read(message, MODELS).model_name == "m3d_retrieve"


@pytest.mark.parametrize("count", [0, 1, requests.MAX_TEXTS])
def test_as_many_texts_as_a_tensor_may_have_pass(count):
    request = retrieve()
    request.inputs[1].shape[:] = [count]
    request.raw_input_contents[1] = (b"\x01\0\0\0a") * count
    requests.check(request, MODELS)


# --- what is refused -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rule:
    """A change of `retrieve()` that breaks one rule, and what is said of it."""

    change: object
    words: str
    status: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT


def _set(**values):
    return lambda request: [setattr(request, name, value) for name, value in values.items()]


def _input(number: int, **values):
    return lambda request: [setattr(request.inputs[number], name, value) for name, value in values.items()]


def _shape(number: int, *shape: int):
    def change(request):
        request.inputs[number].shape[:] = shape

    return change


def _raw(number: int, content: bytes):
    def change(request):
        request.raw_input_contents[number] = content

    return change


def _both(*changes):
    return lambda request: [change(request) for change in changes]


def _parameter(of, name: str, value=2):
    def change(request):
        of(request).parameters[name].int64_param = value

    return change


def _drop(number: int):
    def change(request):
        del request.inputs[number], request.raw_input_contents[number]

    return change


NOT_FOUND = grpc.StatusCode.NOT_FOUND
TEXT = b"\x01\0\0\0a"
RULES = {
    "no model": Rule(_set(model_name=""), "unknown model: '' is not found", NOT_FOUND),
    "an unknown model": Rule(_set(model_name="gpt"), "unknown model: 'gpt' is not found", NOT_FOUND),
    "a long model": Rule(_set(model_name="m" * 1_000_000), r"unknown model: 'm+\.\.\. is not found", NOT_FOUND),
    **{
        f"the inner model {model.name}": Rule(
            _set(model_name=model.name), f"unknown model: '{model.name}' is not found", NOT_FOUND
        )
        for model in MODELS.values()
        if not model.public
    },
    "another version": Rule(_set(model_version="2"), "model_version is 1 or not given, not '2'"),
    "a long version": Rule(_set(model_version="1" * 1_000_000), "model_version is 1 or not given, not '11"),
    "a long id": Rule(_set(id="i" * 257), "a request's id has at most 256 characters, not 257"),
    "a parameter": Rule(_parameter(lambda r: r, "sequence_id"), "a request takes no parameter 'sequence_id': leave it"),
    "the front's own parameter": Rule(_parameter(lambda r: r, "m3d_peer"), "a request takes no parameter 'm3d_peer'"),
    "a long parameter": Rule(_parameter(lambda r: r, "p" * 1_000_000), "a request takes no parameter 'pp"),
    "an input's parameter": Rule(
        _parameter(lambda r: r.inputs[1], "shared_memory_region"),
        "input TEXTS takes no parameter 'shared_memory_region': leave it out",
    ),
    "an output's parameter": Rule(
        _parameter(lambda r: r.outputs.add(name="SCORES"), "classification"),
        "output SCORES takes no parameter 'classification': leave it out",
    ),
    "an unknown input": Rule(_input(1, name="TEXT"), "unexpected inference input 'TEXT' for model m3d_retrieve"),
    "a long input": Rule(_input(1, name="T" * 1_000_000), r"unexpected inference input 'T+\.\.\. for model"),
    "an input of another model": Rule(_input(1, name="QUESTION"), "unexpected inference input 'QUESTION' for model"),
    "an input twice": Rule(_input(1, name="AFFINE"), "input AFFINE is given twice"),
    "an unknown output": Rule(
        lambda r: r.outputs.add(name="TEXT"), "unexpected inference output 'TEXT' for model m3d_retrieve"
    ),
    "an output twice": Rule(
        lambda r: [r.outputs.add(name="SCORES") for _ in range(2)], "output SCORES is asked for twice"
    ),
    "another type": Rule(_input(0, datatype="FP32"), "input AFFINE has the type FP64, not 'FP32'"),
    "no type": Rule(_input(0, datatype=""), "input AFFINE has the type FP64, not ''"),
    "a long type": Rule(_input(0, datatype="F" * 1_000_000), "input AFFINE has the type FP64, not 'FF"),
    "fewer axes": Rule(_shape(0, 16), "input AFFINE has the shape 4 x 4, not 16$"),
    "more axes": Rule(_shape(1, 3, 1), "input TEXTS has the shape any, not 3 x 1$"),
    "no axes": Rule(_shape(1), "input TEXTS has the shape any, not of no axis$"),
    "very many axes": Rule(
        _shape(1, *[1] * 100_000), r"input TEXTS has the shape any, not 1 x 1 x .* \(100,000 axes\)$"
    ),
    "another size": Rule(_shape(0, 4, 5), "input AFFINE has the shape 4 x 4, not 4 x 5$"),
    "a negative size": Rule(_shape(1, -1), "input TEXTS has the shape any, not -1$"),
    "two negative sizes": Rule(_both(_shape(0, -4, -4)), "input AFFINE has the shape 4 x 4, not -4 x -4$"),
    "no needed input": Rule(_drop(1), "m3d_retrieve needs the input TEXTS: T candidate texts"),
    "no input at all": Rule(_both(_drop(1), _drop(0)), "m3d_retrieve needs the input TEXTS"),
    "typed contents": Rule(
        lambda r: r.inputs[1].contents.bytes_contents.append(b"a"), "inputs come as raw_input_contents, one for each"
    ),
    "empty typed contents": Rule(
        lambda r: r.inputs[1].contents.SetInParent(), "inputs come as raw_input_contents, one for each"
    ),
    "fewer contents": Rule(lambda r: r.raw_input_contents.pop(), "inputs come as raw_input_contents, one for each"),
    "more contents": Rule(lambda r: r.raw_input_contents.append(b""), "inputs come as raw_input_contents, one for"),
    "a byte more": Rule(_raw(0, bytes(129)), "input AFFINE has 129 bytes, which are not 16 of FP64"),
    "a byte less": Rule(_raw(0, bytes(127)), "input AFFINE has 127 bytes, which are not 16 of FP64"),
    "no bytes": Rule(_raw(0, b""), "input AFFINE has 0 bytes, which are not 16 of FP64"),
    "fewer texts": Rule(_raw(1, TEXT * 2), "input TEXTS has 10 bytes, which are not 3 of BYTES"),
    "more texts": Rule(_raw(1, TEXT * 4), "input TEXTS has 20 bytes, which are not 3 of BYTES"),
    "no text": Rule(_raw(1, b""), "input TEXTS has 0 bytes, which are not 3 of BYTES"),
    "a text longer than its bytes": Rule(_raw(1, TEXT * 2 + b"\x02\0\0\0a"), "input TEXTS has 15 bytes, which are not"),
    "a text of 4 GB": Rule(_raw(1, TEXT * 2 + b"\xff\xff\xff\xffa"), "input TEXTS has 15 bytes, which are not 3 of"),
    "a text shorter than its bytes": Rule(_raw(1, TEXT * 2 + b"\0\0\0\0a"), "input TEXTS has 15 bytes, which are not"),
    "half a length": Rule(_raw(1, TEXT * 2 + b"\x01\0"), "input TEXTS has 12 bytes, which are not 3 of BYTES"),
    "too many texts": Rule(
        _both(_shape(1, 4097), _raw(1, TEXT * 4097)), "input TEXTS has 4,097 texts, at most 4,096 are taken"
    ),
    "more texts said than are there": Rule(
        _both(_shape(1, 1 << 40), _raw(1, TEXT * 4096)), "input TEXTS has 1,099,511,627,776 texts, at most 4,096"
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_is_refused(rule):
    request = retrieve()
    rule.change(request)
    with pytest.raises(Refused, match=rule.words) as caught:
        requests.check(request, MODELS)
    assert caught.value.status is rule.status and len(caught.value.words) <= LARGEST_WORDS


@pytest.mark.parametrize("shape", [(1 << 31, 1 << 31), (1 << 32, 1 << 32), (1 << 62, 4), ((1 << 63) - 1,) * 2])
def test_a_shape_whose_product_overflows_is_refused(shape):
    """2**31 x 2**31 floats have 2**64 bytes, which are none in 64 bits."""
    request = full("segmentation")
    states = next(number for number, given in enumerate(request.inputs) if given.name == "SEG_STATES")
    request.inputs[states].shape[:] = shape
    request.raw_input_contents[states] = b""
    assert "input SEG_STATES has 0 bytes" in refused(request).words


@pytest.mark.parametrize(
    "model, name", [(model.name, tensor.name) for model in PUBLIC for tensor in model.inputs if tensor.max_bytes]
)
def test_a_text_has_so_many_bytes_at_most(model, name):
    request = full(model)
    number = [given.name for given in request.inputs].index(name)
    most = MODELS[model].inputs[number].max_bytes
    for size in (most, most + 1):
        request.raw_input_contents[number] = size.to_bytes(4, "little") + bytes(size)
        if size == most:
            requests.check(request, MODELS)
    said = from_wire(refused(request).words)
    assert isinstance(said, InvalidInput)
    assert f"the {name.lower()} has {most + 1:,} bytes, at most {most:,} are taken: shorten it" in str(said)


@pytest.mark.parametrize("model", PUBLIC, ids=lambda model: model.name)
def test_a_model_that_is_not_served_is_refused_as_unknown(model):
    said = refused(full(model.name), served=set(MODELS) - {model.name})
    assert (said.status, said.words) == requests.unknown_model(model.name)


@pytest.mark.parametrize(
    "model, name", [(model.name, tensor.name) for model in PUBLIC for tensor in model.inputs if not tensor.optional]
)
def test_each_needed_input_that_is_missing_is_named(model, name):
    request = full(model)
    number = [given.name for given in request.inputs].index(name)
    del request.inputs[number], request.raw_input_contents[number]
    said = from_wire(refused(request).words)
    assert isinstance(said, InvalidInput) and f"{model} needs the input {name}: " in str(said)


@pytest.mark.parametrize("change", ["an unknown model", "the inner model segmentation_head"])
def test_a_client_takes_an_unknown_model_for_one_that_the_server_does_not_serve(change):
    request = retrieve()
    RULES[change].change(request)
    said = refused(request)
    error = wire.server_error(said.words, said.status)
    assert isinstance(error, Unavailable) and "the server does not serve this" in str(error)


@pytest.mark.parametrize("change", ["an unknown input", "an unknown output"])
def test_a_client_takes_an_unknown_tensor_for_another_version(change):
    request = retrieve()
    RULES[change].change(request)
    said = refused(request)
    error = wire.server_error(said.words, said.status)
    assert isinstance(error, Unavailable) and "the server runs another version of m3d-engine" in str(error)


@pytest.mark.parametrize("name", ["another version", "a parameter", "an input twice", "no needed input", "no bytes"])
def test_a_client_takes_other_refusals_for_its_own_mistake(name):
    request = retrieve()
    RULES[name].change(request)
    assert type(from_wire(refused(request).words)) is InvalidInput


VERY_MANY = {
    "axes": lambda r: r.inputs[1].shape.extend([1 << 40] * 300_000),
    "outputs": lambda r: r.outputs.extend([type(r).InferRequestedOutputTensor(name="SCORES")] * 300_000),
    "inputs": lambda r: r.inputs.extend([type(r).InferInputTensor(name="CROP")] * 300_000),
    "parameters": lambda r: [r.parameters[str(number)].SetInParent() for number in range(300_000)],
    "contents": lambda r: r.raw_input_contents.extend([b""] * 300_000),
}


@pytest.mark.parametrize("many", VERY_MANY.values(), ids=VERY_MANY)
def test_a_message_of_very_many_things_costs_next_to_nothing_to_refuse(many):
    request = retrieve()
    many(request)
    tracemalloc.start()
    try:
        refused(request)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


class NoProtobuf:
    RAW_INPUT_CONTENTS_FIELD_NUMBER = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

    @staticmethod
    def FromString(message: bytes):
        raise AssertionError("protobuf was asked to read this")


@pytest.mark.parametrize("many", VERY_MANY.values(), ids=VERY_MANY)
def test_a_message_of_very_many_things_is_refused_before_protobuf_takes_memory_for_them(many, monkeypatch):
    """It takes 880 MB for 17 MB of empty inputs."""
    request = retrieve()
    many(request)
    message = request.SerializeToString()
    monkeypatch.setattr(requests, "ModelInferRequest", NoProtobuf)
    with pytest.raises(Refused, match="INVALID_ARGUMENT: a message has at most 1,024 fields, and 65,536 bytes beside"):
        requests.read(message, MODELS)
    assert requests.id_of(message) == ""


@pytest.mark.parametrize("end", [b"", b"\x0b", b"\x78\xff", b"\x7f"], ids=["whole", "group", "cut", "no type"])
def test_a_large_message_that_is_none_is_refused_before_protobuf_takes_memory_for_it(end, monkeypatch):
    monkeypatch.setattr(requests, "ModelInferRequest", NoProtobuf)
    with pytest.raises(Refused, match="a message has at most"):
        requests.read(end + b"\x2a\x00" * 100_000, MODELS)


def test_the_bytes_of_tensors_are_not_counted():
    request = full("study")
    request.inputs[0].shape[:] = [16 << 20]
    request.raw_input_contents[0] = bytes(16 << 20)
    message = request.SerializeToString()
    assert requests.read(message, MODELS) == request
    turned = ModelInferRequest(raw_input_contents=request.raw_input_contents).SerializeToString()
    request.ClearField("raw_input_contents")
    assert requests.read(turned + request.SerializeToString(), MODELS).id == requests.id_of(message) == "mine"


# --- any bytes -------------------------------------------------------------------------------------------------------
GOOD = [full(model.name).SerializeToString() for model in PUBLIC]


@st.composite
def damaged(draw) -> bytes:
    """A good message in which some bytes are others, missing, doubled or new."""
    message = bytearray(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(message)))
        end = min(len(message), start + draw(st.integers(0, 6)))
        message[start:end] = draw(st.one_of(st.binary(max_size=6), st.just(bytes(message[start:end]) * 2)))
    return bytes(message)


def outcome(read, *arguments) -> str:
    """What is said of a message; empty if it passes."""
    try:
        read(*arguments)
    except Refused as refused:
        return refused.words
    except DecodeError:
        return "INVALID_ARGUMENT: the message is no ModelInferRequest"
    return ""


@settings(max_examples=300, deadline=None)
@given(damaged())
def test_what_is_said_of_a_damaged_message_is_what_protobuf_and_the_rules_say_of_it(message):
    def obvious():
        requests.check(ModelInferRequest.FromString(message), MODELS)

    assert outcome(requests.read, message, MODELS) == outcome(obvious)


@settings(max_examples=300, deadline=None)
@given(damaged())
def test_of_damaged_messages_only_those_pass_whose_inputs_are_what_they_say(message):
    try:
        request = requests.read(message, MODELS)
    except Refused as refused:
        assert refused.status in (NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        assert 0 < len(refused.words) <= LARGEST_WORDS
        return
    model = MODELS[request.model_name]
    assert model.public and set(request.parameters) <= {"triton_enable_empty_final_response"}
    assert len(request.inputs) == len(request.raw_input_contents)
    for given_input, content in zip(request.inputs, request.raw_input_contents):
        decoded = wire.decode(given_input.datatype, tuple(given_input.shape), content)
        assert decoded.shape == tuple(given_input.shape) and given_input.name in model.input_names
        assert not given_input.parameters


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\x05ab", b"\x0a\x01\xff", b"\x07", b"\x0b"])
def test_bytes_that_are_no_request_are_refused_as_invalid(message):
    with pytest.raises(Refused, match="INVALID_ARGUMENT: the message is no ModelInferRequest") as caught:
        requests.read(message, MODELS)
    assert caught.value.status is grpc.StatusCode.INVALID_ARGUMENT


def test_no_bytes_are_a_request_without_a_model():
    with pytest.raises(Refused, match="unknown model: ''"):
        requests.read(b"", MODELS)
