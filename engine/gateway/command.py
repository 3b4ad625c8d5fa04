"""`m3d gateway` and `m3d keys`. What they need is imported when they run: help comes at once, and without the extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from engine.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from engine.gateway.backend import AsyncM3D

_NEEDED = ("fastapi", "uvicorn", "httptools", "cryptography", "prometheus_client", "python_multipart", "PIL")
_notes = Console(stderr=True, highlight=False, soft_wrap=True)
KeysFile = Annotated[Path, typer.Option("--keys", help="file of the keys, as `m3d keys add` makes it")]
keys = typer.Typer(no_args_is_help=True, help="Say who may enter the gateway: add, list and revoke keys.")


@keys.command(help="Make a key, and print it as the last word: it is kept nowhere and cannot be shown again.")
def add(
    name: Annotated[str, typer.Argument(help="who gets it: letters, digits, dots, underscores and dashes")],
    file: KeysFile,
    role: Annotated[str, typer.Option(help="ask, upload, admin, with commas between them")] = "ask,upload",
    days: Annotated[float | None, typer.Option(help="days until it expires (default: never)")] = None,
    rate_per_minute: Annotated[int | None, typer.Option(help="requests a minute (default: the gateway's)")] = None,
    concurrency: Annotated[int | None, typer.Option(help="requests at a time (default: the gateway's)")] = None,
    max_upload_mb: Annotated[int | None, typer.Option(help="MB of an upload (default: the gateway's)")] = None,
) -> None:
    _check_installed()
    from engine.gateway.keys import add as add_key

    limits = dict(rate_per_minute=rate_per_minute, concurrency=concurrency, max_upload_mb=max_upload_mb)
    roles = tuple(each.strip() for each in role.split(","))
    print(f"key of {name} ({', '.join(roles)}): {add_key(file, name, roles, days=days, **limits)}")


@keys.command("list", help="Print the names of the keys, their roles and when they expire.")
def list_(file: KeysFile) -> None:
    _check_installed()
    from datetime import datetime, timezone

    from engine.gateway.keys import read

    for key in read(file).keys:
        end = "never" if key.expires is None else f"{datetime.fromtimestamp(key.expires, timezone.utc):%Y-%m-%d %H:%M}Z"
        limits = {name: getattr(key, name) for name in ("rate_per_minute", "concurrency", "max_upload_mb")}
        own = " ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        state = "expired" if key.has_expired() else "expires"
        print(f"{key.name}\t{','.join(key.roles)}\t{state} {end}\t{own}".rstrip())


@keys.command(help="Take a key back: it is refused from now on, without a restart.")
def revoke(name: Annotated[str, typer.Argument(help="whose key")], file: KeysFile) -> None:
    _check_installed()
    from engine.gateway.keys import revoke as revoke_key

    revoke_key(file, name)
    print(f"revoked {name}")


def gateway(
    server: Annotated[str | None, typer.Option(help="gRPC address of the server that answers, host:port")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="exported model repository, to answer in this process instead")
    ] = None,
    host: Annotated[str, typer.Option(help="address that clients come to")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of HTTP; 0 for a free one")] = 8080,
    keys_file: Annotated[
        Path | None, typer.Option("--keys", help="file of the keys, as `m3d keys add` makes it")
    ] = None,
    no_keys: Annotated[bool, typer.Option("--no-keys", help="let everybody on this machine in")] = False,
    tls: Annotated[Path | None, typer.Option(help="PEM file with the private key and its certificates: HTTPS")] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: with --tls, clients need a certificate of this authority, too")
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="file of the audit lines (default: standard output)")] = None,
    audit_questions: Annotated[bool, typer.Option("--audit-questions", help="audit lines have the questions")] = False,
    rate_per_minute: Annotated[int, typer.Option(min=1, help="requests of a key a minute")] = 600,
    concurrency: Annotated[int, typer.Option(min=1, help="requests of a key at a time")] = 16,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="MB of an upload")] = 2048,
    max_json_mb: Annotated[int, typer.Option(min=1, help="MB of a JSON body, inline scans included")] = 64,
    files_mb: Annotated[int, typer.Option(min=1, help="MB of all kept files; one key may have half")] = 16_384,
    file_hours: Annotated[float, typer.Option(min=0.01, help="hours that a file is kept")] = 24.0,
    study_hours: Annotated[float, typer.Option(min=0.01, help="hours that a study is kept after its last use")] = 24.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds until a question or an upload is given up")] = 600.0,
) -> None:
    from engine.cli import _is_loopback

    _check_installed()
    if (server is None) == (repository is None):
        raise InvalidInput("who is to answer? give --server HOST:PORT or --repository DIR, one of the two")
    if (keys_file is None) == (not no_keys):
        raise InvalidInput("who may enter? give --keys FILE (`m3d keys add NAME --keys FILE` makes it), or --no-keys")
    if no_keys and not _is_loopback(host):
        raise InvalidInput(f"--no-keys --host {host}: without keys only this machine may be served: --host 127.0.0.1")
    if client_ca is not None and tls is None:
        raise InvalidInput("--client-ca needs --tls: certificates are asked for within TLS")
    from engine.gateway.app import create
    from engine.gateway.audit import Audit
    from engine.gateway.keys import Keys
    from engine.gateway.serving import listening, serve
    from engine.gateway.settings import GatewaySettings

    settings = GatewaySettings(
        rate_per_minute=rate_per_minute,
        concurrency=concurrency,
        max_upload_mb=max_upload_mb,
        max_json_mb=max_json_mb,
        files_mb=files_mb,
        file_hours=file_hours,
        study_hours=study_hours,
        timeout_s=timeout,
        audit_questions=audit_questions,
    )
    known = Keys(keys_file) if keys_file is not None else None
    with listening(host, port) as socket:
        _warn(no_keys, tls is None and not _is_loopback(host), host)
        where = f"{'https' if tls else 'http'}://{host if ':' not in host else f'[{host}]'}:{socket.getsockname()[1]}"
        m3d, name = _answering(server, repository, timeout)
        application = create(m3d, known, settings, Audit(audit, audit_questions), name)
        _notes.print(f"[green]ready[/] on {escape(where)}/v1   (stop with Ctrl-C)")
        serve(application, socket, tls, client_ca)


def _answering(server: str | None, repository: Path | None, timeout: float) -> tuple[AsyncM3D, str]:
    """Who answers, and its name in the ids of studies."""
    from engine.client import AsyncM3DClient
    from engine.gateway.backend import ThreadedM3D

    if server is not None:
        return AsyncM3DClient(server, timeout), server
    from engine.local import M3DEngine

    _notes.print(f"[dim]loading {escape(str(repository))}[/]")
    return ThreadedM3D(M3DEngine(repository or "", timeout)), "local"


def _warn(no_keys: bool, in_clear: bool, host: str) -> None:
    if no_keys:
        _notes.print("[yellow]warning:[/] --no-keys: everybody on this machine can upload, ask, and use all studies")
    if in_clear:
        _notes.print(
            f"[yellow]warning:[/] --host {escape(host)} without --tls: keys, scans and answers can be read on the "
            "network. Give --tls, or put a proxy with TLS before this"
        )


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"the gateway needs {', '.join(missing)}: pip install 'm3d-engine[gateway]'")
