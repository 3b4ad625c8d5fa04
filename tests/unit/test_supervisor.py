"""The supervisor leaves no process and no shared memory behind, however the tree or its owner ends; other users of the
machine see nothing of the tree; and its log stays small, whatever is said and whatever becomes of the file."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from engine.server import supervisor

pytestmark = pytest.mark.integration

PATIENCE_S = 60
PRIVATE = "shared memory is private to this server"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")
SERVER_USER, OTHER_USER = 65534, 65533
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
WAITS = "import os, signal; print(os.getpid(), flush=True); signal.pause()"


def spec_of(command: list, **more) -> dict:
    spec = {"command": [str(word) for word in command], "grace_s": 20.0, "orphans_grace_s": 0.3, "remove": []}
    return spec | {"shm_prefixes": []} | more


def python(code: str, *arguments) -> list:
    return [sys.executable, "-c", code, *arguments]


class Kept:
    """A supervisor at work. Unless the spec names a log, it comes through a pipe: `line`, `rest`."""

    def __init__(self, command: list, interpreter: str = sys.executable, popen: dict | None = None, **more):
        self.process = subprocess.Popen(
            [interpreter, "-I", "-S", supervisor.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **(popen or {}),
        )
        self.pid = self.process.pid
        self.supervisor_words = ""
        self.process.stdin.write(json.dumps(spec_of(command, **more)) + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_) -> None:
        try:
            self.stop()
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()

    def line(self) -> str:
        """The tree's next line."""
        while (line := self.process.stdout.readline()).startswith("supervisor: "):
            self.supervisor_words += line
        return line

    def rest(self) -> str:
        return self.process.stdout.read()

    def stop(self) -> int:
        self.process.stdin.close()
        return self.ended()

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)


def shared_memory_at(pid: int) -> Path:
    """/dev/shm as this process sees it."""
    return Path(f"/proc/{pid}/root/dev/shm")


class Tree(Kept):
    """A supervisor with COMMAND under it."""

    def __init__(self, tmp_path: Path, command: str = COMMAND, private_shm: str = "auto", read_pids: bool = True):
        self.prefix, self.name = f"test-{uuid.uuid4().hex[:8]}", f"psm_{uuid.uuid4().hex[:8]}"
        self.folder = tmp_path / "run"
        self.folder.mkdir()
        super().__init__(
            python(command, self.prefix, self.name, DEAF),
            shm_prefixes=[f"{self.prefix}-region", f"{self.prefix}-{{pid}}-"],
            remove=[str(self.folder)],
            private_shm=private_shm,
        )
        self.pids = [int(word) for word in self.line().split()] if read_pids else []

    def leftovers(self) -> list:
        names = os.listdir("/dev/shm")
        if self.process.poll() is None:
            names += os.listdir(shared_memory_at(self.pid))
        shm = {name for name in names if name.startswith((self.prefix, self.name))}
        alive = [pid for pid in self.pids if pid in supervisor.descendants(0)]
        return [*shm, *alive] + ([self.folder] if self.folder.exists() else [])


@pytest.fixture(params=["auto", "never"])
def tree(tmp_path, request):
    with Tree(tmp_path, private_shm=request.param) as tree:
        assert len(tree.leftovers()) == 6  # the test can see what it looks for
        yield tree


def test_closing_stdin_stops_the_whole_tree(tree):
    assert tree.stop() == 128 + signal.SIGTERM
    assert tree.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_whole_tree(tree, number):
    tree.process.send_signal(number)
    tree.ended()
    assert tree.leftovers() == []


def test_a_crash_of_the_command_is_cleaned_up_and_told(tree):
    os.kill(tree.pids[0], signal.SIGKILL)
    assert tree.ended() == 128 + signal.SIGKILL
    assert tree.leftovers() == []


def test_the_commands_exit_status_is_passed_on(tmp_path):
    with Tree(tmp_path, "import sys; print(); sys.exit(7)") as tree:
        assert tree.ended() == 7


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("false", 1)])
def test_a_command_that_ends_at_once_is_noticed(command, status):
    for _ in range(10):
        with Kept([command]) as kept:
            assert kept.ended() == status


