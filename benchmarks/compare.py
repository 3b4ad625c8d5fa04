"""Two results of latency.py side by side, with their noise: is the newer one slower?

    python benchmarks/compare.py OLD.json NEW.json

A ratio above 1 is slower, or more. The interval holds 95 % of the ratios of medians when the samples of both are drawn
again at random (bootstrap). A ratio is marked if 1 lies outside, and also whatever the baseline's new scan says of the
machine itself, where both have one: noise between two runs is not in the samples of either. What was measured once or
twice has no interval and no mark, but bytes on the wire, which have no noise.

The exit status is 1 if anything of the server is slower beyond its noise, is missing in NEW, or does a step that it did
not in OLD, 2 if they cannot be compared: not results, or of other work (scans, tokens, questions, precision).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.timings import rest
from engine.errors import InvalidInput

DRAWS = 4000
FEWEST = 3  # samples that say something about their noise
METRICS = ("total_s", "first_s", "per_token_s")
OF_THE_WORK = ("scan", "tokens")
ALSO_OF_THE_WORK = ("segment_tokens", "segment_question")  # which earlier results do not tell
OF_THE_MACHINE = ("cpu", "cores", "gpu", "versions")
SAME_BYTES = 1.001  # a question's number may have a digit more
SAME_MEMORY = 1.1
ONCE = {"export_s": "export", "start_s": "start"}
MEMORY = {
    "export_peak_bytes": "memory of the export",
    "server_memory_bytes": "memory of the server",
    "peak_memory_bytes": "memory of the machine",
}
MACHINE = "cold, total"  # of a baseline: says how fast the machine was


@dataclass(frozen=True)
class Row:
    """low, high: 95 % interval of the ratio new / old; the ratio itself where there is no noise, None where unknown."""

    what: str
    ratio: float
    low: float | None = None
    high: float | None = None

    def mark(self, machine: tuple[float, float] = (1.0, 1.0)) -> str:
        """SLOWER, faster, or nothing. machine: interval of the machine's own ratio."""
        if self.low is None:
            return ""
        return "SLOWER" if self.low > max(1, machine[1]) else "faster" if self.high < min(1, machine[0]) else ""


