"""Prepare raw scans for training: from NIfTI files and slice folders to the layout of M3D-Data.

    python training/data/prepare.py cap RAW OUT
    python training/data/prepare.py seg RAW OUT
    python training/data/prepare.py refseg RAW OUT

OUT is a data root; each command writes its set there. A command that was interrupted goes on where it stopped.
README.md in this folder says what RAW may look like.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import typer
from rich.console import Console

from engine.cli import console
from engine.errors import InvalidInput
from engine.volume import PRESETS
from training.data.jobs import Job, LeftOut, Outcome, do_all
from training.data.raw import cap_jobs, refseg_jobs, seg_jobs
from training.data.reading import mask_id, read_json, read_split, read_table
from training.data.sets import CAP, REFSEG, SEG, names_of
from training.files import write_json, write_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prepare raw scans for training, in the layout of M3D-Data. An interrupted command goes on.",
)
notes = Console(stderr=True, highlight=False, soft_wrap=True)

Raw = Annotated[Path, typer.Argument(help="folder with the raw data (see README.md in training/data)")]
Out = Annotated[Path, typer.Argument(help="data root to write to")]
Size = Annotated[tuple[int, int, int], typer.Option("--image-size", min=1, help="voxels of the model along D, H, W")]
Preset = Annotated[str, typer.Option(help=f"preprocessing: {', '.join(PRESETS)}")]
Workers = Annotated[int, typer.Option(min=1, help="processes (default: one per core)")]
TestShare = Annotated[
    float, typer.Option(min=0, max=0.5, help="share of the cases held out, where RAW does not split them")
]

_CORES = os.cpu_count() or 1
_SHOWN = 10
_REFSEG_COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")


@app.command()
def cap(
    raw: Raw,
    out: Out,
    image_size: Size = (32, 256, 256),
    preset: Preset = "m3d-cap",
    workers: Workers = _CORES,
    test_share: TestShare = 0.02,
) -> None:
    """Image-text pairs: folders with one .txt and series as folders of slices, DICOM folders or NIfTI files."""
    began = _begin(raw, out, preset)
    jobs, others = cap_jobs(raw, out / CAP, image_size, preset)
    outcomes = do_all(jobs, workers, "M3D-Cap")
    given, names = _given_pairs(raw), {case.name for case in _usable(outcomes)}
    index: dict[str, list] = {split: [] for split in ("train", "validation", "test", *given.values())}
    if (out / CAP / "M3D_Cap.json").is_file():  # the pairs of other cases stay
        for split, pairs in read_json(out / CAP / "M3D_Cap.json").items():
            kept = [pair for pair in pairs if Path(pair["image"]).parent.relative_to(CAP).as_posix() not in names]
            index.setdefault(split, []).extend(kept)
    for case in _usable(outcomes):
        for path in sorted(case.target.glob("*.npy")):
            image = path.relative_to(out).as_posix()
            split = given.get(_pair(image)) if given else _drawn(case.name, test_share, ("test", "validation"))
            if split:
                index[split].append({"image": image, "text": (case.target / "text.txt").relative_to(out).as_posix()})
            else:
                others.append(LeftOut(str(path), "M3D_Cap.json of the raw folder does not list it"))
    _finish(out / CAP, "cap", began, raw, image_size, preset, outcomes, others)
    write_json(out / CAP / "M3D_Cap.json", index)


@app.command()
def seg(
    raw: Raw,
    out: Out,
    image_size: Size = (32, 256, 256),
    preset: Preset = "m3d-seg",
    workers: Workers = _CORES,
    test_share: TestShare = 0.2,
) -> None:
    """Masks of structures: RAW/NNNN/CASE with image.nii.gz and label.nii.gz, or one mask file per class."""
    began = _begin(raw, out, preset)
    codes = sorted(path.name for path in raw.iterdir() if path.is_dir() and not path.name.startswith("."))
    listed = {code: seg_jobs(raw, out / SEG, code, image_size, preset) for code in codes}
    earlier = {code: _earlier_masks(out, code, jobs, names) for code, (jobs, names, _) in listed.items()}
    outcomes = do_all([job for jobs, _, _ in listed.values() for job in jobs], workers, "M3D-Seg")
    _finish(out / SEG, "seg", began, raw, image_size, preset, outcomes)
    for code, (jobs, names, splits) in listed.items():
        targets = {job.target for job in jobs}
        cases = [case for case in _usable(outcomes) if case.target in targets]
        index: dict = {"name": code, "labels": {"0": "background"} | {str(k): name for k, name in enumerate(names, 1)}}
        index |= _without(earlier[code], {case.target.name for case in cases})
        for case in cases:
            split = splits.get(case.target.name) or _drawn(case.name, test_share, ("test",))
            masks = sorted((case.target / "masks").glob("mask_*.npy"), key=lambda path: int(path.stem[5:]))
            index[split] += [
                {
                    "image": (case.target / "image.npy").relative_to(out / SEG).as_posix(),
                    "label": mask.relative_to(out / SEG).as_posix(),
                }
                for mask in masks
            ]
        if index["train"] or index["test"]:
            write_json(out / SEG / code / f"{code}.json", index)


@app.command()
def refseg(
    raw: Raw, out: Out, image_size: Size = (32, 256, 256), preset: Preset = "m3d-refseg", workers: Workers = _CORES
) -> None:
    """Referring questions: RAW/CASE with ct.nii.gz and mask.nii.gz, and M3D_RefSeg.csv (and M3D_RefSeg_test.csv)."""
    began = _begin(raw, out, preset)
    names = ("M3D_RefSeg.csv", "M3D_RefSeg_test.csv")
    tables = {
        name: read_table(raw / name, _REFSEG_COLUMNS) for name in names if name == names[0] or (raw / name).is_file()
    }
    earlier = {
        name: read_table(out / REFSEG / name, _REFSEG_COLUMNS) for name in names if (out / REFSEG / name).is_file()
    }
    outcomes = do_all(refseg_jobs(raw, out / REFSEG, image_size, preset), workers, "M3D-RefSeg")
    cases = {case.target.name: case.target for case in _usable(outcomes)}
    values = {name: set(np.unique(np.load(folder / "mask.npy")).tolist()) - {0} for name, folder in cases.items()}
    left_out, texts, kept = [], {}, _without(earlier, set(cases), "Image")
    for name in tables | earlier:
        texts[name] = text = io.StringIO()
        writer = csv.DictWriter(text, _REFSEG_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.get(name, ()))
        for number, row in enumerate(tables.get(name, ()), 1):
            case = _case(row["Image"])
            if case not in cases:
                left_out.append(LeftOut(f"{raw / name}, row {number}", f"its case {case!r} is not prepared"))
            elif mask_id(row["Mask_ID"]) not in values[case]:
                left_out.append(LeftOut(f"{raw / name}, row {number}", f"{case} has no mask {row['Mask_ID']}"))
            else:
                folder = cases[case].relative_to(out).as_posix()
                writer.writerow(row | {"Image": f"{folder}/ct.npy", "Mask": f"{folder}/mask.npy"})
    _finish(out / REFSEG, "refseg", began, raw, image_size, preset, outcomes, left_out)
    for name, text in texts.items():
        write_text(out / REFSEG / name, text.getvalue())


def _begin(raw: Path, out: Path, preset: str) -> float:
    if not raw.is_dir():
        raise InvalidInput(f"{raw} is not a folder with raw data")
    if preset not in PRESETS:
        raise InvalidInput(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if out.resolve().is_relative_to(raw.resolve()):
        raise InvalidInput(f"{out} lies inside {raw}, and would be taken for raw data the next time: write elsewhere")
    return time.monotonic()


def _earlier_masks(out: Path, code: str, jobs: Sequence[Job], names: tuple[str, ...]) -> dict[str, list]:
    """The entries by split that a data set's index has already.

    Raises InvalidInput if some are of cases that are not in `jobs` and number the classes otherwise than `names`.
    """
    path = out / SEG / code / f"{code}.json"
    none: dict[str, list] = {"train": [], "test": []}
    if not path.is_file():
        return none
    earlier = {split: list(read_split(path, split, ("image", "label"))) for split in none}
    if (theirs := names_of(path, code)) == names:
        return earlier
    others = {
        _case(entry["image"])
        for split in _without(earlier, {job.target.name for job in jobs}).values()
        for entry in split
    }
    if others:
        raise InvalidInput(
            f"{path} has {len(others):,} cases of other raw folders, for example {min(others)}, whose "
            f"classes are {', '.join(theirs)}; here they are {', '.join(names)}. Give both the same "
            f'"labels" in their {code}/{code}.json, or prepare them to different roots'
        )
    return none  # all its cases are here, and will be made again with these classes


def _without(entries: dict[str, Sequence[dict]], cases: set[str], key: str = "image") -> dict[str, list[dict]]:
    """Of each list in `entries`, what is of none of `cases`. key: under which an entry has its image."""
    return {name: [entry for entry in listed if _case(entry[key]) not in cases] for name, listed in entries.items()}


def _case(image: str) -> str:
    """The case of an image, in whatever folder it is."""
    return Path(image).parent.name


def _given_pairs(raw: Path) -> dict[str, str]:
    """The split of each pair, where RAW has M3D-Cap's own JSON."""
    path = raw / "M3D_Cap.json"
    if not path.is_file():
        return {}
    return {_pair(pair["image"]): split for split, pairs in read_json(path).items() for pair in pairs}


