"""Errors keep their kind and their words across Triton, whatever Triton puts around them."""

from __future__ import annotations

import pytest

from engine import errors

KINDS = (
    errors.InvalidInput,
    errors.StudyNotFound,
    errors.ResourceExhausted,
    errors.Unavailable,
    errors.Cancelled,
    errors.DeadlineExceeded,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["", "in ensemble 'm3d_chat', ", "Failed to process the request(s), message: "])
def test_an_error_comes_back_as_the_same_class_with_the_same_words(kind, before):
    sent = kind("the scan has 2 axes: send a volume")
    received = errors.from_wire(before + sent.to_wire())
    assert type(received) is kind
    assert str(received) == str(sent)


def test_the_outermost_kind_counts_when_a_message_quotes_another():
    received = errors.from_wire("INVALID_ARGUMENT: the header says NOT_FOUND: nothing")
    assert type(received) is errors.InvalidInput
    assert str(received) == "the header says NOT_FOUND: nothing"


def test_a_message_without_a_kind_is_a_plain_error_and_keeps_its_words():
    received = errors.from_wire("inference failed")
    assert type(received) is errors.M3DError
    assert str(received) == "inference failed"


@pytest.mark.parametrize(
    "value, said",
    [
        ("x-ray", "'x-ray'"),
        ("\0\n\u202e", r"'\x00\n\u202e'"),
        ("x" * 1_000_000, "'" + "x" * 76 + "..."),
        (["x" * 1_000_000] * 3, "['" + "x" * 75 + "..."),
        (10**5000, "a very long int"),
        (None, "None"),
    ],
    ids=lambda value: str(type(value)),
)
def test_what_a_message_echoes_is_short_and_printable(value, said):
    assert errors.shortened(value) == said and len(said) <= 80


def test_how_much_a_message_echoes_can_be_chosen():
    assert errors.shortened("abcdefgh", 8) == "'abcd..."
    assert errors.shortened("abcdef", 8) == "'abcdef'"
