"""A private folder in shared memory that belongs to one server: common to its processes, gone when it is.

Nothing needs to be configured: the processes find it by the pid and the start time of the server above them. Each holds
a shared lock on it; the last to leave removes it, and what a killed server left behind is swept by the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "m3d-studies"
_USERS = ".users"


class ServerFolder:
    """Joins the folder at `path`, creating it if need be. Raises PermissionError if others can enter it."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._users: int | None = _join(self.path)

    @classmethod
    def of_server(cls) -> ServerFolder:
        """The folder of the tritonserver that this process belongs to."""
        sweep()
        pid = _server_pid()
        return cls(SHARED_MEMORY / f"{prefix_of(pid)}{_start_time(pid)}")

    @classmethod
    def of_process(cls) -> ServerFolder:
        """A new folder that belongs to this process alone."""
        sweep()
        pid = os.getpid()
        return cls(SHARED_MEMORY / f"{prefix_of(pid)}{_start_time(pid)}-{secrets.token_hex(4)}")

    def leave(self) -> None:
        if self._users is None:
            return
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.path, ignore_errors=True)
        except BlockingIOError:
            pass  # others still use it
        finally:
            os.close(self._users)
            self._users = None


def prefix_of(pid: int | str) -> str:
    """How the names of the folders of a server, or of a process, begin."""
    return f"{PREFIX}-{pid}-"


def sweep() -> None:
    """Remove this user's folders whose server is dead and which nobody has open."""
    name = re.compile(rf"{PREFIX}-(\d+)-(\d+)(-[0-9a-f]+)?")
    for path in SHARED_MEMORY.iterdir():
        server = name.fullmatch(path.name)
        if not server or _start_time(int(server[1])) == int(server[2]):
            continue
        try:
            # In a shared /dev/shm the server may live in another container, where its pid means nothing to us.
            ServerFolder(path).leave()
        except OSError:
            continue


def _join(path: Path) -> int:
    """Create the folder if need be and hold a shared lock on it; the descriptor of the lock."""
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(f"{path} is not a private folder of this user: remove it")
        try:
            descriptor = os.open(path / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path / _USERS)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # the last user removed the folder in between: once more


def _server_pid() -> int:
    """The nearest ancestor that is a tritonserver, else the parent."""
    pid = os.getppid()
    while pid > 1:
        name, parent, _ = _process(pid)
        if name == "tritonserver":
            return pid
        pid = parent
    return os.getppid()


def _start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot, which tells apart processes that had the same pid; None if dead."""
    try:
        return _process(pid)[2]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _process(pid: int) -> tuple[str, int, int]:
    """(name, parent, start time) from /proc, see proc(5)."""
    head, tail = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)
    fields = tail.split()
    return head.split("(", 1)[1], int(fields[1]), int(fields[19])
