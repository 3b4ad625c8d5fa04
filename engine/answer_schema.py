"""JSON schemas that an answer can be held to: a part of the standard whose cost is known.

A schema becomes a grammar inside the language model's process. What that process would refuse, ignore or compute for
long is refused here, in the client and again in the server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidInput, shortened

MAX_BYTES = 1 << 14
MAX_DEPTH = 16  # of schemas within schemas
MAX_COUNT = 10_000  # of characters or items
MAX_NUMBER = 1_000_000_000
TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_NOTES = ("title", "description", "default", "examples", "$schema", "$id", "$comment")  # which change no answer
KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs"),
    *(*_COUNTS, *_NUMBERS, *_NOTES),
)
_DEFINITION = "#/$defs/"
_SCALARS = (str, bool, int, float, type(None))


def checked_schema(schema: object) -> str:
    """A JSON schema as JSON text.

    Args:
        schema: a JSON object (such as pydantic's `model_json_schema()`), or its text.

    Raises:
        InvalidInput: it is no schema, is too large, or uses what is not taken.
    """
    if isinstance(schema, str):
        text = schema
    elif isinstance(schema, Mapping):
        try:
            text = json.dumps(schema, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"json_schema cannot be written as JSON: {str(error)[:200]}") from None
    else:
        raise InvalidInput(f"json_schema must be a JSON object or its text, not {shortened(schema)}")
    if len(text) > MAX_BYTES:
        raise InvalidInput(f"json_schema has {len(text):,} characters, at most {MAX_BYTES:,} are taken: shorten it")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"json_schema is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"json_schema must be a JSON object, not {shortened(values)}")
    _Checker(values).check_all()
    return json.dumps(values, separators=(",", ":"))


def schema_for_grammar(text: str) -> str:
    """A checked schema as xgrammar is to read it. Of its version 0.2.8, strings with a bound on their length may hold
    control characters, which JSON does not allow: the bounds become patterns."""
    return json.dumps(_with_patterns(json.loads(text)), separators=(",", ":"))


def _with_patterns(schema: dict[str, Any]) -> dict[str, Any]:
    found = dict(schema)
    low, high = found.pop("minLength", None), found.pop("maxLength", None)
    if (low, high) != (None, None):
        found["pattern"] = rf'^[^"\\\x00-\x1f]{{{low or 0},{"" if high is None else high}}}$'
    for name in ("properties", "$defs"):
        if name in found:
            found[name] = {key: _with_patterns(value) for key, value in found[name].items()}
    if "items" in found:
        found["items"] = _with_patterns(found["items"])
    if "anyOf" in found:
        found["anyOf"] = [_with_patterns(each) for each in found["anyOf"]]
    return found


class _Checker:
    """Walks through a schema; each definition is entered once."""

    def __init__(self, schema: Mapping[str, Any]):
        self._definitions = schema.get("$defs", {})
        if not isinstance(self._definitions, dict):
            raise _wrong("/$defs", "it must be an object")
        self._schema = schema
        self._known: dict[str, int] = {}  # definition -> depth at which it was entered, the deepest
        self._open: list[str] = []

    def check_all(self) -> None:
        self.check(self._schema, "", 0)
        for name in self._definitions:
            self._follow(_DEFINITION + name, "", 0)

    def check(self, schema: Any, place: str, depth: int) -> None:
        """place: of the schema in the whole, for messages."""
        if not isinstance(schema, dict):
            raise _wrong(place, f"a schema must be an object, not {shortened(schema)}")
        if depth > MAX_DEPTH:
            raise _wrong(place, f"schemas are nested more than {MAX_DEPTH} deep: flatten it")
        if unknown := [name for name in schema if name not in KEYWORDS]:
            raise _wrong(place, f"{shortened(unknown[0], 40)} is not taken; what is: {', '.join(KEYWORDS)}")
        if "$defs" in schema and depth:
            raise _wrong(place, "$defs stands at the top of a schema only")
        if not schema.keys() & {"type", "enum", "const", "anyOf", "$ref"}:
            raise _wrong(place, "it says nothing of its value: give type, enum, const, anyOf or $ref")
        self._check_alone(schema, place)
        types = self._checked_types(schema, place)
        self._check_bounds(schema, types, place)
        self._check_values(schema, types, place)
        self._check_object(schema, place, depth)
        if "items" in schema:
            self.check(schema["items"], f"{place}/items", depth + 1)
        if "anyOf" in schema:
            for number, choice in enumerate(_filled(schema["anyOf"], list, f"{place}/anyOf")):
                self.check(choice, f"{place}/anyOf/{number}", depth + 1)
        if "$ref" in schema:
            self._follow(schema["$ref"], place, depth)

    def _check_alone(self, schema: Mapping[str, Any], place: str) -> None:
        """xgrammar 0.2.8 ignores what stands beside $ref and anyOf."""
        for name, way_out in (
            ("$ref", "put them into the definition that it names"),
            ("anyOf", "put them into each of its schemas"),
        ):
            beside = [other for other in schema if other not in (name, "$defs", *_NOTES)]
            if name in schema and beside:
                raise _wrong(place, f"{name} takes no other keywords beside it, such as {beside[0]}: {way_out}")

    def _checked_types(self, schema: Mapping[str, Any], place: str) -> list[str]:
        types = schema.get("type", [])
        types = [types] if isinstance(types, str) else _filled(types, list, f"{place}/type", "type" not in schema)
        for name in types:
            if name not in TYPES:
                raise _wrong(place, f"type {shortened(name, 40)} is none of {', '.join(TYPES)}")
        return types

    def _check_values(self, schema: Mapping[str, Any], types: list[str], place: str) -> None:
        """xgrammar 0.2.8 ignores what stands beside enum and const, so that each value is held to it here."""
        values = [*_filled(schema.get("enum", []), list, f"{place}/enum", "enum" not in schema)]
        if "const" in schema:
            if values:
                raise _wrong(place, "enum and const stand beside each other: give one of them")
            values.append(schema["const"])
        for value in values:
            if not isinstance(value, _SCALARS) or not isinstance(value, str) and not abs(value or 0) <= MAX_NUMBER:
                raise _wrong(
                    place,
                    f"enum and const take texts, numbers from -{MAX_NUMBER:,} to {MAX_NUMBER:,}, true, false and null, "
                    f"not {shortened(value)}",
                )
            if broken := _broken_by(value, schema, types):
                raise _wrong(
                    place,
                    f"the value {shortened(value)} of enum or const is not of {broken} {shortened(schema[broken])}: "
                    f"leave out one of the two",
                )

    def _check_bounds(self, schema: Mapping[str, Any], types: list[str], place: str) -> None:
        for name in _COUNTS:
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
                raise _wrong(place, f"{name} must be a whole number from 0 to {MAX_COUNT:,}, not {shortened(value)}")
        for name in _NUMBERS:
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
                raise _wrong(
                    place, f"{name} must be a number from -{MAX_NUMBER:,} to {MAX_NUMBER:,}, not {shortened(value)}"
                )
            if "integer" in types and value != int(value):
                raise _wrong(place, f"{name} of an integer must be a whole number, not {shortened(value)}")
        for low, high in (("minLength", "maxLength"), ("minItems", "maxItems"), ("minimum", "maximum")):
            if low in schema and high in schema and schema[low] > schema[high]:
                raise _wrong(place, f"{low} {schema[low]} is above {high} {schema[high]}")
        if _no_number_between(schema, whole="integer" in types):
            bounds = ", ".join(f"{name} {schema[name]}" for name in _NUMBERS if name in schema)
            raise _wrong(place, f"no {'integer' if 'integer' in types else 'number'} is within {bounds}: widen them")
        if "array" in types and schema.get("minItems") and "items" not in schema:
            raise _wrong(place, f"minItems is {schema['minItems']}, and items does not say what they are: give items")

    def _check_object(self, schema: Mapping[str, Any], place: str, depth: int) -> None:
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise _wrong(place, "properties must be an object")
        for name, value in properties.items():
            self.check(value, f"{place}/properties/{name}", depth + 1)
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _wrong(place, "required must be a list of names")
        if missing := [name for name in required if name not in properties]:
            raise _wrong(place, f"required names {shortened(missing[0], 40)}, which properties do not have")
        if not isinstance(schema.get("additionalProperties", False), bool):
            raise _wrong(place, "additionalProperties must be true or false")

    def _follow(self, reference: Any, place: str, depth: int) -> None:
        name = reference.removeprefix(_DEFINITION) if isinstance(reference, str) else None
        if name is None or not reference.startswith(_DEFINITION) or name not in self._definitions:
            raise _wrong(place, f"$ref must be {_DEFINITION} and a name of $defs, not {shortened(reference)}")
        if name in self._open:
            raise _wrong(place, f"{shortened(name, 40)} refers to itself, so that an answer could have any depth")
        if self._known.get(name, -1) >= depth:
            return
        self._known[name] = depth
        self._open.append(name)
        self.check(self._definitions[name], f"/$defs/{name}", depth + 1)
        self._open.pop()


def _broken_by(value: Any, schema: Mapping[str, Any], types: list[str]) -> str | None:
    """The keyword that a value of enum or const does not fulfil. Those of objects and arrays say nothing of it."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None:
        kinds = {"null"}
    elif isinstance(value, str):
        kinds = {"string"}
    elif not number:
        kinds = {"boolean"}
    else:
        kinds = {"number", "integer"} if value == int(value) else {"number"}
    if types and not kinds.intersection(types):
        return "type"
    fulfilled = {}
    if number:
        fulfilled = {
            "minimum": lambda bound: value >= bound,
            "maximum": lambda bound: value <= bound,
            "exclusiveMinimum": lambda bound: value > bound,
            "exclusiveMaximum": lambda bound: value < bound,
        }
    elif isinstance(value, str):
        fulfilled = {"minLength": lambda bound: len(value) >= bound, "maxLength": lambda bound: len(value) <= bound}
    return next((name for name, holds in fulfilled.items() if name in schema and not holds(schema[name])), None)


def _no_number_between(schema: Mapping[str, Any], whole: bool) -> bool:
    """Whether the bounds of numbers leave none. whole: whether integers are meant, whose bounds are whole."""
    # (bound, 1 if it is itself left out): of two bounds on the same side, the tighter one holds.
    low = max(
        (schema.get("minimum", -math.inf), 0),
        (schema.get("exclusiveMinimum", -math.inf), 1),
    )
    high = min(
        (schema.get("maximum", math.inf), 0),
        (schema.get("exclusiveMaximum", math.inf), -1),
    )
    if whole:
        return low[0] + low[1] > high[0] + high[1]
    return low[0] > high[0] or low[0] == high[0] and (low[1], high[1]) != (0, 0)


def _filled(value: Any, kind: type, place: str, may_be_empty: bool = False) -> Any:
    """A list that is not empty."""
    if not isinstance(value, kind) or not value and not may_be_empty:
        raise _wrong(place, "it must be a list that is not empty")
    return value


def _wrong(place: str, what: str) -> InvalidInput:
    where = shortened(place, 120).strip("'\"") or "its top"
    return InvalidInput(f"json_schema, at {where if place else 'its top'}: {what}")
