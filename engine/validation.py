"""Values from files as typed ones, checked by pydantic; its faults in our words.

Settings are dataclasses of pydantic's, made with `CHECKED`: nothing is converted, unknown names are refused. `checked`
holds any dataclass to that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from engine.errors import shortened

CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_NAMED = 5  # faults in a message
_Kind = TypeVar("_Kind")


def checked(kind: type[_Kind], values: Any, where: str = "") -> _Kind:
    """Values as a dataclass.

    Args:
        kind: the dataclass. values: as JSON or TOML have them. where: stands in front of names in the error.

    Raises:
        ValueError: they make none; with what was given and what is allowed.
    """
    # In a list, since a dataclass of Python's own is checked as that says in which it is.
    adapter = TypeAdapter(list[kind], config=CHECKED)  # type: ignore[valid-type]
    try:
        return adapter.validate_json(json.dumps([values], default=str))[0]
    except ValidationError as error:
        found = [_fault(one["loc"][1:], one["type"], one["msg"], one["input"], kind, where) for one in error.errors()]
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise ValueError("; ".join(found[:_NAMED]) + more)


def _fault(place: Sequence, fault: str, words: str, given: Any, kind: type, where: str) -> str:
    name = where + ".".join(map(str, place))
    if fault == "unexpected_keyword_argument":
        return f"{name} is unknown; known are {', '.join(_known(kind, place[:-1]))}"
    if fault == "missing":
        return f"{name} is missing"
    return f"{name or 'the whole'} must be {words.removeprefix('Input should be ')}, not {shortened(given)}"


def _known(kind: Any, place: Sequence) -> list[str]:
    """The names of the dataclass at a place in `kind`; a place in a union has the name of its dataclass."""
    for part in place:
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
        kind = hints.get(part) or next(one for one in get_args(kind) if getattr(one, "__name__", None) == part)
    return [field.name for field in fields(kind)]
