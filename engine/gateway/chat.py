"""Chat completions: whole, and as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from engine.api import Answer, ScoredToken
from engine.errors import M3DError
from engine.gateway.audit import Access, log_failure
from engine.gateway.backend import AsyncAnswerStream
from engine.gateway.metrics import Metrics
from engine.gateway.refusal import refusal_of
from engine.gateway.studies import OpenStudy

DONE = b"data: [DONE]\n\n"
UNREAD_NOTE = "earlier messages were not read: this model answers the last question alone"
LEAST_LOGPROB = -9999.0  # OpenAI's number for what is as good as impossible: JSON has no infinity


@dataclass(frozen=True)
class Begun:
    """An answer whose first piece of text is there: whatever is wrong with the question is known by then.

    first: None for an answer without text.
    """

    stream: AsyncAnswerStream
    first: str | None
    opened: OpenStudy

    async def texts(self) -> AsyncIterator[str]:
        """All pieces; the request is cancelled if they are not read to the end."""
        try:
            if self.first is not None:
                yield self.first
                async for text in self.stream:
                    yield text
        finally:
            await self.stream.aclose()


class Completion:
    """One completion in OpenAI's words. model: the name that was asked for. fingerprint: of the model's export."""

    def __init__(self, begun: Begun, model: str, fingerprint: str, metrics: Metrics):
        self._begun = begun
        self._metrics = metrics
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        text = "".join([text async for text in self._begun.texts()])
        answer = self._answer()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": logprobs(answer),
            "finish_reason": answer.finish_reason,
        }
        extension = self._extension(answer)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(answer), **extension}

    async def events(self, include_usage: bool, access: Access) -> AsyncIterator[bytes]:
        """Server-sent events. Log-probabilities come with the last piece, when the answer is whole.

        An error comes as an event, as OpenAI's server sends it, and ends the stream: the status has been sent by then.
        """
        try:
            yield self._event({"role": "assistant", "content": ""}, include_usage)
            async for text in self._begun.texts():
                yield self._event({"content": text}, include_usage)
            answer = self._answer()
            yield self._event({}, include_usage, answer)
            if include_usage:
                yield _data({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(answer)})
            yield DONE
        except Exception as error:
            refusal = refusal_of(error)
            access.outcome = refusal.code
            if not isinstance(error, M3DError):
                log_failure(access, error)
            yield _data(refusal.body)

    def _event(self, delta: dict[str, Any], include_usage: bool, answer: Answer | None = None) -> bytes:
        """answer: of the last piece."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs(answer) if answer else None,
            "finish_reason": answer.finish_reason if answer else None,
        }
        nothing = {"usage": None} if include_usage else {}
        extension = self._extension(answer) if answer else {}
        return _data({**self._head, "object": "chat.completion.chunk", "choices": [choice], **nothing, **extension})

    def _answer(self) -> Answer:
        answer = self._begun.stream.answer
        if answer is None:
            raise RuntimeError("the stream ended without an answer")
        self._metrics.answered(answer)
        return answer

    def _extension(self, answer: Answer) -> dict[str, Any]:
        """What OpenAI's answers do not have: `m3d`, which their clients keep as an extra field."""
        opened = self._begun.opened
        info = opened.study.info
        notes = [*opened.notes, *([UNREAD_NOTE] if answer.history_used is False else [])]
        extension = {
            "study": opened.public,
            "preset": info.preset if info else None,
            "reason": info.reason if info else None,
            "boxes": answer.boxes.tolist(),
            "choices": {text: max(value, LEAST_LOGPROB) for text, value in answer.choices.items()},
            "notes": notes,
        }
        return {"m3d": extension}


def logprobs(answer: Answer) -> dict[str, Any] | None:
    """In OpenAI's words; None if they were not asked for."""
    if not answer.logprobs:
        return None
    content = [_scored(each) | {"top_logprobs": [_scored(top) for top in each.top]} for each in answer.logprobs]
    return {"content": content, "refusal": None}


def _scored(token: ScoredToken) -> dict[str, Any]:
    """bytes: None of a token that is a part of a character only."""
    whole = "\ufffd" not in token.text
    return {
        "token": token.text,
        "logprob": max(token.logprob, LEAST_LOGPROB),
        "bytes": list(token.text.encode(errors="replace")) if whole else None,
    }


def usage(answer: Answer) -> dict[str, Any]:
    took = answer.timings
    return {
        "prompt_tokens": took.prompt_tokens,
        "completion_tokens": took.answer_tokens,
        "total_tokens": took.prompt_tokens + took.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": took.cached_tokens},
    }


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n\n"
