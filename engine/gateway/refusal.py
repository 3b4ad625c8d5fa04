"""What is refused, in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from engine.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    M3DError,
    ResourceExhausted,
    StudyNotFound,
    Unavailable,
)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every error, for the description of the routes."""

    error: ErrorDetail


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is an error.

    status: of HTTP. code: one of few words, which audit lines and metrics have, too. message: what was given, what is
    allowed, what to do; for the client only, as it may quote him. param: the request's field. retry_after: seconds.
    allow: the methods that the route has.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        if self.allow is not None:
            headers["allow"] = self.allow
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> Refusal:
    return Refusal(400, code, message, param)


def unsupported(param: str, message: str) -> Refusal:
    """For what OpenAI's API has and this one has not."""
    return Refusal(400, "unsupported_parameter", f"{param}: {message}", param)


def not_found(what: str, given: str) -> Refusal:
    """For an id of another owner, too: the answer does not say that it exists."""
    return Refusal(404, "not_found", f"there is no {what} {given[:100]!r} of this key", "id")


def gone(message: str) -> Refusal:
    return Refusal(410, "gone", message)


# Of the classes that an error may be of, the first counts.
_OF_ERROR: tuple[tuple[type[M3DError], int, str, int | None], ...] = (
    (InvalidInput, 400, "invalid_value", None),
    (ResourceExhausted, 503, "overloaded", 5),
    (Unavailable, 503, "unavailable", 5),
    (Cancelled, 503, "cancelled", None),
    (DeadlineExceeded, 504, "deadline_exceeded", None),
    (M3DError, 500, "internal_error", None),
)


def refusal_of(error: Exception) -> Refusal:
    """What a client gets for an error. Of one that is not ours it gets no detail: it may quote somebody's scan."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, StudyNotFound):  # what it says has the server's handle
        return gone("the server does not hold this study any more: upload the scan again")
    for kind, status, code, retry_after in _OF_ERROR:
        if isinstance(error, kind):
            return Refusal(status, code, str(error), retry_after=retry_after)
    return Refusal(500, "internal_error", "the gateway failed; its log says where")
