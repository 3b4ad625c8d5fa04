"""`m3d serve`: an exported model repository behind Triton, until a signal."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from engine.cli import console


def serve(
    repository: Annotated[Path, typer.Option(help="exported model repository")] = Path("model_repository"),
    target: Annotated[str, typer.Option(help="what it was exported for: cpu or tensorrt")] = "cpu",
    host: Annotated[
        str, typer.Option(help="address that clients come to; 0.0.0.0 lets anybody on the network in, without a key")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="port of the client protocol")] = 8001,
    metrics_host: Annotated[str, typer.Option(help="address of metrics and health checks")] = "127.0.0.1",
    metrics_port: Annotated[
        int, typer.Option(help="port of /metrics (Prometheus), /health/live and /health/ready, over HTTP")
    ] = 8002,
    log: Annotated[Path | None, typer.Option(help="file for Triton's log (default: in the cache folder)")] = None,
    start_timeout: Annotated[float, typer.Option(help="seconds until all models must be ready")] = 900.0,
) -> None:
    from engine.server import Server

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
        server.start()
        console.success("ready", f"on {server.url} (gRPC), metrics on {server.metrics_url}; log: {server.log}")
        console.note(f'try: m3d ask SCAN "Describe the scan." --server {server.url}   (stop with Ctrl-C)')
        server.wait()
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
    if not _is_loopback(host):
        console.warn(
            f"--host {host}: whoever can reach port {grpc_port} can upload scans, ask, segment and rank, use any study "
            "whose handle he has, and take all of the machine's capacity. Nobody needs a key, and the traffic is not "
            "encrypted. Put a gateway or a firewall before it."
        )
    if not _is_loopback(metrics_host):
        console.warn(
            f"--metrics-host {metrics_host}: whoever can reach port {metrics_port} can read counts, timings and "
            "whether the server is ready, without a key. No scan and no answer is there."
        )


def _is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. Of names only localhost is known to be so."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
