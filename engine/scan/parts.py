"""What every reader of a file format returns, before `read_scan` checks its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine.scan.dicom.references import SeriesReference


@dataclass(frozen=True)
class Volume:
    """One volume of a file.

    array: 3 axes, real numbers, with the file's rescale applied. affine: float64 [4, 4], voxel indices to mm, RAS+.
    header: the geometry header of a NIfTI file (see `Scan.header`); None for other formats. notes: what a user has to
    know of it, sentences without a full stop, such as that its orientation is a guess. modality: as DICOM names it.
    series: of DICOM files, which images its slices are.
    """

    array: np.ndarray
    affine: np.ndarray
    header: bytes | None = None
    notes: tuple[str, ...] = ()
    modality: str | None = None
    series: SeriesReference | None = None
