"""Rows of a run on disk: JSONL, one row a key, written once. A run that was cut off goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from benchmarks.command import say
from engine.errors import InvalidInput, shortened


class RowStore:
    """The rows of one file; its first line is a header, which says what made them.

    A last line that was cut off by a crash is removed; its row is made again.

    Args:
        path: of the file; it is made if it is not there.
        header: JSON-ready; a file with another one is refused.
        anew: it is not refused, but emptied, and this is said.

    Raises:
        InvalidInput: if the file was made by something else, is damaged, or is open in another run.
    """

    def __init__(self, path: Path, header: dict, anew: bool = False):
        self.path, self.header, self._anew = path, json.loads(json.dumps(header)), anew
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise InvalidInput(f"{path} is open in another run: wait for it, or choose another folder") from None
        try:
            self._rows = self._load()
        except InvalidInput:
            os.close(self._file)
            raise

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict]:
        """All rows, in the order of their keys: the order in which they were written says nothing."""
        return [self._rows[key] for key in sorted(self._rows)]

    def append(self, row: dict) -> None:
        """Write a row; it is in the file when this returns. Raises InvalidInput for a key that has one."""
        key = row["key"]
        if key in self._rows:
            raise InvalidInput(f"{self.path} has a row {shortened(key)} already")
        row = json.loads(self._write(row))
        self._rows[key] = row

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, row: dict) -> str:
        line = json.dumps(row, allow_nan=False)
        data = f"{line}\n".encode()
        while data:  # a disk that is full writes a part, and raises then
            data = data[os.write(self._file, data) :]
        return line

    def _load(self) -> dict[str, dict]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
        lines = whole.splitlines()
        if not lines:
            self._write(self.header)
            return {}
        header, *rows = (self._parsed(number, line) for number, line in enumerate(lines, start=1))
        if differences := self._differences(header):
            if not self._anew:
                raise InvalidInput(
                    f"{self.path} was made by another run and cannot be resumed ({differences}): choose another "
                    "folder with --out, or delete those rows with --anew"
                )
            say(f"{self.path} was made by another run ({differences}): its {len(rows)} rows are deleted")
            os.ftruncate(self._file, 0)
            self._write(self.header)
            return {}
        found: dict[str, dict] = {}
        for number, row in enumerate(rows, start=2):
            if not isinstance(row.get("key"), str) or row["key"] in found:
                raise InvalidInput(f"{self.path}: line {number} has no key, or one that an earlier line has")
            found[row["key"]] = row
        return found

    def _parsed(self, number: int, line: bytes) -> dict:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InvalidInput(
                f"{self.path}: line {number} is no JSON object: the file is damaged, choose another folder"
            )
        return row

    def _differences(self, header: dict) -> str:
        return "; ".join(
            f"{name}: {shortened(header.get(name))} there, {shortened(self.header.get(name))} now"
            for name in sorted({*header, *self.header})
            if header.get(name) != self.header.get(name)
        )


def read_rows(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows in the order of their keys) of a file, without a last line that is cut off. Raises InvalidInput."""
    try:
        content = path.read_bytes()
        header, *rows = map(json.loads, content[: content.rfind(b"\n") + 1].splitlines())
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise InvalidInput(f"{path} does not hold a header and rows in JSON") from None
    return header, sorted(rows, key=lambda row: row["key"])
