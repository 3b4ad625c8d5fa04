"""Start a Triton on an exported model repository, watch it come up, and stop it without leaving anything behind.

`with Server("model_repository") as server:` is ready inside the block; `server.url` is what M3DClient takes.
"""

from __future__ import annotations

import compileall
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, cast

from engine import gpu, gpu_memory
from engine.cache import cache_folder
from engine.contract import DECODER_MODELS
from engine.errors import InvalidInput, RepositoryError, Unavailable
from engine.manifest import Manifest
from engine.runtime.run_folder import RunFolder
from engine.runtime.server_folder import prefix_of
from engine.runtime.settings import Settings
from engine.server import supervisor
from engine.server.settings import FrontSettings, address
from engine.server.triton import TARGETS, Sockets, Triton

EXIT_TIMEOUT_S = 10  # Triton's own limit for finishing requests and unloading models
RUN_LOCK = "lock"  # in that folder, held while the run lasts
RUN_PREFIX = "m3d-"  # of the folder of one run, in the folder for temporary files
GRACE_S = 30  # after this all that is left gets killed
ORPHANS_GRACE_S = 5  # for processes that outlive Triton, such as those that tidy up after killed ones
START_ATTEMPTS = 3
STUB = "triton_python_b"  # the name of a Python model's process; Triton neither restarts it nor tells who waits for it
LOWEST_FREE_PORT = 10_000
# Models that wait until the others are there. On a GPU the language model does, since vLLM takes what the others leave.
# On a CPU nothing is gained by it: to load all at once is quicker.
LOADED_LAST: dict[str, tuple[str, ...]] = {"cpu": (), "tensorrt": DECODER_MODELS}
SHM_NEEDED = 256 << 20  # requests, answers and studies travel through shared memory
_LOADING = re.compile(r"loading: (\w+):")
_LOADED = re.compile(r"successfully loaded '(\w+)'")
_ENDED = re.compile(re.escape(supervisor.VITAL_ENDED) + r"\d+: .*/(\w+)/\d+/model\.py")
_FRONT_ENDED = re.compile(re.escape(supervisor.VITAL_ENDED) + r"\d+: .* -m engine\.server\.front ")
_BROKEN = re.compile(r"^decoder: (the language model is .*)", re.M)  # in model_repository/decoder/1/model.py
_FAILED = re.compile(r"failed to load '(\w+)' version \d+: (?:[A-Z][\w ]*?: )?(.*)")


