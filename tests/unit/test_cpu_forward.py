"""When the layers call vLLM's kernels directly. That they answer right then is seen in functional/test_decoder_engine.py."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from engine.runtime.decoder import cpu_forward
from engine.runtime.decoder.cpu_forward import Kernels


def kernels(to) -> Kernels:
    """As vLLM's, in PyTorch. to(values, dtype): how results become `dtype`."""
    def rms_norm(out, x, weight, epsilon):
        out.copy_(to(functional.rms_norm(x.float(), weight.shape, weight.float(), epsilon), x.dtype))

    def add_rms_norm(x, residual, weight, epsilon):
        residual.copy_(to(x.float() + residual.float(), x.dtype))
        rms_norm(x, residual, weight, epsilon)

    def silu_and_mul(out, both):
        gate, factor = both.float().chunk(2, -1)
        out.copy_(to(functional.silu(gate) * factor, out.dtype))

    return Kernels(rms_norm, add_rms_norm, silu_and_mul)


def cut(values, dtype):
    """Without the digits that bf16 does not have."""
    return (values.view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype)


ROUNDING, CUTTING = kernels(torch.Tensor.to), kernels(cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_that_round_are_told_from_those_that_cut(dtype):
    assert ROUNDING.round(dtype)
    for name in ("rms_norm", "add_rms_norm", "silu_and_mul"):
        assert not replace(ROUNDING, **{name: getattr(CUTTING, name)}).round(torch.bfloat16)


@pytest.mark.parametrize("device, eager, fits, kernels, used", [
    ("cpu", True, True, ROUNDING, True), ("cuda", True, True, ROUNDING, False), ("cpu", False, True, ROUNDING, False),
    ("cpu", True, False, ROUNDING, False), ("cpu", True, True, CUTTING, False)])
def test_it_is_used_on_a_cpu_uncompiled_where_it_fits_and_kernels_round(monkeypatch, device, eager, fits, kernels, used):
    model = SimpleNamespace(forward="vLLM's own")
    runner = SimpleNamespace(device=torch.device(device), model=SimpleNamespace(model=model),
                             model_config=SimpleNamespace(enforce_eager=eager, dtype=torch.bfloat16))
    monkeypatch.setattr(cpu_forward, "_fits", lambda _: fits)
    monkeypatch.setattr(cpu_forward, "_forward_of", lambda *_: "the shorter one")
    monkeypatch.setattr(Kernels, "of_vllm", lambda: kernels)
    assert cpu_forward.use_on(runner) is used
    assert model.forward == ("the shorter one" if used else "vLLM's own")
