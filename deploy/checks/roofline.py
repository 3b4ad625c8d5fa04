"""The rates of this GPU, measured: what no computation on it can go beyond."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.cpu_roofline import Rates
from deploy.checks.context import Context
from deploy.checks.timing import DTYPES, exact_fp32, forget, seconds, use_tf32

# Elements of the tensor that is copied, and edge of the square matrices; the small ones try the step itself.
COPIED, EDGE = 1 << 29, 8192
TINY_COPIED, TINY_EDGE = 1 << 20, 128


def measure(context: Context) -> Iterator[dict]:
    """Rows {"rate", "what", "speed", "per_s"}: bytes/s of the memory, FLOP/s by precision.

    The values are random: products of zeros are faster.
    """
    exact_fp32()
    copied, edge = (TINY_COPIED, TINY_EDGE) if context.tiny else (COPIED, EDGE)
    yield from _memory(copied, context.device)
    forget(context.device)
    for name, dtype in DTYPES.items():
        yield _product(name, dtype, edge, context.device)
    if context.device == "cuda":
        use_tf32(True)
        yield _product("tf32", torch.float32, edge, context.device)
        exact_fp32()


def rates(context: Context) -> Rates:
    """What the step roofline measured, or a measurement now where it was not asked for."""
    found = context.rates or {row["rate"]: row["per_s"] for row in measure(context)}
    memory = max(found["copy"], found["read"])
    return Rates({name: rate for name, rate in found.items() if name not in ("copy", "read")}, memory)


def _memory(elements: int, device: str) -> Iterator[dict]:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), device)
    yield _row("copy", copy, f"bytes read and written by a copy of {source.nbytes / 1e6:,.0f} MB", "TB/s")
    read = source.nbytes / seconds(source.sum, device)
    yield _row("read", read, "bytes read by a sum", "TB/s")


def _product(name: str, dtype: torch.dtype, edge: int, device: str) -> dict:
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    rate = 2 * edge**3 / seconds(lambda: torch.mm(left, right, out=product), device)
    return _row(name, rate, f"products of {edge} x {edge} matrices in {name}", "TFLOP/s")


def _row(rate: str, per_s: float, what: str, unit: str) -> dict:
    return {"rate": rate, "what": what, "speed": f"{per_s / 1e12:.3g} {unit}", "per_s": per_s}
