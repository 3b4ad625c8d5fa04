"""What was measured: one sample a request, and what may be said about many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Timing:
    """One request. Times in seconds since it began.

    first_s: when its first token came. tokens: of the answer; prompt_tokens: before it, visual ones included;
    cached_tokens: those of the prompt that the server had computed before.
    parts: where its time went, by stage, as far as the side that did it says. started: by time.perf_counter.
    """

    total_s: float
    first_s: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    cached_tokens: int = 0
    started: float | None = None

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first; None without two tokens."""
        return None if self.tokens < 2 or self.first_s is None else (self.total_s - self.first_s) / (self.tokens - 1)

    def to_dict(self) -> dict:
        """JSON-ready, with per_token_s."""
        return {**asdict(self), "per_token_s": self.per_token_s}


def summary(values: Sequence[float]) -> dict[str, float]:
    """{"n", "median", "p90", "p99", "min", "max"} of `values`; percentiles are interpolated linearly."""
    median, p90, p99 = np.percentile(np.asarray(values, float), PERCENTILES)
    return {
        "n": len(values),
        "median": float(median),
        "p90": float(p90),
        "p99": float(p99),
        "min": float(min(values)),
        "max": float(max(values)),
    }


def rest(sample: dict) -> float:
    """Seconds of a request that none of its parts explains: serving overhead."""
    return sample["total_s"] - sum(sample["parts"].values())


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ours / theirs, pair by pair: both of a pair were measured in the same round."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} measurements cannot be paired with {len(theirs)}")
    return [a / b for a, b in zip(ours, theirs)]
