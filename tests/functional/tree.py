"""What the processes of a running server take, and what another user of the machine finds of them."""

from __future__ import annotations

import inspect
import json
import os
import re
import select
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from engine.server import supervisor

STRANGER = 65534
PATIENCE_S = 120
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


class Process(psutil.Process):
    @property
    def descriptors(self) -> int:
        return self.num_fds()

    @property
    def threads(self) -> int:
        return self.num_threads()

    @property
    def anonymous(self) -> int:
        """Bytes of memory that are no file's and not shared: RssAnon in /proc."""
        memory = self.memory_info()
        return memory.rss - memory.shared


class Tree:
    """The processes below a supervisor by name: `triton`, `front`, `vllm`, and each Python model's by the model's."""

    def __init__(self, supervisor_pid: int):
        self.supervisor_pid = supervisor_pid
        self.processes: dict[str, Process] = {}
        for pid in supervisor.descendants(supervisor_pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            self.processes[_name(words, pid)] = Process(pid)

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self.processes.items()}

    @property
    def run_folder(self) -> Path:
        return Path(self["triton"].environ()["M3D_RUN_FOLDER"])

    @property
    def shared_memory(self) -> Path:
        """/dev/shm as the tree sees it."""
        return Path(f"/proc/{self.supervisor_pid}/root/dev/shm")

    @property
    def shared_bytes(self) -> int:
        """What lies in shared memory besides studies, which are in a folder."""
        return sum(path.stat().st_blocks * 512 for path in self.shared_memory.iterdir() if path.is_file())


def _name(words: str, pid: int) -> str:
    if stub := re.search(r"/(\w+)/\d+/model\.py ", words):
        return stub[1]
    marks = {"front": "engine.server.front", "triton": "bin/tritonserver", "vllm": "VLLM::EngineCore"}
    marks |= {"resource tracker": "resource_tracker"}
    return next((name for name, mark in marks.items() if mark in words), f"process {pid}")


# --- another user ----------------------------------------------------------------------------------------------------
_PROGRAM = """
import codecs, encodings.idna, errno, json, os, re, select, socket, stat, sys
{work}
arguments = json.loads(sys.stdin.readline())
os.setgroups([])
os.setgid({user})
os.setuid({user})
os.chdir("/")
print(json.dumps({name}(*arguments)), flush=True)
"""


class Stranger:
    """`work(*arguments)` as another user. `work` has its own text only, and the modules that _PROGRAM imports first:
    that user may not read Python's files, which may lie in a home folder."""

    def __init__(self, work: Callable, *arguments):
        program = _PROGRAM.format(work=inspect.getsource(work), user=STRANGER, name=work.__name__)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()

    def line(self) -> str:
        """What it prints next."""
        return self.process.stdout.readline().strip()

    def result(self):
        """What it returns, if need be when its stdin ends."""
        said, wrong = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, wrong
        return json.loads(said.splitlines()[-1])


def as_stranger(work: Callable, *arguments):
    return Stranger(work, *arguments).result()


@contextmanager
def strangers_eyes(needles: list[bytes], folders: list[str], since: float) -> Iterator[Callable[[], list[str]]]:
    """Another user who reads, again and again, all that it may: shared memory, processes, `folders`.

    Args:
        needles: what it looks for.
        folders: where it reads the files that were written at or after `since`.

    Yields:
        A function that ends the search and returns where it found what. It may be called once.
    """
    stranger = Stranger(_look, [needle.hex() for needle in needles], folders, since)
    try:
        assert stranger.line() == "looked"
        yield stranger.result
    finally:
        stranger.process.kill()
        stranger.process.wait()


def _look(needles, folders, since):
    needles = [bytes.fromhex(needle) for needle in needles]
    found = set()

    def read(path):
        try:
            if stat.S_ISREG(os.stat(path).st_mode):
                with open(path, "rb") as file:
                    content = file.read(1 << 26)
                found.update(f"{path}: needle {i}" for i, needle in enumerate(needles) if needle in content)
        except OSError:
            pass  # it is another's, or gone

    def below(folder, wanted):
        for at, _, names in os.walk(folder):
            for path in (os.path.join(at, name) for name in names):
                try:
                    if wanted(os.lstat(path)):
                        read(path)
                except OSError:
                    pass

    while True:
        pids = [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]
        for folder in ("/dev/shm", *(f"/proc/{pid}/root/dev/shm" for pid in pids)):
            below(folder, lambda status: True)
        for pid in pids:
            for name in ("cmdline", "environ"):
                read(f"/proc/{pid}/{name}")
            try:
                for descriptor in os.listdir(f"/proc/{pid}/fd"):
                    read(f"/proc/{pid}/fd/{descriptor}")
            except OSError:
                pass
        for folder in folders:
            below(folder, lambda status: status.st_mtime >= since)
        print("looked", flush=True)
        if select.select([0], [], [], 0)[0]:
            return sorted(found)
