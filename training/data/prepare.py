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
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
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
from training.data.raw import DTYPES, MASK_RULES, Rules, cap_jobs, refseg_jobs, seg_jobs
from training.data.reading import mask_id, read_json, read_split, read_table
from training.data.sets import CAP, REFSEG, REFSEG_TABLES, SEG, TERMS, names_of, referring_train
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

MaskRule = Annotated[
    str,
    typer.Option(
        "--mask",
        help="a voxel of a mask is set where the nearest voxel of the scan is (nearest, as the published masks were "
        "made), or where at least half of it is (half, which loses thin and small structures)",
    ),
]
Dtype = Annotated[str, typer.Option(help=f"of stored images: {', '.join(DTYPES)}; smaller ones are read faster")]

_CORES = os.cpu_count() or 1
_SHOWN = 10
_ABSENT_BYTES = 200  # more than the file of a structure that is not in the scan has
_REFSEG_COLUMNS = ("Image", "Mask", "Mask_ID", "Question_Type", "Question", "Answer")


@app.command()
def cap(
    raw: Raw,
    out: Out,
    image_size: Size = (32, 256, 256),
    preset: Preset = "m3d-cap",
    workers: Workers = _CORES,
    test_share: TestShare = 0.02,
    unlisted: Annotated[
        float, typer.Option(min=0, max=1, help="share of each family's series that M3D_Cap.json may leave out")
    ] = 0.05,
    dtype: Dtype = "float32",
) -> None:
    """Image-text pairs: folders with one .txt and series as folders of slices, DICOM folders or NIfTI files."""
    began, rules = _begin(raw, out, Rules(image_size, preset, dtype=dtype))
    index_of_raw, given = _given_pairs(raw)
    listed = defaultdict(set)
    for pair in given:
        listed[pair.rpartition("/")[0]].add(pair.rpartition("/")[2].removesuffix(".npy"))
    jobs, others, series = cap_jobs(raw, out / CAP, rules, listed)
    if given:
        _check_listed(series, given, index_of_raw, unlisted)
    outcomes = do_all(jobs, workers, "M3D-Cap")
    names = {case.name for case in _usable(outcomes)}
    index: dict[str, list] = {split: [] for split in ("train", "validation", "test")}
    if (out / CAP / "M3D_Cap.json").is_file():  # the pairs of other cases stay
        for split, pairs in read_json(out / CAP / "M3D_Cap.json").items():
            kept = [pair for pair in pairs if Path(pair["image"]).parent.relative_to(CAP).as_posix() not in names]
            index.setdefault(split, []).extend(kept)
    for case in _usable(outcomes):
        for path in sorted(case.target.glob("*.npy")):
            image = path.relative_to(out).as_posix()
            drawn = [_drawn(case.name, test_share, ("test", "validation"))]
            splits = given.get(_pair(image), []) if given else drawn
            for split in splits:
                index.setdefault(split, []).append(
                    {"image": image, "text": (case.target / "text.txt").relative_to(out).as_posix()}
                )
            if not splits:
                others.append(LeftOut(str(path), "M3D_Cap.json of the raw folder does not list it"))
    _finish(out / CAP, "cap", began, raw, rules, outcomes, others)
    write_json(out / CAP / "M3D_Cap.json", index)