def interval(old: Sequence[float], new: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(ratio of medians new / old, lower and upper end of its 95 % interval)."""
    rng = np.random.default_rng(seed)
    drawn = [np.median(rng.choice(values, (DRAWS, len(values))), axis=1) for values in (old, new)]
    low, high = np.percentile(drawn[1] / drawn[0], (2.5, 97.5))
    return float(np.median(new) / np.median(old)), float(low), float(high)


@dataclass(frozen=True)
class Compared:
    """rows: what both results have. gone: what only the old one has. steps: the server's that only the new one has."""

    rows: list[Row]
    gone: list[str]
    steps: list[str]


def compare(old: dict, new: dict) -> Compared:
    """Raises InvalidInput for other work, or nothing in both."""
    known = [name for name in ALSO_OF_THE_WORK if name in old["conditions"] and name in new["conditions"]]
    for name in (*OF_THE_WORK, *known):
        before, after = old["conditions"][name], new["conditions"][name]
        if before != after:
            raise InvalidInput(f"they did other work: {name} was {before} and is {after}")
    if _precision(old) != _precision(new):
        raise InvalidInput(f"they did other work: the precision was {_precision(old)} and is {_precision(new)}")
    rows, gone = [], []
    for measured, row in ((_measured, _noisy), (_sizes, _bounded(SAME_BYTES)), (_memory, _bounded(SAME_MEMORY))):
        before, after = dict(measured(old)), dict(measured(new))
        rows += [row(what, before[what], after[what]) for what in before if what in after]
        gone += [what for what in before if what not in after]
    if not rows:
        raise InvalidInput("nothing was measured in both")
    kinds = old["samples"].get("served", {}).keys() & new["samples"].get("served", {}).keys()
    steps_before, steps_after = set(_steps(old, kinds)), set(_steps(new, kinds))
    return Compared(rows, [what for what in gone if what not in steps_before], sorted(steps_after - steps_before))


def _noisy(what: str, old: list[float], new: list[float]) -> Row:
    if min(len(old), len(new)) < FEWEST:
        return Row(what, float(np.median(new) / np.median(old)))
    return Row(what, *interval(old, new))


def _bounded(same: float) -> Callable[[str, int, int], Row]:
    def row(what: str, old: int, new: int) -> Row:
        ratio = new / old
        end = 1.0 if 1 / same < ratio < same else ratio
        return Row(what, ratio, end, end)

    return row


def machine(rows: list[Row]) -> tuple[float, float]:
    """Interval of how much slower the machine itself was, as the baselines have it; (1, 1) without one."""
    ends = [
        (row.low, row.high)
        for row in rows
        if row.what.startswith("baseline") and row.what.endswith(MACHINE) and row.low is not None
    ]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (1.0, 1.0)


def _measured(result: dict) -> Iterator[tuple[str, list[float]]]:
    """Durations, with their samples."""
    for side, kinds in result["samples"].items():
        for kind, samples in kinds.items():
            yield from _times(f"{side}, {kind}", samples)
            for part in sorted({name for s in samples for name in s["parts"]}):
                yield _step(side, kind, part), [s["parts"][part] for s in samples if part in s["parts"]]
            if samples and side == "served" and kind in ("cold", "follow_up"):
                yield f"{side}, {kind}, overhead", [rest(s) for s in samples]
    clients: dict[str, list[float]] = {}
    for row in result.get("closed_loop", ()):
        clients.setdefault(f"{row['concurrency']} clients, per token", []).append(1 / row["tokens_per_s"])
    yield from clients.items()
    for run in result.get("open_loop", ()):
        yield from _times(run["scenario"] + (f" {run['rate']:g}/s" if run["rate"] else ""), run["samples"])
    if "preprocessing" in result:
        yield f"preprocessing of {_large_ct(result)}", result["preprocessing"]["seconds"]
    for name, words in ONCE.items():
        if result.get(name):
            yield words, [result[name]]


def _steps(result: dict, kinds: Iterable[str]) -> Iterator[str]:
    """What the server does for any of the requests of these kinds."""
    for kind in kinds:
        yield from (_step("served", kind, part) for s in result["samples"]["served"][kind] for part in s["parts"])


def _step(side: str, kind: str, part: str) -> str:
    return f"{side}, {kind}, {part}"


def _large_ct(result: dict) -> str:
    return "a CT of " + " x ".join(map(str, result["preprocessing"]["shape"]))


def _times(what: str, samples: list[dict]) -> Iterator[tuple[str, list[float]]]:
    for metric in METRICS:
        if values := [s[metric] for s in samples if s[metric] is not None]:
            yield f"{what}, {metric.removesuffix('_s')}", values


def _sizes(result: dict) -> Iterator[tuple[str, int]]:
    """Bytes on the wire."""
    for name, size in result.get("wire", {}).items():
        yield f"bytes of {name}", size


def _memory(result: dict) -> Iterator[tuple[str, int]]:
    for name, words in MEMORY.items():
        if result.get(name):
            yield words, result[name]
    if "preprocessing" in result:
        yield f"memory of preprocessing {_large_ct(result)}", result["preprocessing"]["extra_bytes"]


def _surroundings(result: dict) -> dict:
    """What is no reason not to compare, but may be one for a difference: the machine and the model."""
    manifest = result.get("manifest") or {}
    return {
        **{name: result["conditions"].get(name) for name in OF_THE_MACHINE},
        "checkpoint_sha256": manifest.get("checkpoint_sha256"),
        "graph_precision": result.get("graph_precision"),
    }


def _precision(result: dict) -> str | None:
    return result["manifest"]["precision"] if result.get("manifest") else None


def read(path: Path) -> dict:
    """A result of latency.py. Raises InvalidInput for anything else."""
    try:
        result = json.loads(path.read_text(), parse_constant=_refused)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InvalidInput(f"{path} is not JSON: give what latency.py wrote to --json") from None
    if not isinstance(result, dict) or not result.get("samples") or "conditions" not in result:
        raise InvalidInput(f"{path} has no samples: give what latency.py wrote to --json")
    return result


def _refused(number: str) -> None:
    raise InvalidInput(f"a result has no {number}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.json", help="what latency.py --json wrote before")
    parser.add_argument("new", type=Path, metavar="NEW.json", help="and now")
    arguments = parser.parse_args()
    try:
        old, new = read(arguments.old), read(arguments.new)
        compared = compare(old, new)
    except InvalidInput as error:
        print(f"not compared: {error}", file=sys.stderr)
        return 2
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        print(
            "not compared: one of the files is no whole result of latency.py "
            f"({type(error).__name__}: {error}): measure again",
            file=sys.stderr,
        )
        return 2
    before, after = _surroundings(old), _surroundings(new)
    for name, value in before.items():
        if value != after[name]:
            print(f"not the same: {name} was {value} and is {after[name]}")
    known, slower, judged = machine(compared.rows), False, False
    for row in compared.rows:
        ours = not row.what.startswith("baseline")
        mark = row.mark(known) if ours else row.mark()
        slower |= ours and mark == "SLOWER"
        judged |= row.low is not None and row.low < row.high
        noise = "" if row.low is None else f"[{row.low:.3f}, {row.high:.3f}]"
        print(f"{row.what:<44} {row.ratio:6.3f}   {noise:<16}  {mark}")
    for what in compared.gone:
        print(f"{what:<44} missing in {arguments.new}")
    for what in compared.steps:
        print(f"{what:<44} NOT DONE in {arguments.old}")
    for section, words in new.get("failures", {}).items():
        print(f"{section:<44} failed in {arguments.new}: {words}")
    if not judged:
        print(f"no time was measured {FEWEST} times in both: none is judged")
    return int(slower or bool(compared.gone or compared.steps or new.get("failures")))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without words about a pipe
    sys.exit(main())
