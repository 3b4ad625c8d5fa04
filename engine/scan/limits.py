"""What a scan may weigh: checked against headers before anything is decompressed, and again while it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidInput


@dataclass(frozen=True)
class Limits:
    """Limits on a scan, of whatever format; a scan over one of them is refused with InvalidInput.

    max_bytes: of the file as sent, and of its contents once decompressed. max_voxels: of the whole volume.
    max_files: members of a zipped DICOM series. min_axis: voxels along the shortest axis.
    """

    max_bytes: int = 2 << 30
    max_voxels: int = 1 << 29
    max_files: int = 10_000
    min_axis: int = 2

    def check_bytes(self, size: int, what: str) -> None:
        if size > self.max_bytes:
            raise InvalidInput(
                f"{what} has {size:,} bytes, over this server's limit of {self.max_bytes:,} "
                f"(Limits.max_bytes): crop or resample the scan, or have the limit raised"
            )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse what is not a volume of 3 axes, or is too large. `shape` may come from a header that lies."""
        if len(shape) != 3 or min(shape) < self.min_axis:
            count = "no" if 0 in shape else f"{sum(n > 1 for n in shape)}"
            raise InvalidInput(
                f"the scan has shape {' x '.join(map(str, shape)) or 'of a scalar'}, with {count} axes "
                f"of content: one volume of 3 axes is wanted, each of {self.min_axis} voxels or more; "
                f"send one volume of a series, or stack single slices"
            )
        if (voxels := math.prod(shape)) > self.max_voxels:
            raise InvalidInput(
                f"the scan has {' x '.join(map(str, shape))} = {voxels:,} voxels, over this server's "
                f"limit of {self.max_voxels:,} (Limits.max_voxels): crop or resample it, or have the "
                f"limit raised"
            )
