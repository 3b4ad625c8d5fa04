"""How TensorRT plans are built: what can be chosen, and what goes together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.contract import ENCODER_MAX_BATCH
from engine.errors import InvalidInput

BUILDERS = ("tensorrt", "rtx")
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
FP8_CAPABILITY = 8.9


@dataclass(frozen=True)
class BuildSettings:
    """How plans are built.

    builder: one of BUILDERS. compute_capability: what rtx builds for, such as "8.9"; None for the GPU's own.
    batches: one optimisation profile for each, tuned for that many volumes, which are also the most it takes: a profile
    takes memory for its largest batch. Every other axis is fixed, which is what kernels are tuned for.
    workspace_gib: scratch memory that a kernel may use. timing_cache: file of measured kernel times, read and written;
    it makes later builds on the same GPU quicker. version_compatible: the plan runs on later TensorRT 10/11 releases,
    too. hardware_compatible: it runs on every GPU since Ampere, slower. strip_weights: keep weights out of the built
    plan, and refit them: a fine-tune of the same architecture then needs no second build.
    """

    builder: str = "tensorrt"
    compute_capability: str | None = None
    batches: tuple[int, ...] = (1, ENCODER_MAX_BATCH)
    workspace_gib: float = 4.0
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False

    def __post_init__(self):
        if self.builder not in BUILDERS:
            raise InvalidInput(f"builder {self.builder!r} is unknown; known are {', '.join(BUILDERS)}")
        if not self.batches or min(self.batches) < 1:
            raise InvalidInput(f"batches must have 1 volume or more, not {self.batches}")
        if not 0 < self.workspace_gib < 1024:
            raise InvalidInput(f"workspace must be above 0 GiB, not {self.workspace_gib}")
        if self.builder == "rtx":
            if self.compute_capability not in RTX_CAPABILITIES:
                raise InvalidInput(
                    f"builder rtx needs --compute-capability, one of {', '.join(RTX_CAPABILITIES)}; "
                    f"given: {self.compute_capability}"
                )
            # Stripping fails in TensorRT-RTX 1.7 without a GPU; the others are not in it, or ask for a GPU.
            for name in ("timing_cache", "version_compatible", "hardware_compatible", "strip_weights"):
                if getattr(self, name):
                    raise InvalidInput(f"builder rtx cannot do --{name.replace('_', '-')} without a GPU: leave it out")
        elif self.compute_capability is not None:
            raise InvalidInput(
                "builder tensorrt builds for the GPU of this machine: leave out --compute-capability, or "
                "take --builder rtx"
            )
        if self.version_compatible and self.strip_weights:
            raise InvalidInput(
                "the runtime that is in a version compatible plan cannot refit it: leave out --version-compatible or "
                "--strip-weights"
            )

    @property
    def profiles(self) -> list[list[int]]:
        """Fewest, best and most volumes of each optimisation profile."""
        return [[1, batch, batch] for batch in self.batches]

    def refuse(self, precision: str) -> None:
        """Raises InvalidInput for a precision that the settings rule out."""
        if precision == "fp8" and self.compute_capability and float(self.compute_capability) < FP8_CAPABILITY:
            raise InvalidInput(f"fp8 needs compute capability {FP8_CAPABILITY} or later, not {self.compute_capability}")
        if precision == "fp8" and self.hardware_compatible:
            raise InvalidInput(
                f"fp8 needs compute capability {FP8_CAPABILITY} or later, and --hardware-compatible is for all since "
                "8.0: leave it out"
            )
        if precision == "fp8" and self.strip_weights:
            raise InvalidInput(
                "fp8 cannot be refitted, since its scales belong to one checkpoint: leave out --strip-weights"
            )
