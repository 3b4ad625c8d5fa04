"""What a client imports: nothing that is large, and nothing that only Linux has."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

LARGE = ("torch", "scipy", "matplotlib", "transformers", "vllm", "onnxruntime", "blake3", "aiohttp", "monai")
LINUX = ("fcntl", "resource", "pwd", "grp", "termios")
PROGRAM = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not there")

# What Python and gRPC import by themselves, where it is there.
import asyncio, subprocess, tempfile, getpass, grpc
for name in [name for name in sys.modules if name.split(".")[0] in {blocked!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Block())
import numpy as np
import engine.cli.app
from engine.client import M3DClient
from engine.errors import Unavailable
from engine.results import save_mask
from engine.results.measurements import measure
from engine.scan import read_scan, scan_pieces
from engine.volume.crop import Crop

array = np.random.default_rng(0).integers(0, 200, (8, 9, 10)).astype(np.float32)
pieces, affine = scan_pieces(array, np.eye(4))
scan = read_scan(b"".join(pieces), affine=affine)
mask = scan.array > 100
measure(mask, scan.affine, scan, preset="raw")
save_mask(mask, scan, sys.argv[1])
Crop.of("0:4,0:4,0:4")
array[0, 0, 0] = np.nan
pieces, affine = scan_pieces(array, np.eye(4))
try:
    read_scan(b"".join(pieces), affine=affine)
except Unavailable as error:
    print(error)
"""


def test_a_client_works_without_what_is_large_and_without_what_only_linux_has(tmp_path):
    program = PROGRAM.format(blocked=set(LARGE + LINUX))
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "mask.nii.gz"], cwd=ROOT, capture_output=True, text=True
    )
    assert "pip install scipy" in done.stdout, done.stderr


def test_the_doctor_looks_at_a_machine_that_has_the_client_alone(tmp_path):
    blocked = PROGRAM.format(blocked=set(LARGE)).partition("import numpy as np")[0]
    program = f"{blocked}\nfrom engine import doctor\nfrom pathlib import Path\n"
    program += "print([finding.state for finding in doctor.examine(Path(sys.argv[1]), 'cpu')])"
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "'note'" in done.stdout or "'missing'" in done.stdout, done.stderr
