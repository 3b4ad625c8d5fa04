"""What unit and functional tests share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Threads that spin while they wait slow each other down on the few cores of a CI machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]

# What `make test-all GROUP=...` takes. Each group stays under 25 minutes on 2 cores.
GROUPS = {
    "matrix": "precisions x architectures of the exported models",
    "sizes": "checkpoints of the published size in bytes",
    "quantization": "language models quantised by llm-compressor",
    "pythons": "other versions of Python",
    "fuzz": "many random inputs",
    "soak": "many requests for a long time",
    "faults": "processes that are killed, in many ways",
    "releases": "newer releases of what is locked, and known flaws",
}


def pytest_configure(config):
    if (asked := re.search(r"group='(\w*)'", config.option.markexpr)) and asked[1] not in GROUPS:
        raise pytest.UsageError(f"GROUP={asked[1]}: it is one of {', '.join(GROUPS)}")


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers("slow"):
            if mark.args or set(mark.kwargs) != {"group"} or mark.kwargs["group"] not in GROUPS:
                raise pytest.UsageError(f"{item.nodeid}: slow(group=...) takes one of {', '.join(GROUPS)}")


def copy_repository(folder: Path) -> Path:
    """The tracked files of model_repository, as a user would copy them."""
    ignore = shutil.ignore_patterns(
        "*.onnx*", "*.plan", "layers.txt", "tensorrt.pbtxt", "llm", "tokenizer", "manifest.json", "__pycache__"
    )
    return shutil.copytree(ROOT / "model_repository", folder / "model_repository", ignore=ignore)


def copy_checkout(folder: Path) -> Path:
    """The tracked files of this checkout as they are now, as a fresh clone has them."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # not one that was just deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder
