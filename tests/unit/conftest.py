"""The cases recorded from the reference implementation as checkpoints, and a server that plays Triton."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import weights
import write_checkpoint

from engine import cli, logs
from tests.conftest import ROOT
from tests.unit.fake_triton import FakeTriton


@pytest.fixture
def triton():
    triton = FakeTriton()
    yield triton
    triton.stop()


@pytest.fixture
def engine_log(monkeypatch):
    """The engine's logger, which a test may set up: it is afterwards as it was."""
    logger = logging.getLogger("engine")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    level = logger.level
    yield logger
    logger.setLevel(level)


@pytest.fixture
def m3d(monkeypatch, capsys):
    """m3d(*arguments) -> (exit code, stdout, stderr)."""

    monkeypatch.setenv(logs.VARIABLE, "warning")  # which `m3d` sets for good

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["m3d", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@dataclass(frozen=True)
class Case:
    """One recorded case: its description, expected numbers, checkpoint folder and input volume [B, 1, D, H, W]."""

    spec: dict
    expected: dict
    folder: Path
    volume: torch.Tensor


def _case(name: str, tmp_path_factory) -> Case:
    source = ROOT / "tests" / "fixtures" / name
    spec = json.loads((source / "case.json").read_text())
    folder = write_checkpoint.write(source / "case.json", tmp_path_factory.mktemp(name))
    volume = torch.from_numpy(weights.volume(tuple(spec["volume_shape"]), spec["volume_seed"]))
    return Case(spec, dict(np.load(source / "expected.npz")), folder, volume)


@pytest.fixture(scope="session")
def dev_small(tmp_path_factory) -> Case:
    return _case("dev_small", tmp_path_factory)


@pytest.fixture(scope="session")
def dev_clip(tmp_path_factory) -> Case:
    return _case("dev_clip", tmp_path_factory)
