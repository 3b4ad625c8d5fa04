"""The `[SEG]` tokens of an answer: their states as the prompts of its masks, and the words that each belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidInput, shortened

REFERENCE, EACH = MERGES = ("reference", "each")
MAX_SEGMENTS = 16  # masks of one answer
MAX_SEGMENTS_BYTES = 256 << 20  # that they take, a bit a voxel: Triton keeps shared memory for its largest response
_AT_ENDS = " \t\r\n.,;:!?"


def merged(states: Any) -> Any:
    """The one prompt [H_llm] of an answer with K states [K, H_llm], K >= 1, NumPy's or PyTorch's: their mean.

    Source: M3D's `LamedMetaForCausalLM`, which averages the states of several [SEG].
    """
    return states.mean(0)


def prompts(states: Any, merge: str, voxels: int) -> Any:
    """The prompts [S, H_llm] of the masks that K states [K, H_llm] ask for: S is 1 for reference, K for each.

    voxels: of the scan. Raises InvalidInput for more masks than `most_segments`.
    """
    if merge == REFERENCE:
        return merged(states)[None]
    if len(states) > (most := most_segments(voxels)):
        raise InvalidInput(
            f"the answer has {len(states)} [SEG]; with merge {EACH!r} at most {most} masks of a scan of this size are "
            f"drawn: ask for fewer structures at a time, give a lower max_new_tokens, or use merge {REFERENCE!r}"
        )
    return states


def most_segments(voxels: int) -> int:
    """How many masks of a scan with so many voxels an answer may have."""
    return max(1, min(MAX_SEGMENTS, MAX_SEGMENTS_BYTES // -(-voxels // 8)))


def checked_merge(merge: object) -> str:
    """One of MERGES; the reference for None. Raises InvalidInput for anything else."""
    if merge is None:
        return REFERENCE
    if not isinstance(merge, str) or merge not in MERGES:
        raise InvalidInput(f"merge must be one of {', '.join(MERGES)}, not {shortened(merge)}")
    return merge


def spans_of_words(text: str, spans: Sequence[tuple[int, int]], merge: str) -> list[tuple[int, int]]:
    """Which words of an answer each of its masks belongs to, as (start, end) in characters.

    For each mask of a [SEG] the words between the [SEG] before it, or the answer's beginning, and itself; for the one
    mask of all [SEG] those up to the last of them. Without white space and punctuation at their ends; empty if there
    are none.

    Args:
        text: the answer's.
        spans: where each [SEG] stands in it, in their order.
        merge: one of MERGES.
    """
    if not spans:
        return []
    if merge == REFERENCE:
        return [_trimmed(text, 0, spans[-1][0])]
    starts = [0, *(end for _, end in spans[:-1])]
    return [_trimmed(text, start, end) for start, (end, _) in zip(starts, spans)]


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    words = text[start:end].lstrip(_AT_ENDS)
    start = end - len(words)
    return start, start + len(words.rstrip(_AT_ENDS))
