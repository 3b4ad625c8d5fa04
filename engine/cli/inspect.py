"""`m3d inspect`: what a checkpoint is, lacks and needs."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.cli import console, options
from engine.errors import Unavailable


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="folder or Hugging Face id (owner/name\\[/subfolder]\\[@revision]) of M3D-LaMed or M3D-CLIP"
        ),
    ],
    target: Annotated[str, typer.Option(help="what it shall be exported for: cpu or tensorrt")] = "cpu",
    precision: Annotated[str, typer.Option(help="of the export: fp32, bf16, fp16, or fp8 with tensorrt")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="print all that is known as JSON")] = False,
) -> None:
    import json
    from dataclasses import asdict

    options.checked_target(target)
    try:
        from engine import inspection
        from engine.inspection_table import rows, verdict
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"m3d inspect needs {error.name}, which the client alone does without: install 'm3d-engine[cpu]'"
        ) from None
    found = inspection.inspect(checkpoint, target, precision, console.progress)
    if as_json:
        print(json.dumps({**asdict(found), "ready": found.ready}, indent=2))
    else:
        console.print_table(rows(found))
        print(verdict(found))
    raise typer.Exit(0 if found.ready else console.FAILED)
