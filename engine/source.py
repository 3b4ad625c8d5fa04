"""Where a study came from: what is sent, sent again after an eviction, and read for pictures and measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import InvalidInput

if TYPE_CHECKING:  # what reads scans is imported when a scan is read
    from engine.scan import Scan
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

    def read(self) -> Scan | None:
        """The scan as it was sent; None if what lies there now is another, or nothing."""
        from engine.scan import read_scan, scan_pieces

        try:
            pieces, affine = scan_pieces(self.scan, self.affine)
            if self.content is None or content_of(pieces) != self.content:
                return None
            return read_scan(b"".join(pieces), affine=affine)
        except InvalidInput:
            return None


def content_of(pieces: Iterable[bytes | memoryview]) -> tuple[int, int]:
    """(bytes, CRC-32) of a file in pieces: enough to notice that it was written anew, at the speed of memory."""
    from isal import isal_zlib

    size = check = 0
    for piece in pieces:
        size += memoryview(piece).nbytes
        check = isal_zlib.crc32(piece, check)
    return size, check
