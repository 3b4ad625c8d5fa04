"""The code of the documents works as it stands there: with a server, and with `M3DEngine` in programs of all kinds."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from engine.runtime.server_folder import SHARED_MEMORY
from m3d_demo.samples import write_sample
from tests import documents
from tests.conftest import ROOT
from tests.tiny import volume

pytestmark = pytest.mark.integration

RUN = [block for block in documents.blocks("python") if not block.mark.startswith(documents.PARSED_ONLY)]
LOCAL = [block.text for block in RUN if "M3DEngine" in block.text]
REMOTE = [block for block in RUN if "localhost:8001" in block.text]
COMMANDS = [block for block in documents.blocks("sh") if block.mark == documents.RUN_WITH_SERVER]
PATIENCE_S = 600
# As Jupyter runs a cell: on a thread whose asyncio loop is running.
NOTEBOOK = """
import asyncio, sys

async def cell(source):
    assert asyncio.get_running_loop().is_running()
    exec(compile(source, "<cell>", "exec"), {"__name__": "__main__"})

asyncio.run(cell(sys.stdin.read()))
"""


@pytest.fixture(scope="module")
def folder(demo_repository, tmp_path_factory):
    """A folder of a user's: a scan of the chest, and a repository."""
    folder = tmp_path_factory.mktemp("user")
    write_sample("chest-ct", folder / "scan.nii.gz")
    (folder / "model_repository").symlink_to(demo_repository)
    return folder


def run(folder, *arguments, stdin: str = "", **environment: str) -> str:
    """What a Python with these arguments prints, in the user's folder; it ends well."""
    theirs = ("VLLM_", "OMP_", "GOMP_", "LC_")  # that the tests' own process has set for vLLM
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


def is_answered(said: str) -> bool:
    """Whether the lines of M3DEngine's example were printed, once."""
    return (
        said.count("It shows the chest.") == 1 and len(re.findall(r"^\d+\.\d+ ct \S*training/demo$", said, re.M)) == 1
    )


def test_all_python_of_the_documents_is_tested():
    assert len(LOCAL) == 1 and len(REMOTE) >= 4 and len(LOCAL) + len(REMOTE) == len(RUN)
    assert len(COMMANDS) == 2 and all(block.mark == "" for block in RUN)  # no mark is misspelt


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_the_commands_of_a_document_work(folder, demo_server, block):
    (folder / "reports.txt").write_text("A chest CT.\nA brain MRI.\n")
    (folder / "training").mkdir(exist_ok=True)
    (folder / "training" / "demo").unlink(missing_ok=True)
    (folder / "training" / "demo").symlink_to(ROOT / "training" / "demo")
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == ".venv/bin/m3d"
        said = run(folder, "-m", "engine.cli", *words[1:], M3D_SERVER=demo_server.url)
        assert said.strip(), line


@pytest.mark.parametrize("block", REMOTE, ids=str)
def test_a_program_asks_a_server(folder, demo_server, block):
    script = folder / "remote.py"
    script.write_text(block.text.replace("localhost:8001", demo_server.url))
    said = run(folder, script)
    if "choices" in block.text:
        chosen, _, held, modality, history_used = said.splitlines()
        chosen = ast.literal_eval(chosen)
        assert max(chosen, key=chosen.get) == held == "It is a CT scan."
        assert json.loads(modality)["modality"] in ("CT", "MR") and history_used == "False"
        return
    assert "chest" in said
    if "found.save" in block.text:
        assert nibabel.load(folder / "lung.nii.gz").shape == nibabel.load(folder / "scan.nii.gz").shape


def test_a_script_without_a_main_guard_has_an_engine(folder):
    script = folder / "script.py"
    script.write_text("import torch\nprint('begins')\n" + LOCAL[0])  # it may have imported PyTorch before
    said = run(folder, script)
    assert is_answered(said) and said.count("begins") == 1


def test_an_interactive_session_has_an_engine(folder):
    said = run(folder, "-i", "-q", stdin=LOCAL[0] + "\n\nprint('goes on')\n")
    assert is_answered(said) and "goes on" in said


def test_a_notebook_has_an_engine(folder):
    assert is_answered(run(folder, "-c", NOTEBOOK, stdin=LOCAL[0]))


def test_a_script_that_does_not_close_its_engine_ends_and_leaves_nothing(repository, tmp_path):
    script = tmp_path / "careless.py"
    script.write_text(
        "from engine import M3DEngine\n"
        f"m3d = M3DEngine({str(repository)!r})\n"
        "decoder = m3d._transport._decoding[1].decoder\n"
        "print(decoder.temporary, *decoder.engine.process_ids)\n"
        "study = m3d.upload('scan.npy')\n"
        "stream = m3d.stream(study, 'w10 w20')\n"
        "print(next(stream))\n"
    )
    np.save(tmp_path / "scan.npy", volume())
    studies, process = run(tmp_path, script).splitlines()[0].split()
    assert Path(studies).parent == SHARED_MEMORY and not Path(studies).exists()
    with contextlib.suppress(ProcessLookupError):  # it ends with its owner, a moment later
        select.select([os.pidfd_open(int(process))], [], [], PATIENCE_S)
    assert not Path("/proc", process).exists() or "Z" in Path("/proc", process, "stat").read_text().split()[2]


def test_an_engine_that_is_dropped_leaves_nothing(repository, tmp_path):
    script = tmp_path / "drops.py"
    script.write_text(
        "import gc, os, select\n"
        "from engine import M3DEngine\n"
        f"m3d = M3DEngine({str(repository)!r})\n"
        "decoder = m3d._transport._decoding[1].decoder\n"
        "studies, process = decoder.temporary, os.pidfd_open(decoder.engine.process_ids[0])\n"
        "del m3d, decoder\n"
        "gc.collect()\n"
        f"print(len(select.select([process], [], [], {PATIENCE_S})[0]))\n"
        "import threading\n"
        "[thread.join() for thread in threading.enumerate() if thread.name == 'm3d-close']\n"
        "print(studies.exists())\n"
    )
    assert run(tmp_path, script).splitlines()[-2:] == ["1", "False"]
