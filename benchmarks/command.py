"""What the benchmarks' commands share: the signals that end them, progress, and their arguments' types."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable

SIGNALS = signal.SIGINT, signal.SIGTERM  # of `engine.cli.console.run`: SIGTERM, too, ends what a benchmark has started


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
