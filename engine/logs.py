"""Logging of the engine: loggers below `engine`, one line a record on stderr, with the id of the request.

A program that uses the library sets handlers of its own. Commands and the processes of a server call `set_up`.

- error: a defect, with its traceback; it may quote values of the request that ran into it.
- warning (the default): what an operator must know, such as a language model that is started again.
- info: starts and ends, and a line for each answered request: its id, how it ended, and how long it took.
- debug: parts of uploads and quick requests, and the messages of refusals, which may quote a request.

No record at info or above, errors apart, has a scan, a question, an answer, a file's name or a study's handle.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from engine.errors import InvalidInput

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "M3D_LOG_LEVEL"  # in the environment: the processes of a server take it from the command that starts them
_FORMAT = "%(asctime)s %(levelname)s %(process_name)s %(request)s %(name)s: %(message)s"
_request: ContextVar[str] = ContextVar("request", default="-")


def set_up(process: str, level: str | None = None) -> None:
    """Write the engine's log to stderr, in the place of an earlier set-up.

    Args:
        process: name of this process in each line, such as a Triton model's.
        level: one of LEVELS; None takes the environment's M3D_LOG_LEVEL, else warning.

    Raises:
        InvalidInput: there is no such level.
    """
    level = level or os.environ.get(VARIABLE) or "warning"
    if level not in LEVELS:
        raise InvalidInput(f"log level {level!r} (--log-level, {VARIABLE}): it is one of {', '.join(LEVELS)}")
    logger = logging.getLogger("engine")
    logger.handlers = [_Stderr(process)]
    logger.setLevel(level.upper())


@contextmanager
def request(id_: str) -> Iterator[None]:
    """Give the records of this thread or task the id of the request they belong to."""
    token = _request.set(id_ or "-")
    try:
        yield
    finally:
        _request.reset(token)


class _Stderr(logging.Handler):
    """Writes whole lines to the stderr of the moment."""

    def __init__(self, process: str):
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT, defaults={"process_name": process}))

    def emit(self, record: logging.LogRecord) -> None:
        record.request = _request.get()
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # nobody reads stderr any more; a log must not end what it tells of
