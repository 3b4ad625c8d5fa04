"""Sampling settings are checked where they enter, and arrive as they were sent."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidInput
from engine.sampling import (
    MAX_CHOICE_CHARACTERS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
    MIN_TEMPERATURE,
    Sampling,
)


@given(
    st.builds(
        Sampling,
        max_new_tokens=st.integers(1, 1 << 20),
        temperature=st.just(0.0) | st.floats(MIN_TEMPERATURE, 2),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.integers(0, 1 << 30),
        stop=st.lists(st.text(min_size=1, max_size=MAX_STOP_CHARACTERS), max_size=MAX_STOP_STRINGS),
        seed=st.none() | st.integers(0, (1 << 63) - 1),
        repetition_penalty=st.floats(MIN_REPETITION_PENALTY, 2),
        logprobs=st.none() | st.integers(0, MAX_LOGPROBS),
        choices=st.lists(
            st.text(min_size=1, max_size=MAX_CHOICE_CHARACTERS).filter(lambda text: text == text.strip()),
            max_size=MAX_CHOICES,
            unique=True,
        ),
    )
)
def test_settings_survive_the_wire(sampling):
    assert Sampling.from_json(sampling.to_json()) == sampling


def test_constraints_survive_the_wire():
    schema = {"type": "array", "items": {"enum": ["\u00e9", 1]}}
    for sampling in (Sampling(json_schema=schema), Sampling(choices=("yes", "no"), only_choices=True)):
        assert Sampling.from_json(sampling.to_json()) == sampling and hash(sampling)
    assert json.loads(Sampling(json_schema=schema).json_schema) == schema


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"logprobs": -1}, "logprobs must be a whole number from 0 to 20, not -1"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"choices": 3}, "choices must be a text or a list of texts"),
        ({"choices": ["a", ""]}, "choices: every string must have 1 to 256 characters"),
        ({"choices": ["a", 3]}, "choices: every string"),
        ({"choices": ["a", "a"]}, "choices: a text is given twice: give each once"),
        ({"choices": ["a", " b"]}, "choices: ' b' begins or ends with a space: leave it out"),
        ({"choices": ["\ud800"]}, "choices: a string is not valid Unicode"),
        ({"choices": [str(k) for k in range(65)]}, "choices: 65 strings given, at most 64 are allowed"),
        ({"only_choices": True}, "only_choices is true, but there are no choices: give some"),
        ({"only_choices": 1, "choices": ["a"]}, "only_choices must be true or false, not 1"),
        ({"json_schema": {"type": "tree"}}, "json_schema, at its top: type 'tree'"),
        ({"json_schema": {"type": "null"}, "stop": "a"}, "json_schema and stop are given.*leave one out"),
        ({"json_schema": {"type": "null"}, "choices": "a", "only_choices": True}, "json_schema and only_choices"),
        ({"choices": "a b", "only_choices": True, "stop": "b"}, "only_choices and stop"),
    ],
)
def test_unusable_likelihoods_and_constraints_are_refused(settings, words):
    with pytest.raises(InvalidInput, match=words):
        Sampling(**settings)


def test_default_is_greedy():
    assert Sampling().temperature == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("max_new_tokens", (1 << 20) + 1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", 10**30),
        ("temperature", 5e-324),
        ("temperature", 0.0099),
        ("temperature", False),
        ("temperature", []),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 0.0099),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_with_its_value(name, value):
    with pytest.raises(InvalidInput, match=name) as refusal:
        Sampling(**{name: value})
    assert repr(value) in str(refusal.value)


def test_the_refused_gap_between_greedy_and_the_lowest_temperature_is_named():
    with pytest.raises(InvalidInput, match="temperature must be 0 or a number from 0.01 to 2, not 0.001"):
        Sampling(temperature=0.001)
    assert Sampling(temperature=0.01).temperature == 0.01 and Sampling(temperature=0).temperature == 0


MEGABYTE = "x" * (1 << 20)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": MEGABYTE},
        {"temperature": MEGABYTE},
        {"top_p": [MEGABYTE]},
        {"top_k": {MEGABYTE: MEGABYTE}},
        {"stop": {MEGABYTE: 1}},
        {"stop": [MEGABYTE]},
        {MEGABYTE: 1},
        {f"{i} {MEGABYTE}": 1 for i in range(100)},
        {str(i): 1 for i in range(10_000)},
    ],
    ids=lambda settings: f"{len(settings)} {next(iter(settings))[:14]}",
)
def test_a_refusal_echoes_little_of_what_was_sent(settings):
    with pytest.raises(InvalidInput) as refusal:
        Sampling.from_json(json.dumps(settings))
    assert len(str(refusal.value)) < 350


def test_of_many_unknown_settings_a_few_are_named_and_the_others_counted():
    with pytest.raises(InvalidInput, match="unknown sampling setting 'u0', 'u1', 'u2', 'u3', 'u4' and 3 more; known"):
        Sampling.from_dict({f"u{i}": 1 for i in range(8)})


@pytest.mark.parametrize(
    "stop", [["x"] * (MAX_STOP_STRINGS + 1), [""], ["x" * (MAX_STOP_CHARACTERS + 1)], [3], 3, ["\ud800"]]
)
def test_unusable_stop_texts_are_refused(stop):
    with pytest.raises(InvalidInput, match="stop"):
        Sampling(stop=stop)


def test_numpy_scalars_are_numbers():
    given = Sampling(seed=np.int64(3), temperature=np.float32(0.5))
    assert Sampling.from_json(given.to_json()) == Sampling(seed=3, temperature=0.5)


def test_a_number_too_long_for_a_float_is_refused():
    with pytest.raises(InvalidInput, match="temperature"):
        Sampling(temperature=10**400)


def test_one_stop_text_may_be_given_without_a_list():
    assert Sampling(stop="END").stop == ("END",)


def test_an_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(InvalidInput, match="top_q.*temperature"):
        Sampling.from_dict({"top_q": 1})


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", b"\xff\xfe", "[" * 100_000])
def test_what_is_not_a_json_object_is_refused(text):
    with pytest.raises(InvalidInput, match="JSON"):
        Sampling.from_json(text)
