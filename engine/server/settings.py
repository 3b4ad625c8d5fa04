"""What the server tells its front, apart from the front itself, which imports gRPC."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrontSettings:
    """host, grpc_port: where clients come. metrics_host, metrics_port: of metrics and health, over HTTP.

    inside: Triton's gRPC address. inside_metrics: path of the Unix socket of its metrics. models: of the repository.
    last: of those, which Triton does not load by itself: the front has it load them, in this order, when the others are
    there. folder: the server's private folder.
    """

    host: str
    grpc_port: int
    metrics_host: str
    metrics_port: int
    inside: str
    inside_metrics: str
    models: tuple[str, ...]
    last: tuple[str, ...]
    folder: str


def address(host: str, port: int) -> str:
    """host:port, as gRPC and URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
