"""Two results of latency.py side by side, with their noise: is the newer one slower?

    python benchmarks/compare.py OLD.json NEW.json

A ratio above 1 is slower. The interval holds 95 % of the ratios of medians when the samples of both are drawn again at
random (bootstrap); a ratio is marked if 1 lies outside. The exit status is 1 if anything is slower beyond its noise.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DRAWS = 4000
METRICS = ("total_s", "first_s", "per_token_s")


def interval(old: Sequence[float], new: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(ratio of medians new / old, lower and upper end of its 95 % interval)."""
    rng = np.random.default_rng(seed)
    drawn = [np.median(rng.choice(values, (DRAWS, len(values))), axis=1) for values in (old, new)]
    low, high = np.percentile(drawn[1] / drawn[0], (2.5, 97.5))
    return float(np.median(new) / np.median(old)), float(low), float(high)


def compare(old: dict, new: dict) -> list[tuple[str, float, float, float]]:
    """(what, ratio, low, high) of everything that both results have samples of."""
    found = []
    for side, kinds in old["samples"].items():
        for kind, samples in kinds.items():
            others = new["samples"].get(side, {}).get(kind, [])
            for metric in METRICS:
                a, b = ([s[metric] for s in group if s[metric] is not None] for group in (samples, others))
                if a and b:
                    found.append((f"{side}, {kind}, {metric.removesuffix('_s')}", *interval(a, b)))
    old, new = _others(old), _others(new)
    return found + [(what, *interval(old[what], new[what])) for what in old if what in new]


def _others(result: dict) -> dict[str, list[float]]:
    """What was measured several times beside the samples of one at a time, in seconds."""
    found: dict[str, list[float]] = {}
    for row in result.get("closed_loop", ()):
        found.setdefault(f"{row['concurrency']} clients, per token", []).append(1 / row["tokens_per_s"])
    if "preprocessing" in result:
        found["preprocessing of a large CT"] = result["preprocessing"]["seconds"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    rows = compare(*(json.loads(path.read_text()) for path in (arguments.old, arguments.new)))
    slower = False
    for what, ratio, low, high in rows:
        mark = "SLOWER" if low > 1 else "faster" if high < 1 else ""
        slower |= low > 1
        print(f"{what:<44} {ratio:6.3f}   [{low:.3f}, {high:.3f}]  {mark}")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
