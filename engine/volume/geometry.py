"""How a model volume lies in the scan it came from: an orientation, a crop and a scale for each axis.

Model axes are D, H, W. Each of them runs along one array axis of the scan, forwards or backwards, and covers a crop of
it; oblique scans are not rotated. So masks and boxes go back into the scan's own array exactly, and its affine stays
true for them as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import numpy as np
from nibabel.orientations import io_orientation
from scipy.sparse import csr_array

from engine.errors import InvalidInput
from engine.volume.resample import apply, cheapest_order, shrink, slabs, weights

# World axis (0 right-left, 1 anterior-posterior, 2 inferior-superior) and its sign in RAS+ for D, H and W:
# D from inferior to superior, H from anterior to posterior, W from right to left.
_CANONICAL = ((2, 1), (1, -1), (0, -1))


@dataclass(frozen=True)
class Geometry:
    """The map between a scan's array and its model volume.

    scan_shape: shape of the scan's array. affine: its voxel-to-world matrix, mm, RAS+, untouched.
    axes: for D, H, W the array axis they run along. flips: whether they run backwards on it.
    crop: for D, H, W (start, stop) in voxels of that array axis, forwards, half-open.
    image_size: (D, H, W) of the model volume.
    """

    scan_shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    crop: tuple[tuple[int, int], ...]
    image_size: tuple[int, int, int]

    def to_dict(self) -> dict:
        """JSON-ready; `from_dict` reads it back, equal."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Geometry:
        return cls(
            scan_shape=tuple(values["scan_shape"]),
            affine=tuple(map(tuple, values["affine"])),
            axes=tuple(values["axes"]),
            flips=tuple(values["flips"]),
            crop=tuple(map(tuple, values["crop"])),
            image_size=tuple(values["image_size"]),
        )

    def of_whole(self, region: Sequence[tuple[int, int]], scan_shape: tuple[int, ...], affine: np.ndarray) -> Geometry:
        """This geometry of a region as one of the whole scan, which the model sees the region of.

        Args:
            region: (start, stop) in voxels along each array axis.
            scan_shape: of the whole scan.
            affine: its own, [4, 4].
        """
        crop = tuple(
            (start + region[axis][0], stop + region[axis][0]) for (start, stop), axis in zip(self.crop, self.axes)
        )
        return replace(
            self,
            scan_shape=cast(tuple[int, int, int], tuple(scan_shape)),
            affine=tuple(map(tuple, np.asarray(affine).tolist())),
            crop=crop,
        )

    def view(self, array: np.ndarray) -> np.ndarray:
        """`array` (of the scan's shape) as a view with axes D, H, W, flipped and cropped; nothing is copied."""
        return oriented(array[self._box()], self.axes, self.flips)

    def mask_to_model(self, mask: np.ndarray) -> np.ndarray:
        """float32 [D, H, W]: how much of each model voxel a mask of the scan's shape covers, 0 to 1."""
        mask = self._of_scan(mask)
        matrices = [weights(stop - start, size, "output") for (start, stop), size in zip(self.crop, self.image_size)]
        return shrink(self.view(mask), matrices)

    def mask_to_scan(self, probabilities: np.ndarray) -> np.ndarray:
        """bool array of the scan's shape: where probabilities [D, H, W], resampled smoothly, exceed one half.

        Outside the crop nothing is marked. Only the part that can exceed one half is computed, slab by slab.
        """
        probabilities = np.asarray(probabilities, np.float32)
        if probabilities.shape != self.image_size:
            raise InvalidInput(f"the mask has shape {probabilities.shape}, the model volume is {self.image_size}")
        mask = np.zeros(self.scan_shape, bool)
        # From here on in the order of the scan's axes, so that slabs are contiguous in the result.
        order = np.argsort(self.axes)
        volume, box, matrices = probabilities.transpose(order), [], []
        for axis, model_axis in enumerate(order):
            start, stop = self.crop[model_axis]
            matrix = weights(self.image_size[model_axis], stop - start, reverse=self.flips[model_axis])
            high = np.flatnonzero((volume > 0.5).any(tuple({0, 1, 2} - {axis})))
            if not len(high):
                return mask
            rows = np.flatnonzero(matrix[:, high[0] : high[-1] + 1].any(1))
            matrix = matrix[rows[0] : rows[-1] + 1]
            used = np.flatnonzero(matrix.any(0))
            columns = slice(used[0], used[-1] + 1)
            volume = volume[(slice(None),) * axis + (columns,)]
            matrices.append(csr_array(matrix[:, columns]))
            box.append(slice(start + rows[0], start + rows[-1] + 1))
        target = mask[tuple(box)]
        *rest, last = cheapest_order(matrices)
        volume = np.ascontiguousarray(volume)
        for axis in rest:
            volume = apply(volume, matrices[axis], axis)
        across = 1 if last == 0 else 0
        for slab in slabs(target.shape, across):
            part = (slice(None),) * across + (slab,)
            np.greater(apply(np.ascontiguousarray(volume[part]), matrices[last], last), 0.5, out=target[part])
        return mask

    def boxes_to_scan(self, boxes: np.ndarray) -> np.ndarray:
        """float64 [K, 6] (i0, j0, k0, i1, j1, k1) in voxels of the scan's array axes: array[i0:i1, ...] is inside.

        boxes: [K, 6] (x1, y1, z1, x2, y2, z2) as M3D writes them: index of the first and of the last voxel along
        D, H, W, each divided by the axis' length. What lies outside the model volume is clipped.
        """
        boxes = np.asarray(boxes, float).reshape(-1, 2, 3)
        size, crop = np.array(self.image_size), np.array(self.crop, float)
        edges = np.clip(boxes * size + [[0], [1]], 0, size) / size
        edges[..., list(self.flips)] = 1 - edges[..., list(self.flips)]
        edges = np.sort(crop[:, 0] + edges * (crop[:, 1] - crop[:, 0]), axis=1)
        return edges[..., np.argsort(self.axes)].reshape(-1, 6)

    def _box(self) -> tuple[slice, ...]:
        return tuple(slice(*self.crop[model_axis]) for model_axis in np.argsort(self.axes))

    def _of_scan(self, array: np.ndarray) -> np.ndarray:
        if np.shape(array) != self.scan_shape:
            raise InvalidInput(f"the mask has shape {np.shape(array)}, the scan has {self.scan_shape}")
        return np.asarray(array)


def canonical_axes(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """(axes, flips) that bring an array with this RAS+ affine nearest to D up, H to the back, W to the left."""
    world, sign = io_orientation(affine).T
    axes = tuple(int(np.flatnonzero(world == axis)[0]) for axis, _ in _CANONICAL)
    flips = tuple(bool(sign[axis] != wanted) for axis, (_, wanted) in zip(axes, _CANONICAL))
    return cast(tuple[int, int, int], axes), cast(tuple[bool, bool, bool], flips)


def oriented(array: np.ndarray, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> np.ndarray:
    """A view of `array` with axes D, H, W."""
    return array.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
