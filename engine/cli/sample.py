"""`m3d sample`: one of the real scans that packages carry, as NIfTI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    name: Annotated[str, typer.Argument(help="brain-mr, chest-ct or spine-ct")],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write into, or a .nii.gz file")] = Path("."),
) -> None:
    from m3d_demo.samples import write_sample

    print(write_sample(name, output))
