"""A scan: an array of 3 axes with the affine that says where its voxels lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from nibabel.orientations import aff2axcodes

if TYPE_CHECKING:
    from engine.scan.dicom.references import SeriesReference


@dataclass(frozen=True)
class Scan:
    """One volume as its file has it: neither reoriented nor resampled.

    array: 3 axes, integers of at most 16 bits or float32, finite and not constant; read-only, often F-ordered.
    affine: float64 [4, 4], voxel indices to mm, RAS+.
    kind: nifti, nrrd, metaimage, mgh, dicom, array (with an affine) or npy (without, see ARRAY_AFFINE).
    modality: DICOM's modality, for example CT or MR; None where the format does not say.
    offset: what was taken off the values so that float32 keeps their contrast; the file's value is array + offset.
    header: of a NIfTI file, its 348 or 540 bytes without free text: a mask is written with it, so that it lies where
    the scan does in every reader. None for other formats.
    series: of DICOM files, the UIDs of study, series and frame of reference, and the image behind each slice: what a
    DICOM result refers to. None for other formats. It names a patient's images, and a server keeps nothing of it.
    notes: what a user has to know, sentences without a full stop: guesses, and what was left aside or replaced.
    """

    array: np.ndarray
    affine: np.ndarray
    kind: str
    modality: str | None = None
    offset: float = 0.0
    header: bytes | None = None
    notes: tuple[str, ...] = ()
    series: SeriesReference | None = None

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Distance between voxels along the array's axes."""
        return tuple(float(x) for x in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def orientation(self) -> str:
        """Where the array's axes point, for example RAS or LPS (nearest, if oblique)."""
        return "".join(aff2axcodes(self.affine))