class Server:
    """A Triton process tree on one repository.

    target: cpu (the Triton of nvidia-pytriton) or tensorrt (`tritonserver` on PATH). host, metrics_host: addresses to
    listen on, for gRPC, and for metrics and health over HTTP; other machines are kept out unless they say otherwise.
    log: file for the words of Triton and its models, by default one per gRPC port in the cache folder. trace: files for
    the timestamps of all requests; Triton appends .0, .1, ... to the name. start_timeout: seconds until all models must
    be ready. on_progress: is told what loads.
    """

    def __init__(
        self,
        repository: Path | str,
        *,
        target: str = "cpu",
        host: str = "127.0.0.1",
        metrics_host: str = "127.0.0.1",
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        log: Path | str | None = None,
        trace: Path | str | None = None,
        start_timeout: float = 900.0,
        on_progress: Callable[[str], None] = lambda text: None,
    ):
        self.repository = Path(repository).resolve()
        self.target = target
        self.host = host
        self.metrics_host = metrics_host
        self.ports = {"grpc": grpc_port, "metrics": metrics_port}
        self.log = Path(log) if log else cache_folder() / "logs" / f"triton-{grpc_port}.log"
        self.trace = Path(trace).resolve() if trace else None
        self.start_timeout = start_timeout
        self.on_progress = on_progress
        self._supervisor: subprocess.Popen | None = None
        self._sockets: Sockets | None = None

    @property
    def url(self) -> str:
        """Where clients come."""
        return address(_reachable(self.host), self.ports["grpc"])

    @property
    def inside_url(self) -> str:
        """Triton's own gRPC address, behind the front: for this user alone, to look at the models inside."""
        return cast(Sockets, self._sockets).grpc_url

    @property
    def metrics_url(self) -> str:
        return f"{self._pages}/metrics"

    @property
    def _pages(self) -> str:
        return f"http://{address(_reachable(self.metrics_host), self.ports['metrics'])}"

    @property
    def supervisor_pid(self) -> int | None:
        """Process id of the supervisor above Triton and all that it starts; None before the start."""
        return self._supervisor.pid if self._supervisor else None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until every model is ready.

        Raises RepositoryError (nothing exported here, or for another target), Unavailable (no Triton, a port is taken,
        a model does not load; the message has the cause), and leaves nothing running then.
        """
        if self._supervisor is not None:
            raise InvalidInput("this server was started already; make a new Server to start another")
        manifest = self._check()
        triton = Triton.find(self.target)
        if self.log.is_dir():
            raise InvalidInput(f"the log {self.log} is a folder: name a file")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._launch(triton, manifest)
                return self._wait_ready(manifest.models)
            except BaseException:
                self.stop()
                if attempt == START_ATTEMPTS or not self._was_starved():
                    raise
                self.on_progress("the machine is too busy for Triton's start-up checks, starting again")

    def _launch(self, triton: Triton, manifest: Manifest) -> None:
        sweep()
        run_folder = Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
        if self.log.is_file():  # an earlier run's words are not this one's, nor others' to read
            self.log.replace(f"{self.log}.1").chmod(0o600)
        try:
            backends = triton.assemble_backends(run_folder) if triton.wheel else None
            shm_prefix = f"{run_folder.name}-"
            self._sockets = Sockets(run_folder)
            # Triton, its stubs and vLLM each trip over some paths: spaces, brackets, letters beyond ASCII.
            repository = run_folder / "model_repository"
            repository.symlink_to(self.repository)
            last = tuple(model for model in manifest.models if model in LOADED_LAST[self.target])
            first = tuple(model for model in manifest.models if model not in last)
            command = triton.command(
                repository, manifest, first, self._sockets, backends, shm_prefix, EXIT_TIMEOUT_S, self.trace
            )
            # Triton takes a model for changed when anything in its folder is, and would load it again with an ensemble
            # that it is part of: Python must not write its bytecode there when the model starts.
            # A folder that cannot be written stays as it is.
            compileall.compile_dir(self.repository, maxlevels=2, quiet=2)
            front = FrontSettings(
                host=self.host,
                grpc_port=self.ports["grpc"],
                metrics_host=self.metrics_host,
                metrics_port=self.ports["metrics"],
                inside=self._sockets.grpc_url,
                inside_metrics=self._sockets.metrics,
                models=manifest.models,
                last=last,
                folder=str(run_folder),
            )
            spec = {
                "command": command,
                "companion": [sys.executable, "-m", "engine.server.front", json.dumps(asdict(front))],
                "grace_s": GRACE_S,
                "orphans_grace_s": ORPHANS_GRACE_S,
                "remove": [str(run_folder)],
                "shm_prefixes": [shm_prefix, prefix_of("{pid}")],
                "vital": STUB,
                "log": str(self.log),
            }
            RunFolder(run_folder)
            with open(run_folder / f"{RUN_LOCK}-new", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the supervisor has it, too, and so holds it until it ends
                os.rename(lock.name, run_folder / RUN_LOCK)  # before, nobody takes the folder for a left one
                self._supervisor = subprocess.Popen(
                    [sys.executable, "-I", "-S", supervisor.__file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=triton.environment(run_folder),
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                )
            pipe = cast(IO[bytes], self._supervisor.stdin)
            pipe.write(json.dumps(spec).encode() + b"\n")
            pipe.flush()
        except BaseException:
            shutil.rmtree(run_folder, ignore_errors=True)
            raise

    def is_ready(self) -> bool:
        """Whether the server and all its models answer now."""
        try:
            with urllib.request.urlopen(f"{self._pages}/health/ready", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> None:
        """Block while the server runs. Raises Unavailable with the cause when it ends by itself."""
        code = cast(subprocess.Popen, self._supervisor).wait()
        raise Unavailable(f"Triton ended by itself ({_exit_words(code)}): {self._cause()}")

    def stop(self) -> None:
        """Stop the server; when this returns, no process of it and none of its shared memory is left."""
        if self._supervisor is None:
            return
        cast(IO, self._supervisor.stdin).close()
        self._supervisor.wait()

    def _check(self) -> Manifest:
        """What can be refused before anything starts."""
        if self.target not in TARGETS:
            raise InvalidInput(f"target {self.target!r} is unknown; known are {', '.join(TARGETS)}")
        manifest = Manifest.read(self.repository, self.target)
        if manifest.target != self.target:
            raise RepositoryError(
                f"{self.repository} was exported for target {manifest.target}, not {self.target}: "
                f"serve with --target {manifest.target}, or export with --target {self.target}"
            )
        gpus = gpu.find_gpus() if self.target == "tensorrt" else []
        if self.target == "tensorrt" and (wrong := gpu.misfits(manifest, gpus, gpu.tensorrt_version())):
            raise RepositoryError(f"{self.repository} does not fit this machine: {'; '.join(wrong)}")
        manifest.check(self.repository)
        Settings.read(self.repository)
        if self.target == "tensorrt" and (small := gpu_memory.misfits(self.repository, manifest, gpus)):
            raise RepositoryError(f"{self.repository} does not fit this machine: {'; '.join(small)}")
        if len(set(self.ports.values())) < len(self.ports):
            raise InvalidInput(f"the gRPC and metrics ports must differ: {self.ports}")
        for name, host in (("grpc", self.host), ("metrics", self.metrics_host)):
            _check_port(host, name, self.ports[name])
        free = shutil.disk_usage(supervisor.SHM).free
        if free < SHM_NEEDED:
            raise Unavailable(
                f"{supervisor.SHM} has {free >> 20} MiB free, the server needs {SHM_NEEDED >> 20} or more: "
                "in Docker give the container --shm-size 2g"
            )
        return manifest

    def _wait_ready(self, models: tuple[str, ...]) -> None:
        end = time.monotonic() + self.start_timeout
        said = None
        while not self.is_ready():
            try:
                code = cast(subprocess.Popen, self._supervisor).wait(timeout=0.25)
            except subprocess.TimeoutExpired:
                pass
            else:
                raise Unavailable(f"Triton did not start ({_exit_words(code)}): {self._cause()}")
            if time.monotonic() > end:
                raise Unavailable(
                    f"the models were not ready after {self.start_timeout:g} s "
                    f"({self._loading(models)}); log: {self.log}\n{self._tail()}"
                )
            if (now := self._loading(models)) != said:
                said = now
                self.on_progress(said)

    def _loading(self, models: tuple[str, ...]) -> str:
        text = self._log_text()
        loaded = set(_LOADED.findall(text))
        loading = [m for m in dict.fromkeys(_LOADING.findall(text)) if m not in loaded]
        if loading:
            return f"loading {', '.join(loading)} ({len(loaded)} of {len(models)} ready)"
        return "getting ready" if loaded else "starting Triton"

    def _was_starved(self) -> bool:
        """Triton 2.51 gives up a Python process that does not stir for a second while it loads, and aborts on the way.

        That happens when other programs keep all cores; the next attempt often succeeds.
        """
        if self._supervisor is None or self._supervisor.returncode != 128 + signal.SIGABRT:
            return False
        return "lock_exception" in self._log_text()

    def _log_text(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except FileNotFoundError:  # the supervisor has not begun it yet
            return ""

    def _cause(self) -> str:
        """Why Triton ended, the first cause first, from its log."""
        text = self._log_text()
        if self._was_starved():
            return f"the machine is too busy for Triton's start-up checks; try again in a while\n(log: {self.log})"
        # Triton escapes line ends in its log; where in the Python code it was stands there, too.
        failed = {
            model: words.rstrip('"').replace("\\n", "\n").partition("\n\nAt:")[0].strip()
            for model, words in _FAILED.findall(text)
        }
        # An ensemble fails because a part of it did: the part is the cause.
        causes = [f"{model}: {words}" for model, words in failed.items() if "ensemble" not in words]
        front_ended = _FRONT_ENDED.search(text)
        if front_ended and not causes:  # it ends, too, when a model does not load that it has Triton load
            return f"the front ended, killed or crashed (see engine/server/front.py)\n(log: {self.log})"
        if broken := _BROKEN.findall(text):
            return f"{broken[-1]}\n(log: {self.log})"
        if (
            supervisor.VITAL_ENDED in text and not front_ended
        ):  # one that ended in its first moments left no model's name
            ended = sorted(set(_ENDED.findall(text))) or ["a Python model"]
            return (
                f"the process of {', '.join(ended)} ended, killed or crashed, and was not asked to\n(log: {self.log})"
            )
        return "; ".join(causes or [f"\n{self._tail()}"]) + f"\n(log: {self.log})"

    def _tail(self, lines: int = 15) -> str:
        """The last lines of the log that report something wrong, or just the last ones."""
        every = self._log_text().splitlines()
        wrong = [
            line
            for line in every
            if re.match(r"[EF]\d{4} |Bad option|\S.*(?:[Ee]rror|Traceback)", line)
            and not (self.target == "cpu" and "cuda" in line.lower())
        ]
        return "\n".join((wrong or every)[-lines:])


def sweep() -> None:
    """Remove this user's run folders whose supervisor was killed.

    Others may have put anything there under such a name.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_PREFIX}*"):
        try:
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(folder / RUN_LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
        except OSError:
            continue  # it is in use, another program's, or gone


def free_ports(host: str = "127.0.0.1") -> dict[str, int]:
    """Ports that nobody listens on now, as Server's arguments of the same names.

    From below those that the system hands out by itself: vLLM's processes ask for some before Triton listens.
    """
    handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < 2:
        port = random.randrange(LOWEST_FREE_PORT, handed_out)
        if port not in found and _can_listen(host, port):
            found.append(port)
    return dict(zip(("grpc_port", "metrics_port"), found))


def _reachable(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _can_listen(host: str, port: int) -> bool:
    try:
        _listen(host, port)
    except OSError:
        return False
    return True


def _listen(host: str, port: int) -> None:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    socket.create_server((host, port), family=family).close()


def _check_port(host: str, name: str, port: int) -> None:
    if not 0 < port < 65536:
        raise InvalidInput(f"--{name}-port must be from 1 to 65535, not {port}")
    try:
        _listen(host, port)
    except OSError as error:
        raise Unavailable(
            f"the {name} port {port} on {host} cannot be used ({error.strerror or error}): stop what "
            f"listens there, or give another --{name}-port"
        ) from None


def _exit_words(code: int) -> str:
    return f"killed by signal {code - 128}" if code > 128 else f"exit status {code}"
