"""What unit and functional tests share."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# Threads that spin while they wait slow each other down on the few cores of a CI machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]


def copy_repository(folder: Path) -> Path:
    """The tracked files of model_repository, as a user would copy them."""
    ignore = shutil.ignore_patterns(
        "*.onnx*", "*.plan", "layers.txt", "tensorrt.pbtxt", "llm", "tokenizer", "manifest.json", "__pycache__"
    )
    return shutil.copytree(ROOT / "model_repository", folder / "model_repository", ignore=ignore)
