"""When the layers call vLLM's kernels directly; functional/test_decoder_engine.py sees that they answer right then."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from engine.runtime.acceleration import Pass
from engine.runtime.cpu import forward as cpu_forward
from engine.runtime.cpu.forward import Norms


def norms(to) -> Norms:
    """vLLM's, in PyTorch. to(values, dtype): how results become `dtype`."""

    def plain(out, x, weight, epsilon):
        out.copy_(to(functional.rms_norm(x.float(), weight.shape, weight.float(), epsilon), x.dtype))

    def added(x, residual, weight, epsilon):
        residual.copy_(to(x.float() + residual.float(), x.dtype))
        plain(x, residual, weight, epsilon)

    return Norms(plain, added)


def cut(values, dtype):
    """Without the digits that bf16 does not have."""
    return (values.view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype)


ROUNDING, CUTTING = norms(torch.Tensor.to), norms(cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_that_round_are_recognised(dtype):
    assert ROUNDING.round(dtype)


@pytest.mark.parametrize("name", ["plain", "added"])
def test_kernels_that_cut_are_recognised(name):
    assert not replace(ROUNDING, **{name: getattr(CUTTING, name)}).round(torch.bfloat16)


@pytest.mark.parametrize(
    "device, eager, fits, found, kernel, furthest, used, size",
    [
        ("cpu", True, True, ROUNDING, True, Pass.DECODE_KERNEL, Pass.DECODE_KERNEL, 1 << 20),
        ("cpu", True, True, ROUNDING, False, Pass.DECODE_KERNEL, Pass.DIRECT, 1 << 20),
        ("cpu", True, True, ROUNDING, True, Pass.DIRECT, Pass.DIRECT, 1 << 20),
        ("cpu", True, True, ROUNDING, True, Pass.VLLM, Pass.VLLM, 1 << 20),
        ("cuda", True, True, ROUNDING, True, Pass.DECODE_KERNEL, Pass.VLLM, 1 << 20),
        ("cpu", False, True, ROUNDING, True, Pass.DECODE_KERNEL, Pass.VLLM, 1 << 20),
        ("cpu", True, False, None, True, Pass.DECODE_KERNEL, Pass.VLLM, 1 << 20),
        ("cpu", True, True, CUTTING, True, Pass.DECODE_KERNEL, Pass.VLLM, 1 << 20),
        ("cpu", True, True, ROUNDING, True, Pass.DECODE_KERNEL, Pass.VLLM, 4 << 30),
    ],
)
def test_a_shorter_pass_is_used_on_a_cpu_uncompiled_where_it_fits_and_helps_and_kernels_round(
    monkeypatch, device, eager, fits, found, kernel, furthest, used, size
):
    model = SimpleNamespace(forward="vLLM's own")
    head = SimpleNamespace(cpu_linear="vLLM's own", weight=torch.zeros(16, 8))
    runner = SimpleNamespace(
        device=torch.device(device),
        model=SimpleNamespace(model=model, lm_head=head),
        model_config=SimpleNamespace(enforce_eager=eager, dtype=torch.bfloat16),
    )
    monkeypatch.setattr(cpu_forward, "_fits", lambda _: fits)
    monkeypatch.setattr(cpu_forward, "_layer_bytes", lambda *_: size)
    monkeypatch.setattr(cpu_forward, "_kernel_of", lambda *_: SimpleNamespace() if kernel else None)
    monkeypatch.setattr(cpu_forward, "_forward_of", lambda *_: "a shorter one")
    monkeypatch.setattr(Norms, "of_vllm", lambda: found)
    assert cpu_forward.install_on(runner, furthest) is used
    assert (model.forward == "vLLM's own") is (used is Pass.VLLM)
    assert (head.cpu_linear == "vLLM's own") is (used is not Pass.DECODE_KERNEL)


def test_a_weight_comes_back_exactly_from_its_product():
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
        linear = SimpleNamespace(input_size=1100, weight=weight, cpu_linear=lambda x, w, bias: functional.linear(x, w))
        assert torch.equal(cpu_forward._weight(linear, dtype), weight)
