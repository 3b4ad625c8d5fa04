"""Reads NRRD with its voxels inside (.nrrd), raw or gzipped, from bytes that are not trusted.

Source: "Definition of NRRD File Format", teem.sourceforge.net/nrrd/format.html; field names below are without spaces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import LPS_TO_RAS, affine_of
from engine.scan.limits import Limits
from engine.scan.npy import of_three_axes
from engine.scan.parts import Volume
from engine.scan.voxels import inflated_voxels, raw_voxels

_MAX_HEADER = 1 << 20
_FIELD = re.compile(r"([A-Za-z][A-Za-z ]*):(?!=)(.*)")
_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
_DTYPES = {name: code for code, names in _TYPES.items() for name in names.split(", ")}
_RAS, _LAS = np.eye(4), np.diag([-1.0, 1, 1, 1])
_SPACES = {
    "right-anterior-superior": _RAS,
    "ras": _RAS,
    "left-anterior-superior": _LAS,
    "las": _LAS,
    "left-posterior-superior": LPS_TO_RAS,
    "lps": LPS_TO_RAS,
}
_NAMELESS = ("", "scanner-xyz", "3d-right-handed")  # right-handed spaces that say nothing of the patient's sides
_SPATIAL = ("domain", "space", "???", "none", "")  # kinds of an axis along which voxels may follow each other
_MILLIMETRES = {
    **dict.fromkeys(("", "???", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre"), 0.001),
}
_WAY_OUT = "for example with SimpleITK: WriteImage(ReadImage('in.nhdr'), 'out.nrrd')"


@dataclass(frozen=True)
class _Axis:
    """One axis as the header has it. step: from a sample to the next in the file's space; None if not of space."""

    size: int
    kind: str
    step: tuple[float, ...] | None


def is_nrrd(head: bytes) -> bool:
    return head.startswith(b"NRRD0")


def read_nrrd(data: memoryview, limits: Limits) -> Volume:
    """The volume in a file, in RAS+ mm. A missing space is taken as LPS, as ITK does, and said to be a guess."""
    fields, start = _fields(data)
    if "datafile" in fields:
        raise InvalidInput(
            f"the NRRD header's voxels are in another file ({fields['datafile'][:80]}), which cannot be followed here: "
            f"send one .nrrd with the voxels inside, {_WAY_OUT}"
        )
    dtype = _dtype(fields)
    axes, sizes = _axes(fields)
    kept = _spatial(axes)
    shape = tuple(axis.size for axis in kept) if len(kept) == 3 else of_three_axes(sizes)
    limits.check_shape(shape)
    affine, notes = _placed(fields, kept)
    encoding = fields.get("encoding", "").lower()
    if encoding == "raw":
        array = raw_voxels("NRRD", data, start, dtype, shape)
    elif encoding in ("gzip", "gz"):
        array = inflated_voxels("NRRD", data, start, dtype, shape, limits)
    else:
        raise InvalidInput(
            f"the NRRD file's encoding is {encoding!r}; raw and gzip are read here: write it anew with one"
        )
    return Volume(array, affine, notes=notes)


def _fields(data: memoryview) -> tuple[dict[str, str], int]:
    """(the header's fields, names in small letters without spaces; where the voxels begin)."""
    head = bytes(data[:_MAX_HEADER])
    end = re.search(rb"\r?\n\r?\n", head)
    lines = head[: end.start() if end else None].decode("utf-8", "replace").split("\n")
    if not re.fullmatch(r"NRRD000[1-6]\s*", lines[0]):
        raise InvalidInput(f"the file starts with {lines[0][:20]!r}: NRRD0001 to NRRD0006 are read here")
    fields: dict[str, str] = {}
    for line in lines[1:]:
        if line.startswith("#") or not line.strip():
            continue
        if found := _FIELD.match(line):
            name = found[1].lower().replace(" ", "")
            name = {"centerings": "centers"}.get(name, name)
            if name in fields:
                raise InvalidInput(f"the NRRD header is damaged: it has the field {found[1]!r} twice")
            fields[name] = found[2].strip()
        elif ":=" not in line:
            raise InvalidInput(f"the NRRD header is damaged: {line[:60]!r} is no field")
    if end is None and "datafile" not in fields:
        raise InvalidInput(
            "the NRRD header has no end (an empty line): the file is truncated or damaged; copy it again"
        )
    if any(fields.get(name, "0") != "0" for name in ("lineskip", "byteskip")):
        raise InvalidInput("the NRRD header skips lines or bytes in front of its voxels: write the file without them")
    return fields, end.end() if end else len(head)


def _needed(fields: Mapping[str, str], name: str) -> str:
    if not fields.get(name):
        raise InvalidInput(f"the NRRD header has no {name}: it is damaged; write the file again")
    return fields[name]


def _numbers(fields: Mapping[str, str], name: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in fields[name].split())
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise InvalidInput(f"the NRRD header is damaged: {name} is {fields[name][:80]!r}, {count} numbers are wanted")
    return numbers


def _dtype(fields: Mapping[str, str]) -> np.dtype:
    name = " ".join(_needed(fields, "type").lower().split())
    if name not in _DTYPES:
        raise InvalidInput(
            f"the NRRD file holds {name[:40]!r} values; one real number a voxel is wanted: short, float, ..."
        )
    dtype = np.dtype(_DTYPES[name])
    if dtype.itemsize == 1:
        return dtype
    endian = fields.get("endian", "").lower()
    if endian not in ("little", "big"):
        raise InvalidInput(f"the NRRD header is damaged: endian is {endian[:20]!r}, little or big is wanted")
    return dtype.newbyteorder("<" if endian == "little" else ">")


