"""The folder for what is kept between runs: logs, timing caches, downloads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$M3D_CACHE, else $XDG_CACHE_HOME/m3d-engine, else ~/.cache/m3d-engine."""
    if own := os.environ.get("M3D_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3d-engine"
