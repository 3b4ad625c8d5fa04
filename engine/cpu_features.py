"""CPU feature detection (bf16)."""

from __future__ import annotations

from pathlib import Path


def has_bf16() -> bool:
    """Whether it multiplies bf16 natively (AMX or AVX512-BF16); others take longer for it than for fp32."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_flags())


def _flags() -> list[str]:
    return Path("/proc/cpuinfo").read_text().split()
