"""Two real Tritons for all tests that only need one: a tiny random checkpoint's, and the demonstration model's."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import contract
from engine.client import M3DClient
from engine.manifest import Manifest
from engine.server import Server, free_ports
from export.build_engines import export
from tests.conftest import ROOT, copy_repository
from tests.functional.footprint import Footprint
from tests.tiny import volume, write_tiny_clip, write_tiny_lamed

DEMO = ROOT / "training" / "demo"


@pytest.fixture(scope="session")
def fixture_checkpoint(tmp_path_factory):
    """A M3D-LaMed folder in the published layout, small and random."""
    return write_tiny_lamed(tmp_path_factory.mktemp("checkpoint") / "lamed")


@pytest.fixture(scope="session")
def clip_checkpoint(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("checkpoint") / "clip")


@pytest.fixture(scope="session")
def repository(fixture_checkpoint, clip_checkpoint, tmp_path_factory):
    """A model repository with chat, segmentation and retrieval, exported in fp32."""
    repository = copy_repository(tmp_path_factory.mktemp("repository"))
    export(str(fixture_checkpoint), repository, clip_checkpoint=str(clip_checkpoint), precision="fp32")
    return repository


@pytest.fixture(scope="session")
def light_repository(repository, tmp_path_factory):
    """The same repository, serving only `study` and what it needs: starts in seconds, without a language model."""
    light = shutil.copytree(repository, tmp_path_factory.mktemp("light") / "model_repository", symlinks=True)
    replace(Manifest.read(light), models=("study", "vision_encoder")).write(light)
    return light


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    """A running server. Its end is a test, too: nothing of it may be left."""
    before = set(Path(tempfile.gettempdir()).glob("vllm*"))
    with Server(repository, **free_ports(), log=tmp_path_factory.mktemp("log") / "triton.log") as server:
        # vLLM removes none of its temporary files: they lie in the run folder, which goes.
        assert set(Path(tempfile.gettempdir()).glob("vllm*")) <= before
        yield server
        footprint = Footprint(server.supervisor_pid)
        assert len(footprint.processes) > len(contract.MODELS) // 2 and footprint.mapped
    assert footprint.left() == []


@pytest.fixture(scope="session")
def client(server):
    with M3DClient(server.url, timeout=300) as client:
        yield client


@pytest.fixture(scope="session")
def demo_repository(tmp_path_factory):
    """The demonstration model, exported: what it says and draws means something."""
    repository = copy_repository(tmp_path_factory.mktemp("demo"))
    export(str(DEMO), repository, clip_checkpoint=str(DEMO / "clip"))
    return repository


@pytest.fixture(scope="session")
def demo_server(demo_repository, tmp_path_factory):
    with Server(demo_repository, **free_ports(), log=tmp_path_factory.mktemp("log") / "triton.log") as server:
        yield server


@pytest.fixture(scope="session")
def demo_client(demo_server):
    with M3DClient(demo_server.url, timeout=300) as client:
        yield client


@pytest.fixture(scope="session")
def scans():
    """Two patients: volumes at the model's size, 1 x D x H x W in 0..1."""
    return volume("tiny"), np.ascontiguousarray(volume("other")[:, :, ::-1])
