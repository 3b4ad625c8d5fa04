"""What speaks to TensorRT fits TensorRT's type stubs, so that a call which it does not have is found without a GPU."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
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
REPAIRS = ((r"\bin: ", "in_: "), (r"channel_axis: int\) -> IScaleLayer", "channel_axis: int = ...) -> IScaleLayer"))


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """A function that checks files against the stubs and returns (status, what mypy says)."""
    folder = tmp_path_factory.mktemp("types")
    # mypy reads no stubs in site-packages that are not marked as such, and these are not.
    for file in importlib.metadata.files("tensorrt-stubs"):
        if file.suffix != ".pyi":
            continue
        text = file.locate().read_text()
        for wrong, right in REPAIRS:
            text = re.sub(wrong, right, text)
        target = folder / "stubs" / file
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


def test_what_speaks_to_tensorrt_fits_its_type_stubs(mypy):
    status, said = mypy(SOURCE)
    assert status == 0, said


@pytest.mark.parametrize(
    ("call", "broken"),
    [
        ("builder.create_builder_config()", "builder.create_builder_configuration()"),
        ("refitter.refit_cuda_engine()", "refitter.refit_cuda_engine(engine)"),
        ("parser.parse_from_file(str(graph))", "parser.parse_from_file()"),
    ],
)
def test_a_call_that_tensorrt_does_not_have_is_found(mypy, tmp_path, call, broken):
    source = SOURCE.read_text()
    assert call in source
    (tmp_path / "broken.py").write_text(source.replace(call, broken))
    status, said = mypy(tmp_path / "broken.py")
    assert status == 1 and len(re.findall(r"^.*broken\.py:\d+: error: ", said, re.MULTILINE)) == 1, said
