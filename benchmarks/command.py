"""What the benchmarks' commands share: how they begin, speak and end, and their arguments' types."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from engine.errors import M3DError

INTERRUPTED = 130  # exit status, as a shell gives it after Ctrl-C
_SIGNALS = signal.SIGINT, signal.SIGTERM


def run(body: Callable[[], int]) -> int:
    """The exit status of `body`. Ctrl-C and SIGTERM end what it has started, too, and are said in a line, as errors."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        return body()
    except M3DError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("the benchmark was interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(words: str) -> None:
    """A step of long work."""
    print(f"- {words}", flush=True)


def at_least(least: float, kind: type = int, most: float = 1_000_000):
    """An argument's type: a number from `least` on, and at most `most`."""

    def number(text: str):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most:,}")
        return value

    number.__name__ = "number"  # argparse says it of what is none
    return number


def several(one: Callable = str):
    """An argument's type: values with commas between them, each once."""

    def values(text: str) -> tuple:
        return tuple(dict.fromkeys(one(part) for part in text.split(",") if part))

    values.__name__ = "list with commas"
    return values


def _interrupt(*_) -> None:
    for number in _SIGNALS:  # ending a server is bounded, and must not be cut short
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
