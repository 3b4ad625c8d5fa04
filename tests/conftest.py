"""What unit and functional tests share."""
from __future__ import annotations

import os
import sys
from pathlib import Path

# Threads that spin while they wait slow each other down on the few cores of a CI machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fixtures")]
