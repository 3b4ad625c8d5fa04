"""What a run's folder says about itself: settings, data, code, packages and machine (`run.json`)."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from engine.errors import InvalidInput
from engine.models.hub import cached_commit
from training.files import write_json

FILE = "run.json"
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "monai",
    "scipy",
    "deepspeed",
    "tensorboard",
)
# Settings that change nothing in the result may differ when a run goes on.
FREE = {
    "trainer." + name
    for name in (
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "disable_tqdm",
        "log_level",
        "report_to",
        "run_name",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "ddp_timeout",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs.use_reentrant",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
    )
} | {
    "sample_every",
    "out",
    "data.m3d.root",
    *(f"data.m3d.validation.{name}" for name in ("split", "samples", "answers")),
}
# How a batch is spread over processes and accumulated. Losses do not depend on it, where its product stays as it was.
SPREAD = ("processes", "settings.trainer.per_device_train_batch_size", "settings.trainer.gradient_accumulation_steps")
# transformers' own values for what a configuration leaves out.
USUAL_BATCH = 8
_USUAL = {SPREAD[1]: USUAL_BATCH, SPREAD[2]: 1}


# Settings that name what a run starts from, and what is read of it where that is a folder.
STARTS = (
    "start",
    "start.language_model",
    "start.vision_tower",
    "start.mm_projector",
    "start.seg_module",
    "start.lora",
    "teacher",
    "text_encoder",
    "vision_tower",
    "trained",
    "base",
)
_READ = {".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".txt"}


def begin(folder: Path, stage: str, settings: dict, data: dict | None = None, world_size: int = 1) -> None:
    """Record that a run begins or goes on; InvalidInput unless folder, settings, data, the batch of all processes and
    the files that it starts from are the same."""
    decisive = {
        "stage": stage,
        "processes": world_size,
        "settings": settings,
        "started_from": started_from(settings),
        "data": data or {},
    }
    record = _matching(folder, decisive) or {**decisive, "sessions": []}
    record["sessions"].append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "code": code_version(),
            "packages": package_versions(),
            "machine": machine(),
        }
    )
    write_json(folder / FILE, record)


def check(folder: Path, stage: str, settings: dict) -> None:
    """InvalidInput if a finished run in `folder` had other settings, or if what it started from has changed since."""
    _matching(folder, {"stage": stage, "settings": settings, "started_from": started_from(settings)})


def end(folder: Path) -> None:
    """Record how long this session took, and the memory of its first process (peak, MB)."""
    file = folder / FILE
    record = json.loads(file.read_text())
    session = record["sessions"][-1]
    began = datetime.fromisoformat(session["started"])
    session["seconds"] = round((datetime.now(UTC) - began).total_seconds())
    session["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_json(file, record)


def started_from(settings: dict) -> dict[str, str]:
    """Hashes of the files that a run starts from, by setting and file name, and commits of Hugging Face ids.

    What is not on this machine is left out, and what a package carries, too: the settings name its version.
    """
    named = _flat(settings)
    found = {}
    for name in STARTS:
        if not isinstance(source := named.get(name), str):
            continue
        path = Path(source).expanduser()
        files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
        found |= {
            f"{name}/{file.name}": sha256(file)
            for file in files
            if file == path or file.is_file() and file.suffix in _READ and file.name != FILE
        }
        if not path.exists() and (commit := cached_commit(source)):
            found[f"{name}/commit"] = commit
    return found


def _matching(folder: Path, decisive: dict) -> dict | None:
    """The record in `folder`, None without one. InvalidInput if something decisive is not as recorded; what a record
    of an older version does not hold is not compared."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise InvalidInput(f"{file} cannot be read: {error}") from None
    decisive = {key: value for key, value in decisive.items() if key in record}
    before, now = (_flat({key: values[key] for key in decisive}) for values in (record, decisive))
    # Whatever a run started from may be gone once it was read.
    sources = [{key.partition("/")[0] for key in flat if key.startswith("started_from.")} for flat in (before, now)]
    gone = sources[0] ^ sources[1]
    spread = SPREAD if _same_batch(before, now) else ()
    changed = [
        f"{key.removeprefix('settings.').removeprefix('started_from.')}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and key.removeprefix("settings.") not in FREE
        and key not in spread
        and key.partition("/")[0] not in gone
    ]
    if changed:
        raise InvalidInput(
            f"the run in {folder} was begun with something else ({'; '.join(changed[:6])}): give "
            "another `out`, or remove that folder to begin again"
        )
    return record


def _same_batch(before: dict, now: dict) -> bool:
    """Whether a step has the samples that it had, and its losses their value, however they are spread."""
    if any(key.startswith(("settings.trainer.deepspeed", "settings.trainer.fsdp")) and now[key] for key in now):
        return False  # optimizer states lie in as many files as there were processes
    processes, batch, steps = ([flat.get(key, _USUAL.get(key)) for flat in (before, now)] for key in SPREAD)
    if None in processes:
        return False  # a check of settings alone
    if now.get("stage") == "pretrain_clip":  # pairs are compared within a batch, not over accumulated ones
        return processes[0] * batch[0] == processes[1] * batch[1] and steps[0] == steps[1]
    return processes[0] * batch[0] * steps[0] == processes[1] * batch[1] * steps[1]


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