def test_a_command_that_does_not_exist_is_named_and_cleaned_up(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Kept(["/no/such/program"], remove=[str(folder)]) as kept:
        assert kept.ended() == 127 and not folder.exists()
        assert "supervisor: /no/such/program cannot be started: No such file or directory" in kept.rest()


def test_an_owner_that_says_nothing_starts_nothing():
    done = subprocess.run(
        [sys.executable, "-I", "-S", supervisor.__file__], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert done.returncode == 1 and done.stderr == b"supervisor: the owner ended before it said what to start\n"


def test_the_commands_own_words_cannot_end_it_when_its_supervisor_was_killed():
    """Nobody reads them then: with SIGPIPE at work they would cut its orderly stop short."""
    with Kept(["grep", "SigIgn", "/proc/self/status"]) as kept:
        ignored = int(kept.line().split()[1], 16)
    assert ignored >> (signal.SIGPIPE - 1) & 1


# --- what it is told -------------------------------------------------------------------------------------------------
def test_a_spec_longer_than_a_pipe_holds_is_read_whole():
    with Kept(["true"], remove=[f"/tmp/{uuid.uuid4()}" for _ in range(5_000)]) as kept:
        assert kept.ended() == 0


# --- vital processes -------------------------------------------------------------------------------------------------
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


@pytest.fixture
def worker(tmp_path):
    worker = tmp_path / "vital-worker"
    worker.symlink_to(sys.executable)
    return worker


def test_a_vital_process_that_ended_before_it_was_seen_ends_the_tree_too(worker):
    name = f"test-{uuid.uuid4().hex[:8]}"
    command = """
import os, signal, subprocess, sys
worker = subprocess.Popen([sys.argv[1], "-c", ""])
os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
open(f"/dev/shm/{sys.argv[2]}", "w").close()
signal.pause()
"""
    with Kept(python(command, worker, name), shm_prefixes=[name], vital="vital-worker") as kept:
        assert kept.ended() == 128 + signal.SIGKILL
        assert supervisor.VITAL_ENDED in kept.rest()


def test_only_the_commands_own_children_are_vital(worker):
    """What Triton's Python models fork has their name, too, until it becomes another program."""
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
    with Kept(python(command, worker, between), vital="vital-worker") as kept:
        helper = int(kept.line())
        while not any("pidfd" in file for file in open_files(kept.pid)):
            os.sched_yield()  # the supervisor has not seen the worker yet; the helper was there before it
        os.kill(helper, signal.SIGKILL)
        assert kept.line() == "gone\n"
        assert kept.stop() == 128 + signal.SIGTERM and kept.rest() == ""


@pytest.mark.parametrize("private_shm", ["auto", "never"])
@pytest.mark.parametrize("command", ["notices", "waits"])
def test_the_tree_ends_when_a_vital_process_does(worker, command, private_shm):
    """A command that notices ends as it likes; one that would wait for ever is killed, and the log says why."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    more = {"shm_prefixes": [name], "vital": "vital-worker", "private_shm": private_shm, "orphans_grace_s": 3.0}
    with Kept(python(VITAL, worker, name, command), **more) as kept:
        pid = int(kept.line())
        while not any("pidfd" in file for file in open_files(kept.pid)):
            os.sched_yield()  # the supervisor has not seen it yet
        os.kill(pid, signal.SIGKILL)
        assert kept.ended() == (50 - signal.SIGKILL if command == "notices" else 128 + signal.SIGKILL)
        assert (f"{supervisor.VITAL_ENDED}{pid}: {worker}" in kept.rest()) == (command == "waits")
    assert not Path(f"/dev/shm/{name}").exists()


# --- the companion ---------------------------------------------------------------------------------------------------
STOPS_WITH_3 = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
os.write(1, b"command %d\\n" % os.getpid())
while True:
    signal.pause()
"""
COMPANION = r"import os, signal; os.write(1, b'companion %d\n' % os.getpid()); signal.pause()"
DEAF_COMPANION = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{COMPANION}"


def pids_of(kept: Kept) -> dict[str, int]:
    """Both tell theirs in one write: `print` may take two, and the other's words come between."""
    return {name: int(pid) for name, pid in (kept.line().split() for _ in range(2))}


@pytest.mark.parametrize(
    ("ending", "how"), [("os.kill(os.getpid(), 9)", r"signal 9"), ("sys.exit(4)", r"exit status 4")]
)
def test_a_companions_end_stops_the_tree_orderly_and_the_log_says_so(ending, how):
    companion = f"import os, sys; {ending}  # says-what-it-is"
    with Kept(python(STOPS_WITH_3), companion=python(companion)) as kept:
        kept.line()
        assert kept.ended() == 3
        assert re.search(rf"^{supervisor.VITAL_ENDED}\d+: .* # says-what-it-is \({how}\)$", kept.rest(), re.M)


@pytest.mark.parametrize("companion", [COMPANION, DEAF_COMPANION])
@pytest.mark.parametrize("how", ["stop", "crash"])
def test_the_companion_ends_with_the_command(companion, how):
    with Kept(python(STOPS_WITH_3), companion=python(companion)) as kept:
        pids = pids_of(kept)
        if how == "crash":
            os.kill(pids["command"], signal.SIGKILL)
            assert kept.ended() == 128 + signal.SIGKILL
        else:
            assert kept.stop() == 3
        assert not set(pids.values()) & set(supervisor.descendants(0))
        assert supervisor.VITAL_ENDED not in kept.rest()


def test_a_companion_is_not_blamed_for_the_end_of_a_command_that_it_noticed_first():
    command = """
import os, select, signal
mine, siblings = os.getpid(), []
while not siblings:
    found = open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split()
    siblings = [int(pid) for pid in found if int(pid) != mine]
ended = os.pidfd_open(siblings[0])
os.kill(siblings[0], signal.SIGKILL)
select.select([ended], [], [])
os._exit(5)
"""
    with Kept(python(command), companion=python(COMPANION)) as kept:
        assert kept.ended() == 5
        assert supervisor.VITAL_ENDED not in kept.rest()


def test_a_companion_that_is_asked_to_stop_may_wait_for_the_command():
    companion = """
import os, select, signal, sys
def stop(*_):
    select.select([command], [], [])
    print("the command has ended", flush=True)
    os._exit(0)
(pid,) = (int(pid) for pid in open(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read().split()
          if int(pid) != os.getpid())
command = os.pidfd_open(pid)
signal.signal(signal.SIGTERM, stop)
os.write(1, b"companion %d\\n" % os.getpid())
while True:
    signal.pause()
"""
    with Kept(python(STOPS_WITH_3), companion=python(companion), orphans_grace_s=PATIENCE_S) as kept:
        pids_of(kept)
        assert kept.stop() == 3
        assert "the command has ended\n" in kept.rest()


def test_a_companion_that_does_not_exist_stops_the_command():
    with Kept(python(WAITS), companion=["/no/such/program"]) as kept:
        assert kept.ended() == 128 + signal.SIGTERM
        assert "supervisor: /no/such/program cannot be started: No such file or directory" in kept.rest()


# --- other users of the machine --------------------------------------------------------------------------------------
# As Triton's Python backend (boost) does it: created, and then opened to all.
REGION = """
import mmap, os, signal, sys
path = f"/dev/shm/{sys.argv[1]}"
file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
rights = {os.fstat(file).st_mode & 0o777}
os.fchmod(file, 0o644)
rights.add(os.fstat(file).st_mode & 0o777)
os.chmod(path, 0o666)
os.chmod(sys.argv[1], 0o604, dir_fd=os.open("/dev/shm", os.O_RDONLY))
rights.add(os.fstat(file).st_mode & 0o777)
os.write(file, b"a scan")
print(os.getpid(), *map(oct, sorted(rights)), flush=True)
signal.pause()
"""
# What another user finds: names, and what can be opened, in /dev/shm and by way of /proc.
SPY = """
import json, os, sys
name, *pids = sys.argv[1:]
listed, read = [], []
for folder in ["/dev/shm", *(f"/proc/{pid}/root/dev/shm" for pid in pids), *(f"/proc/{pid}/fd" for pid in pids)]:
    try:
        listed += [f"{folder}/{each}" for each in os.listdir(folder) if each == name or folder.endswith("fd")]
    except OSError:
        pass
for path in [*listed, *(f"/proc/{pid}/root/dev/shm/{name}" for pid in pids)]:
    try:
        read.append(open(path, "rb").read().decode())
    except OSError:
        pass
print(json.dumps([listed, read]))
"""


@functools.cache
def others_python() -> str:
    """A Python that other users may start, and the supervisor with it."""
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            command = [path, "-I", "-S", supervisor.__file__]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, user=SERVER_USER)
        except OSError:
            continue
        if b"the owner ended" in done.stderr:
            return path
    pytest.skip("other users cannot read this environment")


def found_by_another_user(name: str, pids: list[int]) -> tuple[list[str], list[str]]:
    """(paths listed, contents read)."""
    command = [others_python(), "-I", "-S", "-c", SPY, name, *map(str, pids)]
    return tuple(json.loads(subprocess.check_output(command, user=OTHER_USER, group=OTHER_USER, extra_groups=[])))


def as_user(user: int) -> dict:
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def without_the_right_to_mount() -> None:
    """As in a container. For a process to be."""
    supervisor.prctl(24, supervisor.CAP_SYS_ADMIN)  # PR_CAPBSET_DROP


@as_root
@pytest.mark.parametrize(("user", "way"), [(0, "mount namespace"), (SERVER_USER, "user namespace")])
def test_another_user_cannot_even_list_its_shared_memory(user, way):
    name = f"test-{uuid.uuid4().hex[:8]}"
    interpreter = others_python()
    with Kept([interpreter, "-c", REGION, name], interpreter, as_user(user)) as kept:
        pid = int(kept.line().split()[0])
        if PRIVATE not in kept.supervisor_words:
            pytest.skip(f"this machine does not allow it: {kept.supervisor_words}")
        assert f"{PRIVATE} ({way})" in kept.supervisor_words
        assert (shared_memory_at(pid) / name).read_text() == "a scan"
        assert (shared_memory_at(pid) / name).stat().st_uid == user
        outside = Path("/dev/shm", name)
        assert not outside.exists()
        assert found_by_another_user(name, [kept.pid, pid]) == ([], [])
        outside.write_text("not a secret")
        try:
            outside.chmod(0o644)
            assert found_by_another_user(name, []) == ([str(outside)], ["not a secret"])  # so it would be found
        finally:
            outside.unlink()
        kept.stop()
        assert found_by_another_user(name, [kept.pid, pid]) == ([], [])


LISTENS = """
import socket
listening = socket.create_server(("127.0.0.1", 0))
port = listening.getsockname()[1]
own = socket.create_connection(("127.0.0.1", port), timeout=10)
print(port, flush=True)
while True:
    listening.accept()
"""


@as_root
@pytest.mark.parametrize("user", [0, SERVER_USER])
def test_nobody_else_reaches_the_ports_that_it_listens_on(user):
    """vLLM's engine listens on some, and loses a descriptor with every connection."""
    interpreter = others_python() if user else sys.executable
    with Kept([interpreter, "-c", LISTENS], interpreter, as_user(user)) as kept:
        port = int(kept.line())
        if PRIVATE not in kept.supervisor_words:
            pytest.skip(f"this machine does not allow it: {kept.supervisor_words}")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)


