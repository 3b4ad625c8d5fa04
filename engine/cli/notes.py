"""What the commands say about a study and an answer, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.cli import console

if TYPE_CHECKING:
    from engine.api import Answer, Study


def note_study(study: Study) -> None:
    """How the scan was prepared, and why so."""
    if study.info is not None:
        console.progress(study.info.reason)


def note_answer(answer: Answer) -> None:
    """Length, time and boxes of an answer."""
    took = answer.timings
    first = f", first text after {took.first_text_s:.2f} s" if took.first_text_s else ""
    console.progress(f"{len(answer.token_ids)} tokens in {took.total_s:.2f} s{first} ({answer.finish_reason})")
    for box in answer.boxes:
        corners = [round(float(v), 1) for v in box]
        console.progress(f"box, voxels (i0, j0, k0) to (i1, j1, k1): {corners}")
