"""The seam to `engine.runtime.cpu`. Where that package is not, everything works the way that the libraries have it."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from engine.errors import RepositoryError


class Pass(IntEnum):
    """Through a language model's layers: vLLM's own, one with vLLM's kernels only, and with the decode kernel, too."""

    VLLM = 0
    DIRECT = 1
    DECODE_KERNEL = 2


try:
    from engine.runtime.cpu.entry import give_way, lacking, multiplies_bf16, open_bf16, shorten_pass, variables
except ModuleNotFoundError as _error:
    if not (_error.name or "").startswith("engine.runtime.cpu"):
        raise

    def variables() -> dict[str, str]:
        return {}

    def give_way() -> None:
        pass

    def multiplies_bf16() -> bool:
        return False

    def open_bf16(path: str, threads: int) -> Any:
        raise RepositoryError("engine/runtime/cpu, which multiplies bf16, is not there: set precision to fp32 or auto")

    def shorten_pass(runner: Any, furthest: int) -> int:
        return Pass.VLLM

    def lacking() -> str | None:
        return "engine/runtime/cpu is not there: answers and encoders take longer"


__all__ = ["Pass", "give_way", "lacking", "multiplies_bf16", "open_bf16", "shorten_pass", "variables"]
