"""Which images a scan's slices come from: what a DICOM result, such as a segmentation, refers to."""

from __future__ import annotations

from dataclasses import dataclass

import pydicom


@dataclass(frozen=True)
class SliceReference:
    """The image that one slice comes from. UIDs are empty where the file has none.

    frame: its number in a multi-frame image, from 1, as ReferencedFrameNumber has it; None for a single-frame image.
    file: its name in the zip; empty for a series that is one file. `engine.source.Source.series` gives paths.
    """

    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None
    file: str


@dataclass(frozen=True)
class SeriesReference:
    """The series that a scan is. UIDs are empty where the files have none; study_uid also where they have several.

    slices: in the order of the scan's last axis: `slices[k]` is the image of `array[:, :, k]`, whose rows are the
    array's second axis. A mask has the scan's axes, so `mask[:, :, k].T` are the pixels for it.
    """

    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    slices: tuple[SliceReference, ...]


def reference_to(file: str, dataset: pydicom.Dataset, frame: int | None) -> SliceReference:
    """To a data set that was read from a file, or to one of its frames."""
    meta = dataset.file_meta
    return SliceReference(
        str(dataset.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""),
        str(dataset.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or ""),
        frame,
        file,
    )
