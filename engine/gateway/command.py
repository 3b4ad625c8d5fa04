"""`m3d gateway` and `m3d keys`. What they need is imported when they run: help comes at once, and without the extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from engine.errors import InvalidInput
from engine.gateway.entrance import (
    DEFAULT_PORT,
    AuditFile,
    AuditQuestions,
    ClientCa,
    Entrance,
    KeysOption,
    NoKeys,
    Tls,
    check_installed,
    notes,
)

if TYPE_CHECKING:
    from engine.gateway.backend import AsyncM3D

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
    check_installed()
    from engine.gateway.keys import add as add_key

    limits = dict(rate_per_minute=rate_per_minute, concurrency=concurrency, max_upload_mb=max_upload_mb)
    roles = tuple(each.strip() for each in role.split(","))
    print(f"key of {name} ({', '.join(roles)}): {add_key(file, name, roles, days=days, **limits)}")


@keys.command("list", help="Print the names of the keys, their roles and when they expire.")
def list_(file: KeysFile) -> None:
    check_installed()
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
    check_installed()
    from engine.gateway.keys import revoke as revoke_key

    revoke_key(file, name)
    print(f"revoked {name}")


def gateway(
    server: Annotated[str | None, typer.Option(help="gRPC address of the server that answers, host:port")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="exported model repository, to answer in this process instead")
    ] = None,
    host: Annotated[str, typer.Option(help="address that clients come to")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of HTTP; 0 for a free one")] = DEFAULT_PORT,
    keys_file: KeysOption = None,
    no_keys: NoKeys = False,
    tls: Tls = None,
    client_ca: ClientCa = None,
    audit: AuditFile = None,
    audit_questions: AuditQuestions = False,
    rate_per_minute: Annotated[int, typer.Option(min=1, help="requests of a key a minute")] = 600,
    concurrency: Annotated[int, typer.Option(min=1, help="requests of a key at a time")] = 16,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="MB of an upload")] = 2048,
    max_json_mb: Annotated[int, typer.Option(min=1, help="MB of a JSON body, inline scans included")] = 64,
    files_mb: Annotated[int, typer.Option(min=1, help="MB of all kept files; one key may have half")] = 16_384,
    file_hours: Annotated[float, typer.Option(min=0.01, help="hours that a file is kept")] = 24.0,
    study_hours: Annotated[float, typer.Option(min=0.01, help="hours that a study is kept after its last use")] = 24.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds until a question or an upload is given up")] = 600.0,
) -> None:
    if (server is None) == (repository is None):
        raise InvalidInput("who is to answer? give --server HOST:PORT or --repository DIR, one of the two")
    entrance = Entrance(host, port, keys_file, no_keys, tls, client_ca, audit, audit_questions)
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
    )
    with entrance.listening() as serve:
        try:
            serve(*_answering(server, repository, timeout), settings)
        except KeyboardInterrupt:
            notes.print("stopping")


def _answering(server: str | None, repository: Path | None, timeout: float) -> tuple[AsyncM3D, str]:
    """Who answers, and its name in the ids of studies."""
    if server is not None:
        from engine.client import AsyncM3DClient

        return AsyncM3DClient(server, timeout), server
    from engine.gateway.backend import ThreadedM3D
    from engine.local import M3DEngine

    notes.print(f"[dim]loading {escape(str(repository))}[/]")
    return ThreadedM3D(M3DEngine(repository or "", timeout)), "local"
