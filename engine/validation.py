"""Values from files as typed ones, checked by pydantic; its faults in our words.

Settings are dataclasses of pydantic's, made with `CHECKED`: nothing is converted, unknown names are refused. Other
dataclasses may have it as their `__pydantic_config__`, and are checked by `checked` only. A client has no pydantic.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engine.errors import shortened

CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_NAMED = 5  # faults in a message
_Kind = TypeVar("_Kind")


def checked(kind: type[_Kind], values: Any) -> _Kind:
    """`values`, as JSON or TOML have them, as a `kind`. Raises ValueError with what was given and what is allowed."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ValueError(faults(error, kind)) from None


def faults(error: ValidationError, kind: type) -> str:
    """What was given and what is allowed, in a line, of values that do not make a `kind`."""
    found = [_fault(one["loc"], one["type"], one["msg"], one["input"], kind) for one in error.errors()]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _fault(place: tuple, fault: str, words: str, given: Any, kind: type) -> str:
    name = ".".join(map(str, place))
    if fault == "unexpected_keyword_argument":
        for part in place[:-1]:
            kind = get_type_hints(kind)[part]
        known = [field.name for field in fields(kind)] if is_dataclass(kind) else []
        return f"{name} is unknown; known are {', '.join(known)}"
    if fault == "missing":
        return f"{name} is missing"
    allowed = words.removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{name} must be {allowed}, not {shortened(given)}" if allowed != words else f"{name}: {words}"
