"""Reads MetaImage with its voxels inside (.mha), plain or compressed, from bytes that are not trusted.

Its world is ITK's: LPS+ mm. Where MetaIO's description leaves something open, ITK's reader decides.
Source: https://github.com/Kitware/MetaIO, doc/ and src/metaImage.cxx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import LPS_TO_RAS, affine_of
from engine.scan.limits import Limits
from engine.scan.npy import without_frames
from engine.scan.parts import Volume
from engine.scan.voxels import inflated_voxels, raw_voxels

_MAX_HEADER = 1 << 16
# What a header can begin with: MetaObject's keys, and MetaImage's own.
_BEGINS = re.compile(
    rb"\s*(Object(Type|SubType)|NDims|Comment|Name|ID|ParentID|Color|AcquisitionDate|BinaryData(ByteOrderMSB)?|DimSize|"
    rb"CompressedData(Size)?|TransformMatrix|Rotation|Orientation|Offset|Position|Origin|CenterOfRotation|"
    rb"DistanceUnits|AnatomicalOrientation|HeaderSize|Modality|SequenceID|Element\w+)[ \t]*="
)
_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",  # 4 bytes on every machine: MetaIO's table, not C's long
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_SAME = {
    "Position": "Offset",
    "Origin": "Offset",
    "Orientation": "TransformMatrix",
    "Rotation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
# Keys whose other values would change what the voxels mean, and ITK's reader does not heed, or reads in another way.
_PLAIN = {
    "ObjectType": ("Image",),
    "BinaryData": ("True", "true", "TRUE", "T", "t", "1"),
    "ElementNumberOfChannels": ("1",),
    "ElementToIntensityFunctionSlope": ("1",),
    "ElementToIntensityFunctionOffset": ("0",),
    "DistanceUnits": ("mm", "?", ""),
    "HeaderSize": ("0",),
}
_WAY_OUT = "for example with SimpleITK: WriteImage(ReadImage('in.mhd'), 'out.mha')"


def is_metaimage(head: bytes) -> bool:
    return _BEGINS.match(head) is not None


def read_metaimage(data: memoryview, limits: Limits) -> Volume:
    """The volume in a file, in RAS+ mm. Directions that are missing are taken as ITK's, and said to be a guess."""
    keys, start = _keys(data)
    for key, plain in _PLAIN.items():
        if (value := keys.get(key, plain[0])) not in plain and not _same_number(value, plain[0]):
            raise InvalidInput(
                f"the MetaImage header has {key} = {value[:40]}, which is not read here ({plain[0]} is): write the "
                f"file anew, {_WAY_OUT}"
            )
    if (where := keys["ElementDataFile"]).lower() != "local":
        raise InvalidInput(
            f"the MetaImage header's voxels are in another file ({where[:80]}), which cannot be followed here: send "
            f"one .mha with the voxels inside, {_WAY_OUT}"
        )
    sizes = tuple(_numbers(keys, "DimSize", int))
    if min(sizes, default=-1) < 0 or keys.get("NDims") != str(len(sizes)):
        raise InvalidInput(
            f"the MetaImage header is damaged: DimSize is {keys.get('DimSize', '')[:80]!r}, NDims "
            f"{keys.get('NDims', '')[:20]!r}"
        )
    shape = without_frames(sizes)
    limits.check_shape(shape)
    if len(sizes) != 3:
        raise InvalidInput(f"the MetaImage has {len(sizes)} axes ({keys['DimSize'][:80]}): write it as a volume of 3")
    affine, notes = _placed(keys)
    dtype = _dtype(keys)
    if _true(keys, "CompressedData"):
        array = inflated_voxels("MetaImage", data, start, dtype, shape, limits)
    else:
        array = raw_voxels("MetaImage", data, start, dtype, shape)
    return Volume(array, affine, notes=notes)


def _keys(data: memoryview) -> tuple[dict[str, str], int]:
    """(the header's values, by the newest of their names; where the voxels begin)."""
    head = bytes(data[:_MAX_HEADER])
    end = re.search(rb"^[ \t]*ElementDataFile[ \t]*=[^\n]*(\n|\Z)", head, re.MULTILINE)
    if end is None:
        raise InvalidInput(
            "the MetaImage header has no ElementDataFile: the file is truncated or damaged; copy it again"
        )
    keys: dict[str, str] = {}
    for line in head[: end.end()].decode("utf-8", "replace").split("\n"):
        if not line.strip():
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        key = _SAME.get(key, key)
        if not equals:
            raise InvalidInput(f"the MetaImage header is damaged: {line[:60]!r} is no key with a value")
        if keys.setdefault(key, value) != value and key != "Comment":
            raise InvalidInput(f"the MetaImage header is damaged: it has two values of {key}")
    return keys, end.end()


def _numbers(keys: Mapping[str, str], key: str, kind: type) -> list:
    try:
        return [kind(word) for word in keys.get(key, "").split()]
    except ValueError:
        raise InvalidInput(f"the MetaImage header is damaged: {key} is {keys[key][:80]!r}") from None


def _same_number(value: str, plain: str) -> bool:
    try:
        return float(value) == float(plain)
    except ValueError:
        return False


def _true(keys: Mapping[str, str], key: str) -> bool:
    return keys.get(key, "")[:1] in ("T", "t", "1")


def _dtype(keys: Mapping[str, str]) -> np.dtype:
    name = keys.get("ElementType", "")
    if name not in _DTYPES:
        raise InvalidInput(
            f"the MetaImage file holds {name[:40] or 'no'} values; one real number a voxel is wanted, for example "
            f"ElementType = MET_SHORT"
        )
    return np.dtype(_DTYPES[name]).newbyteorder(">" if _true(keys, "BinaryDataByteOrderMSB") else "<")


def _placed(keys: Mapping[str, str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(affine to RAS+ mm, what of it is a guess)."""
    notes = []
    matrix, origin = _numbers(keys, "TransformMatrix", float), _numbers(keys, "Offset", float)
    spacings = _numbers(keys, "ElementSpacing", float) or _numbers(keys, "ElementSize", float)
    if not matrix:
        if (sides := keys.get("AnatomicalOrientation", "???")) not in ("RAI", "???", ""):
            raise InvalidInput(
                f"the MetaImage header has AnatomicalOrientation = {sides[:20]} and no TransformMatrix, without which "
                f"ITK reads it as RAI: set TransformMatrix before sending the scan"
            )
        matrix = np.eye(3).ravel().tolist()
        notes.append(
            "the MetaImage file has no TransformMatrix: that its axes run to the patient's left, back and head, as ITK "
            "has it, is a guess, left and right with it"
        )
    if not spacings:
        spacings = [1.0] * 3
        notes.append("the MetaImage file has no voxel sizes: that they are 1 mm is a guess")
    origin = origin or [0.0] * 3
    if (len(matrix), len(origin), len(spacings)) != (9, 3, 3):
        raise InvalidInput(
            "the MetaImage header is damaged: TransformMatrix has 9 numbers, Offset and ElementSpacing have 3"
        )
    directions = np.reshape(matrix, (3, 3))  # a row for each axis
    with np.errstate(all="ignore"):  # what comes out is looked at
        steps = (directions * np.reshape(spacings, (3, 1))).tolist()
    return affine_of("MetaImage", steps, origin, LPS_TO_RAS), tuple(notes)