@pytest.mark.parametrize("user", [0, pytest.param(SERVER_USER, marks=as_root)])
def test_a_private_dev_shm_is_as_large_as_the_machines(user):
    interpreter = others_python() if user else sys.executable
    with Kept([interpreter, "-c", WAITS], interpreter, as_user(user)) as kept:
        kept.line()
        there, here = os.statvfs(shared_memory_at(kept.pid)), os.statvfs("/dev/shm")
        assert there.f_blocks * there.f_frsize == here.f_blocks * here.f_frsize


@pytest.mark.parametrize(
    ("user", "private_shm", "popen"),
    [
        (None, "never", {}),
        pytest.param(SERVER_USER, "never", as_user(SERVER_USER), marks=as_root),
        pytest.param(0, "auto", {"preexec_fn": without_the_right_to_mount}, marks=as_root),
    ],
)
def test_where_there_is_no_namespace_shared_memory_never_gets_rights_for_others(user, private_shm, popen):
    """Whatever its maker wants, and from the start: a moment would be enough to open it."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    interpreter = others_python() if user else sys.executable
    more = {"shm_prefixes": [name], "private_shm": private_shm}
    with Kept([interpreter, "-c", REGION, name], interpreter, popen, **more) as kept:
        pid, *rights = kept.line().split()
        assert rights == ["0o600"] and stat.S_IMODE(Path("/dev/shm", name).stat().st_mode) == 0o600
        assert "other users of this machine can list this server's shared memory, but not open" in kept.supervisor_words
        if os.geteuid() == 0:
            assert found_by_another_user(name, [kept.pid, int(pid)]) == ([f"/dev/shm/{name}"], [])
        kept.stop()
        assert not Path("/dev/shm", name).exists()


def test_programs_can_be_made_where_rights_are_kept_closed(tmp_path):
    """As compilers do it that run while a model loads."""
    command = """
