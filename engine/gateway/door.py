"""The access middleware: keys, roles, rates, sizes and the audit line of each request.

It is an ASGI application around the routes. What goes wrong inside it becomes an answer in OpenAI's error shape; no
exception reaches the web server, which would write its message, and so perhaps somebody's scan, into a log.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from engine.errors import M3DError
from engine.gateway.audit import Access, Audit, log_failure
from engine.gateway.keys import PREFIX, ROLES, Key, Keys
from engine.gateway.limits import Concurrency, Rates, Room
from engine.gateway.metrics import Metrics
from engine.gateway.refusal import Refusal, refusal_of
from engine.gateway.settings import MB, GatewaySettings

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health/live", "/health/ready")  # need no key
UPLOAD_PATHS = ("/v1/files", "/v1/studies")  # POST takes a scan's file
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
MAX_QUERY_FIELDS = 32
SMALL_BODY = 64 << 10  # a JSON body that takes no place in the room
STRUCTURAL_BYTES = 100_000  # of a JSON body: each may become an object of a hundred bytes; base64 has none of them
SENT_BYTES = 64 << 10  # of an answer, at a time
SILENCE_S = 30.0  # a body that brings nothing for so long is given up
SLOW_AFTER_S = 60.0  # a body must be faster than SLOW_BYTES_PER_S on average, after that time
SLOW_BYTES_PER_S = 16_000
STALLED_S = 60.0  # a client that reads nothing of its answer for so long is given up
DRAINED_BYTES = 8 << 20  # of the body of a refused request: a client that is writing reads the answer then
DRAINED_S = 5.0
_KEY_NAMES = ("key", "api_key", "apikey", "api-key", "token", "access_token", "auth", "authorization", "bearer")
_KEY_LIKE = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9_-]{43}")


class Disconnected(Exception):
    """The client has gone, or does not read its answer."""


# Who enters a gateway without keys: everybody is one owner.
ANYBODY = Key.model_construct(name="anybody", owner="0" * 32, hash="", roles=ROLES, created=0.0)


class AccessMiddleware:
    """routes: the application behind it. keys: None lets everybody in."""

    def __init__(
        self, routes: Application, keys: Keys | None, settings: GatewaySettings, audit: Audit, metrics: Metrics
    ) -> None:
        self._routes = routes
        self._keys = keys
        self._settings = settings
        self._audit = audit
        self._metrics = metrics
        self._rates = Rates()
        self._concurrency = Concurrency()
        self._room = Room(settings.json_room_mb * MB)
        metrics.gauge("requests_in_work", "requests in work", lambda: self._concurrency.total)
        metrics.gauge("json_bytes_in_work", "bytes of large JSON bodies in work", lambda: self._room.taken)
        metrics.gauge("audit_failures", "audit lines that could not be written", lambda: audit.failures)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._routes(scope, receive, send)
        elif scope["type"] == "http":
            await _Request(self, scope, receive, send).run()
        else:
            await send({"type": "websocket.close"})


class _Request:
    """One request."""

    def __init__(self, door: AccessMiddleware, scope: Scope, receive: Receive, send: Send):
        self._door = door
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._access = Access(secrets.token_hex(8))
        self._started = self._has_ended = False
        self._body_is_read = False
        self._is_upload = False
        self._structural = 0
        self._limit = 0

    async def run(self) -> None:
        door, access = self._door, self._access
        self._scope["m3d.access"] = access
        is_open = self._scope["path"] in OPEN_PATHS
        try:
            with ExitStack() as held:
                self._enter(held)
                await door._routes(self._scope, self._received, self._sent)
        except (Disconnected, asyncio.CancelledError):
            access.outcome = "disconnected"
        except Exception as error:
            await self._refuse(error)
        route = self._scope.get("route")
        access.operation = f"{self._scope['method']} {route.path}" if route is not None else "other"
        door._metrics.ended(access)
        if not is_open:
            door._audit.write(access)

    # --- who may enter -----------------------------------------------------------------------------------------------
    def _enter(self, held: ExitStack) -> None:
        """Raises Refusal for who may not. held: what is given back when the request ends."""
        self._check_address()
        self._limit = self._door._settings.max_json_mb * MB
        if self._scope["path"] in OPEN_PATHS:
            self._limit = 0
            return
        key = self._key()
        self._access.key = key.name
        self._scope["m3d.key"] = key
        settings = self._door._settings
        self._door._rates.take(key.owner, key.rate_per_minute or settings.rate_per_minute)
        held.enter_context(self._door._concurrency.entered(key.owner, key.concurrency or settings.concurrency))
        self._is_upload = self._uploads()
        if self._is_upload:
            # Boundaries and small fields stand around a file.
            self._limit = (key.max_upload_mb or settings.max_upload_mb) * MB + SMALL_BODY
        size = self._declared_size()
        if size > self._limit:
            raise self._too_large()
        if not self._is_upload and size and not self._is_json():
            raise Refusal(415, "unsupported_media_type", "the body must be JSON: send Content-Type: application/json")
        room = self._door._room
        self._scope["m3d.hold"] = lambda more: held.enter_context(room.holding(more))
        self._scope["m3d.body_size"] = size if size >= 0 else self._limit
        if not self._is_upload and (size < 0 or size > SMALL_BODY):
            held.enter_context(room.holding(self._scope["m3d.body_size"]))

    def _check_address(self) -> None:
        """A key in an address is in logs and histories of others by then: it is refused even if it is right."""
        query = self._scope.get("query_string", b"").decode("latin-1")
        try:
            fields = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS)
        except ValueError:
            raise Refusal(400, "invalid_value", f"the address has more than {MAX_QUERY_FIELDS} fields") from None
        named = any(name.lower() in _KEY_NAMES for name, _ in fields)
        if named or _KEY_LIKE.search(query) or _KEY_LIKE.search(self._scope["path"]):
            raise Refusal(
                400,
                "key_in_url",
                "a key belongs into the header Authorization: Bearer KEY, never into an address, which proxies and "
                "browsers keep: revoke this one (m3d keys revoke), and make another",
            )

    def _key(self) -> Key:
        keys = self._door._keys
        if keys is None:
            self._check_local()
            return ANYBODY
        scheme, _, given = self._headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Refusal(401, "missing_api_key", "a key is needed: send the header Authorization: Bearer KEY")
        key = keys.find(given.strip())
        if key is None:
            raise Refusal(401, "invalid_api_key", "this key is not known, or was revoked")
        if key.has_expired():
            self._access.key = key.name
            raise Refusal(401, "expired_api_key", "this key has expired: ask for another one")
        return key

    def _check_local(self) -> None:
        """Without keys, a page of the web that is open in a browser here must not get in: neither by a name of its own
        that leads to this machine, nor by a form."""
        origin = self._headers.get("origin")
        if not _is_local("//" + self._headers.get("host", "")) or (origin is not None and not _is_local(origin)):
            message = f"without keys only {', '.join(LOCAL_HOSTS)} can be asked, and not by pages of others"
            raise Refusal(403, "not_local", message)

    # --- bodies ------------------------------------------------------------------------------------------------------
    def _uploads(self) -> bool:
        return self._scope["method"] == "POST" and self._scope["path"] in UPLOAD_PATHS and not self._is_json()

    def _is_json(self) -> bool:
        return self._headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"

    def _declared_size(self) -> int:
        """-1 if it is not known."""
        if "transfer-encoding" in self._headers:
            return -1
        try:
            return int(self._headers.get("content-length", "0"))
        except ValueError:
            raise Refusal(400, "invalid_value", "Content-Length is no number") from None

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            "body_too_large",
            f"the body has more than the {self._limit:,} bytes that it may have here: send a scan by POST /v1/files or "
            "/v1/studies, crop or resample it, or have the limit raised",
        )

    async def _received(self) -> Message:
        """A piece of the body; or that the client has gone, once the body is read."""
        if self._body_is_read:
            message = await self._receive()
        else:
            try:
                async with asyncio.timeout(SILENCE_S):
                    message = await self._receive()
            except TimeoutError:
                raise self._too_slow() from None
        if message["type"] == "http.disconnect":
            if not self._has_ended:
                self._access.outcome = "disconnected"
            if not self._body_is_read:
                raise Disconnected
            return message
        self._access.bytes_in += len(message.get("body", b""))
        self._body_is_read = not message.get("more_body", False)
        if self._access.bytes_in > self._limit:
            raise self._too_large()
        if not self._is_upload:
            self._count_structure(message.get("body", b""))
        took = self._access.seconds
        if not self._body_is_read and took > SLOW_AFTER_S and self._access.bytes_in < SLOW_BYTES_PER_S * took:
            raise self._too_slow()
        return message

    def _count_structure(self, piece: bytes) -> None:
        """A small body of many empty lists takes much memory, and the event loop's time, once it is read as JSON."""
        self._structural += sum(map(piece.count, (b"[", b"{", b",", b":")))
        if self._structural > STRUCTURAL_BYTES:
            message = (
                f"the body has more than {STRUCTURAL_BYTES:,} commas, colons and opening brackets: send less at a time"
            )
            raise Refusal(413, "body_too_large", message)

    def _too_slow(self) -> Refusal:
        return Refusal(
            408, "body_too_slow", f"the body comes too slowly ({self._access.bytes_in:,} bytes until now): send it anew"
        )

    # --- answers -----------------------------------------------------------------------------------------------------
    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._access.status = message["status"]
            own = {
                b"x-request-id": self._access.request.encode(),
                b"cache-control": b"no-store",
                b"x-content-type-options": b"nosniff",
            }
            message["headers"] = [*message.get("headers", ()), *own.items()]
            if not self._body_is_read and self._declared_size():
                message["headers"].append((b"connection", b"close"))
        else:
            self._access.bytes_out += len(message.get("body", b""))
            self._has_ended = not message.get("more_body", False)
        # The web server waits before it takes a piece, not behind the last one: a long body would be taken at once.
        for piece in _pieces(message):
            try:
                async with asyncio.timeout(STALLED_S):
                    await self._send(piece)
            except TimeoutError:
                raise Disconnected from None

    async def _refuse(self, error: Exception) -> None:
        refusal = refusal_of(error)
        self._access.outcome = refusal.code
        if not isinstance(error, (Refusal, M3DError)):
            log_failure(self._access, error)
        if self._started:
            return  # an answer that breaks off; of one in events the last one tells
        await self._drain()
        content = json.dumps(refusal.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **refusal.headers}
        try:
            raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
            await self._sent({"type": "http.response.start", "status": refusal.status, "headers": raw})
            await self._sent({"type": "http.response.body", "body": content})
        except Disconnected:
            pass

    async def _drain(self) -> None:
        """Read on for a moment: a client that is still writing may lose an answer on a connection that is closed."""
        if self._body_is_read or not self._declared_size():
            return
        end, left = time.monotonic() + DRAINED_S, DRAINED_BYTES
        try:
            while left > 0:
                async with asyncio.timeout(max(0, end - time.monotonic())):
                    message = await self._receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                left -= len(message.get("body", b""))
        except TimeoutError:
            return


def _is_local(address: str) -> bool:
    try:
        return urlsplit(address).hostname in LOCAL_HOSTS
    except ValueError:  # no address at all
        return False


def _pieces(message: Message) -> Iterator[Message]:
    """A message as it is, or for a long body messages of SENT_BYTES each and an empty one at the end."""
    body = message.get("body", b"")
    if len(body) <= SENT_BYTES:
        yield message
        return
    for start in range(0, len(body), SENT_BYTES):
        yield {"type": message["type"], "body": body[start : start + SENT_BYTES], "more_body": True}
    if not message.get("more_body", False):
        yield {"type": message["type"], "body": b"", "more_body": False}
