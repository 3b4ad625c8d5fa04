"""What speaks to TensorRT fits TensorRT's type stubs, so that a call which it does not have is found without a GPU.

The stubs are of one release of TensorRT 10. Of the newest releases of 10 and 11 the bindings are asked for their
signatures; they are loaded against empty libraries, since TensorRT itself has gigabytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SOURCE = Path(__file__).resolve().parents[2] / "export" / "tensorrt.py"
# TensorRT's types alone matter; of everything else nothing is read, which keeps the check to seconds.
CONFIG = """
[mypy]
mypy_path = {stubs}
follow_imports = skip
ignore_missing_imports = True
explicit_package_bases = True
[mypy-tensorrt.*,tensorrt_bindings.*]
follow_imports = normal
ignore_errors = True
"""
# Lines of the stubs that are not Python: a parameter called `in`, and one without a default behind others with one.
REPAIRS = ((r"\bin: ", "in_: "), (r"(channel_axis: [\w.]+)\) -> IScaleLayer", r"\1 = ...) -> IScaleLayer"))
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")  # that the bindings are linked to
MAJORS = (10, 11)


def checker(folder: Path, stubs: Iterable[tuple[str, str]]):
    """A function that checks files against stubs, (path, text) of each, and returns (status, what mypy says)."""
    for name, text in stubs:
        for wrong, right in REPAIRS:
            text = re.sub(wrong, right, text)
        target = folder / "stubs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    (folder / "mypy.ini").write_text(CONFIG.format(stubs=folder / "stubs"))

    def run(*files: Path) -> tuple[int, str]:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "mypy",
                "--config-file",
                folder / "mypy.ini",
                "--cache-dir",
                folder / "cache",
                *files,
            ],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Checks files against tensorrt-stubs. mypy itself reads no stubs in site-packages that are not marked as such."""
    files = [file for file in importlib.metadata.files("tensorrt-stubs") if file.suffix == ".pyi"]
    return checker(tmp_path_factory.mktemp("types"), ((str(file), file.locate().read_text()) for file in files))


@pytest.fixture(scope="module", params=MAJORS)
def bindings(request, tmp_path_factory):
    """Checks files against the signatures of the newest bindings of a major version; without a network it skips."""
    folder = tmp_path_factory.mktemp(f"tensorrt{request.param}")
    packages, libraries = folder / "packages", folder / "libraries"
    uv = [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
    wanted = f"tensorrt-cu13-bindings=={request.param}.*"
    done = subprocess.run([*uv, "--target", packages, wanted], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"{wanted} cannot be fetched: {done.stderr.strip()[-200:]}")
    write_empty_libraries(packages / "tensorrt_bindings" / "tensorrt.so", libraries, request.param)
    environment = {**os.environ, "PYTHONPATH": str(packages), "LD_LIBRARY_PATH": str(libraries)}
    command = [Path(sys.executable).with_name("stubgen"), "--inspect-mode", "--quiet", "--output", folder / "out"]
    command += ["--module", "tensorrt_bindings.tensorrt"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "out" / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    return checker(
        folder,
        [
            ("tensorrt/__init__.pyi", "from tensorrt_bindings.tensorrt import *"),
            ("tensorrt_bindings/__init__.pyi", ""),
            ("tensorrt_bindings/tensorrt.pyi", text),
        ],
    )


def write_empty_libraries(module: Path, folder: Path, major: int) -> None:
    """Libraries that the extension `module` can be loaded with; none of their functions may be called."""
    if not (shutil.which("gcc") and shutil.which("nm")):
        pytest.skip("no gcc and nm to make libraries with")
    undefined = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True)
    names = re.findall(r" U ((?!_?Py|dl)\w+)$", undefined.stdout, re.MULTILINE)
    folder.mkdir()
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for library in LIBRARIES:
        file = folder / f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-o", file, source], check=True)


BROKEN = [
    ("builder.create_builder_config()", "builder.create_builder_configuration()"),
    ("refitter.refit_cuda_engine()", "refitter.refit_cuda_engine(engine)"),
    ("parser.parse_from_file(str(graph))", "parser.parse_from_file()"),
    ("engine.create_engine_inspector()", "engine.create_engine_inspector(1)"),
    ("api.BuilderFlag.STRIP_PLAN", "api.BuilderFlag.STRIPPED"),
    ("api.BuilderFlag.VERSION_COMPATIBLE", "api.BuilderFlag.COMPATIBLE"),
    ("runtime.engine_host_code_allowed", "runtime.host_code_allowed"),
    ("config.hardware_compatibility_level", "config.hardware_compatibility"),
    ("api.HardwareCompatibilityLevel.AMPERE_PLUS", "api.HardwareCompatibilityLevel.AMPERE"),
    ("config.create_timing_cache(known)", "config.create_timing_cache()"),
    (", ignore_mismatch=False", ""),
    ("api.OnnxParserRefitter(refitter, log)", "api.OnnxRefitter(refitter, log)"),
]


def check(mypy, folder: Path, call: str = "", broken: str = "") -> list[str]:
    """mypy's complaints about what speaks to TensorRT, with the text `call` replaced by `broken`.

    The module is Any there, as it is one of several; here it is TensorRT's. It alone has no ComputeCapability.
    """
    source = SOURCE.read_text()
    assert call in source
    source = source.replace(call, broken) if call else source
    (folder / "checked.py").write_text(re.sub(r"\bapi\.(?=[A-Z])(?!ComputeCapability)", "trt.", source))
    status, said = mypy(folder / "checked.py")
    found = re.findall(r"^.*checked\.py:\d+: error: .*$", said, re.MULTILINE)
    assert status == bool(found), said
    return found


def test_what_speaks_to_tensorrt_fits_its_type_stubs(mypy, tmp_path):
    assert check(mypy, tmp_path) == []


@pytest.mark.parametrize(("call", "broken"), BROKEN)
def test_a_call_that_tensorrt_does_not_have_is_found(mypy, tmp_path, call, broken):
    assert len(check(mypy, tmp_path, call, broken)) == 1


@pytest.mark.slow(group="releases")
def test_what_speaks_to_tensorrt_fits_the_newest_bindings(bindings, tmp_path):
    assert check(bindings, tmp_path) == []


@pytest.mark.slow(group="releases")
@pytest.mark.parametrize(("call", "broken"), BROKEN)
def test_a_call_that_the_newest_bindings_do_not_have_is_found(bindings, tmp_path, call, broken):
    assert len(check(bindings, tmp_path, call, broken)) == 1
