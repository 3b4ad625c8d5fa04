"""An answer is held to schemas whose cost and meaning are known; all others are refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from engine.answer_schema import KEYWORDS, MAX_BYTES, MAX_COUNT, MAX_DEPTH, checked_schema, schema_for_grammar
from engine.errors import InvalidInput

FINDING = {
    "$defs": {
        "Size": {"type": "object", "properties": {"mm": {"type": "number", "minimum": 0, "maximum": 500}}},
        "Side": {"enum": ["left", "right", None]},
    },
    "title": "Finding",
    "type": "object",
    "properties": {
        "organ": {"type": "string", "minLength": 1, "maxLength": 40, "description": "which"},
        "side": {"$ref": "#/$defs/Side"},
        "sizes": {"type": "array", "items": {"$ref": "#/$defs/Size"}, "maxItems": 3},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "maxLength": {"type": ["integer", "null"]},
    },
    "required": ["organ", "side"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "null"}


def grammar(schema: str) -> xgrammar.Grammar:
    return xgrammar.Grammar.from_json_schema(schema, any_whitespace=False, separators=(",", ":"))


def accepts(schema: object, text: str) -> bool:
    """Whether the grammar of a schema takes a text, spelled byte by byte."""
    vocabulary = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], vocab_size=256, stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_grammar(grammar(schema_for_grammar(checked_schema(schema))))
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(0)


@pytest.mark.parametrize("given_as", [lambda schema: schema, json.dumps])
def test_a_schema_is_kept_as_text(given_as):
    assert json.loads(checked_schema(given_as(FINDING))) == FINDING
    assert checked_schema(checked_schema(FINDING)) == checked_schema(FINDING)


def test_what_is_taken_becomes_a_grammar():
    assert accepts(FINDING, '{"organ":"liver","side":null}')
    assert accepts(FINDING, '{"organ":"liver","side":"left","sizes":[{"mm":3.5}]}')
    assert not accepts(FINDING, '{"organ":"","side":null}') and not accepts(FINDING, '{"organ":"liver","side":"up"}')


@pytest.mark.parametrize("bounds", [{}, {"minLength": 1}, {"maxLength": 3}, {"minLength": 1, "maxLength": 3}])
def test_strings_hold_what_json_allows(bounds):
    """xgrammar 0.2.8 alone takes control characters in strings whose length is bounded."""
    schema = {"type": "array", "items": {"type": ["string", "null"], **bounds}}
    assert accepts(schema, '["ab"]') and accepts(schema, '["\u00e9 "]') and accepts(schema, "[null]")
    for character in "\n\t\x01":
        assert not accepts(schema, f'["a{character}"]')
    assert accepts(schema, '["abcd"]') is ("maxLength" not in bounds)
    assert accepts(schema, '[""]') is ("minLength" not in bounds)


def test_properties_may_be_named_like_keywords():
    assert json.loads(schema_for_grammar(checked_schema(FINDING)))["properties"]["maxLength"] == {
        "type": ["integer", "null"]
    }


@pytest.mark.parametrize(
    "schema, words",
    [
        (3, "must be a JSON object or its text, not 3"),
        ([], "must be a JSON object"),
        ("{", "is not JSON"),
        ("[" * 10_000, "is not JSON"),
        ("[]", "must be a JSON object, not"),
        ({"type": {1}}, "cannot be written as JSON"),
        ({}, "at its top: it says nothing of its value"),
        ({"type": "tree"}, "type 'tree' is none of object, array"),
        ({"type": []}, "a list that is not empty"),
        ({"type": "string", "pattern": "a"}, "'pattern' is not taken; what is: type, properties"),
        ({"type": "object", "properties": {"a": {"type": "array", "items": 3}}}, "at /properties/a/items: a schema"),
        ({"type": "object", "properties": 3}, "properties must be an object"),
        ({"type": "object", "required": "a"}, "required must be a list of names"),
        ({"type": "object", "required": ["a"]}, "required names 'a', which properties do not have"),
        ({"type": "object", "additionalProperties": {"type": "null"}}, "additionalProperties must be true or false"),
        ({"enum": []}, "a list that is not empty"),
        ({"enum": [["a"]]}, "enum and const take texts"),
        ({"enum": [10**4000]}, "enum and const take texts"),
        ({"const": float("nan")}, "enum and const take texts"),
        ({"anyOf": []}, "a list that is not empty"),
        ({"anyOf": [{"type": "null"}, {}]}, "at /anyOf/1: it says nothing"),
        ({"type": "string", "maxLength": MAX_COUNT + 1}, "maxLength must be a whole number from 0 to 10,000"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is above maxLength 2"),
        ({"type": "integer", "maximum": 1e300}, "maximum must be a number from"),
        ({"type": "integer", "minimum": True}, "minimum must be a number from"),
        ({"$ref": "#"}, "must be #/./defs/ and a name of .defs, not '#'"),
        ({"$ref": "http://example.org/schema"}, "must be #/./defs/"),
        ({"$ref": "#/$defs/a"}, "must be #/./defs/"),
        ({"$defs": 3, "type": "null"}, "at /.defs: it must be an object"),
        ({"$defs": {"a": {"type": "tree"}}, "type": "null"}, "at /.defs/a: type 'tree'"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "'a' refers to itself"),
        (
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "const": 1},
            "refers to itself",
        ),
        ({"type": "array", "items": {"$defs": {}, "type": "null"}}, "at the top of a schema only"),
        (nested(MAX_DEPTH + 1), "more than 16 deep"),
        ({"enum": ["x" * MAX_BYTES]}, "characters, at most 16,384 are taken: shorten it"),
    ],
)
def test_is_refused(schema, words):
    words = words.replace("/./", r"/\$").replace(".defs", r"\$defs")
    with pytest.raises(InvalidInput, match=words) as caught:
        checked_schema(schema)
    assert len(str(caught.value)) < 500


def test_definitions_may_be_shared():
    """Each names the next one twice."""
    definitions = {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} if n < 7 else {"type": "null"} for n in range(8)
    }
    assert checked_schema({"$defs": definitions, "$ref": "#/$defs/d0"})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYWORDS) | st.text(), inner),
        max_leaves=20,
    )
)
def test_anything_else_is_refused_as_bad_input(schema):
    try:
        checked_schema(schema)
    except InvalidInput as error:
        assert str(error).startswith("json_schema")
