"""`m3d doctor`: what this machine has, and what serving lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli import console, options


def doctor(
    repository: Annotated[Path, typer.Option(help="model repository to look at")] = Path("model_repository"),
    target: Annotated[str | None, typer.Option(help="cpu or tensorrt (default: the repository's)")] = None,
) -> None:
    from engine.doctor import examine, target_of

    target = options.checked_target(target or target_of(repository))
    findings = examine(repository, target)
    console.print_table([(finding.state, finding.what, finding.detail) for finding in findings])
    missing = [finding for finding in findings if finding.state == "missing"]
    where = {"cpu": "on the CPU", "tensorrt": "on the GPU"}[target]
    print(f"{len(missing)} missing for serving {where}" if missing else f"ready to serve {where}")
    raise typer.Exit(console.FAILED if missing else 0)
