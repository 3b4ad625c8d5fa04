"""The web server: uvicorn with bounds, on a socket that is there before anything is loaded."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from engine.errors import InvalidInput, Unavailable
from engine.gateway.door import AccessMiddleware
from engine.gateway.protocol import BoundedProtocol

DRAIN_S = 10  # that answers in work have when the gateway stops
CONNECTIONS = 1024
OPEN_FILES = 16_384  # connections, kept files, the masks of each key, and what arrives


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises Unavailable if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise Unavailable(
            f"--host {host} --port {port} cannot be listened on: {getattr(error, 'strerror', None) or error}"
        ) from None
    with opened:
        yield opened


def serve(
    application: AccessMiddleware,
    socket: socket.socket,
    tls: Path | None = None,
    client_ca: Path | None = None,
    beside: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        application: closes what it works with when this ends.
        socket: that listens.
        tls: PEM file with a private key and its certificates; None for HTTP without TLS.
        client_ca: PEM file: clients need a certificate of this authority.
        beside: blocks while what answers runs, on a thread. When it raises, this ends, too, and raises the same.

    Raises:
        InvalidInput: a PEM file cannot be used.
    """
    settings = configuration(application, tls, client_ca)
    try:
        settings.load()
    except (OSError, ssl.SSLError) as error:
        raise InvalidInput(f"--tls or --client-ca cannot be used: {error.strerror or error}") from None
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, OPEN_FILES), most))
    server = uvicorn.Server(settings)
    failures: list[BaseException] = []

    def watch() -> None:
        try:
            beside()  # type: ignore[misc]
        except BaseException as error:
            failures.append(error)
        server.should_exit = True

    if beside is not None:
        threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[socket])
    if failures:
        raise failures[0]


def configuration(
    application: AccessMiddleware, tls: Path | None = None, client_ca: Path | None = None
) -> uvicorn.Config:
    """No log of addresses, no guess of the client's from headers, no websockets; see `BoundedProtocol`."""
    return uvicorn.Config(
        application,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_S,
        ssl_certfile=tls,
        ssl_ca_certs=client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if client_ca is not None else ssl.CERT_NONE,
    )
