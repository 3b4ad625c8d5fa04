"""What vLLM mixes into its worker; it takes one class."""

from __future__ import annotations

from engine.runtime.decoder import cpu_forward
from engine.runtime.decoder.seg_states import SegStateExtension

NAME = f"{__name__}.WorkerExtension"


class WorkerExtension(SegStateExtension):
    """Its methods, and those of its base, are called by `collective_rpc`."""

    def shorten_pass(self, furthest: int) -> int:
        """See `cpu_forward.use_on`; passes as numbers, which vLLM can send."""
        return int(cpu_forward.use_on(self.model_runner, cpu_forward.Pass(furthest)))
