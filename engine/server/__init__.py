"""What only Triton needs: finding it, the front before it, its supervisor, the repository's writer."""

from engine.server.server import SHM_NEEDED, Server, free_ports

__all__ = ["SHM_NEEDED", "Server", "free_ports"]
