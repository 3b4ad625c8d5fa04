"""The seam to `engine.runtime.cpu`. Where that package is not, everything works the way that the libraries have it."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from engine.errors import RepositoryError


class Pass(IntEnum):
    """Which implementation runs the language model's layers.

    VLLM: vLLM's modules. VLLM_KERNELS: our loop over vLLM's kernels. DECODE_KERNEL: that, with the decode kernel for
    batches of few tokens.
    """

    VLLM = 0
    VLLM_KERNELS = 1
    DECODE_KERNEL = 2


try:
    from engine.runtime.cpu.entry import (
        environment_variables,
        install_fast_forward,
        lower_priority,
        missing_parts,
        multiplies_bf16,
        open_bf16,
    )
except ModuleNotFoundError as _error:
    if not (_error.name or "").startswith("engine.runtime.cpu"):
        raise

    def environment_variables() -> dict[str, str]:
        return {}

    def lower_priority() -> None:
        pass

    def multiplies_bf16() -> bool:
        return False

    def open_bf16(path: str, threads: int) -> Any:
        raise RepositoryError("engine/runtime/cpu, which multiplies bf16, is not there: set precision to fp32 or auto")

    def install_fast_forward(runner: Any, furthest: int) -> int:
        return Pass.VLLM

    def missing_parts() -> str | None:
        return "engine/runtime/cpu is not there: answers and encoders take longer"


__all__ = [
    "Pass",
    "environment_variables",
    "install_fast_forward",
    "lower_priority",
    "missing_parts",
    "multiplies_bf16",
    "open_bf16",
]
