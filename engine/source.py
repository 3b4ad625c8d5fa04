"""Where a study came from: what is sent, sent again after an eviction, and read for pictures and measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import InvalidInput

if TYPE_CHECKING:  # what reads scans is imported when a scan is read
    from engine.scan import Scan
    from engine.scan.dicom.references import SeriesReference
    from engine.volume.crop import Crop


@dataclass(frozen=True, eq=False)
class Source:
    """Where a study came from, so that it can be sent again: what the user handed over, with affine, preset and crop.

    content: `content_of` what was sent; None if that is not known.
    """

    scan: object  # as `upload` takes it
    affine: np.ndarray | None
    preset: str
    crop: Crop | None = None
    content: tuple[int, int] | None = None

    def read(self) -> Scan:
        """The scan as it was sent.

        Raises:
            InvalidInput: what lies at the source now is not what was sent, or is gone.
            Unavailable: a package that reads it is not installed; the message says which.
        """
        from engine.scan import read_scan

        data, affine = self._sent()
        return read_scan(data, affine=affine)

    def series(self) -> SeriesReference | None:
        """The DICOM series that was sent; None for a scan of another format.

        Its `slices` are in the order of the last axis of the scan's array, and so of masks, see `SeriesReference`. The
        files' names are paths on disk, or, of a zip, those within it; empty for bytes of a single file. The source is
        read for it, by the code that the server reads it with; its pixels are not, so that no decoder is needed.

        Raises:
            InvalidInput: what lies at the source now is not what was sent, or is gone.
        """
        from engine.scan import files_of, read_series

        found = read_series(self._sent()[0])
        if found is None:
            return None
        paths = files_of(self.scan)
        slices = (replace(each, file=str(paths.get(each.file, each.file))) for each in found.slices)
        return replace(found, slices=tuple(slices))

    def _sent(self) -> tuple[bytes, np.ndarray | None]:
        """(what was sent as one file, its affine or None). Raises InvalidInput if it lies there no more."""
        from engine.scan import scan_pieces

        try:
            pieces, affine = scan_pieces(self.scan, self.affine)
        except InvalidInput as error:  # which names the path; measurements, which are saved, have this message
            raise InvalidInput("the scan at the study's source is gone or cannot be read: upload it again") from error
        if self.content is None or content_of(pieces) != self.content:
            raise InvalidInput(
                "the scan at the study's source has changed since it was sent, and is not the one that was sent: "
                "upload it again"
            )
        return b"".join(pieces), affine


def content_of(pieces: Iterable[bytes | memoryview]) -> tuple[int, int]:
    """(bytes, CRC-32) of a file in pieces: enough to notice that it was written anew, at the speed of memory."""
    from isal import isal_zlib

    size = check = 0
    for piece in pieces:
        size += memoryview(piece).nbytes
        check = isal_zlib.crc32(piece, check)
    return size, check
