"""Reads one DICOM series from a zip in memory: slices in any order, or enhanced multi-frame files."""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from engine.errors import InvalidInput
from engine.scan.limits import Limits
from engine.scan.nifti import rescale

_LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # pydicom would inflate such a file whole, however large it gets
_FIRST_GROUPS = (b"\x02\0", b"\x08\0")  # what a file without preamble starts with: its meta information or data set
_CONVERT = "convert the series to Explicit VR Little Endian (dcmconv +te)"


@dataclass(frozen=True)
class _Slice:
    """One image plane. `pixels` [rows, columns] with the rescale applied; lengths in mm, LPS+."""

    name: str
    series: str
    modality: str
    pixels: np.ndarray
    position: np.ndarray  # of the first pixel's centre
    along_row: np.ndarray  # direction of growing column index
    along_column: np.ndarray  # direction of growing row index
    row_spacing: float
    column_spacing: float

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.along_row, self.along_column)


def read_dicom_zip(data: memoryview, limits: Limits) -> tuple[np.ndarray, np.ndarray, str]:
    """(array [columns, rows, slices] with the rescale applied, RAS+ affine in mm, modality) of a zipped series.

    Slices are sorted along their normal. Refused: several series, shapes, orientations or spacings in one zip,
    duplicate or missing slices, colour images, transfer syntaxes that no installed decoder reads.
    """
    slices = list(_images(data, limits))
    if not slices:
        raise InvalidInput(
            "the folder or zip holds no DICOM images: send one DICOM series (NIfTI files and npz "
            "archives are not read from a folder or zip)"
        )
    _check_one("series", Counter(s.series for s in slices), "send one series at a time")
    _check_one(
        "slice sizes (rows x columns)",
        Counter("{} x {}".format(*s.pixels.shape) for s in slices),
        "leave out localizers and secondary captures",
    )
    _check_one(
        "orientations",
        _alike((*s.along_row, *s.along_column) for s in slices),
        "leave out localizers, and send one plane at a time",
    )
    _check_one(
        "pixel spacings (mm)", _alike((s.row_spacing, s.column_spacing) for s in slices), "send one series at a time"
    )
    limits.check_shape((*slices[0].pixels.shape[::-1], len(slices)))
    slices.sort(key=lambda s: float(s.position @ s.normal))
    _check_positions(slices)
    return np.stack([s.pixels for s in slices]).transpose(2, 1, 0), _affine(slices), slices[0].modality


def _images(data: memoryview, limits: Limits) -> Iterator[_Slice]:
    """All image planes of all members, decoded; what is not DICOM or has no pixels is passed over."""
    voxels = 0
    for name, content in _members(data, limits):
        if (dataset := _image(name, content)) is None:
            continue
        with _damage_named(name):
            frames = int(dataset.get("NumberOfFrames") or 1)
            voxels += frames * int(dataset.Rows) * int(dataset.Columns)
            if voxels > limits.max_voxels:
                raise InvalidInput(
                    f"the DICOM series has more than {limits.max_voxels:,} voxels, this server's limit "
                    f"(Limits.max_voxels): send fewer slices, or have the limit raised"
                )
            pixels = _pixels(name, dataset, frames)
            planes = [_slice(name, dataset, pixels[index], index, frames) for index in range(frames)]
        yield from planes


