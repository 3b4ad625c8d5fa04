"""`m3d segment`: masks of what an answer names, with measurements and a picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import console, options
from engine.cli.notes import note_answer, note_study
from engine.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from engine.api import Segmentation
    from engine.results.measurements import Measurements

_NO_PICTURE = "matplotlib is not installed: pip install 'm3d-engine[picture]'"


def _checked_merge(merge: str) -> str:
    """Raises InvalidInput for an unknown way to draw several [SEG]."""
    from engine.seg_states import checked_merge

    return checked_merge(merge)


def segment(
    scan: options.ScanPath,
    question: options.Question,
    output: Annotated[Path, typer.Option("--output", "-o", help="mask, .nii or .nii.gz")] = Path("mask.nii.gz"),
    merge: Annotated[
        str,
        typer.Option(
            help="reference: one mask, whatever the answer names; each: one mask for each \\[SEG] of the answer, "
            "written as mask_1.nii.gz, mask_2.nii.gz, ... by the name of --output; no file that exists is overwritten",
            callback=_checked_merge,
        ),
    ] = "reference",
    picture: Annotated[Path | None, typer.Option(help="PNG of three planes (default: by the mask)")] = None,
    server: options.ServerUrl = "localhost:8001",
    preset: options.Preset = "auto",
    crop: options.Crop = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    timeout: options.Timeout = 600.0,
) -> None:
    from engine.client import M3DClient
    from engine.picture import has_matplotlib, montage
    from engine.results.measurements import measure
    from engine.seg_states import EACH

    draws = has_matplotlib()
    if picture is not None and not draws:
        raise InvalidInput(f"--picture {picture}: {_NO_PICTURE}")
    files = _MaskFiles.of(output, picture, scan, merge == EACH)
    sampling = options.sampling_of(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    with M3DClient(server, timeout) as client:
        study = client.upload(scan, preset=preset, crop=crop)
        note_study(study)
        result = client.segment(study, question, merge=merge, **sampling)
    print(result.answer.text.strip(), flush=True)
    note_answer(result.answer)
    if result.mask is None:
        console.note("the answer asks for no mask (it has no [SEG]): nothing is written; for answers alone use m3d ask")
        raise typer.Exit(console.FAILED)
    written = [each.save(files.mask(number)) for number, each in enumerate(result.segments, 1)]
    shown, unread = None, "the scan's source is not known"
    try:
        shown = result.source.read() if result.source else None
    except (InvalidInput, Unavailable) as error:
        unread = str(error)
    measured = [
        measure(each.mask, each.affine, shown, preset=result.preset, missing=unread) for each in result.segments
    ]
    if merge == EACH:
        _save_segments(files.table, result, written, measured)
    else:
        measured[0].save(files.table)
    written.append(files.table)
    if shown is None:
        console.warn(f"{unread}: no picture, no intensities")
    elif not draws:
        console.progress(f"no picture: {_NO_PICTURE}")
    else:
        montage(
            files.picture,
            shown.array,
            shown.affine,
            result.mask,
            question,
            result.answer.text,
            findings=[(each.words, each.mask) for each in result.segments] if merge == EACH else (),
            modality=shown.modality,
            preset=result.preset,
        )
        written.append(files.picture)
    console.success("wrote", ", ".join(map(str, written)))
    for number, (each, found) in enumerate(zip(result.segments, measured), 1):
        if merge == EACH:
            console.note(f"{number} {each.words or '[SEG]'}")
        if each.score is not None:
            console.note(f"score {each.score:.3f} (mean probability in the mask, not calibrated)")
        _note_measurements(found, each.mask.size)


@dataclass(frozen=True)
class _MaskFiles:
    """Where `m3d segment` writes. numbered: whether there is a mask for each [SEG]."""

    output: Path
    picture: Path
    table: Path
    numbered: bool

    @classmethod
    def of(cls, output: Path, picture: Path | None, scan: Path, numbered: bool) -> _MaskFiles:
        """Raises InvalidInput for what cannot be written, or would overwrite the scan or, numbered, any file."""
        if not output.name.endswith((".nii", ".nii.gz")):
            raise InvalidInput(f"--output {output.name}: a mask is written as .nii or .nii.gz")
        stem = _stem(output)
        files = cls(output, picture or output.with_name(stem + ".png"), output.with_name(stem + ".json"), numbered)
        if files.picture.suffix != ".png":
            raise InvalidInput(f"--picture {files.picture.name}: a picture is written as .png")
        for path in (files.output, files.picture, files.table):
            if not path.absolute().parent.is_dir():
                raise InvalidInput(f"the folder {path.parent} does not exist")
            if path.exists() and scan.exists() and path.samefile(scan):
                raise InvalidInput(f"{path} is the scan itself, which would be overwritten: give another --output")
        if numbered and (existing := files._existing()):
            raise InvalidInput(
                f"{existing[0]} exists already, and with --merge each nothing is overwritten, so that no mask of "
                "another answer lies among those of this one: give another --output, or move it away"
            )
        return files

    def mask(self, number: int) -> Path:
        """Of the answer's [SEG] of this number, from 1."""
        if not self.numbered:
            return self.output
        stem = _stem(self.output)
        return self.output.with_name(f"{stem}_{number}{self.output.name[len(stem) :]}")

    def _existing(self) -> list[Path]:
        """What exists of all that may be written."""
        name = re.compile(re.escape(_stem(self.output)) + r"_[0-9]+\.nii(\.gz)?")
        masks = [path for path in self.output.absolute().parent.iterdir() if name.fullmatch(path.name)]
        return sorted(masks) + [path for path in (self.table, self.picture) if path.exists()]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _save_segments(path: Path, result: Segmentation, files: list[Path], measured: list[Measurements]) -> None:
    """Write what each mask is of, and its measurements, as JSON."""
    import json

    segments = [
        {"file": file.name, "words": each.words, "span": list(each.span), "score": each.score, **found.to_dict()}
        for each, file, found in zip(result.segments, files, measured)
    ]
    document = {"answer": result.answer.text, "segments": segments}
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _note_measurements(measured, voxels: int) -> None:
    """voxels: of the whole scan."""
    console.note(
        f"{measured.volume_ml:,.3f} mL, {measured.voxel_count:,} voxels "
        f"({measured.voxel_count / voxels:.2%} of the scan)"
    )
    if measured.centroid_ras_mm is not None:
        x, y, z = measured.centroid_ras_mm
        console.note(f"centroid ({x:.1f}, {y:.1f}, {z:.1f}) mm (RAS+)")
    if measured.intensity_mean is not None:
        unit = " HU" if measured.intensity_unit == "HU" else ""
        console.note(
            f"intensity {measured.intensity_mean:.4g}{unit}, SD {measured.intensity_sd:.4g}, "
            f"from {measured.intensity_min:.4g} to {measured.intensity_max:.4g}"
        )
