"""Runs the steps, each in a process of its own, and writes the report as their rows come."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from deploy.checks.context import ROOT, Context
from deploy.checks.report import FAILED, NOT_RUN, PASSED, RUNNING, Report, Result
from deploy.checks.steps import Step

CHILD = "deploy/checks/child.py"
SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take a shared core from others
}
ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception): .*")
LOOK_S = 0.5  # between two looks at the rows of a step that runs
GRACE_S = 20  # for a step that is ended to stop the servers that it has started


def run(
    steps: Sequence[Step],
    context: Context,
    report: Report,
    budget: float,
    serving: Callable[[], list[str]],
    say: Callable[[str], None] = print,
) -> None:
    """Run the steps one after the other.

    Args:
        steps: in order. context: for them; the rates that the step roofline measures are added.
        report: takes the results. budget: seconds after which no further step begins; a step that is expected to
            outlast them does not begin either.
        serving: what serving on a GPU needs and this machine lacks. say: takes lines about the progress.
    """
    started = time.monotonic()
    for step in steps:
        result = report.results[step.name]
        left = budget - (time.monotonic() - started)
        why = "; ".join(step.missing(report.states, serving))
        if not why and left < step.seconds:
            why = f"{max(left, 0):.0f} of {budget:.0f} s were left, and it takes {step.seconds}: give a larger --budget"
        if why:
            result.state, result.why = NOT_RUN, why
            say(f"-- {step.name}: not run: {why}")
        else:
            say(f"== {step.name} ({step.seconds} s): {step.tells}")
            # What is expected of steps that serve is for the demo's size; another checkpoint has the whole budget.
            limit = min(step.limit, left) if context.is_demo or not step.serves else left
            _run_step(step, replace(context, rates=report.rates()), report, limit, say)
            say(f"   {result.state} after {result.seconds:.0f} s{': ' + result.why if result.why else ''}")
        report.write()


def _run_step(step: Step, context: Context, report: Report, limit: float, say: Callable[[str], None]) -> None:
    """Run one step in its process until it ends, or for `limit` seconds."""
    result = report.results[step.name]
    result.state = RUNNING
    report.write()
    started = time.monotonic()
    # What the step and its programs write into the folder for temporary files goes with it. A server that is being
    # ended may still write there.
    temporary = tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True)
    with temporary as folder, report.log.open("ab") as log:
        rows = Path(folder) / "rows"
        rows.touch()
        log.write(f"\n== {step.name}\n".encode())
        log.flush()
        begun = log.tell()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / CHILD), step.module, step.function, context.to_json(), str(rows)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**SETTINGS, **os.environ, "TMPDIR": folder},
        )
        ended = False
        try:
            while process.poll() is None and not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
                _take_rows(rows, result, report, say)
                result.seconds = round(time.monotonic() - started, 1)
                ended = process.returncode is None and result.seconds > limit
        finally:  # also after Ctrl-C
            if process.returncode is None:
                _end(process)
                result.state, result.why = FAILED, "interrupted"
                report.write()
        _take_rows(rows, result, report, say)
        result.state, result.why = _verdict(process.returncode, result, limit if ended else None)
        if result.state == FAILED:
            result.why += _first_cause(report.log, begun, result.why)


def _take_rows(path: Path, result: Result, report: Report, say: Callable[[str], None]) -> None:
    """Put the whole lines of the file of rows into the report."""
    *lines, _ = path.read_text().split("\n")
    fresh = [json.loads(line) for line in lines[len(result.rows) :]]
    if fresh:
        result.rows += fresh
        report.write()
    for row in fresh:
        say("   " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()))


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _verdict(code: int, result: Result, limit: float | None) -> tuple[str, str]:
    """State and cause of a step that has ended. limit: seconds after which it was ended, if it was."""
    errors = [row["error"] for row in result.rows if set(row) == {"error"}]
    wrong = [str(row.get("what", "a row")) for row in result.rows if row.get("ok") is False]
    if limit is not None:
        return FAILED, f"not done after {limit:.0f} s"
    if errors:
        return FAILED, errors[0]
    if code < 0:
        return FAILED, f"its process was ended by {signal.Signals(-code).name}"
    if code:
        return FAILED, f"its process ended with status {code}"
    if wrong:
        return FAILED, f"not as it should be: {', '.join(wrong[:6])}" + (" ..." if len(wrong) > 6 else "")
    if not result.rows:
        return FAILED, "it told nothing"
    return PASSED, ""


def _first_cause(log: Path, begun: int, why: str) -> str:
    """What went wrong first, by what the step and its programs printed, as the end of a message; else their last line.

    An engine that dies in a process of its own leaves its cause there alone.
    """
    with log.open("rb") as stream:
        stream.seek(begun)
        text = stream.read().decode(errors="replace")
    cause = ERROR.search(text)
    said = cause[0] if cause else next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
    return f" (first in the log: {said[:400]})" if said and said not in why else ""


def _end(process: subprocess.Popen) -> None:
    """End a step and what it has started; a server's supervisor sees that its parent is gone and ends the server."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            return
