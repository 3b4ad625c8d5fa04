"""An answer is held to schemas whose cost and meaning are known; all others are refused with the reason."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

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


def compiled(schema: object) -> xgrammar.CompiledGrammar:
    vocabulary = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], vocab_size=256, stop_token_ids=[0])
    return xgrammar.GrammarCompiler(vocabulary).compile_grammar(grammar(schema_for_grammar(checked_schema(schema))))


def spells(found: xgrammar.CompiledGrammar, text: str) -> bool:
    """Whether a grammar takes a text, byte by byte."""
    matcher = xgrammar.GrammarMatcher(found)
    return all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(0)


def accepts(schema: object, text: str) -> bool:
    return spells(compiled(schema), text)


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
        ({"type": "integer", "enum": ["a"]}, "the value 'a' of enum or const is not of type 'integer'"),
        ({"type": "boolean", "const": None}, "the value None of enum or const is not of type 'boolean'"),
        ({"type": "integer", "const": True}, "the value True of enum or const is not of type 'integer'"),
        ({"type": ["string", "null"], "enum": ["a", 1.5]}, "the value 1.5 of enum or const is not of type"),
        ({"type": "array", "items": {"type": "null"}, "const": "a"}, "is not of type 'array'"),
        ({"type": "integer", "minimum": 3, "enum": [5, 1]}, "the value 1 of enum or const is not of minimum 3"),
        ({"exclusiveMaximum": 3, "const": 3}, "is not of exclusiveMaximum 3"),
        ({"type": "string", "enum": ["abc"], "maxLength": 2}, "'abc' of enum or const is not of maxLength 2"),
        ({"enum": ["a", "b"], "const": "a"}, "enum and const stand beside each other: give one"),
        (
            {"type": "string", "anyOf": [{"type": "integer"}]},
            "anyOf takes no other .* such as type: put them into each",
        ),
        ({"anyOf": [{"type": "string", "maxLength": 2}], "maxLength": 1}, "such as maxLength: put them into each"),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "null"}},
                "required": ["a"],
                "anyOf": [{"type": "object", "properties": {"b": {"type": "null"}}}],
            },
            "anyOf takes no other keywords beside it",
        ),
        ({"anyOf": [{"type": "integer"}], "enum": ["a"]}, "anyOf takes no other keywords beside it, such as enum"),
        ({"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a", "maxLength": 1}, "put them into the definition"),
        ({"type": "array", "minItems": 2}, "items does not say what they are: give items"),
        ({"type": ["null", "array"], "minItems": 1}, "give items"),
        ({"type": "integer", "minimum": 1.5, "maximum": 2.5}, "minimum of an integer must be a whole number, not 1.5"),
        ({"type": ["number", "integer"], "exclusiveMaximum": 2.5}, "exclusiveMaximum of an integer must be a whole"),
        (
            {"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3},
            "no number is within exclusiveMinimum 3, ex",
        ),
        ({"type": "number", "minimum": 3, "exclusiveMaximum": 3}, "no number is within minimum 3, exclusiveMaximum 3"),
        ({"type": "number", "exclusiveMinimum": 3, "maximum": 2}, "no number is within"),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "no integer is within .*: widen them"),
        ({"type": "integer", "minimum": 3, "exclusiveMinimum": 3, "maximum": 3}, "no integer is within"),
        ({"enum": ["x" * MAX_BYTES]}, "characters, at most 16,384 are taken: shorten it"),
    ],
)
def test_is_refused(schema, words):
    words = words.replace("/./", r"/\$").replace(".defs", r"\$defs")
    with pytest.raises(InvalidInput, match=words) as caught:
        checked_schema(schema)
    assert len(str(caught.value)) < 500


class Finding(BaseModel):
    """As pydantic writes types, references and choices."""

    class Size(BaseModel):
        mm: float = Field(ge=0, lt=500)

    organ: Literal["liver", "spleen"] = Field(description="which")
    kind: Literal["cyst"]
    grade: Literal[1, 2] | None = None
    size: Size = Field(description="its largest")
    note: str | None = Field(None, max_length=5)
    count: int = Field(1, gt=0, lt=3)


def test_what_pydantic_writes_is_taken():
    schema = Finding.model_json_schema()
    properties = schema["properties"]
    assert {"type", "enum"} <= properties["organ"].keys() and {"$ref", "description"} <= properties["size"].keys()
    assert {"anyOf", "title", "default"} <= properties["note"].keys() and "const" in properties["kind"]
    whole = '{"organ":"spleen","kind":"cyst","grade":2,"size":{"mm":1.5},"note":"small","count":2}'
    assert accepts(schema, whole) and Finding.model_validate_json(whole)
    for right, wrong in (("spleen", "colon"), ("cyst", "cyste"), ("1.5", "500"), ("small", "larger"), ('":2}', '":3}')):
        assert not accepts(schema, whole.replace(right, wrong))


_BOUND = st.sampled_from([-2, 0, 1, 2, 3, 0.5, 2.0, -0.25])
_COUNT = st.integers(0, 3)
_VALUES = st.lists(st.sampled_from(["", "a", "abc", None, True, 0, 1, 2.5]), min_size=1, max_size=3, unique_by=repr)
_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


def _schemas(inner: st.SearchStrategy) -> st.SearchStrategy:
    keywords = {
        "enum": _VALUES,
        "const": st.sampled_from(["a", "abc", None, False, 3, 1.5]),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _COUNT),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _BOUND),
        "items": inner,
        "properties": st.dictionaries(st.sampled_from("ab"), inner, min_size=1),
        "required": st.just(["a"]),
        "additionalProperties": st.booleans(),
        "anyOf": st.lists(inner, min_size=1, max_size=2),
        "$ref": st.just("#/$defs/D"),
        "title": st.just("T"),
    }
    types = st.sampled_from(_TYPES) | st.lists(st.sampled_from(_TYPES), min_size=1, max_size=2, unique=True)
    few = st.lists(st.sampled_from(sorted(keywords)), max_size=3, unique=True)
    return few.flatmap(
        lambda names: st.fixed_dictionaries({name: keywords[name] for name in names}, optional={"type": types})
    )


_SIMPLE = st.sampled_from([{"type": "integer"}, {"type": "string", "maxLength": 2}, {"type": "null"}, {"const": 1}])
_ANSWERS = (
    *("", "a", "ab", "abc", "abcd", None, True, False, -3, -2, 0, 1, 2, 3, 4, 0.5, 1.5, 2.5, -0.25, -0.5, 1.0),
    *([], [1], ["a"], [None, None], [1, 1, 1], {}, {"a": 1}, {"b": "ab"}, {"a": None, "b": 1}, {"c": 1}),
)


@settings(max_examples=200, deadline=None)
@given(_schemas(_schemas(_SIMPLE) | _SIMPLE), st.sampled_from([{"type": "string", "maxLength": 2}, {"enum": ["a", 1]}]))
def test_an_answer_of_the_grammar_is_one_of_the_schema(schema, definition):
    """Checked by jsonschema, another reader of the standard. Each schema that is taken becomes a grammar."""
    schema = {**schema, "$defs": {"D": definition}}
    try:
        checked_schema(schema)
    except InvalidInput:
        return
    found, validator = compiled(schema), jsonschema.Draft202012Validator(schema)
    for answer in _ANSWERS:
        if spells(found, json.dumps(answer, separators=(",", ":"))):
            assert validator.is_valid(answer), answer


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