import os, subprocess, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o600)
os.write(file, b"#!/bin/sh\\nexit 5")
os.fchmod(file, 0o755)
os.close(file)
sys.exit(subprocess.call(sys.argv[1]))
"""
    with Kept(python(command, tmp_path / "program"), private_shm="never") as kept:
        assert kept.ended() == 5


def test_what_the_tree_creates_has_no_rights_for_others(tmp_path):
    command = "import os, sys; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/file', 'w').close()"
    with Kept(python(command, tmp_path / "made")) as kept:
        assert kept.ended() == 0
    rights = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made", tmp_path / "made" / "file")]
    assert rights == [0o700, 0o600]


def test_shared_memory_of_others_is_left_alone(tree):
    other = Path("/dev/shm") / f"psm_{uuid.uuid4().hex[:8]}"
    other.write_bytes(b"other")
    try:
        tree.stop()
        assert other.exists()
    finally:
        other.unlink()


def test_semaphores_are_told_apart_by_who_has_them(tmp_path):
    """The tree's own one is removed, and that of a bystander stays: both have names of the same random kind."""
    semaphores = lambda: {name for name in os.listdir("/dev/shm") if name.startswith("sem.mp-")}  # noqa: E731
    command = """
import multiprocessing, os, signal
held = multiprocessing.get_context("spawn").Lock()
print(held._semlock.name, flush=True)
os.kill(multiprocessing.resource_tracker._resource_tracker._pid, signal.SIGKILL)
signal.pause()
"""
    with Tree(tmp_path, command, private_shm="never", read_pids=False) as tree:
        name = f"sem.{tree.line().strip().lstrip('/')}"
        assert name in semaphores()
        bystander = multiprocessing.get_context("spawn").Lock()
        theirs = f"sem.{bystander._semlock.name.lstrip('/')}"
        tree.stop()
        assert name not in semaphores() and theirs in semaphores()


