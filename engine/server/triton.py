"""Find a Triton Inference Server for a target, and assemble what it needs to start: backends, environment, command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from engine.errors import InvalidInput, Unavailable
from engine.gpu_memory import CUDA_POOL_BYTES
from engine.manifest import Manifest
from engine.runtime import acceleration
from engine.runtime.run_folder import VARIABLE as RUN_FOLDER

TARGETS = ("cpu", "tensorrt")
WHEEL = "nvidia-pytriton"
LONGEST_SOCKET = 107  # bytes of a Unix socket's path
# Tensors of requests on their way to a GPU and back, and there: four volumes of 8.4 MB, and what they become.
PINNED_POOL_BYTES = 256 << 20
TRACES_A_FILE = 10  # few, as what is not written when Triton ends may be lost
STUB_TIMEOUT_S = 60  # for a stub's Python to start; loading a model may take longer
QUIET = {
    "PYTHONUTF8": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Sockets:
    """Triton's own sockets, in the private folder of one run. Raises Unavailable if its path is too long for them."""

    folder: Path
    GRPC_PORT: ClassVar[int] = 8001  # which Triton puts behind the address, whatever that is

    def __post_init__(self):
        if max(len(os.fsencode(path)) for path in (self.grpc_url.removeprefix("unix:"), self.metrics)) > LONGEST_SOCKET:
            raise Unavailable(
                f"the path of the folder for temporary files is too long for a Unix socket ({self.folder}): "
                f"give a shorter one by TMPDIR"
            )

    @property
    def grpc_address(self) -> str:
        return f"unix:{self.folder / 'grpc'}"

    @property
    def grpc_url(self) -> str:
        return f"{self.grpc_address}:{self.GRPC_PORT}"

    @property
    def metrics(self) -> str:
        return str(self.folder / "metrics")


