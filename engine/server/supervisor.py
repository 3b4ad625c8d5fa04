"""Keeps a process tree: starts one command, and leaves nothing of it behind, however it or its owner ends.

Run as a script (`python -I -S supervisor.py`, standard library only) by `engine.server`, which writes SPEC to its
stdin and then holds that open. The supervisor is the reaper of all processes below it, so even those that leave their
process group (vLLM's engine and its workers) stay its descendants. It stops the tree when stdin closes (the owner
asks, or died), on SIGTERM/SIGINT/SIGHUP, and when the command itself ends; then it removes the shared memory that the
tree held.

Other users of the machine are kept out: nothing of SPEC stands on a command line, which all can read; what the tree
creates has no rights for others (umask 077); and its shared memory is closed to them (see `close_shared_memory`).

SPEC is one line of JSON:
    command: list.
    companion: list, the command line of a process that runs beside the command and without which that is of no use.
        When it ends, so does the tree; when the tree is stopped, it is asked first.
    grace_s: time for an orderly stop of the command. orphans_grace_s: time for what outlives it.
    remove: folders to delete at the end.
    shm_prefixes: names in /dev/shm that belong to the tree; `{pid}` stands for the command's process id.
    vital: name, as in /proc/PID/comm, of the command's children without which it is broken: when one ends, the whole
        tree does.
    private_shm: `auto`, or `never` where a namespace of its own is in the way: /dev/shm stays the machine's then, and
        others can list it, but not open it.
    log: file for what the tree and the supervisor say, with no rights for others; without it all goes to the
        supervisor's stderr. The one that lies there becomes LOG.1, at the start and whenever it reaches log_bytes (16
        MiB, if not given). A terminal or a pipe is written to as it is."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

SHM = "/dev/shm/"
VITAL_ENDED = "supervisor: the command cannot go on without process "
SETTLED_S = 60.0  # after the start and new shared memory, in which vital processes are looked for: they start then
LOOK_S, SETTLED_LOOK_S = 0.1, 1.0  # between two looks, in that time and later
BLAME_S = 0.5  # for the command to end, too: then it was the first, and its companion only saw that before us
READ_S = 5.0  # to read what the ended tree said last
CANNOT_START = 127 << 8  # as a shell's exit status
MOST_FILES = 1 << 20  # descriptors a process: where the hard limit is higher, programs that go through all take minutes

LOG_BYTES = 16 << 20
LOG_CHUNK = 64 << 10
LOG_LINE = LOG_CHUNK  # of a longer line the rest is cut off; at least LOG_CHUNK, see `_without_long_lines`
LOG_BURST, LOG_RATE = 4 << 20, 256 << 10  # bytes at once, so that a start and tracebacks pass; bytes a second
LOG_KEPT = 64 << 10  # of what comes too fast: the end, which tells most

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_REC, MS_SLAVE = 2, 4, 0x4000, 0x80000
CAP_SYS_ADMIN = 21
LIBC = ctypes.CDLL(None, use_errno=True)


def check(what: str, result: int) -> None:
    """Raises OSError if a call of the C library failed."""
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def prctl(option: int, value: int) -> None:
    check(f"prctl({option}, {value})", LIBC.prctl(option, value, 0, 0, 0))


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


def shared_memory_of(pids: Iterable[int]) -> set[tuple[int, int]]:
    """(device, inode) of what these processes have mapped of /dev/shm: of this one, or of one of their own.

    Not names: glibc makes a semaphore under another name than the one it is opened by, and the maps show the first.
    """
    found: set[tuple[int, int]] = set()
    for pid in pids:
        try:
            lines = Path("/proc", str(pid), "maps").read_text().splitlines()
        except OSError:
            continue  # it ended meanwhile, or is another user's
        for line in lines:
            if SHM in line:
                _, _, _, device, inode = line.split()[:5]
                major, minor = device.split(":")
                found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found


def shared_memory() -> dict[str, tuple[int, int]]:
    """(device, inode) by name of everything at the top of /dev/shm."""
    found = {}
    for entry in os.scandir(SHM):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        found[entry.name] = status.st_dev, status.st_ino
    return found


def everybody() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def close_shared_memory(private: str) -> tuple[bool, str]:
    """Keep the shared memory of this process, and of all that it starts, from the other users of the machine.

    That takes more than a umask: Triton's Python backend makes its regions, through which scans go, and then gives
    everybody the right to read them. Ways, the best first: a /dev/shm of its own in a mount namespace; the same in a
    user namespace, where the right for the first is missing; and a filter that leaves rights as they are created.

    Args:
        private: SPEC's `private_shm`.

    Returns:
        Whether /dev/shm is one of its own now, and a line for the log.
    """
    capabilities = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    kind, flags = "mount namespace", CLONE_NEWNS
    if not capabilities:
        kind, flags = "user namespace", CLONE_NEWNS | CLONE_NEWUSER
    if private == "never":
        why = "not wanted"
    elif capabilities and not capabilities >> CAP_SYS_ADMIN & 1:
        # A user namespace would take from this process what it may more than others, such as read all files.
        why = "CAP_SYS_ADMIN is missing"
    elif not (why := refusal(flags)):
        enter_namespace(flags)
        return True, f"supervisor: shared memory is private to this server ({kind})"
    try:
        keep_rights_closed()
    except OSError as error:
        return False, (
            f"supervisor: other users of this machine can read this server's shared memory, scans in it included (no "
            f"namespace for it: {why}; no filter: {error}); start it as root, or allow user namespaces"
        )
    return False, (
        f"supervisor: other users of this machine can list this server's shared memory, but not open it (no namespace "
        f"for it: {why})"
    )


def refusal(flags: int) -> str:
    """Why `enter_namespace` is not possible; empty if it is. A child process tries: there is no way back from half."""
    child = os.fork()
    if child == 0:
        code = errno.EPERM
        try:
            enter_namespace(flags)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return os.strerror(code) if code > 0 else f"signal {-code}" if code else ""


def enter_namespace(flags: int) -> None:
    """Get a mount namespace with an empty /dev/shm, which ends with the last process in it.

    Args:
        flags: of unshare: CLONE_NEWNS, and CLONE_NEWUSER for a user namespace, in which this user has the right to
            mount. Processes and files keep their owners there.

    Raises:
        OSError: the system does not allow it.
    """
    size = os.statvfs(SHM).f_blocks * os.statvfs(SHM).f_frsize
    user, group = os.geteuid(), os.getegid()
    check("unshare", LIBC.unshare(flags))
    if flags & CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    # What is mounted here stays here; what the machine mounts and unmounts from now on is seen here, too.
    check("mount", LIBC.mount(None, b"/", None, MS_REC | MS_SLAVE, None))
    options = f"mode=0700,size={size}".encode()
    check("mount", LIBC.mount(b"tmpfs", SHM.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options))


def leave_network() -> None:
    """Get a network namespace with a loopback of its own alone.

    vLLM's engine listens on ports of 127.0.0.1 for its own processes, and loses a descriptor with every connection:
    some ten thousand end it, and any user of the machine could make them. What clients reach is the companion, which
    stays outside; between the two is a Unix socket, which no network is in the way of.

    Raises:
        OSError: the system does not allow it.
    """
    check("unshare", LIBC.unshare(CLONE_NEWNET))
    up, running, set_flags = 0x1, 0x40, 0x8914  # IFF_UP, IFF_RUNNING, SIOCSIFFLAGS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh22x", b"lo", up | running))


def keep_rights_closed() -> None:
    """Make chmod and its kind do nothing, and say they did, where they would give others rights to what is no program.

    With the umask nothing can be opened by others then, not even for a moment. It holds for this process and all that
    it starts, and cannot be undone. Programs and folders (rights to execute) are let through: compilers make them so.

    Raises:
        OSError: there is no such filter on this machine.
    """
    if os.uname().machine != "x86_64":
        raise OSError(errno.ENOSYS, "it is written for x86-64")
    load, equal, any_set, end = 0x20, 0x15, 0x45, 0x06  # of a word; jump if, with how far if so and if not; return
    number_at, machine_at, second_at, third_at = 0, 4, 24, 32  # in struct seccomp_data: the call, its arguments
    chmod, fchmod, fchmodat, fchmodat2 = 90, 91, 268, 452
    x86_64, allow, do_nothing = 0xC000003E, 0x7FFF0000, 0x00050000  # the last is "fail with error 0", which is success
    program = [(load, 0, 0, machine_at), (equal, 1, 0, x86_64), (end, 0, 0, allow)]
    for number, mode_at in ((chmod, second_at), (fchmod, second_at), (fchmodat, third_at), (fchmodat2, third_at)):
        program += [
            (load, 0, 0, number_at),
            (equal, 0, 4, number),
            (load, 0, 0, mode_at),
            (any_set, 2, 0, 0o111),
            (any_set, 0, 1, 0o077),
            (end, 0, 0, do_nothing),
        ]
    program.append((end, 0, 0, allow))
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    filter_ = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(instructions)))
    seccomp, set_filter, without_slowdown = 317, 1, 4  # the last: old kernels would switch off speculation
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    check("seccomp", LIBC.syscall(seccomp, set_filter, without_slowdown, filter_))


class Log:
    """Takes what the tree says from a pipe into a file that does not outgrow its limit, however much is said.

    While it is written, the file is this process's stdout and stderr, for the words of Python itself. No trouble with
    the file ends anything: what cannot be written is counted like what comes too fast, and told when there is room.
    """

    def __init__(self, path: str, limit: int):
        """
        Args:
            path: SPEC's `log`.
            limit: SPEC's `log_bytes`.

        Raises:
            OSError: `path` is no file, and cannot be written to.
        """
        self.limit = limit
        self.turns = bool(path) and (os.path.isfile(path) or not os.path.exists(path))
        self.path = os.path.realpath(path) if self.turns else path
        self.opened = False
        self.size = 0
        self.at_line_start = True
        self.lost_lines = self.lost_bytes = 0
        self.pending, self.late = b"", False
        self.room, self.room_at = float(LOG_BURST), time.monotonic()
        self.column = self.cut = 0  # of the line that is being read
        self.lock = threading.Lock()
        self.reading, self.writing = os.pipe()
        self.thread = threading.Thread(target=self._read, daemon=True)
        if self.turns:
            self._turn()
        elif path:
            self._write_to(os.open(path, os.O_WRONLY | os.O_APPEND))

    def follow(self) -> None:
        """Start to read, when all who write have got the pipe: no process may be forked from now on."""
        os.close(self.writing)
        self.thread.start()

    def say(self, line: str) -> None:
        """The supervisor's own words."""
        with self.lock:
            self._store(self._on_its_own(line))

    def end(self, seconds: float) -> None:
        """Wait until all is written that was said, if everyone who could say more is gone."""
        self.thread.join(seconds)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self.reading], [], [], LOOK_S if self.late else None)
            data = os.read(self.reading, LOG_CHUNK) if ready else b""
            with self.lock:
                self._take(data)
                if ready and not data:
                    self._flush()
                    return

    def _take(self, data: bytes) -> None:
        """Write what came, or put it back while too much comes; of what is put back, the newest is kept."""
        self.pending += self._without_long_lines(data)
        now = time.monotonic()
        self.room = min(LOG_BURST, self.room + (now - self.room_at) * LOG_RATE)
        self.room_at = now
        if self.room >= (LOG_RATE if self.late else len(self.pending)):
            self._flush()
            return
        self.late = True
        if (surplus := len(self.pending) - LOG_KEPT) > 0:
            end = self.pending.find(b"\n", surplus - 1) + 1 or surplus
            self._lose(self.pending[:end])
            self.pending = self.pending[end:]

    def _without_long_lines(self, data: bytes) -> bytes:
        """Only the line that is open at the start of a chunk can be too long: others of it are shorter than a chunk."""
        head, newline, rest = data.partition(b"\n")
        kept = head[: max(0, LOG_LINE - self.column)]
        self.column += len(head)
        self.cut += len(head) - len(kept)
        if not newline:
            return kept
        if self.cut:
            kept += f" ... ({self.cut:,} bytes cut)".encode()
        self.cut, self.column = 0, len(rest) - (rest.rfind(b"\n") + 1)
        return kept + newline + rest

    def _flush(self) -> None:
        self._store(self.pending)
        self.room -= len(self.pending)
        self.pending, self.late = b"", False

    def _store(self, data: bytes) -> None:
        """Write, with word of what was lost before, and a new file where this one is full, between two lines."""
        if self.lost_bytes:
            note = self._on_its_own(
                f"supervisor: {self.lost_lines:,} lines ({self.lost_bytes / 1e6:.1f} MB) dropped: more than "
                f"{LOG_RATE >> 10} KiB a second came, or the disk was full"
            )
            if self._write(note) == len(note):
                self.lost_lines = self.lost_bytes = 0
        while self.turns and self.size + len(data) > self.limit and b"\n" in data:
            fits = data.rfind(b"\n", 0, max(0, self.limit - self.size)) + 1
            if not fits and (self.size == 0 or not self.at_line_start):  # a line larger than a file, or the end of one
                fits = data.index(b"\n") + 1
            self._lose(data[self._write(data[:fits]) : fits])
            data = data[fits:]
            self._turn()
        self._lose(data[self._write(data) :])

    def _write(self, data: bytes) -> int:
        """Returns how many bytes found room."""
        written = 0
        try:
            while written < len(data):
                written += os.write(2, data[written:])
        except OSError:
            pass  # the disk is full, or what was to read this is gone
        if written:
            self.size += written
            self.at_line_start = data[written - 1 : written] == b"\n"
        return written

    def _on_its_own(self, line: str) -> bytes:
        return (b"" if self.at_line_start else b"\n") + os.fsencode(line) + b"\n"

    def _lose(self, data: bytes) -> None:
        self.lost_lines += data.count(b"\n")
        self.lost_bytes += len(data)

    def _turn(self) -> None:
        """Begin a new file. What lies at its name, of an earlier run or full, becomes the one before it."""
        try:
            if os.path.getsize(self.path):
                os.replace(self.path, f"{self.path}.1")
                os.chmod(f"{self.path}.1", 0o600)
        except OSError:
            pass  # there is none, or it cannot be kept
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
            file = os.open(self.path, flags, 0o600)
        except OSError:
            if self.opened:  # its folder vanished, but not the file that is open: it must not grow, either
                os.ftruncate(2, 0)
        else:
            self._write_to(file)
            self.opened = True
            try:
                os.chmod(2, 0o600)  # it may lie there with other rights
            except OSError:
                pass  # another user's, who lets this one write
        self.size = 0

    def _write_to(self, file: int) -> None:
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


