"""Raw folders as they are downloaded, turned into the cases of M3D-Data with the engine's presets.

What is accepted stands in README.md of this folder. Each `*_jobs` lists the cases of one family; each `_make_*` writes
one of them.
"""

from __future__ import annotations

import ast
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import sparse

from engine.errors import InvalidInput
from engine.scan import ARRAY_AFFINE, Scan, pack_scan, read_scan, read_volume
from engine.volume import Geometry, prepare
from training.data.jobs import Job, LeftOut
from training.data.reading import ABSENT, read_json
from training.data.wording import class_names

_NIFTI = (".nii.gz", ".nii")
_SLICES = (".png", ".jpg", ".jpeg")
_FINDINGS, _DISCUSSION, _FEWEST = "study_findings:", "discussion:", 5
_IMAGES, _LABELS, _MASK_FOLDERS = ("image", "ct"), ("label",), ("masks", "segmentations")
_SPARSE = re.compile(r"mask_(\(.*\))\.npz")
# M3D-Cap is downloaded as ct_case/ct_case_00.zip and so on; the reference's issues name folders ct_case_image, too.
_FAMILY = re.compile(r"(ct_case|ct_quizze)(?:_image)?(?:_\d+)?")
MASK_RULES = ("nearest", "half")
_NO_VOXEL = {"nearest": "is at no voxel of the model", "half": "fills no voxel of the model by half"}
DTYPES = ("float32", "float16", "uint8")
# What a name has in ASCII, where taking accents away is not enough.
_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
    | {"ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ı": "i", "–": "-", "—": "--", "×": "x", "°": "deg", "μ": "u"}
    | {"‘": "'", "’": "'", "“": '"', "”": '"'}
)
_LONGEST = 8  # letters that one foreign character becomes in ASCII

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Rules:
    """How cases are made. mask: of MASK_RULES. dtype: of DTYPES, in which images are stored; uint8 holds 0..255."""

    size: Size
    preset: str
    mask: str = "nearest"
    dtype: str = "float32"

    def settings(self, *, masks: bool = True) -> dict:
        """What decides a case, for JSON. masks: whether it has any. Older versions stored float32 without saying so."""
        return (
            {"size": self.size, "preset": self.preset}
            | ({"mask": self.mask} if masks else {})
            | ({"dtype": self.dtype} if self.dtype != "float32" else {})
        )

    def save(self, path: Path, image: np.ndarray) -> None:
        """An image in 0..1."""
        stored = np.round(image * 255) if self.dtype == "uint8" else image
        np.save(path, stored.astype(self.dtype))

    def of_mask(self, geometry: Geometry, mask: np.ndarray) -> np.ndarray:
        """bool [1, D, H, W]: where a mask of the scan's shape is in the model's volume."""
        if self.mask == "half":
            return geometry.mask_to_model(mask)[None] >= 0.5
        # The voxel at the beginning of each of the model's, as PyTorch's mode "nearest" takes it.
        view = geometry.view(mask)
        return view[np.ix_(*(np.arange(size) * n // size for n, size in zip(view.shape, self.size)))][None]


# --- M3D-Cap ---------------------------------------------------------------------------------------------------------
def cap_jobs(
    raw: Path, target: Path, rules: Rules, listed: Mapping[str, Collection[str]]
) -> tuple[list[Job], list[LeftOut], dict[str, list[str]]]:
    """The cases under `raw`, at any depth: folders with one .txt and their series.

    Args:
        raw: the raw folder.
        target: the folder to write cases to.
        rules: how they are made.
        listed: case -> series that M3D_Cap.json lists.

    Returns:
        The cases, what lacks a text, and the names of each case's series.

    Raises:
        InvalidInput: if two folders are the same case.
    """
    jobs, without_text, series = {}, [], {}
    for path, folders, files in os.walk(raw):
        folder = Path(path)
        texts = sorted(name for name in files if name.endswith(".txt"))
        if texts and folder != raw:
            case = _published_case(raw, folder)
            if case.as_posix() in jobs:
                other = jobs[case.as_posix()].sources[0].parent
                raise InvalidInput(f"{folder} and {other} are both case {case}: prepare one of them")
            names = series_names(
                [*folders, *(name for name in files if name.endswith(_NIFTI))], listed.get(_key(case), ())
            )
            sources = (folder / texts[0], *sorted(folder / name for name in [*folders, *files] if name not in texts))
            renamed = {name: saved for name, saved in names.items() if saved != _ascii(_stem(name))}
            jobs[case.as_posix()] = Job(
                case.as_posix(),
                sources,
                target / case,
                rules.settings(masks=False) | ({"names": renamed} if renamed else {}),
                partial(_make_cap, folder, texts, rules, names),
            )
            series[case.as_posix()] = sorted(names.values())
            folders.clear()
        elif any(name.lower().endswith((*_SLICES, *_NIFTI)) for name in files):
            without_text.append(LeftOut(str(folder), "there are images but no .txt in the folder above or in this one"))
    return [jobs[name] for name in sorted(jobs)], without_text, series


def _published_case(raw: Path, folder: Path) -> Path:
    """Where a case lies as published, ct_case/000006, in whatever folders its archive was unpacked."""
    parts = (raw.resolve().name, *folder.relative_to(raw).parts)
    families = [(k, found[1]) for k, part in enumerate(parts[:-1]) if (found := _FAMILY.fullmatch(part))]
    if families:
        last, family = families[-1]
        return Path(family, *parts[last + 1 :])
    return Path(*parts[-2:]) if len(parts) == 2 else Path(*parts[1:])


def _key(case: Path) -> str:
    return "/".join(case.parts[-2:])


def series_names(found: Sequence[str], listed: Collection[str]) -> dict[str, str]:
    """Name in the raw folder -> name to save it under: in ASCII, as the published names are.

    A foreign character for which no ASCII is known stands for whatever the one name in `listed` has that fits.
    """
    names = {name: _ascii(_stem(name)) for name in found}
    free = set(listed) - set(names.values())
    for name in sorted(name for name, saved in names.items() if not saved.isascii() and saved not in listed):
        pattern = "".join(re.escape(c) if c.isascii() else f".{{0,{_LONGEST}}}" for c in names[name])
        fitting = [other for other in free if re.fullmatch(pattern, other)]
        if len(fitting) == 1:
            names[name] = fitting[0]
            free.remove(fitting[0])
    return names


def _stem(name: str) -> str:
    return name.split(".nii")[0]


def _make_cap(case: Path, texts: Sequence[str], rules: Rules, names: Mapping[str, str], folder: Path) -> list[LeftOut]:
    if len(texts) > 1:
        raise InvalidInput(f"there are {len(texts)} texts ({', '.join(texts)}), one is wanted")
    try:
        text = findings((case / texts[0]).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise InvalidInput(f"{texts[0]} cannot be read: {error.strerror}") from None
    if not text:
        raise InvalidInput(f"{texts[0]} is empty")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    left_out, series = [], 0
    for path in sorted(case.iterdir()):
        if not path.is_dir() and not path.name.endswith(_NIFTI):
            continue
        try:
            scan, dropped = _series(path)
            image = prepare(scan, rules.size, rules.preset).image
        except InvalidInput as error:
            left_out.append(LeftOut(str(path), str(error)))
            continue
        left_out += dropped
        rules.save(_free(folder, names[path.name]), image)
        series += 1
    if not series:
        causes = "; ".join(f"{Path(entry.path).name}: {entry.cause}" for entry in left_out)
        raise InvalidInput(f"no series can be used{': ' + causes if causes else ', there is none'}")
    return left_out


def findings(text: str) -> str:
    """What a case's text says about the images, on one line: its findings, else its discussion, else all of it."""
    for heading in (_FINDINGS, _DISCUSSION, ""):
        _, found, part = text.partition(heading) if heading else ("", True, text)
        if found and len("".join(part.split())) >= _FEWEST:
            return " ".join(part.split())
    return " ".join(text.split())


def _series(path: Path) -> tuple[Scan, list[LeftOut]]:
    """A folder of grey slices, a DICOM series or a NIfTI file; and the slices that do not fit."""
    if not path.is_dir():
        return _nifti_scan(path), []
    slices = sorted((p for p in path.iterdir() if p.suffix.lower() in _SLICES), key=_natural)
    if not slices:
        return read_scan(pack_scan(path)[0]), []
    planes, left_out = {}, []
    for plane in slices:
        try:
            with Image.open(plane) as picture:
                planes[plane] = np.asarray(picture.convert("L"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            left_out.append(LeftOut(str(plane), f"the slice cannot be read: {error}"))
    usual = Counter(plane.shape for plane in planes.values()).most_common(1)
    stack = [plane for plane in planes.values() if plane.shape == usual[0][0]] if usual else []
    left_out += [
        LeftOut(
            str(path),
            f"the slice has {' x '.join(map(str, plane.shape))} pixels, most have {' x '.join(map(str, usual[0][0]))}",
        )
        for path, plane in planes.items()
        if plane.shape != usual[0][0]
    ]
    if 2 * len(stack) <= len(slices) or len(stack) < 2:
        raise InvalidInput(f"only {len(stack)} of {len(slices)} slices can be read and have one size")
    volume = np.stack(stack)
    if volume.min() == volume.max():
        raise InvalidInput(f"every pixel of all slices is {volume.min()}")
    return Scan(volume, ARRAY_AFFINE, "npy"), left_out


# --- M3D-Seg ---------------------------------------------------------------------------------------------------------
def seg_jobs(
    raw: Path, target: Path, code: str, rules: Rules
) -> tuple[list[Job], tuple[str, ...], dict[str, str], list[LeftOut]]:
    """The cases of one data set.

    Returns:
        The cases, the class names, the split by case where the raw folder's JSON says so, and the cases that such a
        JSON does not list: they belong to no split, so they are not prepared.
    """
    folder, index = raw / code, {}
    if (folder / f"{code}.json").is_file():
        index = read_json(folder / f"{code}.json")
    cases = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = class_names().get(code) or _own_names(code, index, cases)
    splits = {Path(entry["image"]).parent.name: split for split in ("train", "test") for entry in index.get(split, [])}
    unlisted = [
        LeftOut(str(case), f"{code}.json of the raw folder does not list it")
        for case in cases
        if splits and case.name not in splits
    ]
    jobs = [
        Job(
            f"{code}/{case.name}",
            (case, *sorted(p for p in case.rglob("*") if p.is_file())),
            target / code / case.name,
            rules.settings() | {"names": list(names)},
            partial(_make_seg, case, names, rules),
        )
        for case in cases
        if not splits or case.name in splits
    ]
    return jobs, names, splits, unlisted


def _own_names(code: str, index: dict, cases: Sequence[Path]) -> tuple[str, ...]:
    if isinstance(labels := index.get("labels"), dict):
        return tuple(labels[key] for key in sorted(labels, key=int) if int(key) > 0)
    names = sorted({_class_of(path) for case in cases for path in _mask_files(case)})
    if not names:
        raise InvalidInput(
            f"{code} is none of M3D-Seg's data sets, so its classes must be named: in "
            f'{code}/{code}.json ("labels": {{"0": "background", "1": "liver", ...}}) or by one mask file per class'
        )
    return tuple(names)


def _make_seg(case: Path, names: Sequence[str], rules: Rules, folder: Path) -> list[LeftOut]:
    left_out: list[LeftOut] = []
    preset = rules.preset
    if (case / "image.npy").is_file():
        scan, masks = _published(case, names)
        preset = "m3d-cap"  # the published arrays are normalised; what remains is to scale, crop and resize them
    else:
        image = _one_of(case, _IMAGES)
        if image is None:
            raise InvalidInput(f"there is no image: {' or '.join(_IMAGES)} with {' or '.join(_NIFTI)} is looked for")
        scan = _nifti_scan(image)
        masks = _labelled(case, scan, names, left_out)
    prepared = prepare(scan, rules.size, preset)
    (folder / "masks").mkdir()
    rules.save(folder / "image.npy", prepared.image)
    structures = 0
    for number, mask in masks:
        present = bool(mask.any())
        small = rules.of_mask(prepared.geometry, mask) if present else np.zeros(ABSENT, bool)
        if present and not small.any():  # it is in the scan, so it cannot be denied either
            left_out.append(LeftOut(str(case), f"{names[number]} {_NO_VOXEL[rules.mask]}", names[number]))
            continue
        np.save(folder / "masks" / f"mask_{number}.npy", small)
        structures += present
    if not structures:
        raise InvalidInput("no class of the data set is in the image")
    return left_out


def _labelled(case: Path, scan: Scan, names: Sequence[str], left_out: list[LeftOut]):
    """(class id, mask) of all classes where there is a label image, or of those that have a mask file.

    The mask of a class that is not in the scan holds nothing but 0, in any shape.
    """
    if label := _one_of(case, _LABELS):
        labels = _label_image(label, scan)
        found = np.unique(labels)
        if (found != np.round(found)).any() or found[0] < 0 or found[-1] > len(names):
            raise InvalidInput(
                f"{label.name} holds {_some(found)}; whole numbers from 0 to {len(names)} are wanted, "
                f"one for each class of the data set"
            )
        return (
            (number, labels == number + 1 if number + 1 in found else np.zeros(1, bool)) for number in range(len(names))
        )
    files = _mask_files(case)
    if not files:
        raise InvalidInput(
            f"there are no labels: {_LABELS[0]}.nii.gz, or a folder {' or '.join(_MASK_FOLDERS)} with "
            f"one file per class is looked for"
        )
    known = {_plain(name): number for number, name in enumerate(names)}
    left_out += [
        LeftOut(str(path), f"the data set has no class {_class_of(path)!r}")
        for path in files
        if _plain(_class_of(path)) not in known
    ]
    return (
        (known[_plain(_class_of(path))], _label_image(path, scan) > 0)
        for path in files
        if _plain(_class_of(path)) in known
    )


def _published(case: Path, names: Sequence[str]):
    """M3D-Seg as it is downloaded: image.npy [1, i, j, k], normalised, and sparse masks in mask_(C, i, j, k).npz."""
    files = [(path, found) for path in case.iterdir() if (found := _SPARSE.fullmatch(path.name))]
    if len(files) != 1:
        raise InvalidInput(f"beside image.npy one mask_(C, W, H, D).npz is wanted, there are {len(files)}")
    path, found = files[0]
    scan = read_scan((case / "image.npy").read_bytes())
    try:
        shape = tuple(int(n) for n in ast.literal_eval(found[1]))
        rows = sparse.load_npz(path).tocsr()
    except Exception as error:  # a damaged archive raises whatever its parser stumbles over
        raise InvalidInput(f"{path.name} cannot be read: {error}") from None
    if shape[1:] != scan.array.shape or rows.shape != (shape[0], scan.array.size):
        raise InvalidInput(f"{path.name} does not fit the image, which has {scan.array.shape}")
    if shape[0] > len(names):
        raise InvalidInput(f"{path.name} has {shape[0]} classes, the data set has {len(names)}")
    masks = ((number, (rows[number].toarray() > 0).reshape(shape[1:]).T) for number in range(shape[0]))
    return Scan(scan.array.T, ARRAY_AFFINE, "npy"), masks


# --- M3D-RefSeg ------------------------------------------------------------------------------------------------------
def refseg_jobs(raw: Path, target: Path, rules: Rules) -> list[Job]:
    """The cases under `raw`: folders with ct.nii.gz and mask.nii.gz."""
    cases = sorted(path for path in raw.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [
        Job(
            case.name,
            (case, *sorted(p for p in case.iterdir() if p.is_file())),
            target / case.name,
            rules.settings(),
            partial(_make_refseg, case, rules),
        )
        for case in cases
    ]


def _make_refseg(case: Path, rules: Rules, folder: Path) -> list[LeftOut]:
    image, label = _one_of(case, ("ct",)), _one_of(case, ("mask",))
    if image is None or label is None:
        raise InvalidInput("ct.nii.gz and mask.nii.gz are looked for, and at least one is missing")
    scan = _nifti_scan(image)
    labels = _label_image(label, scan)
    found = np.unique(labels)
    if (found != np.round(found)).any() or found[0] < 0 or found[-1] >= 1 << 16:
        raise InvalidInput(f"{label.name} holds {_some(found)}; whole numbers are wanted, 0 for none")
    prepared = prepare(scan, rules.size, rules.preset)
    mask, left_out = np.zeros((1, *rules.size), np.uint16), []
    for value in found[found > 0]:
        small = rules.of_mask(prepared.geometry, labels == value)
        mask[small] = value
        if not small.any():
            left_out.append(LeftOut(str(label), f"mask {int(value)} {_NO_VOXEL[rules.mask]}", "lesion"))
    rules.save(folder / "ct.npy", prepared.image)
    np.save(folder / "mask.npy", mask)
    return left_out


# --- files -----------------------------------------------------------------------------------------------------------
def _nifti_scan(path: Path) -> Scan:
    return read_scan(pack_scan(path)[0])


def _label_image(path: Path, scan: Scan) -> np.ndarray:
    """A label image on the scan's own grid. Unlike a scan it may be all zero."""
    _, found = read_volume(memoryview(pack_scan(path)[0]))
    labels = found.array
    if labels.shape != scan.array.shape:
        raise InvalidInput(
            f"{path.name} has shape {' x '.join(map(str, labels.shape))}, its image "
            f"{' x '.join(map(str, scan.array.shape))}"
        )
    if not np.allclose(found.affine, scan.affine, atol=0.05):
        raise InvalidInput(f"{path.name} lies elsewhere than its image: their affines differ")
    return labels


def _one_of(case: Path, stems: Sequence[str]) -> Path | None:
    return next((path for stem in stems for suffix in _NIFTI if (path := case / (stem + suffix)).is_file()), None)


def _mask_files(case: Path) -> list[Path]:
    return sorted(path for name in _MASK_FOLDERS for path in (case / name).glob("*.nii*") if path.name.endswith(_NIFTI))


def _class_of(path: Path) -> str:
    return path.name.split(".nii")[0].replace("_", " ")


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _some(values: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values[:6]) + ", ..." * (len(values) > 6)


def _natural(path: Path) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def _ascii(name: str) -> str:
    """As the published names are: without accents, in ASCII where it is known how."""
    plain = unicodedata.normalize("NFKD", name)
    return "".join(c for c in plain if unicodedata.category(c) != "Mn").translate(_LETTERS)


def _free(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.npy", 2
    while path.exists():
        path, number = folder / f"{stem}_{number}.npy", number + 1
    return path
