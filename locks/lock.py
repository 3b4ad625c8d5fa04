"""Write the locks: the exact version of every package that a target installs (`make lock`).

cpu.txt holds what `make` installs in .venv, on Python 3.11 and 3.12. image.txt holds what deploy/Dockerfile installs.
quantizing.txt holds what `make quantizing` installs. Each comes from pyproject.toml or export/quantizing.txt by uv.
A lock names no index and no address, so it holds wherever packages come from. Versions that are locked already stay as
they are; --upgrade takes the newest releases that fit.

PyTorch has a line of its own: its CPU build comes from a wheel folder or from PyTorch's own index (see Makefile), which
the resolution need not reach. Its dependencies are locked as any other package's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
# What PyTorch's CPU build imports. uv does not see it, as PyTorch itself is left out of the resolution.
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions")


@dataclass(frozen=True)
class Lock:
    """How one lock is resolved.

    name: of the file in locks/. arguments: of `uv pip compile`. pythons: versions it holds for. platform: uv's name of
    the oldest platform that all wheels run on. cpu_torch: PyTorch's CPU build is installed, not PyPI's.
    """

    name: str
    arguments: tuple[str, ...]
    pythons: tuple[str, ...]
    platform: str
    cpu_torch: bool


LOCKS = (
    Lock(
        "cpu.txt",
        (
            "pyproject.toml",
            *(f"--extra={extra}" for extra in ("cpu", "gateway", "train", "bench", "test", "tensorrt-rtx")),
            "--override=overrides.txt",
        ),
        ("3.11", "3.12"),
        "x86_64-manylinux_2_35",  # of nvidia-pytriton
        cpu_torch=True,
    ),
    Lock(
        "image.txt",
        ("pyproject.toml", "--extra=gpu", "--extra=gateway"),
        ("3.12",),
        "x86_64-manylinux_2_39",
        cpu_torch=False,
    ),
    Lock(
        "quantizing.txt",
        ("export/quantizing.txt",),
        ("3.11", "3.12"),
        "x86_64-manylinux_2_35",
        cpu_torch=True,
    ),
)


def resolve(lock: Lock, uv: str, upgrade: bool, preferred: dict[str, str]) -> dict[str, str]:
    """Name -> version of every package that any of the lock's Pythons needs.

    preferred: versions to take for what is not locked yet, where they fit.

    Raises subprocess.CalledProcessError if uv finds no solution; uv says why on standard error.
    """
    kept = {} if upgrade else pins(ROOT / "locks" / lock.name)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = list(lock.arguments)
        if lock.cpu_torch:
            left_out, needed = Path(scratch, "left_out.txt"), Path(scratch, "needed.txt")
            left_out.write_text("".join(f"{name} ; python_version < '3'\n" for name in ("torch", "torchvision")))
            needed.write_text("\n".join(TORCH_NEEDS) + "\n")
            arguments += [f"--override={left_out}", str(needed)]
        for python in lock.pythons:
            output, constraints = Path(scratch, python), Path(scratch, "constraints.txt")
            # uv prefers what its output holds. A later Python takes the earlier one's versions, so that each has one.
            output.write_text(lines({**preferred, **kept}))
            constraints.write_text(lines(found))
            subprocess.run(
                [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", f"--python-version={python}"]
                + [f"--python-platform={lock.platform}", f"--constraints={constraints}", f"--output-file={output}"]
                + arguments,
                cwd=ROOT,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            found |= pins(output)
    return found | ({"torch": TORCH} if lock.cpu_torch else {})


def pins(path: Path) -> dict[str, str]:
    """Name -> version of a lock; empty if there is no such file."""
    text = path.read_text() if path.exists() else ""
    return dict(line.split("==") for line in text.splitlines() if "==" in line)


def lines(versions: dict[str, str]) -> str:
    """The text of a lock, without its header."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest releases instead of what is locked")
    parser.add_argument("--out", type=Path, default=ROOT / "locks", help="folder to write to (default: locks/)")
    arguments = parser.parse_args(argv)
    uv = str(Path(sys.executable).with_name("uv"))
    tested: dict[str, str] = {}  # the CPU's versions, which the tests run on: the image takes them where they fit
    for lock in LOCKS:
        found = resolve(lock, uv, arguments.upgrade, tested)
        tested = tested or found
        header = f"# Made by `make lock` for Python {' and '.join(lock.pythons)} on Linux x86-64. Do not edit.\n"
        (arguments.out / lock.name).write_text(header + lines(found))
        print(f"{arguments.out / lock.name}: {len(found)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