@dataclass(frozen=True)
class Triton:
    """A Triton installation. `wheel` is the folder that nvidia-pytriton carries, or None for one found on PATH."""

    binary: Path
    wheel: Path | None
    version: str

    @classmethod
    def find(cls, target: str) -> Triton:
        """Raises Unavailable with the way to get one if this machine has none for `target`."""
        if target not in TARGETS:
            raise InvalidInput(f"target {target!r} is unknown; known are {', '.join(TARGETS)}")
        if target == "tensorrt":
            binary = shutil.which("tritonserver")
            if binary is None:
                raise Unavailable(
                    "no `tritonserver` on PATH: target tensorrt runs inside NVIDIA's Triton image (see "
                    "deploy/); on a machine without a GPU use --target cpu"
                )
            return cls(Path(binary), None, _version_beside(Path(binary)))
        spec = importlib.util.find_spec("pytriton")
        if spec is None or not spec.submodule_search_locations:
            raise Unavailable(
                f"Triton for the CPU comes with the package {WHEEL}, which is not installed: run `make "
                "demo` once, or install the extra `m3d-engine[cpu]`"
            )
        wheel = Path(spec.submodule_search_locations[0]) / "tritonserver"
        triton = cls(wheel / "bin" / "tritonserver", wheel, importlib.metadata.version(WHEEL))
        for path in (triton.binary, triton.stub):
            if not path.is_file():
                raise Unavailable(
                    f"{WHEEL} {triton.version} has no {path.relative_to(wheel)}: it supports "
                    f"Python {', '.join(triton.python_versions)}, this is {_python_version()}"
                )
        if importlib.metadata.version("numpy").split(".")[0] != "1":
            raise Unavailable(
                f"Triton's Python backend of {WHEEL} needs NumPy 1, "
                f"{importlib.metadata.version('numpy')} is installed: install with overrides.txt"
            )
        return triton

    @property
    def stub(self) -> Path:
        return cast(Path, self.wheel) / "python_backend_stubs" / _python_version() / "triton_python_backend_stub"

    @property
    def python_versions(self) -> list[str]:
        folders = (cast(Path, self.wheel) / "python_backend_stubs").iterdir()
        return sorted((f.name for f in folders), key=lambda v: [int(part) for part in v.split(".")])

    def assemble_backends(self, folder: Path) -> Path:
        """A backends folder with the Python backend and the stub of this Python, made in `folder` (wheel only)."""
        backends = folder / "backends"
        python = backends / "python"
        python.mkdir(parents=True)
        for source in (cast(Path, self.wheel) / "backends" / "python").iterdir():
            (python / source.name).symlink_to(source)
        stub = python / "triton_python_backend_stub"
        shutil.copyfile(self.stub, stub)
        stub.chmod(0o755)  # wheels do not keep the run bit
        if not os.access(self.binary, os.X_OK):
            raise Unavailable(f"{self.binary} may not be run: `chmod +x` it")
        return backends

    def command(
        self,
        repository: Path,
        manifest: Manifest,
        models: Sequence[str],
        sockets: Sockets,
        backends: Path | None,
        shm_prefix: str,
        exit_timeout_s: int,
        trace: Path | None = None,
    ) -> list[str]:
        """Triton's command line, which loads `models` alone, some of the manifest's."""
        command = [
            str(self.binary),
            "--model-repository",
            str(repository),
            "--model-control-mode",
            "explicit",
            *(part for model in models for part in ("--load-model", model)),
            # Only the front talks to it. Whoever else could would load models of his own, which is to run code.
            "--grpc-address",
            sockets.grpc_address,
            "--grpc-port",
            str(sockets.GRPC_PORT),
            "--metrics-address",
            f"unix:{sockets.metrics}",
            # 2.51's HTTP ends the server at a body of many small chunks.
            "--allow-http",
            "false",
            # The configurations are complete: to complete them, Triton would start every Python model twice.
            "--disable-auto-complete-config",
            # More at a time only compete: starting a model is all work and no waiting.
            "--model-load-thread-count",
            str(max(2, len(os.sched_getaffinity(0)))),
            "--exit-timeout-secs",
            str(exit_timeout_s),
            "--allow-gpu-metrics",
            str(backends is None).lower(),
            "--backend-config",
            f"python,shm-region-prefix-name={shm_prefix}",
            "--backend-config",
            f"python,stub-timeout-seconds={STUB_TIMEOUT_S}",
        ]
        if trace is not None:
            settings = (
                "mode=triton",
                "level=TIMESTAMPS",
                "rate=1",
                f"triton,file={trace}",
                f"triton,log-frequency={TRACES_A_FILE}",
            )
            command += [part for setting in settings for part in ("--trace-config", setting)]
        if backends is not None:
            command += ["--backend-directory", str(backends), "--model-config-name", "cpu"]
        else:
            # `tensorrt` is the export's: config.pbtxt with a warm-up in this checkpoint's sizes.
            command += [
                "--model-config-name",
                "tensorrt",
                "--cuda-memory-pool-byte-size",
                f"0:{CUDA_POOL_BYTES}",
                "--pinned-memory-pool-byte-size",
                str(PINNED_POOL_BYTES),
            ]
        if any(plan["version_compatible"] for plan in manifest.graph_plans.values()):
            # Such a plan brings code of the release that built it, which TensorRT runs only where it is allowed.
            command += ["--backend-config", "tensorrt,version-compatible=true"]
        return command

    def environment(self, run_folder: Path) -> dict[str, str]:
        """This process's environment, as the Python backend needs it."""
        # What is left in the folder for temporary files goes with the run folder.
        environment = {
            **os.environ,
            **QUIET,
            **acceleration.variables(),
            "VLLM_RPC_BASE_PATH": str(run_folder),
            "TMPDIR": str(run_folder),
            RUN_FOLDER: str(run_folder),
        }
        # Numbers in CUDA_VISIBLE_DEVICES are nvidia-smi's then, as `engine.gpu` takes them; else the fastest GPU is 0.
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        environment["PYTHONPATH"] = _joined(Path(__file__).parents[2], os.environ.get("PYTHONPATH"))
        if self.wheel is not None:
            # The stub embeds Python: it finds the environment by the first python3 on PATH, libpython by its own path.
            environment["PATH"] = _joined(Path(sys.executable).parent, os.environ.get("PATH"))
            # The copied stub looks for the wheel's own libraries beside itself, where they are not.
            libraries = [
                Path(sysconfig.get_config_var("LIBDIR") or Path(sys.base_prefix) / "lib"),
                self.wheel.parents[1] / "nvidia_pytriton.libs",
            ]
            environment["LD_LIBRARY_PATH"] = _joined(*libraries, os.environ.get("LD_LIBRARY_PATH"))
        return environment


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _version_beside(binary: Path) -> str:
    """NVIDIA's image keeps the version in a file: /opt/tritonserver/TRITON_VERSION."""
    path = binary.resolve().parents[1] / "TRITON_VERSION"
    return path.read_text().strip() if path.is_file() else "unknown"
