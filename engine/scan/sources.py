"""What a client sends of the scan that a user hands over: a path, bytes, a file, an array or a library's image."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import checked_affine
from engine.scan.arrays import array_of, is_array, own_affine
from engine.scan.formats import FORMATS
from engine.scan.images import image_pieces, is_image
from engine.scan.limits import Limits
from engine.scan.npy import npy_pieces
from engine.scan.read import is_recognised

Pieces = tuple[bytes | memoryview, ...]
NamedFiles = list[tuple[str, Path]]
SOURCES = (
    f"the path of a file ({FORMATS}), a folder with one DICOM series or a list of its files' paths, a file's bytes or "
    "a binary file object, an array (NumPy, PyTorch) with its affine, or an image of nibabel or SimpleITK"
)
_HALVES = {".img": ".hdr", ".raw": ".mhd", ".zraw": ".mhd", ".rec": ".par", ".brik": ".head"}  # voxels: their header


def pack_scan(source: Any, affine: Any = None, limits: Limits = Limits()) -> tuple[bytes, np.ndarray | None]:
    """A scan as a file: (bytes that `read_scan` reads, affine or None). See `scan_pieces`."""
    pieces, affine = scan_pieces(source, affine, limits)
    return b"".join(pieces), affine


def scan_pieces(source: Any, affine: Any = None, limits: Limits = Limits()) -> tuple[Pieces, np.ndarray | None]:
    """What a client sends: (one behind the other, a file that `read_scan` reads; affine or None).

    Args:
        source: a file's path, its bytes, or a binary file object, which is read from its start if it can be (all as
            they are); a folder with a DICOM series, or a list of its files' paths (an uncompressed zip); an array of
            3 axes, and others of length 1, NumPy's, PyTorch's on any device or another's (as npy; its values are not
            copied where that can be); a nibabel image (NIfTI with its header, others as npy with their affine) or a
            SimpleITK image.
        affine: for arrays and .npy files, [4, 4], RAS+ mm.
        limits: for a folder and a list of paths.

    Raises:
        InvalidInput: naming what was given, and what may be.
    """
    affine = None if affine is None else checked_affine(affine)
    if isinstance(source, (str, os.PathLike)):
        return _path_pieces(source, limits), affine
    if isinstance(source, (bytes, bytearray, memoryview)):
        return (_file_bytes(source),), affine
    if isinstance(source, (list, tuple)):
        return (_zipped(_listed_files(source, limits)),), affine
    if is_image(source):
        if affine is not None:
            raise InvalidInput("an affine was given with an image that brings its own: give one with arrays only")
        return image_pieces(source)
    if callable(getattr(source, "read", None)):
        return (_read(source),), affine
    if is_array(source):
        array = array_of(source)
        if affine is None and (own := own_affine(source)) is not None:
            affine = checked_affine(own)
        return npy_pieces(array), affine
    raise InvalidInput(f"{_given(source)} is no scan: give {SOURCES}")


def files_of(source: Any, limits: Limits = Limits()) -> dict[str, Path]:
    """The files on disk that a source is, by the names that they have in the zip that `scan_pieces` makes of them.

    A single file's name is empty. Nothing of a source that is no path, no folder and no list of paths.

    Raises:
        InvalidInput: it cannot be read.
    """
    if isinstance(source, (list, tuple)):
        return dict(_listed_files(source, limits))
    if not isinstance(source, (str, os.PathLike)):
        return {}
    path = _path(source)
    return dict(_folder_files(path, limits)) if path.is_dir() else {"": path}


def _given(source: object) -> str:
    """What was given, in few words."""
    if source is None or isinstance(source, (bool, int, float, complex)):
        return repr(source)
    if isinstance(source, type):
        return f"the class {source.__qualname__}"
    return f"an object of type {type(source).__module__}.{type(source).__qualname__}".replace("builtins.", "")


# --- bytes and file objects ------------------------------------------------------------------------------------------
def _file_bytes(source: bytes | bytearray | memoryview) -> bytes | memoryview:
    view = memoryview(source)
    if view.ndim != 1 or view.itemsize != 1:
        raise InvalidInput("the memoryview holds no bytes but an array: hand over numpy.asarray(view), with its affine")
    if not view.nbytes:
        raise InvalidInput(f"there are no bytes: give those of a file, {FORMATS}")
    if view.nbytes < 1 << 12 and (path := bytes(view)) and b"\0" not in path and os.path.exists(path):
        raise InvalidInput(f"the bytes are a path ({os.fsdecode(path)}), not a file's content: give it as str")
    return source if isinstance(source, bytes) else view if view.contiguous else bytes(view)


def _read(file: Any) -> bytes | memoryview:
    """All of a file object, from its start if it can go there: whoever has written a buffer stands at its end."""
    what = f"the file object ({type(file).__module__}.{type(file).__qualname__})"
    if isinstance(file, io.TextIOBase):
        raise InvalidInput(f"{what} is open as text: open the file with mode 'rb'")
    try:
        if hasattr(file, "seek") and getattr(file, "seekable", lambda: True)():
            file.seek(0)
        content = file.read()
    except Exception as error:  # closed, not open for reading, or whatever a class of somebody else raises
        raise InvalidInput(f"{what} cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise InvalidInput(f"{what} gives {type(content).__name__}, not bytes: open the file with mode 'rb'")
    if not len(content):
        raise InvalidInput(f"{what} is empty, or read to its end already: give it anew")
    return content if isinstance(content, bytes) else memoryview(content).cast("B")


# --- paths -----------------------------------------------------------------------------------------------------------
def _path_pieces(source: str | os.PathLike, limits: Limits) -> Pieces:
    path = _path(source)
    try:
        if path.is_dir():
            return (_zipped(_folder_files(path, limits)),)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        hint = ": download it first" if "://" in str(source) else ""
        raise InvalidInput(
            f"{str(path)[:300]} cannot be read: {getattr(error, 'strerror', None) or error}{hint}"
        ) from None
    if not content:
        raise InvalidInput(f"{path} is empty: give a file with a scan, {FORMATS}")
    name = path.name.lower().removesuffix(".gz")
    header = _HALVES.get(os.path.splitext(name)[1])
    if header and not is_recognised(content):
        raise InvalidInput(
            f"{path} holds voxels only, and its header is another file ({header}): convert the two to one .nii or "
            f".mha, for example with nibabel or SimpleITK, or load them there and hand over the image"
        )
    return (content,)


def _path(source: str | os.PathLike) -> Path:
    try:
        text = os.fspath(source)
    except TypeError as error:
        raise InvalidInput(f"the path cannot be told ({error}): give {SOURCES}") from None
    text = os.fsdecode(text) if isinstance(text, bytes) else text
    if not text.strip():
        raise InvalidInput(f"the path is empty: give {SOURCES}")
    return Path(text)


def _folder_files(folder: Path, limits: Limits) -> NamedFiles:
    files = []
    size = 0
    try:
        # The folder may be a whole disk by mistake: listing stops at the limits.
        for path in folder.rglob("*"):
            if path.is_file():
                files.append(path)
                size += path.stat().st_size
                _check_series(f"the folder {folder}", len(files), size, limits)
    except OSError as error:
        raise InvalidInput(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    if not files:
        raise InvalidInput(f"the folder {folder} is empty: a folder with one DICOM series is wanted")
    return _named(sorted(files), folder)


def _listed_files(source: Sequence, limits: Limits) -> NamedFiles:
    """The files of a DICOM series in a list, named as if their folder was given."""
    if not source:
        raise InvalidInput(f"the {type(source).__name__} is empty: give {SOURCES}")
    if others := [item for item in source if not isinstance(item, (str, os.PathLike))]:
        stack = ", arrays of slices as one array (numpy.stack) with its affine" if any(map(is_array, others)) else ""
        raise InvalidInput(
            f"a {type(source).__name__} of {len(source)} with {_given(others[0])} in it is no scan: lists hold the "
            f"paths of one DICOM series' files{stack}; else give {SOURCES}"
        )
    paths = [Path(os.path.abspath(_path(item))) for item in source]
    size = 0
    for number, path in enumerate(paths, 1):
        try:
            if path.is_dir():
                raise InvalidInput(f"{path} is a folder: give it alone, not in a list; lists hold the paths of files")
            size += path.stat().st_size
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{str(path)[:300]} cannot be read: {getattr(error, 'strerror', None) or error}; a list holds the "
                f"paths of one DICOM series' files, and their folder alone will do as well"
            ) from None
        _check_series("the list", number, size, limits)
    return _named(dict.fromkeys(paths), Path(os.path.commonpath([path.parent for path in paths])))


def _check_series(what: str, files: int, size: int, limits: Limits) -> None:
    if files > limits.max_files or size > limits.max_bytes:
        raise InvalidInput(
            f"{what} has more than a scan may have, {limits.max_files:,} files of {limits.max_bytes:,} bytes in all "
            f"(Limits.max_files, Limits.max_bytes): give the files of one DICOM series"
        )


def _named(paths: Iterable[Path], folder: Path) -> NamedFiles:
    """The paths with their names in a zip, which serve messages: what is not UTF-8 is spelt out, as zips want it."""
    return [(str(path.relative_to(folder)).encode(errors="backslashreplace").decode(), path) for path in paths]


def _zipped(files: NamedFiles) -> bytes:
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, path in files:
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"{error.filename or files[0][1].parent} cannot be read: {error.strerror}") from None
    return buffer.getvalue()