def _image(name: str, content: bytes) -> pydicom.Dataset | None:
    """A member's data set, with its transfer syntax, if it is a DICOM image; None otherwise.

    A file without preamble, as some archives and scanners write it, has nothing that says DICOM: it counts as an image
    if all of it can be read as one.
    """
    bare = content[128:132] != b"DICM"
    if bare and content[:2] not in _FIRST_GROUPS:
        return None
    if _DEFLATED in content[:2048]:
        raise InvalidInput(f"{name} is deflated as a whole, which is not read here: {_CONVERT} and zip it")
    try:
        with _damage_named(name):
            dataset = pydicom.dcmread(io.BytesIO(content), force=bare)
            if "PixelData" not in dataset:
                return None
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit, _ = dataset.original_encoding
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            return dataset
    except InvalidInput:
        if bare:
            return None
        raise


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """pydicom converts a tag only when it is asked for, and raises whatever a damaged one makes it stumble over."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{name} is a damaged DICOM file ({_words(error)})") from None


def _members(data: memoryview, limits: Limits) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the zip's files, in memory, once the declared sizes are within limits.

    Never more than the declared size of a member is decompressed: a zip bomb that lies about it is a damaged file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            if len(members) > limits.max_files:
                raise InvalidInput(
                    f"the folder or zip has {len(members):,} files, over this server's "
                    f"limit of {limits.max_files:,} (Limits.max_files): send one series only"
                )
            limits.check_bytes(sum(info.file_size for info in members), "the folder or unpacked zip")
            for info in members:
                with archive.open(info) as member:
                    yield info.filename, member.read(info.file_size)
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        OSError,
        ValueError,
    ) as error:
        raise InvalidInput(
            f"the zip is damaged, encrypted or of an unknown kind ({_words(error)}): zip the series again"
        ) from None


def _pixels(name: str, dataset: pydicom.Dataset, frames: int) -> np.ndarray:
    """[frames, rows, columns] as stored."""
    colours = dataset.get("PhotometricInterpretation")
    if colours == "MONOCHROME1":
        raise InvalidInput(
            f"{name} is a MONOCHROME1 image: low values are the bright ones; slices whose high values "
            f"are bright (MONOCHROME2) are wanted: invert the series, or export it as MONOCHROME2"
        )
    if dataset.get("SamplesPerPixel", 1) != 1 or colours != "MONOCHROME2":
        raise InvalidInput(
            f"{name} is a {colours} image; slices in grey values (MONOCHROME2) are wanted: leave out "
            f"screenshots and secondary captures"
        )
    try:
        return np.asarray(dataset.pixel_array).reshape(frames, dataset.Rows, dataset.Columns)
    except Exception as error:
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.is_transfer_syntax:
            raise InvalidInput(
                f"{name} has the transfer syntax {syntax}, which is not known here: {_CONVERT}"
            ) from None
        if syntax.is_compressed:
            raise InvalidInput(
                f"the pixels of {name} are compressed as {syntax.name}, which could not be decoded "
                f"({_words(error)}): decompress the series first, for example with dcmdjpeg or gdcmconv "
                f"--raw, or install pylibjpeg on the server"
            ) from None
        raise InvalidInput(
            f"the pixels of {name} cannot be read ({_words(error)}): the file is truncated or damaged"
        ) from None


def _slice(name: str, dataset: pydicom.Dataset, pixels: np.ndarray, index: int, frames: int) -> _Slice:
    groups = [dataset]
    for sequence, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        if len(found := dataset.get(sequence) or ()) > item:
            groups.append(found[item])

    def value(keyword, macro, default=None):
        for group in reversed(groups):
            group = group[macro].value[0] if group.get(macro) else group
            if (found := group.get(keyword)) is not None:
                return found
        return default

    try:
        orientation = np.array(value("ImageOrientationPatient", "PlaneOrientationSequence"), float)
        position = np.array(value("ImagePositionPatient", "PlanePositionSequence"), float)
        row_spacing, column_spacing = map(float, value("PixelSpacing", "PixelMeasuresSequence"))
        slope = float(value("RescaleSlope", "PixelValueTransformationSequence", 1))
        intercept = float(value("RescaleIntercept", "PixelValueTransformationSequence", 0))
        along_row, along_column = orientation.reshape(2, 3)
        if position.shape != (3,) or not np.isfinite([*position, *orientation, row_spacing, column_spacing]).all():
            raise ValueError
        if min(row_spacing, column_spacing) <= 0 or np.linalg.norm(np.cross(along_row, along_column)) < 0.9:
            raise ValueError
    except (TypeError, ValueError):
        raise InvalidInput(
            f"{name} lacks usable ImagePositionPatient, ImageOrientationPatient or PixelSpacing, so its "
            f"place in the volume is unknown: send an axial, coronal or sagittal series of CT or MR "
            f"slices"
        ) from None
    return _Slice(
        f"{name} frame {index + 1}" if frames > 1 else name,
        str(dataset.get("SeriesInstanceUID", "unknown")),
        str(dataset.get("Modality", "")),
        rescale(pixels, slope, intercept),
        position,
        along_row,
        along_column,
        row_spacing,
        column_spacing,
    )


def _check_one(what: str, counts: Counter, way_out: str) -> None:
    if len(counts) > 1:
        listed = ", ".join(f"{value} ({count} slices)" for value, count in counts.most_common(5))
        raise InvalidInput(f"the DICOM files have {len(counts)} different {what}: {listed}: {way_out}")


def _check_positions(slices: list[_Slice]) -> None:
    """Refuse duplicate and missing slices, given in order."""
    heights = np.array([s.position @ s.normal for s in slices])
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if (twins := np.flatnonzero(gaps < max(1e-3, 0.01 * usual))).size:
        first, second = slices[twins[0]], slices[twins[0] + 1]
        raise InvalidInput(
            f"series {first.series}: {len(twins)} slices of {len(slices)} lie where another one does "
            f"(first: {first.name} and {second.name}): send one phase, echo or time point at a time"
        )
    if (holes := np.flatnonzero(np.abs(gaps - usual) > 0.1 * usual)).size:
        hole = holes[0]
        raise InvalidInput(
            f"series {slices[0].series}: slices are missing or unevenly spaced at {len(holes)} places "
            f"(usual distance {usual:.3f} mm; {gaps[hole]:.3f} mm between {slices[hole].name} and "
            f"{slices[hole + 1].name}): send the whole series"
        )


def _affine(slices: list[_Slice]) -> np.ndarray:
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.along_row * first.column_spacing
    affine[:3, 1] = first.along_column * first.row_spacing
    # From positions, not the normal: slices of a tilted gantry are sheared.
    affine[:3, 2] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 3] = first.position
    return _LPS_TO_RAS @ affine


def _alike(vectors: Iterator[tuple[float, ...]]) -> Counter:
    """How many vectors there are of each kind; files write the same numbers with different rounding."""
    kinds: Counter[tuple[float, ...]] = Counter()
    for vector in vectors:
        kinds[next((kind for kind in kinds if np.allclose(kind, vector, atol=1e-3)), vector)] += 1
    return Counter({"[" + ", ".join(f"{x:.3g}" for x in kind) + "]": count for kind, count in kinds.items()})


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