# --- descriptors -----------------------------------------------------------------------------------------------------
def test_the_tree_may_open_as_many_files_as_the_hard_limit_allows():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))}
    code = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)"
    with Kept(python(code), popen=few) as kept:
        allowed = min(hard, supervisor.MOST_FILES) if hard != resource.RLIM_INFINITY else supervisor.MOST_FILES
        assert kept.line() == f"{allowed} {hard}\n"


# --- the log ---------------------------------------------------------------------------------------------------------
SLACK = (
    supervisor.LOG_LINE + 2 * supervisor.LOG_CHUNK
)  # by which a file may outgrow its limit: a line, and what comes with it
SPEAKS = """
import os, signal, sys
def speak(first, last):
    for start in range(first, last, 10_000):
        data = b"".join(b"line %08d %s\\n" % (i, b"." * 85) for i in range(start, min(last, start + 10_000)))
        while data:
            data = data[os.write(1, data):]
"""


def lines_of(log: Path) -> list[str]:
    """Of both files, the older first."""
    return [
        line
        for path in (log.with_name(f"{log.name}.1"), log)
        if path.exists()
        for line in path.read_text().splitlines()
    ]


def numbers_of(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.fullmatch(r"line (\d{8}) \.{85}", line))]


def dropped(lines: list[str]) -> int:
    return sum(
        int(found[1].replace(",", "")) for line in lines if (found := re.match(r"supervisor: ([\d,]+) lines ", line))
    )


def test_a_flood_leaves_a_small_log_with_its_end_and_the_count_of_what_is_missing(tmp_path):
    log, count = tmp_path / "log", 1_200_000  # 120 MB
    with Kept(python(f"{SPEAKS}\nspeak(0, {count})\nprint('the cause')"), log=str(log)) as kept:
        assert kept.ended() == 0
    lines = lines_of(log)
    numbers = numbers_of(lines)
    assert log.stat().st_size < supervisor.LOG_BYTES and lines[-1] == "the cause"
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] == count - 1
    assert 0 < dropped(lines) == count - len(numbers)


