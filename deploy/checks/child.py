"""Run one step in this process: python deploy/checks/child.py MODULE FUNCTION CONTEXT ROWS

MODULE is a file of this checkout, such as deploy/checks/machine.py; CONTEXT is a Context as JSON. Each row is appended
to the file ROWS as a line of JSON when it is known; an exception becomes a line {"error": ...}. The exit status is 0 if
the step came to its end.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if __package__ in (None, ""):  # run as a script: this folder's modules must not hide packages
    sys.path[0] = str(ROOT)

from deploy.checks.context import Context  # noqa: E402


def main(module: str, function: str, context: str, rows: str) -> int:
    """Run a step to its end, or to its first exception."""
    with open(rows, "a", buffering=1) as stream:
        try:
            imported = importlib.import_module(module.removesuffix(".py").replace("/", "."))
            found: Iterator[dict] = getattr(imported, function)(Context.from_json(context))
            for row in found:
                stream.write(json.dumps(_plain(row), default=str) + "\n")
        except Exception as error:
            traceback.print_exc()
            stream.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
            return 1
    return 0


def _plain(row: dict) -> dict:
    """The row as JSON has it: no NumPy's bool, which would become a text, and no NaN."""
    words = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**row, **words, **({"ok": bool(row["ok"])} if "ok" in row else {})}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
