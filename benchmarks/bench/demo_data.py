"""A small data root in M3D-Data's layout, of the demonstration's held-out scans: every task has samples there.

Seeded views of the scans at the model's size, the first of each as it is; and for masks in mm the scans in their own
space (NIfTI). All images of a scan lie in one folder, so that intervals know them as one case.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from training.data.augment import Augmentation, View, view_of
from training.data.questions import Question, ask, caption, words
from training.data.scans import SOURCES, load_scans
from training.data.sets import CAP, REFSEG, SEG, VQA

_CODE = "demo"  # of the data set in M3D-Seg's layout
_SEED = 9_000_000  # apart from training's and evaluate.py's
_VQA_COLUMNS = ("Image Path", "Question Type", "Question", *(f"Choice {c}" for c in "ABCD"), "Answer", "Answer Choice")
_REFSEG_COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")
# M3D-VQA numbers its questions: 1 plane, 2 phase, 3 organ, 4 abnormality, 5 location. Modality stands in for phase.
_QUESTION_TYPES = {"modality": 2, "part": 3, "presence": 3, "tumour": 4, "side": 5}


def write_root(
    root: Path,
    names: Sequence[str],
    size: tuple[int, int, int],
    fine_grid: tuple[int, int, int],
    augmentation: Augmentation,
    views: int,
) -> None:
    """Write the root.

    Args:
        root: a folder; files there are written anew.
        names: of the scans, see training.data.scans.SOURCES.
        size: of the model's volume, (D, H, W). fine_grid: to which scans are prepared before they are augmented.
        augmentation: ranges of the views after the first.
        views: of each scan.

    Raises:
        Unavailable: if the packages with the scans cannot be had.
    """
    writer = _Writer(root)
    for scan in load_scans(tuple(names), fine_grid):
        for k in range(views):
            rng = np.random.default_rng([_SEED, k, sum(scan.name.encode())])
            writer.view(view_of(scan, augmentation if k else None, size, rng), k, rng)
    for name in names:
        writer.scan(name)
    writer.close()


class _Writer:
    def __init__(self, root: Path):
        self.root = root
        self.pairs: list[dict] = []
        self.questions: list[tuple] = []
        self.referring: list[tuple] = []
        self.entries: list[dict] = []
        self.classes: list[str] = []

    def view(self, view: View, number: int, rng: np.random.Generator) -> None:
        image = f"{_CODE}/{view.scan}/view-{number}.npy"
        _save(self.root / SEG / image, view.image[None])
        masks = {name: self._mask(view, number, name, image) for name in view.visible}
        text = f"{CAP}/{view.scan}/view-{number}.txt"
        (self.root / text).parent.mkdir(parents=True, exist_ok=True)
        (self.root / text).write_text(caption(view, rng))
        self.pairs.append({"image": f"{SEG}/{image}", "text": text})
        for task, kind in _QUESTION_TYPES.items():
            if question := ask(task, view, rng):
                self.questions.append((f"{SEG}/{image}", kind, *_choices(question, view, rng)))
        for name, path in masks.items():
            asked = ask("segment", view, rng, structure=name)
            self.referring.append((f"{SEG}/{image}", f"{SEG}/{path}", 1, 0, asked.question, asked.answer))

    def scan(self, name: str) -> None:
        """The scan itself, with the masks that come with it."""
        scan, masks = SOURCES[name]()
        image = f"{_CODE}/{name}/scan.nii.gz"
        _save_nifti(self.root / SEG / image, scan.array, scan.affine)
        for structure, mask in masks.items():
            label = f"{_CODE}/{name}/scan/mask_{self._class(structure)}.nii.gz"
            _save_nifti(self.root / SEG / label, np.asarray(mask, np.uint8), scan.affine)
            self.entries.append({"image": image, "label": label})

    def close(self) -> None:
        """Write the indices."""
        _write_json(self.root / CAP / "M3D_Cap.json", {"train": [], "validation": [], "test": self.pairs})
        _write_csv(self.root / VQA / "M3D_VQA_test.csv", _VQA_COLUMNS, self.questions)
        _write_csv(self.root / REFSEG / "M3D_RefSeg_test.csv", _REFSEG_COLUMNS, self.referring)
        labels = {"0": "background"} | {str(n): name for n, name in enumerate(self.classes, start=1)}
        index = {"labels": labels, "train": [], "test": self.entries}
        _write_json(self.root / SEG / _CODE / f"{_CODE}.json", index)

    def _mask(self, view: View, number: int, name: str, image: str) -> str:
        path = f"{_CODE}/{view.scan}/view-{number}/mask_{self._class(name)}.npy"
        _save(self.root / SEG / path, view.mask(name)[None])
        self.entries.append({"image": image, "label": path})
        return path

    def _class(self, name: str) -> int:
        if name not in self.classes:
            self.classes.append(name)
        return self.classes.index(name)


def _choices(question: Question, view: View, rng: np.random.Generator) -> tuple:
    """(question, four choices, right one, its letter): choices are whole sentences, as the model answers."""
    sentences = [str(text) for text in rng.permutation(_sentences(question, view))]
    right = sentences.index(question.answer)  # the wordings are training's own
    padded = (*sentences, *[""] * (4 - len(sentences)))
    return (question.question, *padded, question.answer, "ABCD"[right])


def _sentences(question: Question, view: View) -> list[str]:
    """The answers to a closed question among which one is right."""
    task = words()["tasks"][question.task]
    if question.task == "modality":
        return [task["answer"][0].format(a_modality=name) for name in words()["modalities"].values()]
    if question.task == "part":
        return [task["answer"][0].format(part=part) for part in words()["parts"]]
    if question.task == "side":
        return [task["answer"][0].format(tumour_side=side) for side in ("left", "right")]
    if question.task == "tumour":
        return [*(task["yes"][0].format(tumour_side=side) for side in ("left", "right")), task["no"][0]]
    slots = {"name": question.structure, "is": "are" if question.structure in words()["plural"] else "is"}
    return [task[kind][0].format(**slots) for kind in ("yes", "no")]


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def _save_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def _write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
