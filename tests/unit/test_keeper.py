"""The keeper leaves no process and no shared memory behind, however the tree or its owner ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from engine.server import keeper

pytestmark = pytest.mark.integration

PATIENCE_S = 60
# A command with all that is hard to clean: a process in a session of its own that ignores SIGTERM, anonymous shared
# memory as Python's multiprocessing names it, a file under a known prefix, and a folder named by its process id.
COMMAND = """
import os, signal, subprocess, sys
prefix, name = sys.argv[1:3]
open(f"/dev/shm/{prefix}-region", "w").close()
os.mkdir(f"/dev/shm/{prefix}-{os.getpid()}-store")
open(f"/dev/shm/{prefix}-{os.getpid()}-store/study", "w").close()
deaf = subprocess.Popen([sys.executable, "-c", sys.argv[3], name], start_new_session=True, stdout=subprocess.PIPE)
deaf.stdout.readline()
print(os.getpid(), deaf.pid, flush=True)
signal.pause()
"""
DEAF = """
import mmap, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
file = open(f"/dev/shm/{sys.argv[1]}", "w+b")
file.truncate(4096)
held = mmap.mmap(file.fileno(), 4096)
print("up", flush=True)
signal.pause()
"""


def keeper_command(command: list[str], shm_prefixes: list[str], remove: list[Path]) -> list[str]:
    spec = {
        "command": command,
        "grace_s": 20.0,
        "orphans_grace_s": 0.3,
        "remove": [str(path) for path in remove],
        "shm_prefixes": shm_prefixes,
    }
    return [sys.executable, "-I", "-S", keeper.__file__, json.dumps(spec)]


class Tree:
    """A keeper with COMMAND under it."""

    def __init__(self, tmp_path: Path, command: str = COMMAND, read_pids: bool = True):
        self.prefix, self.name = f"test-{uuid.uuid4().hex[:8]}", f"psm_{uuid.uuid4().hex[:8]}"
        self.folder = tmp_path / "run"
        self.folder.mkdir()
        shm_prefixes = [f"{self.prefix}-region", f"{self.prefix}-{{pid}}-"]
        self.process = subprocess.Popen(
            keeper_command([sys.executable, "-c", command, self.prefix, self.name, DEAF], shm_prefixes, [self.folder]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self.pids = [int(word) for word in self.process.stdout.readline().split()] if read_pids else []

    def leftovers(self) -> list:
        shm = [name for name in os.listdir("/dev/shm") if name.startswith((self.prefix, self.name))]
        alive = [pid for pid in self.pids if pid in keeper.descendants(0)]
        return shm + alive + ([self.folder] if self.folder.exists() else [])


@pytest.fixture
def tree(tmp_path):
    tree = Tree(tmp_path)
    assert len(tree.leftovers()) >= 4  # the test could see what it looks for
    yield tree
    tree.process.kill()
    tree.process.wait()


def test_closing_stdin_stops_the_whole_tree(tree):
    tree.process.stdin.close()
    assert tree.process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert tree.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_whole_tree(tree, number):
    tree.process.send_signal(number)
    tree.process.wait(PATIENCE_S)
    assert tree.leftovers() == []


def test_a_crash_of_the_command_is_cleaned_up_and_told(tree):
    os.kill(tree.pids[0], signal.SIGKILL)
    assert tree.process.wait(PATIENCE_S) == 128 + signal.SIGKILL
    assert tree.leftovers() == []


def test_the_commands_exit_status_is_passed_on(tmp_path):
    tree = Tree(tmp_path, "import sys; print(); sys.exit(7)")
    assert tree.process.wait(PATIENCE_S) == 7


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("false", 1)])
def test_a_command_that_ends_at_once_is_noticed(tmp_path, command, status):
    for _ in range(10):
        with subprocess.Popen(
            keeper_command([command], [], []), stdin=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.wait(PATIENCE_S) == status


def open_files(pid: int) -> list[str]:
    files = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            files.append(os.readlink(link))
        except FileNotFoundError:
            pass  # it was closed meanwhile
    return files


VITAL = """
import os, signal, subprocess, sys, time
worker = subprocess.Popen([sys.argv[1], "-c", "import signal; signal.pause()", "the", "worker"])
open(f"/dev/shm/{sys.argv[2]}", "w").close()
print(worker.pid, flush=True)
sys.exit(worker.wait() + 50) if sys.argv[3] == "notices" else signal.pause()
"""


def test_a_vital_process_that_ended_before_it_was_seen_ends_the_tree_too(tmp_path):
    worker, name = tmp_path / "vital-worker", f"test-{uuid.uuid4().hex[:8]}"
    worker.symlink_to(sys.executable)
    command = """
