"""Reads one DICOM series: slices in any order, or enhanced multi-frame files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pydicom

from engine.errors import InvalidInput
from engine.scan.dicom.archive import members
from engine.scan.dicom.damage import damage_named
from engine.scan.dicom.dataset import Beside, image_type, open_file
from engine.scan.dicom.decoder import Decoder
from engine.scan.dicom.geometry import fitted_affine, sorted_planes
from engine.scan.dicom.pixels import stored_pixels
from engine.scan.dicom.plane import LABELS, UNKNOWN, Plane, planes_of
from engine.scan.dicom.references import SeriesReference
from engine.scan.limits import Limits
from engine.scan.parts import Volume

_TURNED = 0.02  # directions that differ more are another orientation; smaller differences count in mm, at the corners
_FILE = "the file"


def read_dicom_zip(data: memoryview, limits: Limits) -> Volume:
    """The volume [columns, rows, slices] of a zipped series.

    Slices are sorted along their normal. Files that are there twice are read once, and what archives keep beside a
    series (localizers, SEG, SR, PR, KO, RTSTRUCT, ...) is left aside; `notes` says so.

    Raises:
        InvalidInput: there is no series or more than one; its slices do not form one volume; pixels that are not read.
        Unavailable: pixels are compressed, and their decoder is not installed.
    """
    return _images_of_zip(data, limits, with_pixels=True).volume()


def read_dicom_file(data: memoryview, limits: Limits) -> Volume:
    """The volume [columns, rows, frames] of one enhanced multi-frame file. Errors as `read_dicom_zip`'s.

    Raises:
        InvalidInput: also for a file with a single slice, which is a part of a series.
    """
    return _images_of_file(data, limits, with_pixels=True).volume()


def read_series_of_zip(data: memoryview, limits: Limits) -> SeriesReference:
    """The series of what `read_dicom_zip` reads. No pixels are read, so that no decoder is needed."""
    return _series_of(_images_of_zip(data, limits, with_pixels=False).planes())


def read_series_of_file(data: memoryview, limits: Limits) -> SeriesReference:
    """The series of what `read_dicom_file` reads. No pixels are read, so that no decoder is needed."""
    return _series_of(_images_of_file(data, limits, with_pixels=False).planes())


def _images_of_zip(data: memoryview, limits: Limits, with_pixels: bool) -> _Images:
    found = _Images(limits, with_pixels)
    with Decoder() as decoder:
        for name, content in members(data, limits):
            with damage_named(name):
                found.add(name, content, decoder)
    return found


def _images_of_file(data: memoryview, limits: Limits, with_pixels: bool) -> _Images:
    found = _Images(limits, with_pixels)
    with damage_named(_FILE):
        found.add_series(data)
    return found


@dataclass
class _Images:
    """The images of the files that were added, and what there was beside them."""

    limits: Limits
    with_pixels: bool
    scans: list[Plane] = field(default_factory=list)
    localizers: list[Plane] = field(default_factory=list)
    beside: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    foreign: int = 0
    voxels: int = 0
    known: dict[str, list[Plane]] = field(default_factory=dict)

    def add(self, name: str, content: bytes, decoder: Decoder) -> None:
        """Reads one file, whatever it is."""
        image = open_file(name, content)
        if image is None:
            self.foreign += 1
        elif isinstance(image, Beside):
            if image.kind:
                self.beside[image.kind] += 1
        else:
            self.add_image(name, content, image, decoder, file=name)

    def frames_of(self, name: str, image: pydicom.Dataset) -> int:
        """The image's number of frames, with the limit on voxels checked before any is decoded."""
        frames = image.get("NumberOfFrames")
        frames = 1 if frames is None else int(frames)
        rows, columns = int(image.Rows), int(image.Columns)
        if min(frames, rows, columns) < 1:
            raise ValueError(f"NumberOfFrames {frames}, Rows {rows}, Columns {columns}")
        if self.voxels + frames * rows * columns > self.limits.max_voxels:
            raise InvalidInput(
                f"the DICOM series has more than {self.limits.max_voxels:,} voxels, this server's limit "
                f"(Limits.max_voxels): send fewer slices, or have the limit raised"
            )
        return frames

    def add_series(self, content: memoryview) -> None:
        """Reads a file that must be a whole series."""
        image = open_file(_FILE, content)
        if image is None:
            raise InvalidInput(
                "the file starts as DICOM does and cannot be read as DICOM: it was cut off, or is something else; send "
                "the folder of a whole series, or a zip of it"
            )
        if isinstance(image, Beside) or self.frames_of(_FILE, image) == 1:
            what = (
                f"with no slices of a scan ({image.kind or 'an index'})" if isinstance(image, Beside) else "one slice"
            )
            raise InvalidInput(
                f"this is a single DICOM file, {what}: send the folder of the whole series, or a zip of it"
            )
        with Decoder() as decoder:
            self.add_image(_FILE, content, image, decoder, file="")

    def add_image(
        self, name: str, content: bytes | memoryview, image: pydicom.Dataset, decoder: Decoder, file: str
    ) -> None:
        """Reads one image, unless it is a copy of another, or a localizer that cannot be read.

        name: for messages. file: see `SliceReference`.
        """
        frames = self.frames_of(name, image)
        localizer = "LOCALIZER" in image_type(image)
        try:
            with damage_named(name):
                pixels = stored_pixels(name, image, frames, decoder) if self.with_pixels else None
                planes = planes_of(name, image, frames, pixels, file)
        except InvalidInput:
            if not localizer:
                raise
            self.beside["localizer image"] += 1
            return
        # The same file comes twice where an archive and a workstation were exported into one folder.
        uid = str(image.get("SOPInstanceUID") or hashlib.sha256(content).hexdigest())
        if uid in self.known:
            _check_same(uid, self.known[uid], planes)
            self.twice += 1
            return
        self.known[uid] = planes
        self.voxels += frames * planes[0].pixels.size
        (self.localizers if localizer else self.scans).extend(planes)

    def planes(self) -> list[Plane]:
        """In order. Raises InvalidInput if they form no volume."""
        if self.scans and self.localizers:
            self.beside["localizer image"] += len(self.localizers)
        planes = self.scans or self.localizers
        if not planes:
            there = f" (it holds {_listed(self.beside)})" if self.beside else ""
            raise InvalidInput(
                f"the folder or zip holds no DICOM images of a scan{there}: send one DICOM series (NIfTI files and npz "
                f"archives are not read from a folder or zip)"
            )
        _check_one_volume(planes)
        self.limits.check_shape((*planes[0].pixels.shape[::-1], len(planes)))
        return sorted_planes(planes)

    def volume(self) -> Volume:
        planes = self.planes()
        affine = fitted_affine(planes)
        notes = self._notes(planes[0])
        array = np.stack([plane.pixels for plane in planes]).transpose(2, 1, 0)
        return Volume(array, affine, notes=notes, modality=planes[0].modality, series=_series_of(planes))

    def _notes(self, plane: Plane) -> tuple[str, ...]:
        notes = []
        if self.beside:
            notes.append(f"left aside beside the series: {_listed(self.beside)}")
        if self.twice:
            notes.append(f"{self.twice} {'file was' if self.twice == 1 else 'files were'} there twice and read once")
        if self.foreign:
            notes.append(
                f"{self.foreign} {'file that is' if self.foreign == 1 else 'files that are'} not DICOM passed over"
            )
        if plane.modality == "CT" and not plane.rescaled:
            notes.append(
                "the CT slices have neither RescaleSlope nor RescaleIntercept: that their values are Hounsfield units "
                "is a guess"
            )
        return tuple(notes)


