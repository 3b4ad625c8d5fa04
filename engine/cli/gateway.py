"""`m3d gateway`. What it needs is imported when it runs: help comes at once, and without the extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import console
from engine.cli.entrance import (
    DEFAULT_PORT,
    AuditFile,
    AuditQuestions,
    ClientCa,
    Entrance,
    KeysOption,
    NoKeys,
    Tls,
)
from engine.errors import InvalidInput

if TYPE_CHECKING:
    from engine.gateway.backend import AsyncM3D


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
            console.note("stopping")
            raise


def _answering(server: str | None, repository: Path | None, timeout: float) -> tuple[AsyncM3D, str]:
    """Who answers, and its name in the ids of studies."""
    if server is not None:
        from engine.client import AsyncM3DClient

        return AsyncM3DClient(server, timeout), server
    from engine.gateway.backend import ThreadedM3D
    from engine.local import M3DEngine

    console.progress(f"loading {repository}")
    return ThreadedM3D(M3DEngine(repository or "", timeout)), "local"
