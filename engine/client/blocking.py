"""The synchronous client."""

from __future__ import annotations

from engine.blocking import BlockingM3D
from engine.client.connection import Connection
from engine.client.wire import checked_url
from engine.defaults import DEFAULT_URL
from engine.methods import Methods


class M3DClient(BlockingM3D):
    """A connection to one server; use it from as many threads as you like. Its methods are those of `engine.api.M3D`.

    url: host:port of the server's gRPC port. timeout: seconds until a call fails with DeadlineExceeded (and is
    cancelled on the server), None for no limit; each method takes its own.
    """

    _transport: Connection

    def __init__(self, url: str = DEFAULT_URL, timeout: float | None = 600.0):
        super().__init__(Methods(timeout), Connection(checked_url(url)))

    @property
    def url(self) -> str:
        return self._transport.url
