"""One image plane: its values, and where the data set says that they lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom

from engine.errors import InvalidInput
from engine.scan.dicom.references import SliceReference, reference_to
from engine.scan.nifti import rescale

# What the planes of one volume have in common: (keyword, functional group that holds it, what several of them are).
# A scanner may put several volumes into one series or one enhanced file.
LABELS = (
    ("StackID", "FrameContentSequence", "stacks"),
    ("TemporalPositionIndex", "FrameContentSequence", "temporal positions"),
    ("TemporalPositionIdentifier", "", "temporal positions"),
    ("EffectiveEchoTime", "MREchoSequence", "echoes"),
    ("EchoNumbers", "", "echoes"),
    ("DiffusionBValue", "MRDiffusionSequence", "diffusion b-values"),
    ("ComplexImageComponent", "MRImageFrameTypeSequence", "image components"),
    ("FrameType", "MRImageFrameTypeSequence", "frame types"),
    ("FrameType", "CTImageFrameTypeSequence", "frame types"),
    ("FrameType", "PETFrameTypeSequence", "frame types"),
)
UNKNOWN = "unknown"  # in the place of a SeriesInstanceUID that is not there
_SEND = "send an axial, coronal or sagittal series of CT or MR slices"

Value = Callable[[str, str], Any]


@dataclass(frozen=True)
class Plane:
    """One image plane; lengths in mm, directions and positions in LPS+.

    name: for messages. study, series, frame_of_reference: UIDs. reference: the image that it is. pixels: [rows,
    columns], with the rescale applied; zeros, which take no memory, if they are not read. position: of the first
    pixel's centre. along_row, along_column: direction of growing column and row index. rescaled: whether the data set
    has RescaleSlope or RescaleIntercept. labels: its values of LABELS, empty where it has none.
    """

    name: str
    study: str
    series: str
    modality: str
    frame_of_reference: str
    reference: SliceReference
    pixels: np.ndarray
    position: np.ndarray
    along_row: np.ndarray
    along_column: np.ndarray
    row_spacing: float
    column_spacing: float
    rescaled: bool
    labels: tuple[str, ...]

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.along_row, self.along_column)


def planes_of(name: str, dataset: pydicom.Dataset, frames: int, pixels: np.ndarray | None, file: str) -> list[Plane]:
    """The planes of a data set's frames.

    Args:
        name: of the file, for messages.
        frames: how many it has.
        pixels: [frames, rows, columns], as stored; None if they are not read.
        file: see `SliceReference`.

    Raises:
        InvalidInput: where a frame lies, or what its values mean, is missing or no usable number.
    Source: DICOM PS3.3 C.7.6.2, C.7.6.16, C.11.1.
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    if frames > 1 and len(per_frame) != frames:
        raise InvalidInput(
            f"{name} has {frames} frames, and says where {len(per_frame)} of them lie "
            f"(PerFrameFunctionalGroupsSequence): export it as an enhanced multi-frame image, or as single slices"
        )
    found = []
    for index in range(frames):
        reference = reference_to(file, dataset, index + 1 if frames > 1 else None)
        where = f"{name} frame {index + 1}" if frames > 1 else name
        found.append(_plane(where, dataset, None if pixels is None else pixels[index], index, reference))
    return found