def _series_of(planes: Sequence[Plane]) -> SeriesReference:
    """planes: of one series, in order."""
    first, studies = planes[0], {plane.study for plane in planes}
    return SeriesReference(
        first.study if len(studies) == 1 else "",
        first.series if first.series != UNKNOWN else "",
        first.frame_of_reference,
        tuple(plane.reference for plane in planes),
    )


def _check_same(uid: str, first: list[Plane], second: list[Plane]) -> None:
    """Refuse two files that claim to be one and differ in what is read of them."""
    if len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second)):
        return
    raise InvalidInput(
        f"{first[0].name} and {second[0].name} have the same SOPInstanceUID {uid} and differ in their pixels or their "
        f"place, and which of them is right is unknown: leave one out"
    )


def _same(a: Plane, b: Plane) -> bool:
    return (
        (a.series, a.modality, a.labels) == (b.series, b.modality, b.labels)
        and (a.row_spacing, a.column_spacing) == (b.row_spacing, b.column_spacing)
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for name in ("position", "along_row", "along_column", "pixels")
        )
    )


def _check_one_volume(planes: list[Plane]) -> None:
    _check_one("series", Counter(plane.series for plane in planes), "send one series at a time")
    _check_one("modalities", Counter(plane.modality or "none" for plane in planes), "send one series at a time")
    for index, (keyword, _, several) in enumerate(LABELS):
        _check_one(
            f"{several} ({keyword})",
            Counter(plane.labels[index] or "none" for plane in planes),
            "send one of them at a time, as single slices or as a file of its own",
        )
    _check_one(
        "frames of reference (FrameOfReferenceUID)",
        Counter(plane.frame_of_reference or "none" for plane in planes),
        "their positions cannot be compared; send one of them at a time",
    )
    _check_one(
        "slice sizes (rows x columns)",
        Counter("{} x {}".format(*plane.pixels.shape) for plane in planes),
        "leave out localizers and secondary captures",
    )
    _check_one(
        "orientations",
        _alike(((*plane.along_row, *plane.along_column) for plane in planes), _TURNED),
        "leave out localizers, and send one plane at a time",
    )
    _check_one(
        "pixel spacings (mm)",
        _alike(((plane.row_spacing, plane.column_spacing) for plane in planes), 1e-3),
        "send one series at a time",
    )
    _check_one(
        "scalings of values",
        Counter("with RescaleSlope or RescaleIntercept" if plane.rescaled else "without" for plane in planes),
        "their values cannot be compared; export the series again",
    )


def _check_one(what: str, counts: Counter[str], way_out: str) -> None:
    if len(counts) > 1:
        listed = ", ".join(f"{value} ({count} slices)" for value, count in counts.most_common(5))
        raise InvalidInput(f"the DICOM files have {len(counts)} different {what}: {listed}: {way_out}")


def _alike(vectors: Iterable[tuple[float, ...]], tolerance: float) -> Counter[str]:
    """How many vectors there are of each kind; files write the same numbers with different rounding."""
    kinds: Counter[tuple[float, ...]] = Counter()
    for vector in vectors:
        kinds[next((kind for kind in kinds if np.allclose(kind, vector, atol=tolerance)), vector)] += 1
    return Counter({"[" + ", ".join(f"{x:.3g}" for x in kind) + "]": count for kind, count in kinds.items()})


def _listed(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {kind}{'s' if count > 1 and kind[-1].islower() else ''}" for kind, count in counts.items()
    )
