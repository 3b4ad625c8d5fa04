"""Where a gateway listens and who may enter: the options of `m3d gateway` and `m3d serve --http`.

What the gateway needs is imported when it runs: help comes at once, and without the extra.
"""

from __future__ import annotations

import importlib.util
import ipaddress
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import console
from engine.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    import socket

    from engine.gateway.backend import AsyncM3D
    from engine.gateway.settings import GatewaySettings

DEFAULT_PORT = 8080
_NEEDED = (
    *("fastapi", "fastapi_offline", "uvicorn", "httptools", "cryptography", "prometheus_client"),
    *("python_multipart", "PIL"),
)

KeysOption = Annotated[Path | None, typer.Option("--keys", help="file of the keys, as `m3d keys add` makes it")]
NoKeys = Annotated[bool, typer.Option("--no-keys", help="let everybody on this machine in")]
Tls = Annotated[Path | None, typer.Option(help="PEM file with the private key and its certificates: HTTPS")]
ClientCa = Annotated[
    Path | None, typer.Option(help="PEM file: with --tls, clients need a certificate of this authority, too")
]
AuditFile = Annotated[Path | None, typer.Option(help="file of the audit lines (default: standard output)")]
AuditQuestions = Annotated[bool, typer.Option("--audit-questions", help="audit lines have the questions")]


@dataclass(frozen=True)
class Entrance:
    """The options of `m3d gateway` of the same names. Validated on construction.

    Raises:
        InvalidInput: neither keys nor no_keys are given, or options contradict each other.
        Unavailable: what the gateway needs is not installed.
    """

    host: str
    port: int
    keys: Path | None
    no_keys: bool = False
    tls: Path | None = None
    client_ca: Path | None = None
    audit: Path | None = None
    audit_questions: bool = False

    def __post_init__(self) -> None:
        check_installed()
        if (self.keys is None) == (not self.no_keys):
            raise InvalidInput(
                "who may enter? give --keys FILE (`m3d keys add NAME --keys FILE` makes it), or --no-keys"
            )
        if self.no_keys and not is_loopback(self.host):
            raise InvalidInput(
                f"--no-keys --host {self.host}: without keys only this machine may be served: --host 127.0.0.1"
            )
        if self.client_ca is not None and self.tls is None:
            raise InvalidInput("--client-ca needs --tls: certificates are asked for within TLS")
        if self.keys is not None:
            from engine.gateway.keys import read

            read(self.keys)

    @contextmanager
    def listening(self) -> Iterator[Callable[..., None]]:
        """Take the port, before anything is loaded, and warn of what others can do. Raises Unavailable.

        Returns:
            What answers there until SIGINT or SIGTERM, see `_serve`.
        """
        from engine.gateway.serving import listening

        with listening(self.host, self.port) as opened:
            self._warn()
            yield partial(self._serve, opened)

    def _serve(
        self,
        opened: socket.socket,
        m3d: AsyncM3D,
        name: str,
        settings: GatewaySettings,
        beside: Callable[[], None] | None = None,
    ) -> None:
        """m3d: who answers; it is closed at the end. name: of who answers, in the ids of studies. settings: limits.

        beside: blocks while what answers runs; when it raises, the gateway ends with its error.
        """
        from engine.gateway.app import create
        from engine.gateway.audit import Audit
        from engine.gateway.keys import Keys
        from engine.gateway.serving import serve

        known = Keys(self.keys) if self.keys is not None else None
        application = create(m3d, known, settings, Audit(self.audit, self.audit_questions), name)
        shown = f"[{self.host}]" if ":" in self.host else self.host
        where = f"{'https' if self.tls else 'http'}://{shown}:{opened.getsockname()[1]}"
        console.success("ready", f"on {where}/v1   (stop with Ctrl-C)")
        serve(application, opened, self.tls, self.client_ca, beside)

    def _warn(self) -> None:
        if self.no_keys:
            console.warn("--no-keys: everybody on this machine can upload, ask, and use all studies")
        if self.tls is None and not is_loopback(self.host):
            console.warn(
                f"--host {self.host} without --tls: keys, scans and answers can be read on the network. Give --tls, or "
                "put a proxy with TLS before this"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Of names only localhost is known to be so."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_installed() -> None:
    """Raises Unavailable without the extra."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"the gateway needs {', '.join(missing)}: pip install 'm3d-engine[gateway]'")