class Supervisor:
    """The parameters are SPEC's."""

    def __init__(
        self,
        command: list[str],
        grace_s: float,
        orphans_grace_s: float,
        remove: list[str],
        shm_prefixes: list[str],
        companion: Sequence[str] = (),
        vital: str = "",
        private_shm: str = "auto",
        log: str = "",
        log_bytes: int = LOG_BYTES,
    ):
        self.vital = vital
        self.watched: dict[int, tuple[int, str]] = {}  # by descriptor: process id, command line
        self.grace_s = grace_s
        self.orphans_grace_s = orphans_grace_s
        self.remove = remove
        self.owner = os.getppid()
        os.umask(0o077)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        soft = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # clients' connections take one each
        self.log = Log(log, log_bytes)
        self.own_shm, words = close_shared_memory(private_shm)
        self.log.say(words)
        self.shm_before = shared_memory()
        self.shm_seen: set[tuple[int, int]] = set()
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
        self.processes: list[subprocess.Popen] = []
        self.child = self._start(command, alone=self.own_shm)
        self.shm_prefixes = [prefix.format(pid=self.child) for prefix in shm_prefixes]
        self.companion: int | None = None
        self.companion_ended = ""  # how; empty while it runs
        self.companion_words = " ".join(companion)
        if self.child is None:
            self.status = CANNOT_START
        elif companion:
            self.companion = self._start([*companion])
            self.stop_asked |= self.companion is None
        self.log.follow()

    def _start(self, command: list[str], alone: bool = False) -> int | None:
        """Returns the process id, or None if there is no such program; the log says why then.

        alone: with a network of its own, see `leave_network`.
        """

        def prepare() -> None:
            # Should the supervisor itself be killed, it at least gets a SIGTERM ...
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if alone:
                leave_network()

        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self.log.writing,
                stderr=self.log.writing,
                preexec_fn=prepare,
                # ... and is not killed by its next words, which nobody reads then: SIGPIPE stays ignored.
                restore_signals=False,
            )
        except OSError as error:
            self.log.say(f"supervisor: {command[0]} cannot be started: {error.strerror}")
            return None
        self.processes.append(process)  # at the object's end it would collect the status of one that has ended already
        return process.pid

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
                [0, self.wake_read, *self.watched], [], [], LOOK_S if starting else SETTLED_LOOK_S
            )
            self._reap(ready)
            if dead := [self.watched[fd] for fd in ready if fd in self.watched]:
                self._end_without(dead)
            if self.companion_ended:
                self._end_without_companion()
            if (0 in ready and not os.read(0, 4096)) or os.getppid() != self.owner:
                self.stop_asked = True
        self._survey()
        if self.status is None:
            self._signal([self.companion], signal.SIGTERM)  # it takes no new requests then
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
        self.log.end(READ_S)
        self._clean()
        code = os.waitstatus_to_exitcode(self.status) if self.status is not None else -signal.SIGKILL
        return code if code >= 0 else 128 - code

    def _watch(self) -> None:
        """Be told of the end of the vital processes, too; of one that ended before it was seen here, at once.

        They are the command's own children: what these fork has their name, too, for a moment, and may end.
        """
        known = {pid for pid, _ in self.watched.values()}
        mine = children(zombies=True).get(self.child, ()) if self.vital and self.child else ()
        for pid in set(mine) - known:
            try:
                if Path("/proc", str(pid), "comm").read_text().strip() == self.vital:
                    words = Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ").strip()
                    self.watched[os.pidfd_open(pid)] = pid, words
            except OSError:
                continue  # it ended meanwhile

    def _end_without(self, dead: list[tuple[int, str]]) -> None:
        """Vital processes ended. If the command does not end by itself then, whoever waits for them would wait for
        ever, and so would the command when it is asked to stop."""
        self._wait(self.orphans_grace_s, lambda: self.status is not None or bool(self.companion_ended))
        # The companion ends when a model does not load that it has asked for, whose process ends, too.
        if self.status is None and not self.stop_asked and not self.companion_ended:
            for pid, words in dead:
                self.log.say(f"{VITAL_ENDED}{pid}: {words}")
            self._signal([self.child], signal.SIGKILL)
            self._wait(self.grace_s, lambda: self.status is not None)
        self.watched.clear()

    def _end_without_companion(self) -> None:
        """Nobody reaches the command any more, which is well itself: it is asked to stop."""
        self._wait(BLAME_S, lambda: self.status is not None)
        if self.status is None and not self.stop_asked:
            self.log.say(f"{VITAL_ENDED}{self.companion_ended}")
            self.stop_asked = True

    def _ask_stop(self, *_) -> None:
        self.stop_asked = True

    def _survey(self) -> None:
        if not self.own_shm:  # else all of it ends with the last process
            self.shm_seen |= shared_memory_of(descendants(os.getpid()))

    def _signal(self, pids: Iterable[int | None], number: int) -> None:
        for pid in pids:
            try:
                if pid is not None:
                    os.kill(pid, number)
            except ProcessLookupError:
                pass

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while not done() and (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self.wake_read], [], [], min(left, 0.2))
            self._reap(ready)
        self._reap([self.wake_read])

    def _reap(self, ready: list[int]) -> None:
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
            if pid == self.companion:
                self.companion = None
                code = os.waitstatus_to_exitcode(status)
                words = f"signal {-code}" if code < 0 else f"exit status {code}"
                self.companion_ended = f"{pid}: {self.companion_words} ({words})"

    def _clean(self) -> None:
        ours = [] if self.own_shm else [os.path.join(SHM, name) for name in self._names()]
        for path in ours + self.remove:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    pass

    def _names(self) -> set[str]:
        """What the tree left in a /dev/shm that it shared with others."""
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
        return ours


def read_spec() -> dict:
    """The first line of stdin, from the descriptor: what Python reads ahead would be missing in `select`."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := os.read(0, 1 << 16)):
            sys.exit("supervisor: the owner ended before it said what to start")
        line += more
    return json.loads(line)


if __name__ == "__main__":
    sys.exit(Supervisor(**read_spec()).run())
