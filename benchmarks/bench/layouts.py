"""The published layouts of M3D-Data (training/data/README.md): from the files of a data root to samples of a task."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.bench.metrics.choices import LETTERS
from benchmarks.bench.samples import Sample, checked_task, drawn, is_nifti
from engine.errors import InvalidInput
from engine.prompt import SEG_TOKEN
from training.data.reading import mask_id, read_json, read_split, read_table
from training.data.sets import CAP, REFSEG, SEG, VQA, codes_of, names_of
from training.data.wording import choose, descriptions, templates

POOLS = {100: "test100", 500: "test500", 1000: "test1k", 2000: "test"}  # splits of M3D_Cap.json
_MASK = re.compile(r"mask_(\d+)\.(?:npy|nii|nii\.gz)")


def samples_of(task: str, root: Path, limit: int | None = None) -> list[Sample]:
    """The samples of a task, in the order of their images: a scan's questions stand together.

    Args:
        task: one of TASKS.
        root: the data root.
        limit: how many at most; the same ones in every run, and those of a smaller limit are among those of a greater.

    Raises:
        InvalidInput: if the root lacks the data, saying what was looked for, or an index is not as published.
    """
    if not root.is_dir():
        raise InvalidInput(f"the data root {root} is not a folder")
    found = list(_LAYOUTS[checked_task(task)](root))
    if not found:
        raise InvalidInput(f"{root} has no samples for {task}: {_WANTED[task]} has no entries for a test")
    if twice := [key for key, times in Counter(s.key for s in found).items() if times > 1]:
        raise InvalidInput(f"{root}: {len(twice)} entries for {task} stand there twice, such as {twice[0]}")
    if limit is not None:
        found = sorted(found, key=lambda s: hashlib.sha256(s.key.encode()).digest())[:limit]
    return sorted(found, key=lambda s: (str(s.image), s.key))


def looked_for(task: str) -> str:
    """The files that a task is read from, as a path below the data root."""
    return _WANTED[checked_task(task)]


def fingerprint(task: str, root: Path) -> str:
    """SHA-256 of the indices that a task is read from: rows of another data root are not mixed with this one's."""
    digest = hashlib.sha256()
    for part in _WANTED[checked_task(task)].split(" or "):
        for path in sorted(root.glob(part.replace("NNNN", "*"))):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def pool_of(root: Path, size: int) -> list[str] | None:
    """Keys of the pairs of a retrieval pool that M3D_Cap.json names as a split; None if it names none of that size."""
    index = read_json(root / CAP / "M3D_Cap.json")
    split = index.get(POOLS[size])
    if size == 2000 or not isinstance(split, list):
        return None
    return [entry["image"] for entry in split]


def _pairs(task: str) -> Callable[[Path], Iterator[Sample]]:
    def pairs(root: Path) -> Iterator[Sample]:
        for row in read_split(_found(root, task), "test", ("image", "text")):
            key = row["image"]
            question = choose(drawn(key), templates()["caption"]["train"]) if task == "report" else ""
            image = root / row["image"]
            plane = {"image": Path(key).stem}
            yield Sample(key, task, _case(root, image), image, question, text=root / row["text"], groups=plane)

    return pairs


def _vqa(task: str) -> Callable[[Path], Iterator[Sample]]:
    columns = ("Image Path", "Question", "Answer", "Question Type")
    if task == "vqa-closed":
        columns += (*(f"Choice {letter}" for letter in LETTERS), "Answer Choice")

    def questions(root: Path) -> Iterator[Sample]:
        for number, row in enumerate(read_table(_found(root, task), columns), start=1):
            image = root / row["Image Path"]
            common = dict(
                key=f"{number:06} {row['Image Path']}",
                task=task,
                scan=_case(root, image),
                image=image,
                groups={"question type": row["Question Type"]},
            )
            if task == "vqa-open":
                yield Sample(**common, question=row["Question"], answer=row["Answer"])
                continue
            choices = {letter: text for letter in LETTERS if (text := row[f"Choice {letter}"].strip())}
            said = " ".join(f"{letter}. {text}" for letter, text in choices.items())
            yield Sample(
                **common,
                question=f"{row['Question']} Choices: {said}",
                answer=f"{row['Answer Choice']}. {row['Answer']}",
                choices=choices,
                choice=row["Answer Choice"],
            )

    return questions


