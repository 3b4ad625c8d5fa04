"""The client alone, installed by pip on each Python that is here: small, and it gets what the server gives others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import copy_checkout
from tests.tiny import QUESTION

pytestmark = pytest.mark.slow(group="pythons")

OTHERS = [version for version in ("3.10", "3.11", "3.12", "3.13", "3.14") if version != sys.version[:4]]
MOST_BYTES = 210e6  # of an environment with pip and the client
ASK = """
import json, sys
import numpy as np
from engine.client import M3DClient
with M3DClient(sys.argv[1], timeout=300) as client:
    study = client.upload(np.load(sys.argv[2]))
    found = client.segment(study, sys.argv[3], max_new_tokens=24)
    found.save(sys.argv[4])
    assert found.measurements is not None or found.mask is None
    print(json.dumps([sys.version_info[:2], list(found.answer.token_ids)]))
"""


def _find(version: str) -> str | None:
    """A Python of this version: on PATH, or one of pyenv's."""
    candidates = [
        shutil.which(f"python{version}"),
        *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(candidate)
    return None


@pytest.fixture(scope="module", params=OTHERS)
def python(request, tmp_path_factory):
    """Another Python, in an environment with the client alone. No compiler can be found while it is installed."""
    if not (found := _find(request.param)):
        pytest.skip(f"no Python {request.param} is on this machine")
    folder = tmp_path_factory.mktemp("python")
    subprocess.run([found, "-m", "venv", folder / "venv"], check=True)
    python, checkout = folder / "venv" / "bin" / "python", copy_checkout(folder / "checkout")
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    subprocess.run([python, "-m", "pip", "install", "--quiet", checkout], check=True, env=environment)
    return python


def test_the_client_is_small(python):
    folder = python.parents[1]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"{python}: {size / 1e6:.0f} MB")
    assert size < MOST_BYTES
    names = {path.name for path in folder.glob("lib/python*/site-packages/*")}
    assert not names & {"torch", "scipy", "matplotlib", "transformers", "vllm"} and "engine" in names


def test_a_client_on_another_python_gets_the_same_answer_and_mask(python, server, client, scans, tmp_path):
    np.save(tmp_path / "scan.npy", scans[0])
    words = [server.url, tmp_path / "scan.npy", QUESTION, tmp_path / "mask.nii.gz"]
    done = subprocess.run([python, "-I", "-c", ASK, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, token_ids = json.loads(done.stdout)
    expected = client.segment(client.upload(scans[0]), QUESTION, max_new_tokens=24)
    assert ".".join(map(str, version)) != sys.version[:4] and token_ids == list(expected.answer.token_ids)
    import nibabel

    saved = np.asarray(nibabel.load(tmp_path / "mask.nii.gz").dataobj)
    np.testing.assert_array_equal(saved != 0, expected.mask)


def test_the_command_line_on_another_python_knows_its_way(python, server, scans, tmp_path):
    m3d = python.with_name("m3d")
    done = subprocess.run([m3d, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "segment" in done.stdout
    np.save(tmp_path / "scan.npy", scans[0])
    words = ["segment", tmp_path / "scan.npy", QUESTION, "--server", server.url, "-o", tmp_path / "mask.nii.gz"]
    done = subprocess.run([m3d, *words, "--max-new-tokens", "24"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "mask.nii.gz").is_file() and "m3d-engine[picture]" in done.stderr
    done = subprocess.run([m3d, *words, "--picture", tmp_path / "mask.png"], capture_output=True, text=True)
    assert done.returncode != 0 and "m3d-engine[picture]" in done.stderr
