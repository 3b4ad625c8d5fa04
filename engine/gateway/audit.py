"""One JSON line for each access: who did what with which study, and how it ended. No contents.

Of the request a line has the operation (method and route, not the path as it came), sizes and times; of the question
its text only if that is switched on. File names, messages of errors and addresses are left out: they may name a patient
or a person.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from engine.errors import InvalidInput

_log = logging.getLogger(__name__)


@dataclass
class Access:
    """What is known of a request in work; the routes add to it.

    key: name of the key. study: its public id; of several, with commas between them. file: its public id. outcome: ok,
    disconnected, or the code of a refusal.
    """

    request: str
    key: str | None = None
    operation: str = "other"
    study: str | None = None
    file: str | None = None
    question: str | None = None
    outcome: str = "ok"
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Audit:
    """Writes the lines. path: of a file that is appended to (made with mode 0600); None for standard output."""

    def __init__(self, path: Path | None, with_questions: bool = False):
        self._with_questions = with_questions
        self.failures = 0
        if path is None:
            self._file = os.dup(sys.stdout.fileno())
            return
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise InvalidInput(f"the audit file {path} cannot be written: {error.strerror}") from None

    def write(self, access: Access) -> None:
        """A line that cannot be written is counted and logged; the request is answered all the same."""
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request": access.request,
            "key": access.key,
            "operation": access.operation,
            "study": access.study,
            "file": access.file,
            "outcome": access.outcome,
            "status": access.status,
            "bytes_in": access.bytes_in,
            "bytes_out": access.bytes_out,
            "seconds": round(access.seconds, 6),
        }
        if self._with_questions and access.question is not None:
            line["question"] = access.question
        try:
            os.write(self._file, json.dumps(line).encode() + b"\n")  # one call: lines do not mix
        except OSError as error:
            self.failures += 1
            _log.error("an audit line cannot be written: %s", error.strerror)

    def close(self) -> None:
        os.close(self._file)


def log_failure(access: Access, error: Exception) -> None:
    """Where it failed, without what the error says: that may quote a scan or a question."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    _log.error("request %s failed with %s at %s", access.request, type(error).__name__, where)
