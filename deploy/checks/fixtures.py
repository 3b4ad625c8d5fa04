"""The cases that were recorded from the reference implementation; tests/fixtures/README.md describes them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploy.checks.context import ROOT

FIXTURES = ROOT / "tests" / "fixtures"
sys.path.append(str(FIXTURES))
import weights  # noqa: E402
import write_checkpoint  # noqa: E402


def volume(shape: tuple[int, ...], seed: str) -> Tensor:
    """The fp32 volume in 0..1 that this seed stands for."""
    return torch.from_numpy(weights.volume(shape, seed))


@dataclass(frozen=True)
class Case:
    """A recorded case. folder: its checkpoint, made again from its seed. volume: fp32 [B, 1, D, H, W]."""

    spec: dict
    expected: dict[str, np.ndarray]
    folder: Path
    volume: Tensor

    @classmethod
    def write(cls, name: str, folder: Path) -> Case:
        """Make the checkpoint of tests/fixtures/NAME in a folder of its own below `folder`."""
        source = FIXTURES / name
        spec = json.loads((source / "case.json").read_text())
        checkpoint = write_checkpoint.write(source / "case.json", folder / name)
        found = volume(tuple(spec["volume_shape"]), spec["volume_seed"])
        return cls(spec, dict(np.load(source / "expected.npz")), checkpoint, found)