def test_a_full_log_becomes_the_one_before_and_no_line_is_torn(tmp_path):
    log, limit = tmp_path / "log", 300_000
    with Kept(python(f"{SPEAKS}\nspeak(0, 20_000)"), log=str(log), log_bytes=limit) as kept:
        assert kept.ended() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    assert all(path.stat().st_size <= limit + SLACK for path in tmp_path.iterdir())
    lines = lines_of(log)
    numbers = numbers_of(lines)
    assert len(lines) == len(numbers) > 2_000 and numbers == list(range(numbers[0], 20_000))


def test_a_log_smaller_than_its_lines_still_moves_on(tmp_path):
    log = tmp_path / "log"
    with Kept(python(f"{SPEAKS}\nspeak(0, 100)"), log=str(log), log_bytes=10) as kept:
        assert kept.ended() == 0
    assert numbers_of(lines_of(log))[-1] == 99


def test_the_log_of_the_run_before_is_kept(tmp_path):
    log = tmp_path / "log"
    for word in ("first", "second", "third"):
        with Kept(["echo", word], log=str(log)) as kept:
            assert kept.ended() == 0
    words = [line for line in lines_of(log) if not line.startswith("supervisor: ")]
    assert words == ["second", "third"]


def test_the_rest_of_an_endless_line_is_cut(tmp_path):
    log = tmp_path / "log"
    code = "print('a' * 3_000_000 + '\\nb' + '\\n' + 'c' * 100_000 + '\\nd')"
    with Kept(python(code), log=str(log)) as kept:
        assert kept.ended() == 0
    lines = [line for line in lines_of(log) if not line.startswith("supervisor: ")]
    size = supervisor.LOG_LINE
    assert lines == [
        "a" * size + f" ... ({3_000_000 - size:,} bytes cut)",
        "b",
        "c" * size + f" ... ({100_000 - size:,} bytes cut)",
        "d",
    ]


def test_the_log_is_its_owners_alone(tmp_path):
    log, before = tmp_path / "log", tmp_path / "log.1"
    log.write_text("of an earlier version")
    log.chmod(0o644)
    with Kept(["true"], log=str(log)) as kept:
        assert kept.ended() == 0
    assert before.read_text() == "of an earlier version"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (log, before)] == [0o600, 0o600]


def test_an_empty_log_that_all_can_read_is_closed_to_them(tmp_path):
    log = tmp_path / "log"
    log.touch()
    log.chmod(0o644)
    with Kept(["true"], log=str(log)) as kept:
        assert kept.ended() == 0
    assert stat.S_IMODE(log.stat().st_mode) == 0o600 and PRIVATE.split()[0] in log.read_text()


def test_a_log_behind_a_link_is_turned_where_it_lies(tmp_path):
    log, real = tmp_path / "log", tmp_path / "elsewhere"
    real.write_text("before")
    log.symlink_to(real)
    with Kept(["echo", "now"], log=str(log)) as kept:
        assert kept.ended() == 0
    assert log.is_symlink() and "now\n" in real.read_text() and (tmp_path / "elsewhere.1").read_text() == "before"


def test_a_log_that_is_no_file_is_written_and_left_as_it_is(tmp_path):
    log = tmp_path / "log"
    os.mkfifo(log)
    log.chmod(0o644)  # it may be /dev/null, which others need
    with Kept(["echo", "now"], log=str(log), log_bytes=10) as kept:
        assert log.read_text().endswith("now\n")
        assert kept.ended() == 0
    assert stat.filemode(log.stat().st_mode) == "prw-r--r--" and [*tmp_path.iterdir()] == [log]


def test_what_outlives_the_command_is_heard_to_its_end(tmp_path):
    log = tmp_path / "log"
    orphan = """
import os, signal, sys
def stop(*_):
    print("last words", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
os.write(int(sys.argv[1]), b"up")
while True:
    signal.pause()
"""
    command = """
import os, subprocess, sys
reading, writing = os.pipe()
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(writing)], start_new_session=True, pass_fds=[writing])
os.read(reading, 2)
"""
    with Kept(python(command, orphan), log=str(log), orphans_grace_s=PATIENCE_S) as kept:
        assert kept.ended() == 0
    assert lines_of(log)[-1] == "last words"


def test_a_full_disk_does_not_stop_the_command(tmp_path):
    with Kept(python(f"{SPEAKS}\nspeak(0, 20_000)\nsys.exit(7)"), log="/dev/full") as kept:
        assert kept.ended() == 7


def test_what_a_full_disk_swallowed_is_told_when_there_is_room_again(tmp_path):
    log, up = tmp_path / "log", tmp_path / "up"
    os.mkfifo(up)
    code = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