def _pair(image: str) -> str:
    """family/case/series.npy of a path, whatever stands before."""
    return "/".join(Path(image).parts[-3:])


def _drawn(name: str, share: float, held_out: tuple[str, ...]) -> str:
    """A split by the case's name alone, so that cases added later move no other: `share` for each held-out split."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return next((split for k, split in enumerate(held_out, 1) if place < k * share), "train")


def _usable(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.state != "skipped"]


def _finish(
    folder: Path,
    command: str,
    began: float,
    raw: Path,
    size,
    preset: str,
    outcomes: Sequence[Outcome],
    others: Sequence[LeftOut] = (),
) -> None:
    """Writes the report, and says what was done. Raises InvalidInput if no case is usable."""
    states = Counter(outcome.state for outcome in outcomes)
    skipped = [{"case": o.name, **vars(entry)} for o in outcomes if o.state == "skipped" for entry in o.left_out]
    left_out = [{"case": o.name, **vars(entry)} for o in _usable(outcomes) for entry in o.left_out]
    left_out += [vars(entry) for entry in others]
    report = folder / "preparation.json"
    write_json(
        report,
        {
            "command": command,
            "raw": str(raw),
            "image_size": size,
            "preset": preset,
            "made": states["made"],
            "kept": states["kept"],
            "seconds": round(time.monotonic() - began, 1),
            "skipped": skipped,
            "left_out": left_out,
        },
    )
    notes.print(
        f"{states['made']:,} cases made, {states['kept']:,} kept, {len(skipped):,} skipped; from within cases "
        f"{len(left_out):,} parts left out; report: {report}"
    )
    for title, entries in (("skipped", skipped), ("left out", left_out)):
        for entry in entries[:_SHOWN]:
            notes.print(f"  {title} {entry['path']}: {entry['cause']}", markup=False)
        if len(entries) > _SHOWN:
            notes.print(f"  and {len(entries) - _SHOWN:,} more {title}")
    if not _usable(outcomes):
        raise InvalidInput(
            f"no case of {raw} could be prepared"
            + ("" if outcomes else ", as none was found")
            + "; README.md in training/data says what is accepted"
        )


def main() -> None:
    sys.exit(console.run(app))


if __name__ == "__main__":
    main()
