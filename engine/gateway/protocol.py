"""HTTP/1.1 with bounds on a request's head, which uvicorn's parser takes in without any, and errors in our shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.gateway.refusal import Refusal

HEAD_BYTES = 32 << 10
HEAD_S = 15.0
CLOSING_S = 60.0  # that a client has to read the rest of an answer on a connection that is to be closed


class _BoundedTransport:
    """A transport whose close waits for the client for CLOSING_S at most; asyncio's waits for ever."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport = transport
        self._loop = loop
        self.timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._transport.close()
        if self.timer is None:
            self.timer = self._loop.call_later(CLOSING_S, self._transport.abort)


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose request head is longer than HEAD_BYTES or takes longer than HEAD_S to come, and the
    handshake before it. Nothing is said: who sends such a head is not known to be able to read."""

    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._bounded = _BoundedTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._bounded))
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)
        if self._bounded.timer is not None:
            self._bounded.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Any byte ends uvicorn's wait for a next request, a line end before its head, too, which begins no message."""
        super().data_received(data)
        is_idle = self.cycle is not None and self.cycle.response_complete
        if is_idle and self._head_timer is None and not self.transport.is_closing():
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._head_timer is None:  # a later request of the connection
            self._await_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_here()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the shape of all errors; uvicorn would say it in plain text."""
        body = json.dumps(Refusal(400, "invalid_http", "the request is no HTTP/1.1").body).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _head_is_here(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES:
            self._give_up()

    def _give_up(self) -> None:
        self._head_is_here()
        self.transport.abort()
