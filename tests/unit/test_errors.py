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
