"""One sample of the benchmark: what is asked about which scan, and what is right."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np

from engine.errors import InvalidInput
from engine.prompt import format_box
from training.data.reading import read_mask, read_text
from training.data.sample import BrokenSample
from training.data.sets import box_of
from training.data.wording import choose, descriptions, templates

TASKS = ("retrieval", "report", "vqa-closed", "vqa-open", "rec", "reg", "seg-semantic", "seg-referring")
MASKED = ("seg-semantic", "seg-referring")
_STRUCTURE_TASKS = {"rec": "rec", "reg": "reg", "seg-semantic": "segmentation", "seg-referring": "segmentation"}
_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Sample:
    """One sample.

    key: unique in its task, and the same in every run over the same files. task: one of TASKS.
    scan: the case that the image is of, which is what intervals are taken over: the image's folder.
    image, text, mask: files. label: the value in the mask that is meant; None: all that is not 0.
    question, answer: None where they depend on the mask: see `read_truth`.
    choices: letter -> text, and choice, the right letter, of closed questions.
    style: by_name or by_description, of questions about a structure.
    groups: by what the report breaks the figures down (question type, structure, data set).
    """

    key: str
    task: str
    scan: str
    image: Path
    question: str | None = None
    answer: str | None = None
    text: Path | None = None
    mask: Path | None = None
    label: int | None = None
    choices: dict[str, str] = field(default_factory=dict)
    choice: str | None = None
    style: str | None = None
    structure: str | None = None
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Truth:
    """What is asked and what is right, after the sample's files were read.

    question: as it is sent: with a space before it, except for reports (as in training). answer: text.
    mask: bool, the image's own shape without the channel; None for tasks without one.
    box: float64 [6], first and last voxel ÷ length of each axis; None without a mask, or of an empty one.
    spacing_mm: of the mask's axes; None where nothing says it.
    """

    question: str
    answer: str
    mask: np.ndarray | None = None
    box: np.ndarray | None = None
    spacing_mm: tuple[float, ...] | None = None


def read_truth(sample: Sample) -> Truth:
    """The question, and what is right. Raises BrokenSample."""
    if sample.text is not None:
        return Truth(sample.question or "", " ".join(read_text(sample.text).split()))
    if sample.mask is None:
        return Truth(f" {sample.question}", sample.answer or "")
    mask, spacing = _read_mask(sample)
    box = box_of(mask) if mask.any() else None
    question, answer = sample.question, sample.answer
    if question is None:
        question, answer = _worded(sample, box)
    elif box is None:
        raise BrokenSample([sample.mask], f"no voxel of the mask is {sample.label}, which {sample.key} means")
    return Truth(f" {question}", answer or "", mask, box, spacing)


def drawn(key: str) -> np.random.Generator:
    """Random numbers that depend on the key alone."""
    return np.random.default_rng(zlib.crc32(key.encode()))


def is_nifti(path: Path) -> bool:
    return path.name.endswith(_NIFTI)


def spacing_file(image: Path) -> Path:
    """Where the voxel size of an .npy image may stand: a JSON list of mm along its axes. M3D-Data has none."""
    return image.with_name(image.name.removesuffix(".npy") + ".spacing.json")


def _read_mask(sample: Sample) -> tuple[np.ndarray, tuple[float, ...] | None]:
    """(bool [D, H, W], mm of its axes or None)."""
    image, path = sample.image, sample.mask
    if path is None:
        raise ValueError(f"{sample.key} has no mask")
    if is_nifti(image):
        array, affine = _nifti(path)
        shape = nibabel.load(image).shape
        if array.shape != shape:
            raise BrokenSample([path, image], f"the mask has shape {array.shape}, its image {shape}")
        return array != 0 if sample.label is None else array == sample.label, tuple(
            map(float, np.linalg.norm(affine[:3, :3], axis=0))
        )
    shape = np.load(image, mmap_mode="r").shape
    return read_mask(path, image, shape, sample.label)[0], _spacing_of(image)


def _nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = nibabel.load(path)
        return np.asanyarray(image.dataobj), image.affine
    except (OSError, EOFError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise BrokenSample(path, f"cannot be read: {error}") from None


def _spacing_of(image: Path) -> tuple[float, ...] | None:
    path = spacing_file(image)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BrokenSample(path, f"cannot be read: {error}") from None
    if not (
        isinstance(values, list) and len(values) == 3 and all(isinstance(v, (int, float)) and v > 0 for v in values)
    ):
        raise BrokenSample(path, f"must be three numbers above 0, mm along D, H and W, not {values!r:.80}")
    return tuple(map(float, values))


def _worded(sample: Sample, box: np.ndarray | None) -> tuple[str, str]:
    """(question, answer) about a structure, in training's words; box: where it is, None if it is not in the scan."""
    task, rng = _STRUCTURE_TASKS[sample.task], drawn(sample.key)
    slots = {"name": sample.structure}
    if sample.style == "by_description":
        slots["description"] = choose(rng, descriptions()[sample.structure])
    # What is not there has no box to ask about.
    asked = templates()["rec" if box is None and task == "reg" else task][sample.style]
    if box is not None:
        slots["box"] = format_box(box)
    answers = asked["absent" if box is None else "answer"]
    return choose(rng, asked["train"]).format(**slots), choose(rng, answers).format(**slots)


def checked_task(task: str) -> str:
    """The task. Raises InvalidInput for another."""
    if task not in TASKS:
        raise InvalidInput(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    return task
