"""The scans in a request: by an id, inline, or as a list of single slices."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from engine.gateway.refusal import Refusal, invalid
from engine.scan.npy import npy_pieces

if TYPE_CHECKING:
    from PIL.Image import Image

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_DICOM_PREAMBLE, _DICOM = 128, b"DICM"
_MAX_PICTURE_BYTES = 1 << 27  # 512 slices of 512 x 512
_DEEP = {"I;16": "<u2", "I": "i4", "F": "f4"}  # modes of Pillow that are not of 8 bits a channel
SLICES_NOTE = (
    "the scan was sent as single pictures, which have neither voxel sizes nor an orientation: both are a guess, left "
    "and right with them"
)
CHANNELS_NOTE = "of pictures whose colour channels differ, the first channel was read"


@dataclass(frozen=True)
class Named:
    """A scan by the public id of a study or of a file. param: where it stood in the request."""

    public: str
    param: str


@dataclass(frozen=True)
class Inline:
    """A scan's file in the request itself. notes: what a user has to know of it."""

    content: bytes
    digest: str
    notes: tuple[str, ...] = ()


ScanPart = Named | Inline


def decoded(data: str, param: str) -> bytes:
    """The bytes of raw base64, or of a data URL. What its type says counts for nothing: the bytes say what they are."""
    if data[:5].lower() == "data:":
        head, comma, data = data.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise invalid(f"{param}: a data URL has the form data:TYPE;base64,CONTENT", param)
    elif "://" in data[:16]:
        raise invalid(f"{param}: addresses are not fetched: send the content as a data URL or upload a file", param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param}: the content is not base64 ({error})", param) from None


def inline(contents: Sequence[bytes], param: str, hold: Callable[[int], object]) -> Inline:
    """The one scan that is in these files: a file, the DICOM files of a series, or pictures of its slices in order.

    hold: is told how many bytes are about to be taken besides the request's, and raises Refusal if there is no room.
    """
    if len(contents) == 1:
        if _is_picture(contents[0]):
            raise invalid(
                f"{param}: one picture is no scan: send a volume (application/x-nifti, application/dicom, "
                "application/zip, .npy), or the pictures of all its slices",
                param,
            )
        return _inline(contents[0])
    if all(map(_is_picture, contents)):
        content, notes = _stacked(contents, param, hold)
        return _inline(content, notes)
    if all(map(_is_dicom, contents)):
        return _inline(_zipped(contents))
    raise invalid(
        f"{param}: a list of {len(contents)} scans is not one scan: a list has the PNG or JPEG pictures of one scan's "
        "slices, or the DICOM files of one series",
        param,
    )


def _inline(content: bytes, notes: tuple[str, ...] = ()) -> Inline:
    return Inline(content, hashlib.sha256(content).hexdigest(), notes)


def _is_picture(content: bytes) -> bool:
    return content.startswith(_PICTURES)


def _is_dicom(content: bytes) -> bool:
    return content[_DICOM_PREAMBLE : _DICOM_PREAMBLE + len(_DICOM)] == _DICOM


def _zipped(contents: Sequence[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, content in enumerate(contents):
            archive.writestr(f"{number:05}.dcm", content)
    return buffer.getvalue()


def _stacked(contents: Sequence[bytes], param: str, hold: Callable[[int], object]) -> tuple[bytes, tuple[str, ...]]:
    """An .npy file of pictures: uint8 slices x rows x columns, from the first slice to the last.

    MedGemma's convention for CT is three windows in the three channels, of which the first is the widest.
    """
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    volume: np.ndarray | None = None
    coloured = False
    for number, content in enumerate(contents):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", images.DecompressionBombWarning)
                with images.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
                    if volume is None:
                        volume = _volume(picture, len(contents), param, hold)
                    # By its head: a picture of another size is not decoded.
                    if (picture.height, picture.width) != volume.shape[1:] or _kind(picture) != volume.dtype:
                        raise invalid(f"{param}: picture {number + 1} has another size or depth than the first", param)
                    if picture.mode in _DEEP:
                        volume[number] = np.asarray(picture)
                    else:
                        pixels = np.asarray(picture.convert("RGB"))
                        coloured |= any((pixels[..., 0] != pixels[..., channel]).any() for channel in (1, 2))
                        volume[number] = pixels[..., 0]
        except Refusal:
            raise
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Warning, images.DecompressionBombError):
            raise invalid(f"{param}: picture {number + 1} of {len(contents)} cannot be read", param) from None
    content = b"".join(npy_pieces(cast(np.ndarray, volume)))
    return content, (SLICES_NOTE, CHANNELS_NOTE) if coloured else (SLICES_NOTE,)


def _volume(first: Image, number: int, param: str, hold: Callable[[int], object]) -> np.ndarray:
    """Room for all pictures, which are like the first."""
    kind = _kind(first)
    voxels, size = first.width * first.height * number, first.width * first.height * number * kind.itemsize
    if size > _MAX_PICTURE_BYTES:
        raise invalid(
            f"{param}: {number} pictures of {first.width} x {first.height} have {size:,} bytes as a volume, more than "
            f"{_MAX_PICTURE_BYTES:,}: send smaller ones, or the volume itself",
            param,
        )
    hold(2 * size + 8 * voxels // number)  # the volume, its file, and one picture with all channels
    return np.empty((number, first.height, first.width), kind)


def _kind(picture: Image) -> np.dtype:
    return np.dtype(_DEEP.get(picture.mode, np.uint8))