def _structures(task: str, styles: tuple[str, ...]) -> Callable[[Path], Iterator[Sample]]:
    def structures(root: Path) -> Iterator[Sample]:
        for code in codes_of(root):
            index = root / SEG / code / f"{code}.json"
            if read_json(index).get("test") == []:  # some published data sets have no test cases
                continue
            names = names_of(index, code)
            for row in read_split(index, "test", ("image", "label")):
                number = _class_of(index, row["label"], len(names))
                image = root / SEG / row["image"]
                if task in ("rec", "reg") and is_nifti(image):  # boxes are written in the model's volume
                    continue
                for style in styles:
                    if style == "by_description" and not descriptions().get(names[number]):
                        continue
                    yield Sample(
                        f"{row['label']} {style}",
                        task,
                        _case(root, image),
                        image,
                        mask=root / SEG / row["label"],
                        style=style,
                        structure=names[number],
                        groups={"data set": code, "structure": names[number], "asked": style.replace("_", " ")},
                    )

    return structures


def _referring(root: Path) -> Iterator[Sample]:
    """M3D-RefSeg's test questions, and M3D-Seg's structures asked for by a description, as far as they are there."""
    table, structures = root / _REFSEG, any((root / SEG).glob("*/*.json"))
    if structures:
        yield from _structures("seg-referring", ("by_description",))(root)
    if not table.is_file():
        if structures:
            return
        raise InvalidInput(f"{root} lacks what seg-referring is read from: {_WANTED['seg-referring']} was looked for")
    for number, row in enumerate(read_table(table, ("Image", "Mask", "Mask_ID", "Question", "Answer")), start=1):
        image, label = root / row["Image"], mask_id(row["Mask_ID"])
        # The published answers were written by a language model, which now and then changed the brackets.
        answer = row["Answer"].strip().replace("<SEG>", SEG_TOKEN)
        yield Sample(
            f"{number:06} {row['Image']}",
            "seg-referring",
            _case(root, image),
            image,
            row["Question"].strip(),
            answer,
            mask=root / row["Mask"],
            label=-1 if label is None else label,
            groups={"data set": "RefSeg"},
        )


def _class_of(index: Path, label: str, classes: int) -> int:
    found = _MASK.fullmatch(Path(label).name)
    if not found:
        raise InvalidInput(f"{index}: the label {label!r} is not called mask_<class id>.npy")
    if int(found[1]) >= classes:
        raise InvalidInput(f"{index}: the label {label!r} is of class {found[1]}, there are {classes} classes, from 0")
    return int(found[1])


def _case(root: Path, image: Path) -> str:
    """The image's folder: M3D-Data has one for each case, with all of its images."""
    return str(image.parent.relative_to(root))


def _found(root: Path, task: str) -> Path:
    path = root / _WANTED[task]
    if not path.is_file():
        raise InvalidInput(f"{root} lacks what {task} is read from: {path} was looked for")
    return path


_REFSEG = f"{REFSEG}/M3D_RefSeg_test.csv"
_SEG_JSON = f"{SEG}/NNNN/NNNN.json"
_WANTED = {
    "retrieval": f"{CAP}/M3D_Cap.json",
    "report": f"{CAP}/M3D_Cap.json",
    "vqa-closed": f"{VQA}/M3D_VQA_test.csv",
    "vqa-open": f"{VQA}/M3D_VQA_test.csv",
    "rec": _SEG_JSON,
    "reg": _SEG_JSON,
    "seg-semantic": _SEG_JSON,
    "seg-referring": f"{_REFSEG} or {_SEG_JSON}",
}
_BOTH = ("by_name", "by_description")
_LAYOUTS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "retrieval": _pairs("retrieval"),
    "report": _pairs("report"),
    "vqa-closed": _vqa("vqa-closed"),
    "vqa-open": _vqa("vqa-open"),
    "rec": _structures("rec", _BOTH),
    "reg": _structures("reg", _BOTH),
    "seg-semantic": _structures("seg-semantic", ("by_name",)),
    "seg-referring": _referring,
}
