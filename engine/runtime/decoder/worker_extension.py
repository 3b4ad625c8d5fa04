"""What vLLM mixes into its worker; it takes one class."""

from __future__ import annotations

from engine.runtime import acceleration
from engine.runtime.decoder.seg_states import SegStateExtension

NAME = f"{__name__}.WorkerExtension"


class WorkerExtension(SegStateExtension):
    """Its methods, and those of its base, are called by `collective_rpc`."""

    def shorten_pass(self, furthest: int) -> int:
        """See `engine.runtime.acceleration`."""
        return acceleration.shorten_pass(self.model_runner, furthest)
