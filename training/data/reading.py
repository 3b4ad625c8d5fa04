"""Reads the files of a training set: its index (JSON or CSV) before training, volumes and texts while it runs.

What is wrong with an index stops the run: InvalidInput. What is wrong with one sample is a BrokenSample.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.errors import InvalidInput
from training.data.sample import BrokenSample

ABSENT = (1, 1, 1, 1)  # shape of M3D-Seg's mask of a structure that is not in the scan; it holds 0
_ROUNDING = 1e-3  # how far beyond 0..1 resampling may have left an image
_MAX_CELL = 1 << 24


class Table(Sequence):
    """Rows that DataLoader workers share: one block of bytes, as Python objects would be copied to each of them."""

    def __init__(self, rows: Iterable):
        encoded = [json.dumps(row).encode() for row in rows]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._block = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return json.loads(self._block[self._ends[index] : self._ends[index + 1]])


def read_split(path: Path, split: str, keys: tuple[str, ...]) -> Table:
    """The list `split` of a JSON index: objects with at least `keys`. Raises InvalidInput if that is not so."""
    index = read_json(path)
    splits = [name for name, value in index.items() if isinstance(value, list)] if isinstance(index, dict) else []
    if split not in splits:
        raise InvalidInput(f"{path} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    for number, entry in enumerate(index[split]):
        missing = [key for key in keys if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
        if missing:
            raise InvalidInput(f"{path}: entry {number} of {split!r} has no {' and no '.join(missing)}: {entry!r:.200}")
    return Table({key: entry[key] for key in keys} for entry in index[split])


def read_json(path: Path):
    """What a JSON file holds. Raises InvalidInput if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None


def read_table(path: Path, columns: tuple[str, ...], also: tuple[str, ...] = ()) -> Table:
    """The rows of a CSV with a header, `columns` only, and `also` these: blank where it lacks them.

    Raises InvalidInput naming the `columns` that it lacks.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = _rows(path, file, columns, also)
            return Table(rows)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{path} is not a CSV in UTF-8: {error}") from None


def _rows(path: Path, file: Iterable[str], columns: tuple[str, ...], also: tuple[str, ...]) -> Iterator[dict]:
    csv.field_size_limit(_MAX_CELL)  # reports are long
    reader = csv.DictReader(file)
    found = reader.fieldnames or []
    if missing := [column for column in columns if column not in found]:
        raise InvalidInput(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"it has {', '.join(found) or 'none'}"
        )
    # A row that is cut short has None where cells are missing: that row is broken, not the table.
    return ({column: row.get(column) or "" for column in (*columns, *also)} for row in reader)


def first_there(*paths: Path) -> Path:
    """The first of several places where there is a file; the first of all if there is none."""
    return next((path for path in paths if path.is_file()), paths[0])


def mask_id(cell: str) -> int | None:
    """The value in a mask that a cell of M3D-RefSeg means, 1 or above (0 is the background); None if it is none."""
    try:
        value = float(cell)  # tables that went through other tools have 1.0 for 1
    except ValueError:
        return None
    return int(value) if value >= 1 and value.is_integer() else None


def read_image(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    """float32 [1, D, H, W] in 0..1 at `size`, stored so or as uint8 0..255. Raises BrokenSample for anything else."""
    array = _load(path)
    if array.shape != (1, *size):
        raise BrokenSample(path, f"the image has shape {_shape(array.shape)}, the model takes {_shape((1, *size))}")
    image = array.astype(np.float32)
    if array.dtype == np.uint8:
        image /= 255
    low, high = float(image.min()), float(image.max())
    if not -_ROUNDING <= low <= high <= 1 + _ROUNDING:
        values = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "values that are not finite"
        raise BrokenSample(path, f"the image holds {values}, wanted are 0 to 1")
    if low == high:
        raise BrokenSample(path, f"every voxel of the image is {low:g}")
    return np.clip(image, 0, 1, out=image)


def read_mask(path: Path, image_path: Path, shape: tuple[int, ...], label: int | None = None) -> np.ndarray:
    """bool of `shape`, which is the image's: the voxels that are `label`, or without one all that are not 0.

    Without a label a single 0 (`ABSENT`) stands for a mask that is 0 everywhere.
    """
    array = _load(path)
    if label is None and array.shape == ABSENT and not array.any():
        return np.zeros(shape, bool)
    if array.shape != tuple(shape):
        raise BrokenSample([path, image_path], f"the mask has shape {_shape(array.shape)}, its image {_shape(shape)}")
    return array != 0 if label is None else array == label


def read_text(path: Path) -> str:
    """The text of a file, without white space around it. Raises BrokenSample if there is none."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BrokenSample(path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BrokenSample(path, f"is not text in UTF-8: {error}") from None
    if not text:
        raise BrokenSample(path, "the text is empty")
    return text


def stored_shape(path: Path) -> tuple[int, ...] | None:
    """The shape that an .npy file says it has; None if it cannot be read."""
    try:
        return _load(path, mmap_mode="r").shape
    except BrokenSample:
        return None


def _load(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError as error:
        raise BrokenSample(path, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise BrokenSample(path, f"is not a whole .npy file: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise BrokenSample(path, "is not one .npy array of real numbers")
    return array


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "of a scalar"
