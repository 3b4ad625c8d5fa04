"""Keeps a process tree: starts one command, and leaves nothing of it behind, however it or its owner ends.

Run as a script (`python -I -S keeper.py SPEC`, standard library only) by `engine.server`, which holds its stdin open.
The keeper is the reaper of all processes below it, so even those that leave their process group (vLLM's engine and its
workers) stay its descendants. It stops the tree when stdin closes (the owner asks, or died), on SIGTERM/SIGINT/SIGHUP,
and when the command itself ends; then it removes the shared memory that the tree held.

SPEC is JSON: command (list), grace_s (time for an orderly stop), orphans_grace_s (time for what outlives the command),
remove (folders to delete at the end), shm_prefixes (names in /dev/shm that belong to the tree; `{pid}` stands for the
command's process id), vital (name, as in /proc/PID/comm, of the command's children without which it is broken: when one
ends, the whole tree does).
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SHM = "/dev/shm/"
VITAL_ENDED = "keeper: the command cannot go on without process "
SETTLED_S = 60.0  # after the start and new shared memory, in which vital processes are looked for: they start then
LOOK_S, SETTLED_LOOK_S = 0.1, 1.0  # between two looks, in that time and later
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def children(zombies: bool = False) -> dict[int, list[int]]:
    """Process ids by their parent's."""
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if zombies or state not in "ZX":
            found.setdefault(int(parent), []).append(int(name))
    return found


def descendants(root: int) -> list[int]:
    """Process ids below `root`, zombies left out."""
    below, found, todo = children(), [], [root]
    while todo:
        more = below.get(todo.pop(), [])
        found += more
        todo += more
    return found


def shared_memory_of(pids) -> set[int]:
    """Inodes in /dev/shm that these processes have mapped.

    Not names: glibc makes a semaphore under another name than the one it is opened by, and the maps show the first.
    """
    inodes: set[int] = set()
    for pid in pids:
        try:
            lines = Path("/proc", str(pid), "maps").read_text().splitlines()
        except OSError:
            continue  # it ended meanwhile, or is another user's
        inodes.update(int(line.split()[4]) for line in lines if SHM in line)
    return inodes


def shared_memory() -> dict[str, int]:
    """Inode by name of everything at the top of /dev/shm."""
    return {entry.name: entry.inode() for entry in os.scandir(SHM)}


def everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


class Keeper:
    def __init__(
        self,
        command: list[str],
        grace_s: float,
        orphans_grace_s: float,
        remove: list[str],
        shm_prefixes: list[str],
        vital: str = "",
    ):
        self.vital = vital
        self.watched: dict[int, tuple[int, str]] = {}  # by descriptor: process id, command line
        self.grace_s = grace_s
        self.orphans_grace_s = orphans_grace_s
        self.remove = remove
        self.shm_before = shared_memory()
        self.shm_seen: set[int] = set()
        self.owner = os.getppid()
        self.wake_read, wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.stop_asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.status: int | None = None
        self.childless = False
        # Should the keeper itself be killed, the command at least gets a SIGTERM. The object is kept: at its end it
        # would collect the exit status of a command that has ended already.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        )
        self.child = self.process.pid
        self.shm_prefixes = [prefix.format(pid=self.child) for prefix in shm_prefixes]

    def run(self) -> int:
        """Returns the command's exit status, as a shell would: 128 + n after signal n."""
        known, settled = set(self.shm_before), time.monotonic() + SETTLED_S
        while self.status is None and not self.stop_asked:
            if (names := set(os.listdir(SHM))) - known:
                self._survey()
                settled = time.monotonic() + SETTLED_S
            known = names
            if starting := time.monotonic() < settled:
                self._watch()
            ready, _, _ = select.select(
                [sys.stdin, self.wake_read, *self.watched], [], [], LOOK_S if starting else SETTLED_LOOK_S
            )
            self._reap(ready)
            if dead := [self.watched[fd] for fd in ready if fd in self.watched]:
                self._end_without(dead)
            if (sys.stdin in ready and not os.read(0, 4096)) or os.getppid() != self.owner:
                self.stop_asked = True
        self._survey()
        if self.status is None:
            self._signal([self.child], signal.SIGTERM)
            self._wait(self.grace_s, lambda: self.status is not None)
        self._survey()
        # What outlived the command: ask, then kill. Killing may take several rounds, as the tree may still grow. Only
        # having no child left proves that it is gone: a process whose parent just ended is missing in a list.
        self._signal(descendants(os.getpid()), signal.SIGTERM)
        self._wait(self.orphans_grace_s, lambda: self.childless)
        while not self.childless:
            self._signal(descendants(os.getpid()), signal.SIGKILL)
            self._wait(0.2, lambda: self.childless)
        self._clean()
        code = os.waitstatus_to_exitcode(self.status) if self.status is not None else -signal.SIGKILL
        return code if code >= 0 else 128 - code

    def _watch(self) -> None:
        """Be told of the end of the vital processes, too; of one that ended before it was seen here, at once.

        They are the command's own children: what these fork has their name, too, for a moment, and may end.
        """
        known = {pid for pid, _ in self.watched.values()}
        for pid in set(children(zombies=True).get(self.child, ())) - known if self.vital else ():
            try:
                if Path("/proc", str(pid), "comm").read_text().strip() == self.vital:
                    words = Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ").strip()
                    self.watched[os.pidfd_open(pid)] = pid, words
            except OSError:
                continue  # it ended meanwhile

    def _end_without(self, dead: list[tuple[int, str]]) -> None:
        """Vital processes ended. If the command does not end by itself then, whoever waits for them would wait for
        ever, and so would the command when it is asked to stop."""
        self._wait(self.orphans_grace_s, lambda: self.status is not None)
        if self.status is None and not self.stop_asked:
            for pid, words in dead:
                print(f"{VITAL_ENDED}{pid}: {words}", file=sys.stderr, flush=True)
            self._signal([self.child], signal.SIGKILL)
            self._wait(self.grace_s, lambda: self.status is not None)
        self.watched.clear()

    def _ask_stop(self, *_) -> None:
        self.stop_asked = True

    def _survey(self) -> None:
        self.shm_seen |= shared_memory_of(descendants(os.getpid()))

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass

    def _wait(self, seconds: float, done) -> None:
        end = time.monotonic() + seconds
        while not done() and (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self.wake_read], [], [], min(left, 0.2))
            self._reap(ready)
        self._reap([self.wake_read])

    def _reap(self, ready) -> None:
        """Collect every ended process below: ours and the orphans that came to us."""
        if self.wake_read in ready:
            try:
                os.read(self.wake_read, 4096)
            except BlockingIOError:
                pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self.childless = True
                return
            if pid == 0:
                return
            if pid == self.child:
                self.status = status

    def _clean(self) -> None:
        ours = {os.path.basename(path) for prefix in self.shm_prefixes for path in glob.glob(f"{SHM}{prefix}*")}
        # Python's and vLLM's shared memory has random names: what the tree had mapped and nobody else uses.
        unnamed = {
            name: inode
            for name, inode in shared_memory().items()
            if name not in self.shm_before and inode in self.shm_seen
        }
        if unnamed:
            used = shared_memory_of(everybody())
            ours |= {name for name, inode in unnamed.items() if inode not in used}
        for path in [os.path.join(SHM, name) for name in ours] + self.remove:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass


if __name__ == "__main__":
    sys.exit(Keeper(**json.loads(sys.argv[1])).run())
