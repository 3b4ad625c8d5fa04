"""What vLLM mixes into its worker; it takes one class."""
from __future__ import annotations

from engine.runtime.decoder import cpu_forward
from engine.runtime.decoder.seg_states import SegStateExtension

NAME = f"{__name__}.WorkerExtension"


class WorkerExtension(SegStateExtension):
    """Its methods, and those of its base, are called by `collective_rpc`."""

    def call_kernels_directly(self) -> bool:
        """Whether the model does so from now on, see cpu_forward."""
        return cpu_forward.use_on(self.model_runner)
