"""Files that ride in packages are found where they are installed, else downloaded once, and failures say what to do."""

import io
import os
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import numpy
import pytest

from engine.errors import Unavailable
from m3d_demo import packages
from m3d_demo.packages import fetch

pytestmark = pytest.mark.integration

MEMBERS = {"parcel/data/a.bin": b"alpha", "parcel/data/b.bin": b"beta"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty folder that is all pip can see, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("M3D_CACHE", str(tmp_path / "cache"))
    return folder


def write_wheel(folder, name="parcel", version="1.0"):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for member, content in MEMBERS.items():
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def write_sdist(folder, setup):
    with tarfile.open(folder / "parcel-1.0.tar.gz", "w:gz") as archive:
        for member, content in {**MEMBERS, "setup.py": setup, "PKG-INFO": b"Name: parcel\nVersion: 1.0\n"}.items():
            entry = tarfile.TarInfo(f"parcel-1.0/{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def contents(paths):
    return {member: path.read_bytes() for member, path in paths.items()}


def cached_files(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")


def test_members_of_a_wheel_are_downloaded_once(index, tmp_path, monkeypatch):
    write_wheel(index)
    assert contents(fetch("parcel", "1.0", list(MEMBERS))) == MEMBERS
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert contents(fetch("parcel", "1.0", list(MEMBERS))) == MEMBERS
    assert cached_files(tmp_path) == ["a.bin", "b.bin"]


def test_only_wanted_members_are_kept(index, tmp_path):
    write_wheel(index)
    fetch("parcel", "1.0", ["parcel/data/b.bin"])
    assert cached_files(tmp_path) == ["b.bin"]


@pytest.mark.parametrize(
    "setup",
    [
        b"from setuptools import setup\nsetup(name='parcel', version='1.0')\n",
        b"raise RuntimeError('too old for this Python')\n",
    ],
)
def test_members_of_a_source_distribution_are_taken_even_if_it_no_longer_builds(index, tmp_path, setup):
    write_sdist(index, setup)
    assert contents(fetch("parcel", "1.0", list(MEMBERS), sdist=True)) == MEMBERS
    assert cached_files(tmp_path) == ["a.bin", "b.bin"]


def test_an_installed_package_of_that_version_is_used_where_it_lies(index, tmp_path):
    path = fetch("numpy", metadata.version("numpy"), ["numpy/version.py"])["numpy/version.py"]
    assert path.samefile(numpy.version.__file__)
    assert not (tmp_path / "cache").exists()


def test_an_installed_package_of_another_version_is_not_used(index):
    with pytest.raises(Unavailable, match="numpy 0.0.1"):
        fetch("numpy", "0.0.1", ["numpy/version.py"])


def test_a_package_that_cannot_be_had_says_which_command_gets_it(index):
    with pytest.raises(Unavailable, match=r"parcel 1\.0 .*pip download --no-deps parcel==1\.0.*PIP_FIND_LINKS"):
        fetch("parcel", "1.0", list(MEMBERS))
    with pytest.raises(Unavailable, match=r"--no-binary parcel parcel==1\.0"):
        fetch("parcel", "1.0", list(MEMBERS), sdist=True)


def test_a_missing_pip_is_named(index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Unavailable, match="has no pip"):
        fetch("parcel", "1.0", list(MEMBERS))


def test_a_member_that_the_package_lacks_is_named(index, tmp_path):
    write_wheel(index)
    with pytest.raises(Unavailable, match=r"parcel 1\.0 does not carry parcel/data/c\.bin"):
        fetch("parcel", "1.0", ["parcel/data/a.bin", "parcel/data/c.bin"])
    assert cached_files(tmp_path) == []


def test_simultaneous_fetches_download_once(index, monkeypatch):
    write_wheel(index)
    runs, run = [], packages.subprocess.run
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **options: runs.append(args) or run(*args, **options))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: contents(fetch("parcel", "1.0", list(MEMBERS))), range(4)))
    assert results == [MEMBERS] * 4 and len(runs) == 1


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("M3D_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / "m3d-engine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / ".cache" / "m3d-engine"