@app.command()
def seg(
    raw: Raw,
    out: Out,
    image_size: Size = (32, 256, 256),
    preset: Preset = "m3d-seg",
    workers: Workers = _CORES,
    test_share: TestShare = 0.2,
    mask: MaskRule = "nearest",
    dtype: Dtype = "float32",
) -> None:
    """Masks of structures: RAW/NNNN/CASE with image.nii.gz and label.nii.gz, or one mask file per class."""
    began, rules = _begin(raw, out, Rules(image_size, preset, mask, dtype))
    codes = sorted(path.name for path in raw.iterdir() if path.is_dir() and not path.name.startswith("."))
    listed = {code: seg_jobs(raw, out / SEG, code, rules) for code in codes}
    earlier = {code: _earlier_masks(out, code, jobs, names) for code, (jobs, names, _, _) in listed.items()}
    outcomes = do_all([job for jobs, *_ in listed.values() for job in jobs], workers, "M3D-Seg")
    kept: Counter = Counter()
    indexes = {}
    for code, (jobs, names, splits, unlisted) in listed.items():
        targets = {job.target for job in jobs}
        cases = [case for case in _usable(outcomes) if case.target in targets]
        index: dict = {"name": code, "labels": {"0": "background"} | {str(k): name for k, name in enumerate(names, 1)}}
        gone = {case.target.name for case in cases} | {Path(entry.path).name for entry in unlisted}
        index |= _without(earlier[code], gone)
        for case in cases:
            split = splits.get(case.target.name) or _drawn(case.name, test_share, ("test",))
            masks = sorted((case.target / "masks").glob("mask_*.npy"), key=lambda path: int(path.stem[5:]))
            kept.update(names[int(path.stem[5:])] for path in masks if path.stat().st_size > _ABSENT_BYTES)
            index[split] += [
                {
                    "image": (case.target / "image.npy").relative_to(out / SEG).as_posix(),
                    "label": path.relative_to(out / SEG).as_posix(),
                }
                for path in masks
            ]
        indexes[code] = index
    others = [entry for *_, unlisted in listed.values() for entry in unlisted]
    _finish(out / SEG, "seg", began, raw, rules, outcomes, others, kept)
    for code, index in indexes.items():
        if index["train"] or index["test"]:
            write_json(out / SEG / code / f"{code}.json", index)
    if terms := next((folder / TERMS for folder in (raw, raw.parent) if (folder / TERMS).is_file()), None):
        shutil.copyfile(terms, out / SEG / TERMS)


@app.command()
def refseg(
    raw: Raw,
    out: Out,
    image_size: Size = (32, 256, 256),
    preset: Preset = "m3d-refseg",
    workers: Workers = _CORES,
    mask: MaskRule = "nearest",
    dtype: Dtype = "float32",
) -> None:
    """Referring questions: RAW/CASE with ct.nii.gz and mask.nii.gz, and M3D_RefSeg_train.csv, M3D_RefSeg_test.csv."""
    began, rules = _begin(raw, out, Rules(image_size, preset, mask, dtype))
    given = _referring_tables(raw)
    tables = {name: read_table(path, _REFSEG_COLUMNS) for name, path in given.items()}
    earlier = {
        name: read_table(path, _REFSEG_COLUMNS) for name, path in _referring_tables(out / REFSEG, needed=False).items()
    }
    outcomes = do_all(refseg_jobs(raw, out / REFSEG, rules), workers, "M3D-RefSeg")
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
                left_out.append(LeftOut(f"{given[name]}, row {number}", f"its case {case!r} is not prepared"))
            elif mask_id(row["Mask_ID"]) not in values[case]:
                left_out.append(LeftOut(f"{given[name]}, row {number}", f"{case} has no mask {row['Mask_ID']}"))
            else:
                folder = cases[case].relative_to(out).as_posix()
                writer.writerow(row | {"Image": f"{folder}/ct.npy", "Mask": f"{folder}/mask.npy"})
    lesions = Counter(lesion=sum(map(len, values.values())))
    _finish(out / REFSEG, "refseg", began, raw, rules, outcomes, left_out, lesions)
    for name, text in texts.items():
        write_text(out / REFSEG / name, text.getvalue())


def _referring_tables(folder: Path, needed: bool = True) -> dict[str, Path]:
    """Published name -> path of the tables of questions: among the cases or, as published, beside their folder.

    Raises InvalidInput if that of training is not there but needed, or holds the questions of the other.
    """
    for place in (folder, folder.parent) if needed else (folder,):
        train, test = referring_train(place), place / REFSEG_TABLES["test"]
        if train or test.is_file():
            break
    if needed and not train:
        raise InvalidInput(f"{folder} and the folder that it is in hold no {REFSEG_TABLES['train']}")
    found = {REFSEG_TABLES["train"]: train} if train else {}
    return found | ({REFSEG_TABLES["test"]: test} if test.is_file() else {})


