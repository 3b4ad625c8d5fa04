"""What a running server occupies, and what of it is left later: processes, shared memory, its run folder; and the
memory that a command takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from engine.runtime.server_folder import prefix_of
from engine.server import supervisor
from tests.conftest import ROOT


def _started(pid: int) -> str | None:
    """A process's start time, which tells it from a later one of the same id; None if there is none but a zombie."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def stub_of(supervisor_pid: int, model: str) -> int:
    """The process of a Python model."""
    found, *_ = (
        pid
        for pid in supervisor.descendants(supervisor_pid)
        if f"/{model}/1/model.py".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return found


class Footprint:
    """Taken while the supervisor `supervisor_pid` runs; `left()` names what still exists of it.

    Processes are known by their environment, too: whatever the server starts inherits the name of its run folder.
    """

    def __init__(self, supervisor_pid: int):
        tree = supervisor.descendants(supervisor_pid)
        self.processes = {pid: _started(pid) for pid in (supervisor_pid, *tree)}
        (self.triton_pid,) = (pid for pid in tree if Path(f"/proc/{pid}/comm").read_text().strip() == "tritonserver")
        environment = Path(f"/proc/{self.triton_pid}/environ").read_bytes().split(b"\0")
        name = b"VLLM_RPC_BASE_PATH="
        (self.run_folder,) = (variable[len(name) :] for variable in environment if variable.startswith(name))
        self.mapped = supervisor.shared_memory_of(tree)

    def _is_ours(self, name: str) -> bool:
        return name.startswith((prefix_of(self.triton_pid), f"{Path(os.fsdecode(self.run_folder)).name}-"))

    def left(self) -> list[str]:
        alive = [f"process {pid}" for pid, started in self.processes.items() if started and _started(pid) == started]
        for pid in supervisor.everybody():
            try:
                if self.run_folder in Path(f"/proc/{pid}/environ").read_bytes() and _started(pid):
                    alive.append(f"process {pid} by its environment")
            except OSError:
                pass  # it ended meanwhile, or is another user's
        shm = [
            name for name, inode in supervisor.shared_memory().items() if inode in self.mapped or self._is_ours(name)
        ]
        folder = [os.fsdecode(self.run_folder)] if os.path.exists(self.run_folder) else []
        return alive + shm + folder


def run_watched(program: str, *arguments) -> tuple[str, int]:
    """(what it said, its largest anonymous memory in bytes). File pages do not count: the system takes them back."""
    command = [sys.executable, program, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said, peak = None, 0
        while said is None:  # it may end between two looks: what it said is read all the same
            try:
                said, _ = process.communicate(timeout=0.2)
            except subprocess.TimeoutExpired:
                peak = max(peak, _anonymous(process.pid))
    assert process.returncode == 0, said
    return said, peak


def _anonymous(pid: int) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0
