"""Compile the kernel of `decode_kernel.py`: `python -m engine.runtime.cpu.compile_kernel`.

Optional: without it everything works, but small language models answer more slowly on a CPU. `make` runs it when it
makes the environment of the CPU server. A client needs neither kernel nor compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "decode_kernel.c"
LIBRARY = FOLDER / "_decode_kernel.so"
MODULE = "engine.runtime.cpu.compile_kernel"
FLAGS = ("-O3", "-fopenmp", "-Wno-psabi", "-fPIC", "-shared")


def compile_kernel() -> str | None:
    """Compile it beside its source. Returns why that did not work; None if it did."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return "there is no C compiler (apt-get install gcc)"
    fresh = LIBRARY.with_name(f"{LIBRARY.name}.{os.getpid()}")  # replaced in one piece: a server may be starting
    try:
        done = subprocess.run(
            [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(fresh), "-lm"], capture_output=True, text=True
        )
        if done.returncode:
            return f"{compiler} failed: {done.stderr.strip()[-500:]}"
        fresh.replace(LIBRARY)
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or compiler})"
    finally:
        fresh.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    if why := compile_kernel():
        sys.exit(f"the decode kernel is not compiled, and decoding on a CPU takes longer: {why}")
