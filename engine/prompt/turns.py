"""The turns of a conversation: checked, and as text for the way to a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.errors import InvalidInput, shortened

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
MAX_TURNS = 256


class Turn(NamedTuple):
    """One turn of a conversation. role: "user", "assistant", or "system" for the first turn."""

    role: str
    text: str


def checked_turns(messages: Any) -> list[Turn]:
    """The turns in order: user and assistant in turn, the last one the user's; before them a system turn or none.

    Args:
        messages: each a role and a text as a pair, as {"role": …, "content": …}, or as an object with these attributes.

    Raises:
        InvalidInput: for others, and for more than MAX_TURNS.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidInput(f"messages must be a list of turns, each a role and a text, not {shortened(messages)}")
    if len(messages) > MAX_TURNS:
        raise InvalidInput(f"{len(messages):,} turns given, at most {MAX_TURNS} are taken: leave the oldest out")
    turns = [_turn(message) for message in messages]
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles[:1] == [SYSTEM] else roles
    if not talk or len(talk) % 2 == 0 or talk != [USER, ASSISTANT] * (len(talk) // 2) + [USER]:
        said = shortened(", ".join(roles) or "none", 120).strip("'")
        raise InvalidInput(
            f"the roles of the turns are {said}; they must be {USER}, {ASSISTANT} and so on, the last one {USER}; "
            f"before them may stand one {SYSTEM} turn"
        )
    return turns


def history_to_json(turns: Sequence[Turn]) -> str:
    """All turns but the last, as the tensor HISTORY has them."""
    return json.dumps([list(turn) for turn in turns[:-1]], ensure_ascii=False)


def turns_of(history: str, question: str) -> list[Turn]:
    """The turns of a conversation from the tensor HISTORY and its last question. Raises as `checked_turns`."""
    try:
        earlier = json.loads(history)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"HISTORY is not JSON: {str(error)[:200]}") from None
    if not isinstance(earlier, list):
        raise InvalidInput(f"HISTORY must be a JSON list of turns, each a role and a text, not {shortened(earlier)}")
    return checked_turns([*earlier, Turn(USER, question)])


def _turn(message: Any) -> Turn:
    if isinstance(message, Mapping):
        if message.keys() != {"role", "content"}:
            names = shortened(", ".join(map(str, message)), 60)
            raise InvalidInput(f"a turn has a role and a content, and nothing else, not {names}")
        turn = Turn(message["role"], message["content"])
    elif isinstance(message, Sequence) and not isinstance(message, (str, bytes)) and len(message) == 2:
        turn = Turn(*message)
    elif hasattr(message, "role") and hasattr(message, "content"):
        turn = Turn(message.role, message.content)
    else:
        raise InvalidInput(f"a turn is a role and a text, not {shortened(message)}")
    if not (isinstance(turn.role, str) and isinstance(turn.text, str)):
        raise InvalidInput(f"a turn is a role and a text, not {shortened(turn.role)} and a {type(turn.text).__name__}")
    return turn