def _plane(
    name: str, dataset: pydicom.Dataset, pixels: np.ndarray | None, index: int, reference: SliceReference
) -> Plane:
    value = _values(dataset, index)
    orientation = np.array(_numbers(name, value, "ImageOrientationPatient", "PlaneOrientationSequence", 6))
    position = np.array(_numbers(name, value, "ImagePositionPatient", "PlanePositionSequence", 3))
    row_spacing, column_spacing = _spacings(name, value, dataset)
    along_row, along_column = orientation.reshape(2, 3)
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm([along_row, along_column], axis=1)
        skew = float(along_row @ along_column)
    if not (np.abs(lengths - 1) < 0.01).all() or not abs(skew) < 0.01:
        raise InvalidInput(
            f"{name} has an ImageOrientationPatient {_listed(orientation)} that is not two directions of length 1 at a "
            f"right angle (lengths {lengths[0]:.4g} and {lengths[1]:.4g}, cosine {skew:.4g}), so where its pixels lie "
            f"is unknown: {_SEND}, exported again"
        )
    slope, intercept, rescaled = _scaling(name, value)
    return Plane(
        name,
        str(dataset.get("StudyInstanceUID") or ""),
        str(dataset.get("SeriesInstanceUID", UNKNOWN)),
        str(dataset.get("Modality") or ""),
        str(dataset.get("FrameOfReferenceUID") or ""),
        reference,
        np.broadcast_to(np.uint8(0), (dataset.Rows, dataset.Columns))
        if pixels is None
        else rescale(pixels, slope, intercept),
        position,
        along_row,
        along_column,
        row_spacing,
        column_spacing,
        rescaled,
        tuple(_text(value(keyword, macro)) for keyword, macro, _ in LABELS),
    )


def _values(dataset: pydicom.Dataset, index: int) -> Value:
    """Looks an attribute up in the frame's functional groups, the shared ones, then the data set; None if empty."""
    groups = [dataset]
    for sequence, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        if len(found := dataset.get(sequence) or ()) > item:
            groups.append(found[item])

    def value(keyword: str, macro: str) -> Any:
        for group in reversed(groups):
            items = group.get(macro) if macro else None
            found = (items[0] if items else group).get(keyword)
            if found is not None and found != "" and found != []:
                return found
        return None

    return value


def _spacings(name: str, value: Value, dataset: pydicom.Dataset) -> tuple[float, float]:
    if value("PixelSpacing", "PixelMeasuresSequence") is None and "ImagerPixelSpacing" in dataset:
        raise InvalidInput(
            f"{name} has ImagerPixelSpacing alone, the size of a pixel on the detector and not in the patient, as "
            f"projections have it: {_SEND}"
        )
    spacings = _numbers(name, value, "PixelSpacing", "PixelMeasuresSequence", 2)
    if min(spacings) <= 0:
        raise InvalidInput(f"{name} has a PixelSpacing of {_listed(spacings)} mm: {_SEND}, exported again")
    return spacings[0], spacings[1]


def _scaling(name: str, value: Value) -> tuple[float, float, bool]:
    """(slope, intercept, whether any is there)."""
    macro = "PixelValueTransformationSequence"
    there = {key: value(key, macro) is not None for key in ("RescaleSlope", "RescaleIntercept")}
    slope = _numbers(name, value, "RescaleSlope", macro, 1)[0] if there["RescaleSlope"] else 1.0
    intercept = _numbers(name, value, "RescaleIntercept", macro, 1)[0] if there["RescaleIntercept"] else 0.0
    if slope == 0:
        raise InvalidInput(f"{name} has a RescaleSlope of 0, which makes all its values one: export the series again")
    return slope, intercept, any(there.values())


def _numbers(name: str, value: Value, keyword: str, macro: str, count: int) -> list[float]:
    found = value(keyword, macro)
    if found is None:
        raise InvalidInput(
            f"{name} lacks {keyword}, so its place in the volume is unknown: {_SEND}; where frames and "
            f"slices lie is taken from nothing else"
        )
    try:
        numbers = [float(number) for number in (found if count > 1 else [found])]
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise ValueError
    except (TypeError, ValueError):
        wanted = f"{count} finite numbers are" if count > 1 else "a finite number is"
        raise InvalidInput(
            f"{name} has a {keyword} of {_text(found)}; {wanted} wanted: export the series again"
        ) from None
    return numbers


def _listed(numbers: Any) -> str:
    return "[" + ", ".join(f"{number:.6g}" for number in numbers) + "]"


def _text(found: Any) -> str:
    """A value in at most 60 characters."""
    if found is None:
        return ""
    return (str(found) if isinstance(found, str) or not hasattr(found, "__iter__") else "\\".join(map(str, found)))[:60]
