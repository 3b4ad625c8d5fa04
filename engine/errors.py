"""Typed errors, and how they cross the wire.

Triton's streaming protocol carries an error as text only, so the kind travels in front of the message
(``INVALID_ARGUMENT: the scan has 2 axes, ...``) and the client turns it back into the same class.
"""

from __future__ import annotations


class M3DError(Exception):
    """Base of all errors that this library raises on purpose. `code` is the gRPC status name."""

    code = "INTERNAL"

    def to_wire(self) -> str:
        return f"{self.code}: {self}"


class InvalidInput(M3DError):
    """The scan, the question or a setting is unusable; the message names the cause, the limit and the way out."""

    code = "INVALID_ARGUMENT"


class StudyNotFound(M3DError):
    """The study handle is unknown to this server: never uploaded, or evicted since."""

    code = "NOT_FOUND"


class ResourceExhausted(M3DError):
    """A limit of the server is reached (memory of the study store, queue, deadline budget)."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(M3DError):
    """The server, or the part of it that the request needs, does not answer or is not loaded."""

    code = "UNAVAILABLE"


class Cancelled(M3DError):
    """The request was cancelled by its client."""

    code = "CANCELLED"


class DeadlineExceeded(M3DError):
    """The client's deadline passed before the answer was complete."""

    code = "DEADLINE_EXCEEDED"


class CheckpointError(M3DError):
    """A checkpoint folder cannot be used: missing files, missing/unexpected/misshapen keys, another architecture."""

    code = "INVALID_ARGUMENT"


class RepositoryError(M3DError):
    """A model repository is not (or not completely) exported, or does not fit this version of the engine."""

    code = "UNAVAILABLE"


_BY_CODE = {
    cls.code: cls
    for cls in (M3DError, InvalidInput, StudyNotFound, ResourceExhausted, Unavailable, Cancelled, DeadlineExceeded)
}


def from_wire(message: str) -> M3DError:
    """The typed error that `message` (with or without a kind in front) stands for; `M3DError` if it names none.

    Triton puts its own words before a model's ("in ensemble 'm3d_chat', ..."), so the kind is looked for anywhere.
    """
    found = [(position, code) for code in _BY_CODE if (position := message.find(f"{code}: ")) >= 0]
    if not found:
        return M3DError(message)
    position, code = min(found)
    return _BY_CODE[code](message[position + len(code) + 2 :])


def shortened(value: object, limit: int = 80) -> str:
    """What somebody gave, as a message may echo it: its `repr`, of at most `limit` characters."""
    try:
        said = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        said = f"a very long {type(value).__name__}"
    return said if len(said) <= limit else said[: limit - 3] + "..."


def one_line(error: Exception) -> str:
    """What a foreign error says, in one short line; its class if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
