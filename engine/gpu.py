"""The NVIDIA GPUs of this machine, and whether a repository that was exported for TensorRT fits them."""
from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from engine.manifest import LLM_FOLDER, Manifest

_QUERY = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
_TENSORRT_MAJORS = (11, 10)
# Beside weights: activations of vLLM and of the plans, CUDA contexts, and a KV cache for a few answers.
WORKING_BYTES = 6 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it; memory in bytes, compute_capability such as "8.9"."""

    name: str
    driver: str
    compute_capability: str
    memory: int
    free: int


def find_gpus() -> list[Gpu]:
    """The GPUs that the NVIDIA driver reports; none without a driver."""
    words = _nvidia_smi(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in words.splitlines()]
    return [Gpu(name, driver, capability, int(total) << 20, int(free) << 20)
            for name, driver, capability, total, free in (row for row in rows if len(row) == len(_QUERY))]


def cuda_version() -> str | None:
    """The CUDA version that the driver supports."""
    found = re.search(r"CUDA Version:\s*([\d.]+)", _nvidia_smi())
    return found and found[1]


def tensorrt_version() -> str | None:
    """Version of the TensorRT library that Triton's backend would load, such as "10.13.2"."""
    for major in _TENSORRT_MAJORS:
        try:
            library = ctypes.CDLL(f"libnvinfer.so.{major}")
        except OSError:
            continue
        number = library.getInferLibVersion()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None


def memory_needed(manifest: Manifest) -> int:
    """GPU memory, in bytes, that serving needs at least: language model and graphs with weights, and room to work."""
    weights = sum(size for path, size in manifest.files.items()
                  if path.startswith(str(LLM_FOLDER)) and path.endswith(".safetensors")
                  or Path(path).name.startswith(("model.plan", "model.onnx")))
    return weights + WORKING_BYTES


def misfits(manifest: Manifest, gpus: list[Gpu], tensorrt: str | None) -> list[str]:
    """Why a repository for target tensorrt cannot be served here: what, and what to do; empty if nothing is wrong."""
    again = "export again on this machine: python export/build_engines.py --target tensorrt"
    if manifest.plans.get("builder") == "rtx":
        return [f"its plans were built by TensorRT for RTX, to check the graphs; Triton does not load them: {again}"]
    if not gpus:
        return ["no NVIDIA GPU is found (nvidia-smi reports none)"]
    found = []
    for name, entry in manifest.graphs.items():
        plan = entry.get("plan")
        if plan is None:
            continue
        capability, version = plan["compute_capability"], plan["tensorrt"]
        if capability != gpus[0].compute_capability and not plan["hardware_compatible"]:
            found.append(f"{name} was built for compute capability {capability}, {gpus[0].name} has "
                         f"{gpus[0].compute_capability}: {again}")
        if tensorrt is not None and not _loads(version, tensorrt, plan["version_compatible"]):
            found.append(f"{name} was built by TensorRT {version}, here is {tensorrt}: {again}")
    if memory_needed(manifest) > gpus[0].memory:
        found.append(f"it needs {memory_needed(manifest) / (1 << 30):.1f} GiB of GPU memory, {gpus[0].name} has "
                     f"{gpus[0].memory / (1 << 30):.1f}: take a larger GPU, more of them (tensor_parallel_size of the "
                     "decoder), or a smaller precision")
    return found


def _loads(built: str, installed: str, version_compatible: bool) -> bool:
    """A plan runs on the release that built it, or, if it is version compatible, on that and later ones."""
    built_parts, installed_parts = ([int(part) for part in version.split(".")[:3]] for version in (built, installed))
    return built_parts == installed_parts or version_compatible and built_parts <= installed_parts


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
