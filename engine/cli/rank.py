"""`m3d rank`: texts by how well they fit a scan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import console, options
from engine.cli.notes import note_study
from engine.errors import InvalidInput

if TYPE_CHECKING:
    from engine.api import Ranking


def rank(
    scan: options.ScanPath,
    texts: Annotated[list[str] | None, typer.Argument(help="texts to rank")] = None,
    file: Annotated[Path | None, typer.Option(help="file with one text a line, besides those given")] = None,
    server: options.ServerUrl = "localhost:8001",
    preset: options.Preset = "auto",
    crop: options.Crop = None,
    timeout: options.Timeout = 600.0,
) -> None:
    from engine.client import M3DClient

    texts = list(texts or ())
    if file is not None:
        texts += [line.strip() for line in options.text_of(file, "--file").splitlines() if line.strip()]
    if not texts:
        raise InvalidInput("nothing to rank: give texts, or --file with one a line")
    with M3DClient(server, timeout) as client:
        study = client.upload(scan, preset=preset, crop=crop)
        note_study(study)
        ranking = client.rank(study, texts)
    _warn_of_cut(ranking)
    for text, score in ranking.sorted():
        print(f"{score:+.4f}\t{text}")


def _warn_of_cut(ranking: Ranking) -> None:
    """Name the texts that were not read to their end, by their number in the order given, from 1."""
    cut = [str(number) for number, is_cut in enumerate(ranking.cut, 1) if is_cut]
    if cut:
        which = f"text {cut[0]} is" if len(cut) == 1 else f"texts {', '.join(cut)} are"
        console.warn(f"{which} longer than M3D-CLIP reads: only the first {ranking.text_limit} tokens count")
