"""The NVIDIA GPUs of this machine, and whether a repository that was exported for TensorRT fits them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import cast

from engine.manifest import Manifest

_QUERY = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.reserved",
    "memory.free",
    "mig.mode.current",
)
_TENSORRT_MAJORS = (11, 10)
CUDA_NEEDED, DRIVER_NEEDED = (13, 0), 580  # of the PyTorch that vLLM 0.32 brings (locks/image.txt: torch 2.13)
_AMPERE = (8, 0)  # the oldest that hardware compatible plans run on


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it; number is nvidia-smi's, compute_capability such as "8.9".

    memory: bytes that programs can have. free: bytes. Both are None where nvidia-smi knows none, as for a GPU that
    shares the CPU's memory, and where it is split by MIG: nvidia-smi tells the whole GPU's. split: by MIG.
    """

    name: str
    driver: str
    compute_capability: str
    memory: int | None
    free: int | None
    number: int = 0
    split: bool = False

    def __str__(self) -> str:
        return f"{self.name} (GPU {self.number})"


# To plan for, where there is none.
ANY = Gpu("any GPU", "unknown", "unknown", None, None)


def find_gpus() -> list[Gpu]:
    """The GPUs that a server started here would use, in its order; none without a driver.

    Those that the NVIDIA driver reports, or what CUDA_VISIBLE_DEVICES leaves of them, by nvidia-smi's numbers or UUIDs.
    """
    words = _nvidia_smi(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in words.splitlines()]
    whole = [row for row in rows if len(row) == len(_QUERY)]  # others are words, such as "No devices were found"
    found = {
        uuid: _gpu(number, name, driver, capability, total, reserved, free, mig == "Enabled")
        for number, uuid, name, driver, capability, total, reserved, free, mig in whole
        if number.isdecimal()
    }
    return _visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _gpu(
    number: str, name: str, driver: str, capability: str, total: str, reserved: str, free: str, split: bool
) -> Gpu:
    memory, unused = (None, None) if split else (_usable(total, reserved), _bytes(free))
    return Gpu(name, driver, capability, memory, unused, int(number), split)


def _usable(total: str, reserved: str) -> int | None:
    """Of its memory, the driver keeps some (`memory.reserved`), which no program gets."""
    size = _bytes(total)
    return None if size is None else size - (_bytes(reserved) or 0)


def _bytes(mebibytes: str) -> int | None:
    """nvidia-smi writes "[N/A]" or "[Not Supported]" for what it does not know."""
    return int(mebibytes) << 20 if mebibytes.isdecimal() else None


def _visible(gpus: dict[str, Gpu], chosen: str | None) -> list[Gpu]:
    """What CUDA sees of `gpus` (by UUID) if CUDA_VISIBLE_DEVICES is `chosen`."""
    if chosen is None or "MIG-" in chosen:  # nvidia-smi's table does not say which GPU a part belongs to
        return list(gpus.values())
    visible = []
    for word in map(str.strip, chosen.split(",")):
        meant = [
            gpu
            for uuid, gpu in gpus.items()
            if word == str(gpu.number) or word.startswith("GPU-") and uuid.startswith(word)
        ]
        if len(meant) != 1:  # CUDA ignores it and all behind it
            break
        visible += meant
    return visible


def cuda_version() -> str | None:
    """The CUDA version that the driver supports. Drivers from 610 on write "CUDA UMD Version"."""
    found = re.search(r"CUDA(?: UMD)? Version:\s*([\d.]+)", _nvidia_smi())
    return found and found[1]


def too_old() -> str | None:
    """Why the driver is too old for the PyTorch that serves, and what to do; None if it is not, or not known.

    PyTorch must not be asked: with `PYTORCH_NVML_BASED_CUDA_CHECK` it counts the GPUs of any driver.
    """
    cuda = cuda_version()
    if cuda is None or release(cuda) >= CUDA_NEEDED:
        return None
    return f"its driver supports CUDA {cuda}; needed is {driver_needed()}: install a later driver"


def driver_needed() -> str:
    return f"CUDA {'.'.join(map(str, CUDA_NEEDED))} or later, which is driver {DRIVER_NEEDED} or later"


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


def release(version: str) -> tuple[int, ...]:
    """The numbers that `version` begins with, such as (11, 3, 0) of "11.3.0rc1"; empty for "unknown"."""
    found = cast(re.Match[str], re.match(r"[\d.]*", version))  # its empty beginning matches at least
    return tuple(int(number) for number in found[0].split(".") if number)


def misfits(manifest: Manifest, gpus: list[Gpu], tensorrt: str | None) -> list[str]:
    """Why a repository for target tensorrt cannot be served here: what, and what to do; empty if nothing is wrong.

    gpus: all that Triton sees, since it loads every graph on each. tensorrt: version of the library here, if known.
    """
    again = "export again on this machine: python export/build_engines.py --target tensorrt"
    if manifest.plans.get("builder") == "rtx":
        return [f"its plans were built by TensorRT for RTX, to check the graphs; Triton does not load them: {again}"]
    if not gpus:
        return ["no NVIDIA GPU is found (nvidia-smi reports none, or CUDA_VISIBLE_DEVICES leaves all out)"]
    found: dict[str, list[str]] = {}  # what is wrong: the graphs that it is wrong with
    others = [f"{gpus[0]}: {old}"] if (old := too_old()) else []
    if manifest.precision == "bf16" and release(gpus[0].compute_capability) < _AMPERE:
        others.append(
            f"the language model is in bf16, which {gpus[0]} with compute capability {gpus[0].compute_capability} does "
            "not have: export with --precision fp16"
        )
    for name, plan in manifest.graph_plans.items():
        if unfit := [gpu for gpu in gpus if not _runs(plan, gpu)]:
            built, way_out = plan["compute_capability"], again
            if plan["hardware_compatible"]:
                built = f"{'.'.join(map(str, _AMPERE))} or later"
                way_out = again.replace(":", ", without --hardware-compatible:", 1)
            has = ", ".join(f"{gpu} has {gpu.compute_capability}" for gpu in unfit)
            wrong = f"built for compute capability {built}, {has}: {leaving_out(gpus, unfit) or way_out}"
            found.setdefault(wrong, []).append(name)
        if tensorrt is not None and not _loads(plan["tensorrt"], tensorrt, plan["version_compatible"]):
            found.setdefault(f"built by TensorRT {plan['tensorrt']}, here is {tensorrt}: {again}", []).append(name)
    return others + [f"{', '.join(names)}: {wrong}" for wrong, names in found.items()]


def leaving_out(gpus: list[Gpu], unfit: list[Gpu]) -> str | None:
    """How to serve without `unfit`; None if no GPU is left then."""
    left = ",".join(str(gpu.number) for gpu in gpus if gpu not in unfit)
    return f"leave out what does not fit, by CUDA_VISIBLE_DEVICES={left}" if left else None


def _runs(plan: dict, gpu: Gpu) -> bool:
    """Whether a plan was built for GPUs like this one."""
    if plan["hardware_compatible"]:
        return release(gpu.compute_capability) >= _AMPERE
    return gpu.compute_capability == plan["compute_capability"]


def _loads(built: str, installed: str, version_compatible: bool) -> bool:
    """A plan runs on the release that built it, or, if it is version compatible, on that and later ones.

    A release candidate counts as its release: the library's number does not tell them apart.
    """
    built_parts, installed_parts = release(built)[:3], release(installed)[:3]
    return built_parts == installed_parts or version_compatible and built_parts <= installed_parts


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
