"""What a run's folder says about itself: settings, data, code, packages and machine (`run.json`)."""
from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from engine.errors import InvalidInput
from training.files import write_json

FILE = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy", "monai", "scipy",
            "deepspeed", "tensorboard")
# Settings that change nothing in the result may differ when a run goes on.
FREE = {"trainer." + name for name in (
    "logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy", "save_total_limit",
    "disable_tqdm", "log_level", "report_to", "run_name", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_persistent_workers", "dataloader_pin_memory")} | {"sample_every", "out", "data.m3d.root"}


def begin(folder: Path, stage: str, settings: dict, data: dict, world_size: int) -> None:
    """Record that a run begins or goes on; the same folder, settings, data and number of processes or InvalidInput."""
    file = folder / FILE
    decisive = {"stage": stage, "processes": world_size, "settings": settings, "data": data}
    record = {**decisive, "sessions": []}
    if file.is_file():
        record = json.loads(file.read_text())
        before, now = _flat({key: record[key] for key in decisive}), _flat(decisive)
        changed = [f"{key.removeprefix('settings.')}: {before.get(key)!r} -> {now.get(key)!r}"
                   for key in sorted(before.keys() | now.keys())
                   if before.get(key) != now.get(key) and key.removeprefix("settings.") not in FREE]
        if changed:
            raise InvalidInput(f"the run in {folder} was begun with something else ({'; '.join(changed[:6])}): give "
                               "another `out`, or remove that folder to begin again")
    record["sessions"].append({"started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                               "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "code": code_version(),
                               "packages": package_versions(), "machine": machine()})
    write_json(file, record)


def end(folder: Path) -> None:
    """Record how long this session took, and the memory of its first process (peak, MB)."""
    file = folder / FILE
    record = json.loads(file.read_text())
    session = record["sessions"][-1]
    began = datetime.fromisoformat(session["started"])
    session["seconds"] = round((datetime.now(timezone.utc) - began).total_seconds())
    session["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_json(file, record)


def code_version() -> dict:
    """The commit this code was run from, and whether tracked files differed from it."""
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git here
        commit = changed = None
    return {"commit": commit, "dirty": bool(changed) if commit else None}


def package_versions() -> dict[str, str]:
    """Versions of what decides a run's arithmetic, and of Python."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict:
    import torch

    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {"platform": platform.platform(), "cores": os.cpu_count(), "gpus": gpus}


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flat(values, where: str = "") -> dict:
    if isinstance(values, dict):
        return {key: value for name, part in values.items() for key, value in _flat(part, f"{where}{name}.").items()}
    return {where.rstrip("."): values}
