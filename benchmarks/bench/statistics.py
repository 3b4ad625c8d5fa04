"""95 % intervals by the bootstrap, over scans: answers about one scan are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
LEAST_SCANS = 10  # an interval of fewer says more about the draw than about other scans
_SEED = 27
_ENDS = (2.5, 97.5)

ValueOf = Callable[[np.ndarray], np.ndarray]


def mean_of(sums: np.ndarray) -> np.ndarray:
    """The mean of summed (value, 1) [..., 2]; NaN where nothing was summed."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def as_statistics(values: Sequence[float | None]) -> np.ndarray:
    """[n, 2]: what `mean_of` takes. None: a sample to which the metric does not apply."""
    return np.array([(0.0, 0.0) if value is None else (value, 1.0) for value in values]).reshape(-1, 2)


def interval(statistics: np.ndarray, scans: Sequence[str], value_of: ValueOf = mean_of) -> tuple[float, float] | None:
    """The 95 % interval of value_of(the sum of all rows).

    Args:
        statistics: [n, k], a row for each sample; their sums decide the figure.
        scans: of each sample. Scans are drawn, with all of their samples.
        value_of: sums [..., k] -> figures [...].

    Returns:
        (low, high), or None for fewer than LEAST_SCANS scans.
    """
    by_scan = _sums(statistics, scans)
    if len(by_scan) < LEAST_SCANS:
        return None
    return _ends(value_of(_draws(len(by_scan)) @ by_scan))


def paired(
    a: np.ndarray, b: np.ndarray, scans: Sequence[str], value_of: ValueOf = mean_of
) -> tuple[float, tuple[float, float] | None]:
    """(figure of b - figure of a, its 95 % interval or None), of the same samples: the same scans are drawn for both.

    Args:
        a, b: [n, k], rows of the same samples in the same order.
        scans, value_of: see `interval`.
    """
    difference = float(value_of(b.sum(axis=0)) - value_of(a.sum(axis=0)))
    both = _sums(np.hstack([a, b]), scans)
    if len(both) < LEAST_SCANS:
        return difference, None
    drawn, k = _draws(len(both)), a.shape[1]
    return difference, _ends(value_of(drawn @ both[:, k:]) - value_of(drawn @ both[:, :k]))


def _sums(statistics: np.ndarray, scans: Sequence[str]) -> np.ndarray:
    """[scans, k], in the order of their names, of those scans to which the metric applies."""
    statistics = np.asarray(statistics, float)
    names = {scan: number for number, scan in enumerate(sorted(set(scans)))}
    sums = np.zeros((len(names), statistics.shape[1]))
    np.add.at(sums, [names[scan] for scan in scans], statistics)
    return sums[(sums != 0).any(axis=1)]


@lru_cache(maxsize=2)  # the same for all metrics of a task
def _draws(scans: int) -> np.ndarray:
    """[RESAMPLES, scans]: how often each scan was drawn."""
    return np.random.default_rng(_SEED).multinomial(scans, np.full(scans, 1 / scans), size=RESAMPLES).astype(float)


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, _ENDS)
    return float(low), float(high)
