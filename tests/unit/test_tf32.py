"""Why ONNX Runtime may not use TF32 on a GPU: what it would cost the masks, emulated on the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import weights
from torch.utils._python_dispatch import TorchDispatchMode

from engine.models.checkpoint import lamed_shapes
from engine.models.config import LamedConfig
from engine.models.lamed import Lamed
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "dev_small"
TOLERANCE = 1e-3  # of a mask's logits on a GPU, in tests/functional/test_exactness.py
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "convolution": (0, 1)}


class TF32(TorchDispatchMode):
    """Products of fp32 values as tensor cores compute them in TF32: 10 bits of mantissa are kept of both operands.

    Works under `no_grad`: in inference mode it would see linear layers whole, not their products.

    rounds: to the nearest, or cut off. Which of both an instruction does depends on who prepares its operands.
    """

    def __init__(self, rounds: bool):
        super().__init__()
        self.half = 1 << 12 if rounds else 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        arguments = list(arguments)
        for position in PRODUCTS.get(function.name().split("::")[1].split(".")[0], ()):
            bits = arguments[position].contiguous().view(torch.int32)
            arguments[position] = ((bits + self.half) & -(1 << 13)).view(torch.float32)
        return function(*arguments, **(keywords or {}))


@pytest.fixture(scope="module")
def head():
    """The masks' head of the recorded fixture as a function without arguments: logits of the recorded `[SEG]` state."""
    case = json.loads((FIXTURE / "case.json").read_text())
    with torch.device("meta"):
        model = Lamed(LamedConfig.from_dict(case["config"]), with_llm=False).eval()
    shapes = {key: shape for key, shape in lamed_shapes(model).items() if key.startswith("model.seg_")}
    values = weights.fill(shapes, case["weight_seed"])
    model.load_state_dict(
        {key.removeprefix("model."): torch.from_numpy(value) for key, value in values.items()},
        strict=False,
        assign=True,
    )
    volume = torch.from_numpy(weights.volume(tuple(case["volume_shape"]), case["volume_seed"]))
    states = torch.from_numpy(np.load(FIXTURE / "expected.npz")["step_hidden"][case["seg_positions"]])
    with torch.no_grad():
        features = model.seg_module.encode(volume)
    return lambda: model.segment(features, states.mean(0, keepdim=True))


@torch.no_grad()
def test_the_head_in_fp32_is_the_recorded_one(head):
    lowest, highest = np.load(FIXTURE / "expected.npz")["seg_min_max"]
    logits = head()
    assert max(abs(logits.min().item() - lowest), abs(logits.max().item() - highest)) < TOLERANCE / 100


@pytest.mark.parametrize("rounds", [True, False])
@torch.no_grad()
def test_tf32_costs_more_than_masks_may_differ(head, rounds):
    exact = head()
    with TF32(rounds):
        error = (head() - exact).abs().max().item()
    assert TOLERANCE < error < 20 * TOLERANCE
