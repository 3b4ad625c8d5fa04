"""One sample of the benchmark: what is asked about which scan, and what is right."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np

from engine.errors import InvalidInput
from training.data.reading import read_mask
from training.data.sample import BrokenSample
from training.data.sets import TrainingSet, box_of

TASKS = ("retrieval", "report", "vqa-closed", "vqa-open", "rec", "reg", "seg-semantic", "seg-referring")
MASKED = ("seg-semantic", "seg-referring")
_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Sample:
    """One sample.

    key: unique in its task, and the same in every run over the same files. task: one of TASKS.
    scan: the case that the image is of, which is what intervals are taken over: the image's folder.
    image, mask: files. label: the value in the mask that is meant; None: all that is not 0.
    data, index: the set of training's that it is from, and where it stands there: what is asked is worded by that.
    choices: letter -> text, and choice, the right letter, of closed questions.
    structure: the name of what is asked about, of M3D-Seg's.
    groups: by what the report breaks the figures down (question type, structure, data set).
    broken: why nothing can be asked, if the index alone says so.
    """

    key: str
    task: str
    scan: str
    image: Path
    data: TrainingSet = field(compare=False, repr=False)
    index: int
    mask: Path | None = None
    label: int | None = None
    choices: dict[str, str] = field(default_factory=dict)
    choice: str | None = None
    structure: str | None = None
    groups: dict[str, str] = field(default_factory=dict)
    broken: BrokenSample | None = field(default=None, compare=False)


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
    mask, spacing = (None, None) if sample.mask is None else _read_mask(sample)
    question, answer = words_of(sample, mask)
    box = box_of(mask) if mask is not None and mask.any() else None
    if mask is not None and sample.structure is None and box is None:  # of an answer without [SEG]
        raise BrokenSample([sample.mask], f"no voxel of the mask is {sample.label}, which {sample.key} means")
    return Truth(f" {question}" if sample.data.space else question, answer, mask, box, spacing)


def words_of(sample: Sample, mask: np.ndarray | None = None) -> tuple[str, str]:
    """(question, answer) in training's words, drawn by the key alone: every run asks the same. Raises BrokenSample.

    mask: bool [D, H, W], which questions about a structure need; others are only checked against it.
    """
    rng = np.random.default_rng(zlib.crc32(sample.key.encode()))
    return sample.data.worded(sample.index, None if mask is None else mask[None], rng)


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


def checked_task(task: str) -> str:
    """The task. Raises InvalidInput for another."""
    if task not in TASKS:
        raise InvalidInput(f"there is no task {task!r}: choose from {', '.join(TASKS)}")
    return task
