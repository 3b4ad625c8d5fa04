"""What the locks hold against what is released today: newer versions, whether they still work, and known flaws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from locks.lock import LOCKS, pins
from tests.conftest import ROOT, copy_checkout

pytestmark = pytest.mark.slow(group="releases")


@pytest.fixture(scope="module")
def newest(tmp_path_factory):
    """The folder of locks that `make lock UPGRADE=1` would write today."""
    folder = tmp_path_factory.mktemp("newest")
    subprocess.run([sys.executable, "locks/lock.py", "--upgrade", "--out", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("name", [lock.name for lock in LOCKS])
def test_newer_releases_are_listed(newest, name, capsys):
    """Not a failure: the list is what whoever runs this group reads."""
    locked, released = pins(ROOT / "locks" / name), pins(newest / name)
    with capsys.disabled():
        print(f"\n{name}: {len(locked)} packages")
        for package in sorted(locked.keys() | released.keys()):
            if locked.get(package) != released.get(package):
                print(f"  {package}: {locked.get(package, 'not locked')} -> {released.get(package, 'not needed')}")
    assert released


def test_the_demo_works_with_the_newest_releases(tmp_path):
    """The user's command on a fresh checkout without the lock."""
    checkout = copy_checkout(tmp_path / "checkout")
    # Variables of the make that runs this test would reach the one below.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    done = subprocess.run(
        ["make", "demo", "LOCK="], cwd=checkout, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "It is an MR scan." in done.stdout


def test_no_locked_version_has_a_known_flaw(tmp_path):
    assert _flaws("pillow==9.0.0\n", tmp_path), "the database must know of a version that is flawed for sure"
    found = {}
    for lock in LOCKS:
        found |= _flaws((ROOT / "locks" / lock.name).read_text(), tmp_path)
    assert found == {}


def _flaws(requirements: str, folder: Path) -> dict[str, list[str]]:
    """`name version` -> names of the flaws that pip-audit's database has; skips where it cannot be asked."""
    listed = folder / "requirements.txt"
    listed.write_text(requirements)
    command = [Path(sys.executable).with_name("uv"), "tool", "run", "pip-audit", "--requirement", listed, "--no-deps"]
    command += ["--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if not done.stdout.strip():
        pytest.skip(f"pip-audit could not ask: {done.stderr.strip().splitlines()[-1:]}")
    dependencies = json.loads(done.stdout)["dependencies"]
    if all("skip_reason" in dependency for dependency in dependencies):
        pytest.skip(f"no database of flaws can be reached: {dependencies[0]['skip_reason']}")
    return {
        f"{dependency['name']} {dependency['version']}": [flaw["id"] for flaw in dependency["vulns"]]
        for dependency in dependencies
        if dependency.get("vulns")
    }
