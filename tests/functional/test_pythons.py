"""The client on the other Python that is supported, installed from the lock, against the same server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, copy_checkout
from tests.tiny import QUESTION

pytestmark = pytest.mark.slow(group="pythons")

OTHER = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"
ASK = """
import json, sys
import numpy as np
from engine.client import M3DClient
with M3DClient(sys.argv[1], timeout=300) as client:
    study = client.upload(np.load(sys.argv[2]))
    found = client.segment(study, sys.argv[3], max_new_tokens=24)
    np.save(sys.argv[4], found.mask)
    print(json.dumps([sys.version_info[:2], list(found.answer.token_ids)]))
"""


def _find() -> str | None:
    """A Python of the other version: on PATH, or one of pyenv's."""
    candidates = [shutil.which(f"python{OTHER}"), *sorted(Path.home().glob(f".pyenv/versions/{OTHER}.*/bin/python"))]
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(candidate)
    return None


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The other Python, in an environment with the client alone."""
    if not (found := _find()):
        pytest.skip(f"no Python {OTHER} is on this machine")
    folder = tmp_path_factory.mktemp("python")
    subprocess.run([found, "-m", "venv", folder / "venv"], check=True)
    python, checkout = folder / "venv" / "bin" / "python", copy_checkout(folder / "checkout")
    lock = ROOT / "locks" / "cpu.txt"
    subprocess.run(
        [Path(sys.executable).with_name("uv"), "pip", "install", "--quiet", "--python", python]
        + ["--constraints", lock, "--build-constraints", lock, checkout],
        check=True,
    )
    return python


def test_a_client_on_the_other_python_gets_the_same_answer_and_mask(python, server, client, scans, tmp_path):
    np.save(tmp_path / "scan.npy", scans[0])
    words = [server.url, tmp_path / "scan.npy", QUESTION, tmp_path / "mask.npy"]
    done = subprocess.run([python, "-I", "-c", ASK, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, token_ids = json.loads(done.stdout)
    expected = client.segment(client.upload(scans[0]), QUESTION, max_new_tokens=24)
    assert ".".join(map(str, version)) == OTHER and token_ids == list(expected.answer.token_ids)
    np.testing.assert_array_equal(np.load(tmp_path / "mask.npy"), expected.mask)


def test_the_command_line_on_the_other_python_knows_its_way(python):
    done = subprocess.run([python.with_name("m3d"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "segment" in done.stdout
