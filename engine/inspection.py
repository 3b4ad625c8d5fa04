"""What a checkpoint is, what it lacks, and what its export needs here, before it is downloaded or exported."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import CheckpointError, InvalidInput
from engine.manifest import FILE_NAME as MANIFEST
from engine.memory import available_memory
from engine.models import layout
from engine.models.base import ADDED_TOKENS
from engine.models.checkpoint import differences, read_config
from engine.models.config import ViTConfig
from engine.models.description import Description, LanguageModel, Tokenizer, describe
from engine.models.needs import ITEM_BYTES, needs
from engine.models.survey import SAFETENSORS, Entry, Survey, survey
from engine.models.weights import Weights, listed

_DTYPES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class Keys:
    """Keys of the weights, against those that config.json asks for. never_run: keys that later versions of MONAI add,
    and that are left out. unchecked: why they were not compared."""

    expected: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    never_run: tuple[str, ...] = ()
    unchecked: str | None = None


@dataclass(frozen=True)
class Need:
    """Bytes that something needs, and those that are there. where: a folder on the disk; None for memory.
    for_export: without them the export is refused."""

    what: str
    needed: int
    available: int
    ok: bool
    where: str | None = None
    for_export: bool = True


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint.

    kind: config.json's model_type. visual_tokens: that one volume becomes. parameters: numbers by part. stored: bytes
    of tensors by precision; empty where no header could be read. read, unread: bytes by file. to_fetch: bytes that are
    still to be downloaded, by file. export_s: seconds, about. notes: what is worth knowing. problems: why it cannot be
    exported anywhere.
    """

    source: str
    commit: str | None
    kind: str
    language_model: LanguageModel
    vision: ViTConfig
    segmentation: ViTConfig | None
    visual_tokens: int | None
    parameters: dict[str, int]
    stored: dict[str, int]
    tokenizer: Tokenizer
    keys: Keys
    read: dict[str, int]
    unread: dict[str, int]
    to_fetch: dict[str, int]
    target: str
    precision: str
    needs: tuple[Need, ...]
    export_s: float
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def lacking(self) -> list[Need]:
        """What this machine has too little of for the export."""
        return [need for need in self.needs if need.for_export and not need.ok]

    @property
    def ready(self) -> bool:
        """Whether it can be exported on this machine."""
        return not self.problems and not self.lacking


def inspect(
    source: str | Path, target: str = "cpu", precision: str = "fp32", say: Callable[[str], None] = lambda text: None
) -> Inspection:
    """Inspect a checkpoint. No tensor is read, no code in the folder is run, and nothing large is downloaded.

    Args:
        source: a folder or a name on the hub, of M3D-LaMed or M3D-CLIP.
        target, precision: of the export that it shall become, as for `export/build_engines.py`.
        say: takes lines about the hub.

    Raises:
        CheckpointError: there is no checkpoint, or config.json does not describe one that the engine reads.
        InvalidInput: the precision is none, or not for this target.
    """
    known = [name for name in ITEM_BYTES if name != "fp8" or target != "cpu"]
    if precision not in known:
        raise InvalidInput(f"--precision {precision}: for target {target} known are {', '.join(known)}")
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file() and not (folder / layout.CONFIG).is_file():
        raise CheckpointError(
            f"{source} is an exported model repository, not a checkpoint: `m3d doctor --repository {source}` says "
            "what is in it"
        )
    files = survey(source, say)
    model = describe(files.folder, read_config(files.folder))
    problems = list(model.problems)
    keys, entries = _keys(files, model, problems)
    stored = Counter[str]()
    for entry in entries.values():
        stored[_DTYPES.get(entry.dtype, entry.dtype)] += entry.size
    read = {name: files.sizes[name] for name in files.read if name in files.sizes}
    unread = {name: size for name, size in sorted(files.sizes.items()) if name not in read}
    needed = needs(model.parts, sum(read.values()), target, precision)
    return Inspection(
        source=files.source,
        commit=files.commit,
        kind=model.kind,
        language_model=model.language_model,
        vision=model.vision,
        segmentation=model.segmentation,
        visual_tokens=model.visual_tokens,
        parameters=model.parameters,
        stored=dict(stored),
        tokenizer=model.tokenizer,
        keys=keys,
        read=read,
        unread=unread,
        to_fetch=files.absent,
        target=target,
        precision=precision,
        needs=tuple(_room(files, needed.disk, needed.memory, _serving(model, needed.serving, target))),
        export_s=needed.seconds,
        notes=tuple(model.notes),
        problems=tuple(problems),
    )


def _keys(files: Survey, model: Description, problems: list[str]) -> tuple[Keys, dict[str, Entry]]:
    """The keys against the expected ones, and what the headers say of the tensors."""
    entries, count = dict[str, Entry](), len(set(model.expected) - model.optional)
    try:
        names = files.tensor_files
        if not names:
            raise CheckpointError(f"{files.source} {layout.NO_WEIGHTS}{files.others}")
        if lost := [name for name in names if name not in files.sizes]:
            raise CheckpointError(
                f"the index names {', '.join(lost)}, which {_is(lost)} not there: get the checkpoint again"
            )
        for name in names:
            if (header := files.header(name)) is None:
                how = (
                    "when they are downloaded" if name.endswith(SAFETENSORS) else "at export: a .bin is not opened here"
                )
                return Keys(count, unchecked=f"keys are checked {how}"), {}
            entries |= header
    except CheckpointError as error:
        problems.append(str(error))
        return Keys(count, unchecked="the files are not all there, or damaged"), entries
    weights = Weights({key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()})
    expected, optional = dict(model.expected), model.optional
    if ADDED_TOKENS in expected:  # as many rows as there are, or none
        rows = entries[ADDED_TOKENS].shape[:1] if ADDED_TOKENS in entries else (0,)
        expected[ADDED_TOKENS] = (*rows, *expected[ADDED_TOKENS][1:])
        optional |= {ADDED_TOKENS}
    different = differences(weights, expected, optional)
    if wrong := [f"{len(keys)} {what} ({listed(keys, 3)})" for what, keys in different.items() if keys]:
        problems.append(f"the weights do not fit config.json: {'; '.join(wrong)}")
    missing, unexpected, misshapen = (tuple(different[what]) for what in ("missing", "unexpected", "misshapen"))
    return Keys(count, missing, unexpected, misshapen, tuple(weights.never_run)), entries


def _serving(model: Description, needed: int, target: str) -> int | None:
    """Bytes of memory that a server on a CPU needs; None where something else decides."""
    return needed if target == "cpu" and model.parts.llm else None


def _room(files: Survey, disk: int, memory: int, serving: int | None) -> list[Need]:
    """Needs of download and export against this machine. They share the disk where the cache lies on it."""
    here, found, to_fetch = Path.cwd(), list[Need](), sum(files.absent.values())
    free = shutil.disk_usage(here).free
    if to_fetch and files.cache is not None:
        cache = next(folder for folder in (files.cache.root, *files.cache.root.parents) if folder.is_dir())
        free_there = shutil.disk_usage(cache).free
        fits = to_fetch <= free_there
        found.append(Need("disk for the download", to_fetch, free_there, fits, str(files.cache.root)))
        if os.stat(cache).st_dev == os.stat(here).st_dev:
            free = max(0, free - to_fetch)
    left = available_memory()
    found.append(Need("disk for the export", disk, free, disk <= free, str(here)))
    found.append(Need("memory for the export", memory, left, memory <= left))
    if serving is not None:
        found.append(Need("memory for serving on a CPU", serving, left, serving <= left, for_export=False))
    return found


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
