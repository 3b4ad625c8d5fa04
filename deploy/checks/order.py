"""Does every request get its own result? Different volumes in a row and at the same time, each against its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ORDER = "AAAABBBBAB"  # what triton-inference-server/server#8550 got stale results by
# Results of different volumes must be so many times the bound apart: else a wrong one could pass.
TELLS_APART = 2.0


def in_a_row(run: Callable[[int], np.ndarray], own: Sequence[np.ndarray], bound: float) -> dict:
    """One volume after the other, in the order A A A A B B B B A B.

    Args:
        run: computes the volume of this number. own: the right results, of the volumes 0 and 1 at least.
        bound: largest difference allowed, as a share of the largest value.

    Returns:
        A row: the largest difference from the own result, and the smallest from another's.
    """
    numbers = ["AB".index(letter) for letter in ORDER]
    return _row(" ".join(ORDER), [(number, run(number)) for number in numbers], own, bound)


def at_once(run: Callable[[int], np.ndarray], own: Sequence[np.ndarray], bound: float, rounds: int = 4) -> dict:
    """All volumes at the same time, from a thread each, some rounds of it. Arguments and result as of `in_a_row`."""
    numbers = [number for _ in range(rounds) for number in range(len(own))]
    with ThreadPoolExecutor(len(own)) as pool:
        found = list(zip(numbers, pool.map(run, numbers)))
    return _row(f"{len(own)} at a time, {rounds} rounds", found, own, bound)


def as_a_batch(results: np.ndarray, own: Sequence[np.ndarray], bound: float) -> dict:
    """Results of one batch of all volumes. Arguments and result as of `in_a_row`."""
    return _row(f"a batch of {len(own)}", list(enumerate(results)), own, bound)


def _row(what: str, found: Sequence[tuple[int, np.ndarray]], own: Sequence[np.ndarray], bound: float) -> dict:
    error = max(_difference(result, own[number]) for number, result in found)
    others = min(_others(own))
    wrong = [n for n, (number, result) in enumerate(found) if not _difference(result, own[number]) <= bound]
    return {
        "what": what,
        "error": error,
        "bound": bound,
        "to another's": others,
        **({"wrong requests": ", ".join(map(str, wrong))} if wrong else {}),
        "ok": not wrong and others > TELLS_APART * bound,
    }


def _others(own: Sequence[np.ndarray]) -> Iterator[float]:
    """How far the results of different volumes are apart."""
    for n, one in enumerate(own):
        for other in own[:n]:
            yield _difference(one, other)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest, as a share of the largest value; NaN where a value is, infinite for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())
