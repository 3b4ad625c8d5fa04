"""The report: gpu-check.json and gpu-check.md, written anew whenever something is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy.checks.steps import Step

JSON, MARKDOWN, LOG = "gpu-check.json", "gpu-check.md", "gpu-check.log"
WAITING, RUNNING, PASSED, FAILED, NOT_RUN = "waiting", "running", "passed", "failed", "not run"


@dataclass
class Result:
    """What became of a step.

    state: waiting, running, passed, failed or not run. why: of a step that failed or was not run. seconds: it took.
    rows: as the step gave them.
    """

    name: str
    tells: str
    expected_s: int
    findings: tuple[int, ...]
    basic: bool
    state: str = WAITING
    why: str = ""
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, step: Step) -> Result:
        """A step that waits."""
        return cls(step.name, step.tells, step.seconds, step.findings, step.basic)


class Report:
    """The results of all steps in one folder.

    Args:
        folder: is made. steps: those that are asked for, in order. conditions: how the check was started.
    """

    def __init__(self, folder: Path, steps: Iterable[Step], conditions: dict):
        self.folder = folder
        self.conditions = conditions
        self.results = {step.name: Result.of(step) for step in steps}
        folder.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")

    @property
    def log(self) -> Path:
        """The file for what the steps print."""
        return self.folder / LOG

    @property
    def states(self) -> dict[str, str]:
        """State by the name of the step."""
        return {name: result.state for name, result in self.results.items()}

    @property
    def ok(self) -> bool:
        """Every step that ran has passed, and every basic one has run."""
        return all(
            result.state == PASSED or (result.state == NOT_RUN and not result.basic) for result in self.results.values()
        )

    def fact(self, what: str) -> str | None:
        """A value of the step machine; None before it, or if it does not know."""
        rows = self.results["machine"].rows if "machine" in self.results else []
        return next((row["value"] for row in rows if row.get("what") == what), None)

    def rates(self) -> dict[str, float]:
        """What the step roofline measured, in FLOP/s and bytes/s."""
        rows = self.results["roofline"].rows if "roofline" in self.results else []
        return {row["rate"]: row["per_s"] for row in rows if "rate" in row}

    def write(self) -> None:
        """Write both files; each is replaced in one piece, so that a reader never sees half of it."""
        content = {**self.conditions, "ok": self.ok, "steps": [asdict(result) for result in self.results.values()]}
        _replace(self.folder / JSON, json.dumps(content, indent=1, default=str) + "\n")
        _replace(self.folder / MARKDOWN, self.markdown())

    def markdown(self) -> str:
        """The report for a reader."""
        lines = ["# GPU check", "", *(f"- {key}: {value}" for key, value in self.conditions.items()), ""]
        lines += _table(
            [
                {
                    "step": result.name,
                    "state": result.state,
                    "seconds": f"{result.seconds:.0f} of {result.expected_s} expected" if result.seconds else "",
                    "tells": result.tells,
                    "findings": ", ".join(map(str, result.findings)),
                }
                for result in self.results.values()
            ]
        )
        for result in self.results.values():
            if result.rows or result.state == FAILED:
                lines += ["", f"## {result.name}: {result.state}", ""]
                lines += [f"**{_line(result.why)}**", ""] if result.why else []
                lines += _table([row for row in result.rows if "error" not in row or len(row) > 1])
        absent = [result for result in self.results.values() if result.state not in (PASSED, FAILED)]
        if absent:
            lines += ["", "## Not run", ""]
            lines += [f"- {result.name}: {_line(result.why) or result.state}" for result in absent]
        return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict]) -> list[str]:
    """Markdown lines; a column for each key that any row has, in the order in which they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows),
    ]


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.split())


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