def _axes(fields: Mapping[str, str]) -> tuple[list[_Axis], tuple[int, ...]]:
    text = _needed(fields, "sizes")
    try:
        sizes = tuple(int(word) for word in text.split())
    except ValueError:
        sizes = (-1,)
    if min(sizes) < 0 or _needed(fields, "dimension") != str(len(sizes)):
        raise InvalidInput(
            f"the NRRD header is damaged: sizes is {text[:80]!r}, as many whole numbers as its dimension are wanted"
        )
    kinds = fields.get("kinds", "").lower().split() or [""] * len(sizes)
    steps = _steps(fields, len(sizes))
    if not len(kinds) == len(steps) == len(sizes):
        raise InvalidInput(
            f"the NRRD header is damaged: there are {len(sizes)} sizes, {len(kinds)} kinds and {len(steps)} directions "
            f"or spacings"
        )
    return [_Axis(*axis) for axis in zip(sizes, kinds, steps)], sizes


def _steps(fields: Mapping[str, str], count: int) -> Sequence[tuple[float, ...] | None]:
    """For each axis its `space directions`; without them its spacing alone in mm, NaN if that is not known."""
    if "spacedirections" in fields:
        steps = _vectors(fields, "spacedirections")
        return [step if step and not all(math.isnan(x) for x in step) else None for step in steps]
    spacings = _numbers(fields, "spacings", count) if "spacings" in fields else (math.nan,) * count
    return [(spacing * unit,) for spacing, unit in zip(spacings, _millimetres(fields, "units", count))]


def _vectors(fields: Mapping[str, str], name: str) -> list[tuple[float, ...] | None]:
    """From `(1,0,0) (0,1,0) none`."""
    text = fields[name]
    try:
        if not re.fullmatch(r"(\s*(none|\([^()]*\)))+\s*", text):
            raise ValueError
        return [
            None if word == "none" else tuple(float(x) for x in word[1:-1].split(","))
            for word in re.findall(r"none|\([^()]*\)", text)
        ]
    except ValueError:
        raise InvalidInput(
            f"the NRRD header is damaged: {name} is {text[:80]!r}, vectors such as (1,0,0) are wanted"
        ) from None


def _millimetres(fields: Mapping[str, str], name: str, count: int) -> list[float]:
    """Millimetres in each of the units that a field names; mm without the field."""
    if name not in fields:
        return [1.0] * count
    units = re.findall(r'"([^"]*)"', fields[name])
    if len(units) != count or any(unit.strip().lower() not in _MILLIMETRES for unit in units):
        raise InvalidInput(
            f"the NRRD header's {name} are {fields[name][:80]!r}; {count} of mm, cm, m or um are read here, each in "
            f"quotes: write the file in mm"
        )
    return [_MILLIMETRES[unit.strip().lower()] for unit in units]


def _spatial(axes: Sequence[_Axis]) -> list[_Axis]:
    """The axes along which voxels follow each other in space. Raises InvalidInput if there is another beside them."""
    is_spatial = [axis.kind in _SPATIAL and axis.step is not None for axis in axes]
    spatial = [axis for axis, yes in zip(axes, is_spatial) if yes]
    if others := [axis for axis, yes in zip(axes, is_spatial) if not yes and axis.size != 1]:
        kinds = ", ".join(f"{axis.size} ({axis.kind or 'none'})" for axis in others)
        raise InvalidInput(
            f"the NRRD file has axes that are not of space, of size {kinds}: one volume of 3 axes is wanted, one grey "
            f"value a voxel; send one component or one time point"
        )
    return spatial if len(spatial) <= 3 else [axis for axis in spatial if axis.size != 1]


def _placed(fields: Mapping[str, str], axes: Sequence[_Axis]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(affine to RAS+ mm, what of it is a guess) for three axes."""
    name = fields.get("space", "").lower()
    if name not in _SPACES and name not in _NAMELESS:
        raise InvalidInput(
            f"the NRRD header's space is {name[:40]!r}, which says nothing of the patient's sides here: write it in "
            f"left-posterior-superior, right-anterior-superior or left-anterior-superior"
        )
    space, notes = _SPACES.get(name, LPS_TO_RAS), []
    steps: list[tuple[float, ...] | None] = [axis.step for axis in axes]
    if "spacedirections" not in fields:
        spacings = [axis.step[0] if axis.step else math.nan for axis in axes]
        steps = [tuple(row) for row in np.diag([1.0 if math.isnan(x) else x for x in spacings])]
        sides = "right" if space[0, 0] > 0 else "left", "front" if space[1, 1] > 0 else "back"
        notes.append(
            f"the NRRD file has no space directions: that its axes run to the patient's {sides[0]}, {sides[1]} and "
            f"head is a guess, left and right with it"
        )
        if any(map(math.isnan, spacings)):
            notes.append("the NRRD file has no voxel sizes: that they are 1 mm is a guess")
    elif name not in _SPACES:
        notes.append(
            "the NRRD file does not name its space: that this is the patient's left, back and head (LPS), as ITK has "
            "it, is a guess, left and right with it"
        )
    origin = _vectors(fields, "spaceorigin") if "spaceorigin" in fields else [(0.0, 0.0, 0.0)]
    if len(axes) != 3 or len(origin) != 1 or any(step is None or len(step) != 3 for step in (*steps, *origin)):
        raise InvalidInput("the NRRD header is damaged: 3 axes and an origin, each of 3 numbers, are wanted")
    world = space @ np.diag([*_millimetres(fields, "spaceunits", 3), 1.0])
    return affine_of("NRRD", cast(list, steps), cast(tuple, origin[0]), world), tuple(notes)
