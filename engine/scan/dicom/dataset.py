"""One DICOM file's data set, if it is an image that can belong to a scan; else what it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pydicom
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SegmentationStorage,
)

from engine.errors import InvalidInput
from engine.scan.dicom.damage import damage_named

CONVERT = "convert the series to Explicit VR Little Endian (dcmconv +te)"

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # pydicom would inflate such a file whole, however large it gets
_FIRST_GROUPS = (b"\x02\0", b"\x08\0")  # what a file without preamble starts with: its meta information or data set
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_SCANS = frozenset(("CT", "MR", "PT", "NM", "MG"))  # modalities whose files have pixels, or were cut off
# Modalities of what archives keep beside a series. Some (SEG, RTDOSE) have pixels, but none of a scanner's.
_BESIDE_A_SCAN = frozenset(
    ("SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "RTINTENT", "RTSEGANN", "REG", "FID", "RWV")
    + ("DOC", "AU", "ECG", "HD", "PLAN", "ANN", "ASMT", "STAIN", "TEXTUREMAP", "CTPROTOCOL", "MRPROTOCOL")
)


@dataclass(frozen=True)
class NonImageFile:
    """A DICOM file that is no part of a scan. kind: what it is, such as SEG; empty for an index of files (DICOMDIR)."""

    kind: str


class _View:
    """A file in memory that is read without being copied. A length that lies allocates nothing."""

    def __init__(self, content: bytes | memoryview):
        self._content, self._position = memoryview(content), 0

    def read(self, size: int | None = -1) -> bytes:
        end = None if size is None or size < 0 else self._position + size
        piece = bytes(self._content[self._position : end])
        self._position += len(piece)
        return piece

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}[whence]
        if start + offset < 0:
            raise OSError("the file has no bytes before its first")
        self._position = start + offset
        return self._position


def looks_like_dicom(data: bytes | memoryview) -> bool:
    """Whether a file's bytes start as DICOM does: with the preamble, or at once with a data set's first element."""
    if bytes(data[128:132]) == b"DICM":
        return True
    value_representation = bytes(data[4:6])
    length = int.from_bytes(data[4:8], "little")
    # Implicit VR has a length there. What merely happens to start with these two bytes rarely has either.
    return bytes(data[:2]) in _FIRST_GROUPS and (
        (value_representation.isalpha() and value_representation.isupper()) or length <= min(len(data), 1024)
    )


def open_file(name: str, content: bytes | memoryview) -> pydicom.Dataset | NonImageFile | None:
    """A file's data set with its transfer syntax, if it is an image; what else it is; None for what is not DICOM.

    A file without preamble, as some archives and scanners write it, has nothing that says DICOM: it counts as DICOM if
    all of it can be read as that.

    Raises:
        InvalidInput: the file is damaged, or a kind of image that is not read.
    """
    bare = bytes(content[128:132]) != b"DICM"
    if bare and bytes(content[:2]) not in _FIRST_GROUPS:
        return None
    if _DEFLATED in bytes(content[:2048]):
        raise InvalidInput(f"{name} is deflated as a whole, which is not read here: {CONVERT} and zip it")
    try:
        with damage_named(name):
            dataset = pydicom.dcmread(_View(content), force=bare)
            if kind := _beside(name, dataset):
                return kind
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit, _ = dataset.original_encoding
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    except InvalidInput:
        if bare:
            return None
        raise
    _check_kind(name, dataset)
    return dataset


def _beside(name: str, dataset: pydicom.Dataset) -> NonImageFile | None:
    if (
        dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
        or "DirectoryRecordSequence" in dataset
    ):
        return NonImageFile("")
    modality = str(dataset.get("Modality") or "")
    if "SpectroscopyData" in dataset:
        return NonImageFile("MR spectroscopy")
    if not modality and dataset.get("SOPClassUID") == SegmentationStorage:
        modality = "SEG"
    if modality in _BESIDE_A_SCAN:
        return NonImageFile(modality[:16])
    if any(keyword in dataset for keyword in _PIXELS):
        return None
    sop_class = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
    is_image = sop_class is not None and sop_class.name.endswith("Image Storage")
    if is_image or modality in _SCANS or "Rows" in dataset or "ImagePositionPatient" in dataset:
        raise InvalidInput(
            f"{name} is a {modality or 'DICOM'} image without pixels: it was cut off or stripped, export or copy it "
            "again"
        )
    return NonImageFile(modality[:16] or (sop_class.name if sop_class else "DICOM file without pixels"))


def _check_kind(name: str, dataset: pydicom.Dataset) -> None:
    """Refuse, by name, images whose pixels are no slices in grey values."""
    if "PixelData" not in dataset:
        kind = "FloatPixelData" if "FloatPixelData" in dataset else "DoubleFloatPixelData"
        raise InvalidInput(
            f"{name} holds {kind}, floating-point pixels as parametric maps have them, which are not read here: "
            f"send the images that the map was made from, or convert it to NIfTI"
        )
    if "MOSAIC" in image_type(dataset):
        raise InvalidInput(
            f"{name} is a Siemens mosaic: one picture that holds all slices side by side, whose places only private "
            f"elements tell; convert the series to NIfTI with dcm2niix, or export it as enhanced MR or without mosaic"
        )
    if str(dataset.get("AnatomicalOrientationType") or "BIPED") != "BIPED":
        raise InvalidInput(
            f"{name} has AnatomicalOrientationType {dataset.AnatomicalOrientationType}: its axes are not those of a "
            f"human patient; scans of standing animals are not read here"
        )
    if "ModalityLUTSequence" in dataset:
        raise InvalidInput(
            f"{name} has a ModalityLUTSequence, which is not read here: export the series with RescaleSlope and "
            f"RescaleIntercept"
        )


def image_type(dataset: pydicom.Dataset) -> tuple[str, ...]:
    """The values of ImageType, in capitals; none if it is missing."""
    found = dataset.get("ImageType") or ()
    return tuple(str(value).upper() for value in ([found] if isinstance(found, str) else found))
