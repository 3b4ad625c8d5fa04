"""`m3d serve`: an exported model repository behind Triton, until a signal."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

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
    is_loopback,
)
from engine.defaults import GRPC_PORT
from engine.errors import InvalidInput


def serve(
    repository: Annotated[Path, typer.Option(help="exported model repository")] = Path("model_repository"),
    target: Annotated[str, typer.Option(help="what it was exported for: cpu or tensorrt")] = "cpu",
    host: Annotated[
        str, typer.Option(help="address that clients come to; 0.0.0.0 lets anybody on the network in, without a key")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="port of the client protocol")] = GRPC_PORT,
    metrics_host: Annotated[str, typer.Option(help="address of metrics and health checks")] = "127.0.0.1",
    metrics_port: Annotated[
        int, typer.Option(help="port of /metrics (Prometheus), /health/live and /health/ready, over HTTP")
    ] = 8002,
    log: Annotated[Path | None, typer.Option(help="file for Triton's log (default: in the cache folder)")] = None,
    start_timeout: Annotated[float, typer.Option(help="seconds until all models must be ready")] = 900.0,
    http: Annotated[
        bool,
        typer.Option(
            "--http", help="answer HTTP, too, as m3d gateway does: --host is HTTP's then, gRPC stays on 127.0.0.1"
        ),
    ] = False,
    http_port: Annotated[int | None, typer.Option(help=f"port of HTTP (default {DEFAULT_PORT})")] = None,
    keys_file: KeysOption = None,
    no_keys: NoKeys = False,
    tls: Tls = None,
    client_ca: ClientCa = None,
    audit: AuditFile = None,
    audit_questions: AuditQuestions = False,
) -> None:
    from engine.server.server import Server

    entrance = None
    given = (http_port, keys_file, no_keys or None, tls, client_ca, audit, audit_questions or None)
    if http:
        port = DEFAULT_PORT if http_port is None else http_port
        entrance = Entrance(host, port, keys_file, no_keys, tls, client_ca, audit, audit_questions)
        host = "127.0.0.1"
    elif any(value is not None for value in given):
        raise InvalidInput("--http-port, --keys, --no-keys, --tls, --client-ca and --audit... are HTTP's: give --http")
    stopped_by: list[int] = []

    def stop(number: int, _frame) -> None:
        stopped_by.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    server = Server(
        repository,
        target=target,
        host=host,
        metrics_host=metrics_host,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log=log,
        start_timeout=start_timeout,
        on_progress=console.progress,
    )
    _warn_of_the_network(host, grpc_port, metrics_host, metrics_port)
    try:
        with entrance.listening() if entrance else nullcontext() as serve_http:
            server.start()
            console.success("ready", f"on {server.url} (gRPC), metrics on {server.metrics_url}; log: {server.log}")
            if serve_http is None:
                console.note(f'try: m3d ask SCAN "Describe the scan." --server {server.url}   (stop with Ctrl-C)')
                server.wait()
            else:
                from engine.client import AsyncM3DClient
                from engine.gateway.settings import GatewaySettings

                serve_http(AsyncM3DClient(server.url), server.url, GatewaySettings(), beside=server.wait)
    except KeyboardInterrupt:
        console.note("stopping")
        if not stopped_by:  # Ctrl-C; the other signals are how a service manager ends a server that is well
            raise
    finally:
        # Stopping is bounded; a second Ctrl-C must not cut it short.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        server.stop()


def _warn_of_the_network(host: str, grpc_port: int, metrics_host: str, metrics_port: int) -> None:
    """Say who can do what, if others than this machine's users can reach a port."""
    if not is_loopback(host):
        console.warn(
            f"--host {host}: whoever can reach port {grpc_port} can upload scans, ask, segment and rank, use any study "
            "whose handle he has, and take all of the machine's capacity. Nobody needs a key, and the traffic is not "
            "encrypted. Put a gateway or a firewall before it."
        )
    if not is_loopback(metrics_host):
        console.warn(
            f"--metrics-host {metrics_host}: whoever can reach port {metrics_port} can read counts, timings and "
            "whether the server is ready, without a key. No scan and no answer is there."
        )