import os, signal, subprocess, sys
worker = subprocess.Popen([sys.argv[1], "-c", ""])
os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
open(f"/dev/shm/{sys.argv[2]}", "w").close()
signal.pause()
"""
    spec = {
        "command": [sys.executable, "-c", command, str(worker), name],
        "grace_s": 20.0,
        "orphans_grace_s": 0.3,
        "remove": [],
        "shm_prefixes": [name],
        "vital": "vital-worker",
    }
    with subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, json.dumps(spec)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.wait(PATIENCE_S) == 128 + signal.SIGKILL
        finally:
            process.stdin.close()
        assert keeper.VITAL_ENDED in process.stderr.read()


def test_only_the_commands_own_children_are_vital(tmp_path):
    """What Triton's Python models fork has their name, too, until it becomes another program."""
    worker = tmp_path / "vital-worker"
    worker.symlink_to(sys.executable)
    between = """
import subprocess, sys
helper = subprocess.Popen([sys.argv[1], "-c", "import signal; signal.pause()"])
print(helper.pid, flush=True)
helper.wait()
print("gone", flush=True)
"""
    command = """
import signal, subprocess, sys
between = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]], stdout=subprocess.PIPE, text=True)
helper = between.stdout.readline()
worker = subprocess.Popen([sys.argv[1], "-c", "import signal; signal.pause()"])
print(helper, end="", flush=True)
print(between.stdout.readline(), end="", flush=True)
signal.pause()
"""
    spec = {
        "command": [sys.executable, "-c", command, str(worker), between],
        "grace_s": 20.0,
        "orphans_grace_s": 0.3,
        "remove": [],
        "shm_prefixes": [],
        "vital": "vital-worker",
    }
    with subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        helper = int(process.stdout.readline())
        while not any("pidfd" in file for file in open_files(process.pid)):
            os.sched_yield()  # the keeper has not seen the worker yet; the helper was there before it
        os.kill(helper, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM and process.stderr.read() == ""


@pytest.mark.parametrize("command", ["notices", "waits"])
def test_the_tree_ends_when_a_vital_process_does(tmp_path, command):
    """A command that notices ends as it likes; one that would wait for ever is killed, and the log says why."""
    worker, name = tmp_path / "vital-worker", f"test-{uuid.uuid4().hex[:8]}"
    worker.symlink_to(sys.executable)
    spec = {
        "command": [sys.executable, "-c", VITAL, str(worker), name, command],
        "grace_s": 20.0,
        "orphans_grace_s": 3.0,
        "remove": [],
        "shm_prefixes": [name],
        "vital": "vital-worker",
    }
    with subprocess.Popen(
        [sys.executable, "-I", "-S", keeper.__file__, json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        pid = int(process.stdout.readline())
        while not any("pidfd" in file for file in open_files(process.pid)):
            os.sched_yield()  # the keeper has not seen it yet
        os.kill(pid, signal.SIGKILL)
        assert process.wait(PATIENCE_S) == (50 - signal.SIGKILL if command == "notices" else 128 + signal.SIGKILL)
        said = process.stderr.read()
    assert (f"{keeper.VITAL_ENDED}{pid}: {worker}" in said) == (command == "waits")
    assert not Path(f"/dev/shm/{name}").exists()


def test_shared_memory_of_others_is_left_alone(tree):
    other = Path("/dev/shm") / f"psm_{uuid.uuid4().hex[:8]}"
    other.write_bytes(b"other")
    try:
        tree.process.stdin.close()
        tree.process.wait(PATIENCE_S)
        assert other.exists()
    finally:
        other.unlink()


def test_semaphores_are_told_apart_by_who_has_them(tmp_path):
    """The tree's own one is removed, and that of a bystander stays: both have names of the same random kind."""
    semaphores = lambda: {name for name in os.listdir("/dev/shm") if name.startswith("sem.mp-")}  # noqa: E731
    tree = Tree(
        tmp_path,
        """
import multiprocessing, os, signal
held = multiprocessing.get_context("spawn").Lock()
print(held._semlock.name, flush=True)
os.kill(multiprocessing.resource_tracker._resource_tracker._pid, signal.SIGKILL)
signal.pause()
""",
        read_pids=False,
    )
    name = f"sem.{tree.process.stdout.readline().strip().lstrip('/')}"
    assert name in semaphores()
    bystander = multiprocessing.get_context("spawn").Lock()
    theirs = f"sem.{bystander._semlock.name.lstrip('/')}"
    tree.process.stdin.close()
    tree.process.wait(PATIENCE_S)
    assert name not in semaphores() and theirs in semaphores()


def test_the_tree_ends_with_its_owner():
    """The owner is killed outright, while another process still holds the keeper's stdin open."""
    owner_code = """
import json, os, signal, subprocess, sys
keeper = subprocess.Popen(json.loads(sys.argv[1]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          start_new_session=True)
pids = keeper.stdout.readline()
heir = os.fork()
if heir:
    print(keeper.pid, heir, pids, flush=True)
signal.pause()
"""
    prefix, name = f"test-{uuid.uuid4().hex[:8]}", f"psm_{uuid.uuid4().hex[:8]}"
    command = keeper_command([sys.executable, "-c", COMMAND, prefix, name, DEAF], [f"{prefix}-"], [])
    owner = subprocess.Popen([sys.executable, "-c", owner_code, json.dumps(command)], stdout=subprocess.PIPE, text=True)
    keeper_pid, heir, *pids = (int(word) for word in owner.stdout.readline().split())
    ended = os.pidfd_open(keeper_pid)
    owner.kill()
    owner.wait()
    try:
        assert select.select([ended], [], [], PATIENCE_S)[0], "the keeper still runs"
    finally:
        os.close(ended)
        os.kill(heir, signal.SIGKILL)
    assert not set(pids) & set(keeper.descendants(0))
    assert not [n for n in os.listdir("/dev/shm") if n.startswith((prefix, name))]
