"""From a data root of M3D-Data to the samples of a task. What lies where, and what it says, training's sets read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench.samples import Sample, checked_task, is_nifti
from engine.errors import InvalidInput
from training.data.reading import read_json
from training.data.sample import BrokenSample
from training.data.sets import (
    CAP,
    REFSEG,
    REFSEG_TABLES,
    SEG,
    TASKS,
    TEST_5K,
    VQA,
    Captions,
    ClosedVqa,
    Files,
    Referring,
    Structures,
    TrainingSet,
    Vqa,
    splits_of,
)

POOLS = {100: "test100", 500: "test500", 1000: "test1k", 2000: "test"}  # splits of M3D_Cap.json


def samples_of(task: str, root: Path, limit: int | None = None) -> list[Sample]:
    """The samples of a task, in the order of their images: a scan's questions stand together.

    Args:
        task: one of TASKS.
        root: the data root.
        limit: how many at most; the same ones in every run, and those of a smaller limit are among those of a greater.

    Raises:
        InvalidInput: if the root lacks the data, saying what was looked for, or an index is not as published.
    """
    found = [sample for data in _sets(task, root) for sample in _samples(task, data)]
    if not found:
        raise InvalidInput(f"{root} has no samples for {task}: {looked_for(task)} has no entries for a test")
    if twice := [key for key, times in Counter(s.key for s in found).items() if times > 1]:
        raise InvalidInput(f"{root}: {len(twice)} entries for {task} stand there twice, such as {twice[0]}")
    if limit is not None:
        found = sorted(found, key=lambda s: hashlib.sha256(s.key.encode()).digest())[:limit]
    return sorted(found, key=lambda s: (str(s.image), s.key))


def looked_for(task: str) -> str:
    """The files that a task is read from, as a path below the data root."""
    return _WANTED[checked_task(task)]


def fingerprint(task: str, root: Path) -> str:
    """SHA-256 of the files that say which samples there are and how they are worded: rows of others are not mixed."""
    digest = hashlib.sha256()
    for path in sorted({path for data in _sets(task, root) for path in data.sources}):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pool_of(root: Path, size: int) -> list[str] | None:
    """Keys of the pairs of a retrieval pool that M3D_Cap.json names as a split; None if it names none of that size."""
    index = read_json(root / CAP / "M3D_Cap.json")
    split = index.get(POOLS[size])
    if size == 2000 or not isinstance(split, list):
        return None
    return [entry["image"] for entry in split]


def _sets(task: str, root: Path) -> list[TrainingSet]:
    """What a task is read from; files are not looked at yet. Raises InvalidInput if it is not there."""
    if not root.is_dir():
        raise InvalidInput(f"the data root {root} is not a folder")
    kind, split = _KINDS[checked_task(task)], "test"
    if task in ("vqa-closed", "vqa-open") and TEST_5K in splits_of(kind, root):
        split = TEST_5K  # what the published figures, which stand beside ours, were measured on
    if task != "seg-referring":
        return TASKS[kind](root, split, None)
    # Referring questions are M3D-RefSeg's, and M3D-Seg's by a description, as far as they are there.
    structures = TASKS[kind](root, split, None) if any((root / SEG).glob("*/*.json")) else []
    if structures and not (root / REFSEG / REFSEG_TABLES["test"]).is_file():
        return structures
    return [*structures, *TASKS["refseg"](root, split, None)]


def _samples(task: str, data: TrainingSet) -> Iterator[Sample]:
    for index in range(len(data)):
        try:
            files, broken = data.files(index), None
        except BrokenSample as error:
            files, broken = Files(data.index), error
        common = dict(task=task, scan=_case(data.root, files.image), image=files.image, data=data, index=index)
        if isinstance(data, Structures):
            style, structure = data.style(index), data.name(index)
            if index % 2 and style == "by_name":  # no description is known: training asks by the name once more
                continue
            if style not in _STYLES[task] or task in ("rec", "reg") and is_nifti(files.image):
                continue  # boxes are written in the model's volume, which is not known of a NIfTI file
            groups = {"data set": data.code, "structure": structure, "asked": style.replace("_", " ")}
            key = f"{data.rows[index // 2]['label']} {style}"
            yield Sample(key, **common, mask=files.mask, structure=structure, groups=groups)
            continue
        row = data.rows[index]
        if isinstance(data, Captions):
            yield Sample(row["image"], **common, groups={"image": Path(row["image"]).stem})
        elif isinstance(data, Vqa):
            closed = isinstance(data, ClosedVqa)
            yield Sample(
                f"{index + 1:06} {row['Image Path']}",
                **common,
                choices=data.choices(index) if closed else {},
                choice=row["Answer Choice"].strip() if closed else None,
                groups={"question type": row["Question Type"]},
            )
        elif isinstance(data, Referring):
            yield Sample(
                f"{index + 1:06} {row['Image']}",
                **common,
                mask=files.mask,
                label=files.label,
                groups={"data set": "RefSeg"},
                broken=broken,
            )


def _case(root: Path, image: Path) -> str:
    """The image's folder: M3D-Data has one for each case, with all of its images."""
    folder = image.parent
    return str(folder.relative_to(root) if folder.is_relative_to(root) else folder)


_SEG_JSON = f"{SEG}/NNNN/NNNN.json"
_WANTED = {
    "retrieval": f"{CAP}/M3D_Cap.json",
    "report": f"{CAP}/M3D_Cap.json",
    "vqa-closed": f"{VQA}/M3D_VQA_test5k.csv or M3D_VQA_test.csv",
    "vqa-open": f"{VQA}/M3D_VQA_test5k.csv or M3D_VQA_test.csv",
    "rec": _SEG_JSON,
    "reg": _SEG_JSON,
    "seg-semantic": _SEG_JSON,
    "seg-referring": f"{REFSEG}/{REFSEG_TABLES['test']} or {_SEG_JSON}",
}
_KINDS = {  # task -> training's
    "retrieval": "pair",
    "report": "caption",
    "vqa-closed": "vqa_closed",
    "vqa-open": "vqa_open",
    "rec": "rec",
    "reg": "reg",
    "seg-semantic": "segmentation",
    "seg-referring": "segmentation",
}
_BOTH = ("by_name", "by_description")
_STYLES = {"rec": _BOTH, "reg": _BOTH, "seg-semantic": ("by_name",), "seg-referring": ("by_description",)}
