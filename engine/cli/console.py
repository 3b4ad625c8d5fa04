"""How every command looks and ends: `m3d`, and the scripts in export/, training/ and benchmarks/.

Results go to stdout; progress, notes, warnings and errors go to stderr. Exit status: 0 success; 1 failure, or a check
that found something missing; 2 unusable arguments or input; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NoReturn

from engine.errors import InvalidInput, M3DError

if TYPE_CHECKING:
    from rich.console import Console

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
_COLOURS = {"ok": "green", "missing": "red", "wrong": "red", "note": "yellow"}

# rich is imported where it is used: until then Ctrl-C must find `run` in place.


def run(body: Callable[[], object], signals: Sequence[signal.Signals] = (signal.SIGINT,)) -> int:
    """Run a command; errors and signals become one line on stderr instead of a traceback.

    After the first of `signals` further ones are ignored until `body` has ended: what it started must be stopped.

    Args:
        body: returns the exit status if that is a number; else the command has succeeded.
        signals: end the command like Ctrl-C. With SIGTERM among them, a command can stop the processes it started.

    Returns:
        The exit status.
    """
    received = False

    def interrupt(*_) -> None:
        nonlocal received
        received = True
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        # A thread of gRPC's may fail while the process ends. Its traceback would hide the one line that counts.
        threading.excepthook = lambda _: None
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        result = body()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except SystemExit as end:
        if received and end.code == INTERRUPTED:  # typer ends a command so
            note("interrupted")
        raise
    except (M3DError, OSError) as failure:
        error(str(failure))
        return BAD_INPUT if isinstance(failure, InvalidInput) else FAILED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with the errors of `m3d`."""

    def error(self, message: str) -> NoReturn:
        error(f"{message}\nsee {self.prog} --help")
        sys.exit(BAD_INPUT)


@cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a line, as it is."""
    _stderr().print(text, markup=False)


def success(what: str, text: str) -> None:
    """Print what was reached in green, and the rest of the line."""
    _stderr().print(f"[green]{what}[/] ", end="")
    note(text)


def progress(text: str) -> None:
    """Print a step of the work, or a detail of its result."""
    _stderr().print(text, style="dim", markup=False)


def warn(text: str) -> None:
    _stderr().print("[yellow]warning:[/] ", end="")
    note(text)


def error(text: str) -> None:
    _stderr().print("[red]error:[/] ", end="")
    note(text)


def print_table(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print rows of (state, what, detail) on stdout. States: ok, missing, wrong, note, or empty."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for state, what, detail in rows:
        table.add_row(Text(state, _COLOURS.get(state, "")), Text(what, "bold"), Text(detail))
    Console(highlight=False).print(table)
