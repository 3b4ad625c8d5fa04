"""Arguments and options that several commands have, and the checks of them that need no server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.errors import InvalidInput


def _checked_question(question: str) -> str:
    """Raises InvalidInput for a question that cannot be asked, before a scan is sent for it."""
    from engine.methods import checked_question

    return checked_question(question)


def _checked_crop(crop: str | None) -> str | None:
    """Raises InvalidInput for a crop that cannot be read."""
    if crop is not None:
        from engine.volume.crop import Crop

        Crop.of(crop)
    return crop


# engine.scan.FORMATS in few words: importing it takes longer than help may.
_SCAN = "scan: .nii, .nii.gz, .nrrd, .mha, .mgh, .mgz, .npy, a DICOM folder, or a zip of one"
ServerUrl = Annotated[str, typer.Option("--server", envvar="M3D_SERVER", help="gRPC address of the server")]
Preset = Annotated[str, typer.Option(help="preprocessing: auto, ct, mr, m3d-cap, m3d-seg, m3d-refseg or raw")]
Crop = Annotated[
    str | None,
    typer.Option(
        help="region that the model sees: i0:i1,j0:j1,k0:k1 in voxels of the array's axes, or x0:x1,y0:y1,z0:z1mm in "
        "mm (RAS+); default all",
        callback=_checked_crop,
    ),
]
Timeout = Annotated[float, typer.Option(help="seconds until the request is given up")]
ScanPath = Annotated[Path, typer.Argument(metavar="SCAN", help=_SCAN)]
Question = Annotated[str, typer.Argument(help="what to ask", callback=_checked_question)]
MaxNewTokens = Annotated[int | None, typer.Option(help="tokens of the answer at most (default 256)")]
Temperature = Annotated[float | None, typer.Option(help="0 (default) is greedy; else 0.01 to 2")]
TopP = Annotated[float | None, typer.Option(help="sample from the likeliest tokens that sum up to this")]
TopK = Annotated[int | None, typer.Option(help="sample from this many likeliest tokens; 0 is all")]
Seed = Annotated[int | None, typer.Option(help="makes sampling repeatable")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="above 1 repeats less")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be given several times")]


def sampling_of(**given) -> dict:
    """The sampling values that were given. Raises InvalidInput for those that a server refuses."""
    from engine.sampling import Sampling

    sampling = {name: value for name, value in given.items() if value not in (None, [])}
    Sampling.from_dict(sampling)
    return sampling


def text_of(path: Path, option: str) -> str:
    """The text of a file. Raises InvalidInput, naming the option, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{option} {path} cannot be read as text: {getattr(error, 'strerror', error)}") from None


def checked_target(target: str) -> str:
    """Raises InvalidInput for a target that is unknown."""
    from engine.server.triton import TARGETS

    if target not in TARGETS:
        raise InvalidInput(f"--target {target}: known are {', '.join(TARGETS)}")
    return target