speak(0, 3_000)
print("said", file=open(sys.argv[1], "w"))
signal.sigwait([signal.SIGUSR1])
speak(3_000, 3_001)
"""
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))}
    with Kept(python(SPEAKS + code, up), popen=full, log=str(log)) as kept:
        assert up.read_text() == "said\n"  # so all but what a pipe holds was read
        (command,) = supervisor.descendants(kept.pid)
        resource.prlimit(kept.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.kill(command, signal.SIGUSR1)
        assert kept.ended() == 0
    lines = lines_of(log)
    assert numbers_of(lines)[-1] == 3_000 and 0 < dropped(lines) == 3_001 - len(numbers_of(lines))


def test_a_vanished_folder_does_not_stop_the_command_nor_does_its_log_grow_unseen(tmp_path):
    log, up, limit = tmp_path / "logs" / "log", tmp_path / "up", 200_000
    log.parent.mkdir()
    os.mkfifo(up)
    code = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for first in (0, 20_000):
    print("said", file=open(sys.argv[1], "w"))
    signal.sigwait([signal.SIGUSR1])
    speak(first, first + 20_000)
print("said", file=open(sys.argv[1], "w"))
signal.sigwait([signal.SIGUSR1])
sys.exit(7)
"""
    with Kept(python(SPEAKS + code, up), log=str(log), log_bytes=limit) as kept:
        assert up.read_text() == "said\n"
        (command,) = supervisor.descendants(kept.pid)
        shutil.rmtree(log.parent)
        os.kill(command, signal.SIGUSR1)
        assert up.read_text() == "said\n"
        assert os.stat(f"/proc/{kept.pid}/fd/2").st_size <= limit + SLACK
        log.parent.mkdir()  # it comes back with the next file
        os.kill(command, signal.SIGUSR1)
        assert up.read_text() == "said\n"
        os.kill(command, signal.SIGUSR1)
        assert kept.ended() == 7
    assert numbers_of(lines_of(log))[-1] == 39_999


def test_the_supervisor_does_not_end_before_its_log_is_written(tmp_path):
    log, count = tmp_path / "log", 1_200  # more than the log takes before it is read, and less than with all between
    os.mkfifo(log)
    reading = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    with Kept(python(f"{SPEAKS}\nspeak(0, {count})"), log=str(log)) as kept, open(reading) as said:
        os.set_blocking(reading, True)
        ended = os.pidfd_open(kept.pid)
        try:
            assert not select.select([ended], [], [], 1)[0]
        finally:
            os.close(ended)
        assert numbers_of(said.read().splitlines()) == [*range(count)]
        assert kept.ended() == 0


# --- the owner -------------------------------------------------------------------------------------------------------
def test_the_tree_ends_with_its_owner():
    """The owner is killed outright, while another process still holds the supervisor's stdin open."""
    owner_code = """
import json, os, signal, subprocess, sys
command, spec = sys.argv[1:]
supervisor = subprocess.Popen(json.loads(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, start_new_session=True)
supervisor.stdin.write(spec + "\\n")
supervisor.stdin.flush()
while (pids := supervisor.stdout.readline()).startswith("supervisor: "):
    pass
heir = os.fork()
if heir:
    print(supervisor.pid, heir, pids, flush=True)
signal.pause()
"""
    prefix, name = f"test-{uuid.uuid4().hex[:8]}", f"psm_{uuid.uuid4().hex[:8]}"
    spec = spec_of(python(COMMAND, prefix, name, DEAF), shm_prefixes=[f"{prefix}-"], private_shm="never")
    command = json.dumps([sys.executable, "-I", "-S", supervisor.__file__])
    owner = subprocess.Popen(python(owner_code, command, json.dumps(spec)), stdout=subprocess.PIPE, text=True)
    supervisor_pid, heir, *pids = (int(word) for word in owner.stdout.readline().split())
    ended = os.pidfd_open(supervisor_pid)
    owner.kill()
    owner.wait()
    try:
        assert select.select([ended], [], [], PATIENCE_S)[0], "the supervisor still runs"
    finally:
        os.close(ended)
        os.kill(heir, signal.SIGKILL)
    assert not set(pids) & set(supervisor.descendants(0))
    assert not [n for n in os.listdir("/dev/shm") if n.startswith((prefix, name))]