def _begin(raw: Path, out: Path, rules: Rules) -> tuple[float, Rules]:
    if not raw.is_dir():
        raise InvalidInput(f"{raw} is not a folder with raw data")
    for what, given, allowed in (
        ("preset", rules.preset, PRESETS),
        ("rule for masks", rules.mask, MASK_RULES),
        ("type of stored images", rules.dtype, DTYPES),
    ):
        if given not in allowed:
            raise InvalidInput(f"there is no {what} {given!r}: choose one of {', '.join(allowed)}")
    if out.resolve().is_relative_to(raw.resolve()):
        raise InvalidInput(f"{out} lies inside {raw}, and would be taken for raw data the next time: write elsewhere")
    return time.monotonic(), rules


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


def _given_pairs(raw: Path) -> tuple[Path, dict[str, list[str]]]:
    """(M3D-Cap's own JSON, the splits of each pair that it lists, as some are parts of others).

    It is looked for in RAW, and above it as far as the archives of one family may lie below it.
    """
    above = (raw, *raw.resolve().parents[:2])
    path = next((path for folder in above if (path := folder / "M3D_Cap.json").is_file()), None)
    given: dict[str, list[str]] = {}
    if path:
        for split, pairs in read_json(path).items():
            for pair in pairs:
                given.setdefault(_pair(pair["image"]), []).append(split)
    return path or raw / "M3D_Cap.json", given


def _check_listed(series: Mapping[str, Sequence[str]], given: Collection[str], index: Path, limit: float) -> None:
    """Raises InvalidInput, before anything is made, if the index and the raw folder plainly are not of the same names.

    Series that the index does not list are in no split; of each family more than the share `limit` may not be so.
    """
    families: dict[str, list[str]] = defaultdict(list)
    for case, names in series.items():
        families[Path(case).parts[0]] += [_pair(f"{case}/{name}.npy") for name in names]
    for family, pairs in families.items():
        absent = [pair for pair in pairs if pair not in given]
        if len(absent) > limit * len(pairs):
            raise InvalidInput(
                f"{index} does not list {len(absent):,} of the {len(pairs):,} series of {family}, for example "
                f"{absent[0]}; it lists for example {next(iter(given))}. If that is as it should be, give --unlisted "
                f"{min(1, len(absent) / len(pairs) + 0.005):.2f}"
            )


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
    rules: Rules,
    outcomes: Sequence[Outcome],
    others: Sequence[LeftOut] = (),
    kept: Mapping[str, int] | None = None,
) -> None:
    """Writes the report, and says what was done. kept: structures with a mask, by class.

    Raises InvalidInput if no case is usable.
    """
    states = Counter(outcome.state for outcome in outcomes)
    skipped = [{"case": o.name, **vars(entry)} for o in outcomes if o.state == "skipped" for entry in o.left_out]
    left_out = [{"case": o.name, **vars(entry)} for o in _usable(outcomes) for entry in o.left_out]
    left_out += [vars(entry) for entry in others]
    gone = Counter(entry["lost"] for entry in left_out if entry["lost"])
    lost = {name: {"lost": n, "of": n + (kept or {}).get(name, 0)} for name, n in gone.most_common()}
    report = folder / "preparation.json"
    write_json(
        report,
        {
            "command": command,
            "raw": str(raw),
            "image_size": rules.size,
            "preset": rules.preset,
            "mask": rules.mask,
            "dtype": rules.dtype,
            "made": states["made"],
            "kept": states["kept"],
            "seconds": round(time.monotonic() - began, 1),
            "lost_by_class": lost,
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
    if lost:
        worst = sorted(lost.items(), key=lambda item: -item[1]["lost"] / item[1]["of"])
        lost = ", ".join(f"{name} {count['lost']:,} of {count['of']:,}" for name, count in worst[:_SHOWN])
        notes.print(
            f"  structures that the model's volume cannot hold: {lost}"
            + f", and {len(worst) - _SHOWN} classes more" * (len(worst) > _SHOWN),
            markup=False,
        )
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
