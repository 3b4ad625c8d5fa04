"""Cancellations and health, shared by a server's front and its models: files in the private folder of `m3d serve`.

The front cancels no call of Triton's: 2.51 loses a call that is cancelled between its last response and its end, with
its socket. The front gives each request an id of its own instead, and puts the id here when the client has gone; the
models look, and end the answer as any other. A Triton that was started without `m3d serve` has no such folder.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

VARIABLE = "M3D_RUN_FOLDER"
PEER = "m3d_peer"  # the request parameter that names the client's connection
READY = "ready"
STARTING = "starting"
_CANCELLED, _HEALTH = "cancelled", "health"
_HEALTH_BYTES = 512


class RunFolder:
    """The files in the folder at `path`, which must exist and be private."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._cancelled = self.path / _CANCELLED
        self._cancelled.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            with open(self.path / _HEALTH, "xb") as file:
                file.write(_padded(STARTING))

    @classmethod
    def of_server(cls) -> RunFolder | None:
        """The folder of the server that this process belongs to; None if it has none."""
        path = os.environ.get(VARIABLE)
        return cls(path) if path else None

    def cancel(self, request_id: str) -> None:
        """Mark the request as cancelled by its client."""
        (self._cancelled / request_id).touch()

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        (self._cancelled / request_id).unlink(missing_ok=True)

    def cancelled(self) -> set[str]:
        """The ids of the requests that their clients cancelled."""
        return set(os.listdir(self._cancelled))

    @property
    def health(self) -> str:
        """What the language model says of itself: READY, or words for clients."""
        return (self.path / _HEALTH).read_bytes().decode(errors="replace").strip()

    @health.setter
    def health(self, words: str) -> None:
        # In place: a disk that is full takes it all the same.
        with open(self.path / _HEALTH, "r+b") as file:
            file.write(_padded(words))


def _padded(words: str) -> bytes:
    return words.encode()[:_HEALTH_BYTES].ljust(_HEALTH_BYTES)
