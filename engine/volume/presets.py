"""From a scan to the model's volume: named preprocessing presets, each a documented contract.

The way back (masks and boxes into the scan's space) is `engine.volume.geometry.Geometry`, which every preset returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from scipy import ndimage

from engine.errors import InvalidInput, shortened
from engine.scan import Scan
from engine.volume.crop import Crop
from engine.volume.geometry import Geometry, canonical_axes, oriented
from engine.volume.modality import modality_of
from engine.volume.resample import resample, slabs, weights

__all__ = ["Crop", "Geometry", "PRESETS", "Prepared", "Preset", "prepare"]

CT_WINDOW = (-1000.0, 1000.0)
CT_BODY = -500.0
MR_PERCENTILES = (0.5, 99.5)
SEG_PERCENTILES = (0.05, 99.95)
REFSEG_PERCENTILES = (0.5, 99.5)
_COARSE = 128  # longest axis of the grid on which foreground is looked for
_SMALL_PART = 0.1  # pieces of foreground below this share of the largest one are left out of the crop
_ROUNDING = 1e-5  # of the largest value: differences below it tell nothing

Size = tuple[int, int, int]
Axes = tuple[tuple[int, int, int], tuple[bool, bool, bool]]
Run = Callable[[Scan, Size], tuple[np.ndarray, Geometry]]


@dataclass(frozen=True)
class Prepared:
    """A scan as the model sees it.

    image: float32 [1, D, H, W] in 0..1. geometry: how it lies in the scan. preset: the one that was used, never auto.
    reason: why that one, a sentence for the user. region: (start, stop) in voxels along each array axis, of the crop
    that was asked for; None for the whole scan.
    """

    image: np.ndarray
    geometry: Geometry
    preset: str
    reason: str
    region: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Preset:
    """A named way to make a model volume. doc: its contract, for users. run: makes (image [D, H, W] in 0..1, geometry).

    auto runs nothing itself: it chooses another one.
    """

    doc: str
    run: Run | None


def prepare(scan: Scan, image_size: Size = (32, 256, 256), preset: str = "auto", crop: Crop | None = None) -> Prepared:
    """The model volume of `scan` by one of PRESETS, at image_size (D, H, W).

    Args:
        scan: as its file has it.
        image_size: (D, H, W) of the model's volume.
        preset: one of PRESETS. auto decides between ct and mr by the whole scan.
        crop: the region that the model is to see; the preset's statistics and its own crop to the body are those of the
            region. The geometry that comes back is the whole scan's.

    Returns:
        The image, float32 [1, D, H, W] in 0..1; its geometry in the whole scan; the preset that was used and why; the
        region, ((i0, i1), (j0, j1), (k0, k1)) in voxels, half-open, or None for the whole.

    Raises:
        InvalidInput: for an unknown preset, a scan that the preset does not take, a crop that is not within the scan or
            holds one value only.
    """
    if preset not in PRESETS:
        raise InvalidInput(f"there is no preset {shortened(preset)}: choose one of {', '.join(PRESETS)}")
    image_size = cast(Size, tuple(int(n) for n in image_size))
    region = None if crop is None else crop.region(scan.array.shape, scan.affine)
    seen = scan if region is None else _region_of(scan, region)
    reason = f"{preset} was asked for"
    if preset == "auto":
        preset, reason = _auto(seen, image_size, scan)
    image, geometry = cast(Run, PRESETS[preset].run)(seen, image_size)
    if region is not None:
        geometry = geometry.of_whole(region, scan.array.shape, scan.affine)
        reason += f"; the model sees voxels {_text_of(region)} only"
    return Prepared(image[None], geometry, preset, "; ".join((reason, *scan.notes)), region)


def _region_of(scan: Scan, region: tuple[tuple[int, int], ...]) -> Scan:
    """The region as a scan of its own; a view."""
    array = scan.array[tuple(slice(*part) for part in region)]
    if array.min() == array.max():
        raise InvalidInput(
            f"every voxel of the crop {_text_of(region)} is {float(array.flat[0]) + scan.offset:g}: there is nothing "
            "to see"
        )
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [start for start, _ in region]
    return replace(scan, array=array, affine=affine)


def _text_of(region: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{start}:{stop}" for start, stop in region)


def _auto(scan: Scan, image_size: Size, whole: Scan) -> tuple[str, str]:
    """The preset, and why. scan: what the model sees of the `whole` one."""
    low, high = _range(scan)
    is_volume = scan.array.shape == image_size and scan.array.dtype.kind == "f" and low >= 0 and high <= 1
    if scan.kind == "npy" and is_volume:
        return "raw", "auto chose raw: the array already has the model's size and range 0 to 1"
    values = (low, high) if scan is whole else None
    found = modality_of(whole.array, whole.offset, whole.modality, values)
    name = "ct" if found.is_ct else "mr"
    if not found.is_guess:
        return name, f"auto chose {name}: {found.reason}"
    return name, f"auto chose {name}, a guess: {found.reason}; if it is wrong, give the preset (--preset, preset=)"


def _range(scan: Scan) -> tuple[float, float]:
    """The lowest and the highest value, as the file has them."""
    return float(scan.array.min()) + scan.offset, float(scan.array.max()) + scan.offset


def _ct(scan: Scan, image_size: Size) -> tuple[np.ndarray, Geometry]:
    low, high = (edge - scan.offset for edge in CT_WINDOW)
    body = CT_BODY - scan.offset
    geometry = _cropped_to_foreground(scan, image_size, lambda coarse: coarse > body)
    image = _resized(scan, geometry, intensity_map=lambda values: np.clip(values, low, high, out=values))
    return _scaled(image, low, high), geometry


def _mr(scan: Scan, image_size: Size) -> tuple[np.ndarray, Geometry]:
    coarse = _coarse(scan, canonical_axes(scan.affine))
    background = float(np.percentile(coarse, 1))
    threshold = background + 0.5 * (_otsu(coarse) - background)
    geometry = _cropped_to_foreground(scan, image_size, lambda values: values > threshold)
    image = _resized(scan, geometry)
    foreground = image[image > threshold]
    low, high = np.percentile(foreground, MR_PERCENTILES) if foreground.size else (0.0, 0.0)
    if high <= low:
        # All foreground is alike: what else there is, unless resizing has left nothing but its own rounding of it.
        spread = image if np.ptp(image) > _ROUNDING * np.abs(image).max() else scan.array
        low, high = float(spread.min()), float(spread.max())
    return _scaled(image, low, high), geometry


def _m3d_cap(scan: Scan, image_size: Size) -> tuple[np.ndarray, Geometry]:
    axes = ((0, 1, 2), (False,) * 3) if scan.kind == "npy" else canonical_axes(scan.affine)
    return _reference(scan, image_size, axes, float(scan.array.min()), float(scan.array.max()))


def _m3d_seg(scan: Scan, image_size: Size) -> tuple[np.ndarray, Geometry]:
    axes = ((0, 1, 2) if scan.kind == "npy" else (2, 1, 0), (False,) * 3)
    voxels = scan.array.ravel(order="K")
    bright = voxels[voxels > voxels.mean(dtype=np.float64)]
    # Rounded to float32 the mean may reach the largest value: then only voxels of that value are above it.
    low, high = (
        np.percentile(bright, SEG_PERCENTILES, overwrite_input=True) if bright.size else (float(scan.array.max()),) * 2
    )
    if high <= low:
        raise InvalidInput(
            f"preset m3d-seg finds no contrast: the voxels above the mean all are {low + scan.offset:g}; choose "
            f"another preset, for example mr"
        )
    return _reference(scan, image_size, axes, float(low), float(high))


def _m3d_refseg(scan: Scan, image_size: Size) -> tuple[np.ndarray, Geometry]:
    axes = ((0, 1, 2) if scan.kind == "npy" else (2, 0, 1), (False,) * 3)
    low, high = np.percentile(scan.array, REFSEG_PERCENTILES)
    if high <= low:
        raise InvalidInput(
            f"preset m3d-refseg finds no contrast: 99 % of the voxels are {low + scan.offset:g}; choose another "
            f"preset, for example mr"
        )
    return _reference(scan, image_size, axes, float(low), float(high))


def _raw(scan: Scan, image_size: Size) -> tuple[np.ndarray, Geometry]:
    low, high = _range(scan)
    if scan.array.shape != image_size:
        raise InvalidInput(
            f"preset raw takes arrays of the model's size {image_size}; this scan has "
            f"{scan.array.shape}: choose another preset, which resizes it"
        )
    if low < 0 or high > 1:
        raise InvalidInput(
            f"preset raw takes values from 0 to 1; this scan has {low:g} to {high:g}: scale it, or "
            f"choose another preset, which does"
        )
    geometry = _geometry(scan, image_size, ((0, 1, 2), (False,) * 3), [(0, n) for n in image_size])
    return np.ascontiguousarray(scan.array, np.float32), geometry


# The contracts are data, not docstrings: python -OO has none of those.
PRESETS: dict[str, Preset] = {
    "auto": Preset(
        "Chooses, and says why: raw for an .npy that already is a model volume (its size, float, 0..1); by DICOM's "
        "modality ct for CT and mr for all others; without a modality ct if the values of enough voxels are like "
        "those of air, fat and soft tissue in Hounsfield units (single voxels decide nothing), else mr. Where the "
        "values leave it open, it says that its choice is a guess.",
        None,
    ),
    "ct": Preset(
        "For CT in Hounsfield units. Values are clipped to -1000..1000 HU and scaled to 0..1 (air 0, water 0.5). "
        "Cropped to the body: the box around the large connected parts above -500 HU. Axes are turned to D from feet "
        "to head, H from front to back, W from the patient's right to left (nearest, if oblique), and resized to the "
        "model's size, by area averaging where the grid gets coarser, linearly where it gets finer.",
        _ct,
    ),
    "mr": Preset(
        "For MR, and all else whose intensities have no unit. Cropped to the foreground: the box around the large "
        "connected parts above a threshold half way from the background (1st percentile) to Otsu's threshold. Axes "
        "and resizing as ct. Values are then clipped to the 0.5 to 99.5 percentiles of the foreground voxels and "
        "scaled to 0..1.",
        _mr,
    ),
    "m3d-cap": Preset(
        "As the reference prepared M3D-Cap: values scaled from their minimum and maximum to 0..1, cropped to the box "
        "of all voxels above the minimum, resized trilinearly (align_corners=False, no antialiasing). It worked on "
        "stacks of grey slices as a viewer displays them: an .npy without an affine is taken as that stack (D x H x "
        "W); a file or array with an affine is turned to the axes of ct. The reference's slices were windowed for "
        "display; so should yours be.",
        _m3d_cap,
    ),
    "m3d-seg": Preset(
        "As the reference prepared M3D-Seg: values clipped to the 0.05 to 99.95 percentiles of all voxels above the "
        "mean, scaled to 0..1 (its z-score in between cancels out), cropped to the box of voxels above the lower end, "
        "resized trilinearly (align_corners=False, no antialiasing). It reversed the axes of the NIfTI array (i, j, k "
        "become W, H, D) whatever its orientation, and so does this preset; an .npy without an affine is taken as D x "
        "H x W.",
        _m3d_seg,
    ),
    "m3d-refseg": Preset(
        "As the reference prepared M3D-RefSeg: values clipped to the 0.5 to 99.5 percentiles of all voxels, scaled to "
        "0..1, cropped to the box of voxels above the lower end, resized trilinearly (align_corners=False, no "
        "antialiasing). It put the last axis of the NIfTI array first (i, j, k become H, W, D) whatever its "
        "orientation, and so does this preset; an .npy without an affine is taken as D x H x W.",
        _m3d_refseg,
    ),
    "raw": Preset(
        "Nothing is changed: for arrays that already are D x H x W (or 1 x D x H x W) at the model's size, in 0..1, "
        "prepared by other means, as the reference takes them. Anything else is refused.",
        _raw,
    ),
}


def _reference(scan: Scan, image_size: Size, axes: Axes, low: float, high: float) -> tuple[np.ndarray, Geometry]:
    """Scale low..high to 0..1, crop to what is above 0, resize: the steps that the reference's families share."""

    def intensity_map(values: np.ndarray) -> np.ndarray:
        np.clip(values, low, high, out=values)
        values -= np.float32(low)
        values /= np.float32(high - low)
        return values

    crop = _box_above(oriented(scan.array, *axes), low)
    geometry = _geometry(scan, image_size, axes, crop)
    return np.clip(_resized(scan, geometry, intensity_map, box="input"), 0, 1), geometry


def _box_above(volume: np.ndarray, low: float) -> list[tuple[int, int]]:
    """The half-open bounding box of voxels above `low`, exactly; the whole volume if there are none."""
    memory = sorted(range(3), key=lambda axis: -abs(volume.strides[axis]))
    volume, seen = volume.transpose(memory), [np.zeros(volume.shape[axis], bool) for axis in memory]
    for part in slabs(volume.shape, 0, volume.itemsize):
        above = volume[part] > low
        seen[0][part] = above.any((1, 2))
        flat = above.any(0)
        seen[1] |= flat.any(1)
        seen[2] |= flat.any(0)
    found = [np.flatnonzero(seen[memory.index(axis)]) for axis in range(3)]
    return [(int(i[0]), int(i[-1]) + 1) if len(i) else (0, n) for i, n in zip(found, volume.shape)]


def _coarse(scan: Scan, axes: Axes) -> np.ndarray:
    """Every n-th voxel of the scan in model axes, at most _COARSE along each: enough to find the body."""
    view = oriented(scan.array, *axes)
    return np.ascontiguousarray(view[tuple(slice(None, None, -(-n // _COARSE)) for n in view.shape)], np.float32)


def _cropped_to_foreground(scan: Scan, image_size: Size, is_foreground: Callable[[np.ndarray], np.ndarray]) -> Geometry:
    """The geometry of canonical axes, cropped to the large connected parts of the foreground, or whole without any.

    Between two samples of the coarse grid the box is widened to just before the next sample outside.
    """
    axes = canonical_axes(scan.affine)
    shape = [scan.array.shape[axis] for axis in axes[0]]
    crop = [(0, n) for n in shape]
    parts, count = ndimage.label(is_foreground(_coarse(scan, axes)))
    if count:
        sizes = np.bincount(parts.ravel())[1:]
        boxes = [box for box, size in zip(ndimage.find_objects(parts), sizes) if size >= _SMALL_PART * sizes.max()]
        for axis, n in enumerate(shape):
            step = -(-n // _COARSE)
            first, last = min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)
            crop[axis] = max(0, (first - 1) * step + 1), min(n, last * step)
    return _geometry(scan, image_size, axes, crop)


def _geometry(scan: Scan, image_size: Size, axes: Axes, crop: list[tuple[int, int]]) -> Geometry:
    """`crop` counts along the model's axes; the Geometry's along the array's, forwards."""
    order, flips = axes
    lengths = [scan.array.shape[axis] for axis in order]
    forwards = tuple(
        (n - stop, n - start) if flip else (start, stop) for (start, stop), flip, n in zip(crop, flips, lengths)
    )
    shape = cast(Size, tuple(scan.array.shape))
    return Geometry(shape, tuple(map(tuple, scan.affine.tolist())), order, flips, forwards, image_size)


def _resized(scan: Scan, geometry: Geometry, intensity_map=np.asarray, box: str = "wider") -> np.ndarray:
    matrices = [weights(stop - start, size, box) for (start, stop), size in zip(geometry.crop, geometry.image_size)]
    return resample(geometry.view(scan.array), matrices, intensity_map)


def _scaled(image: np.ndarray, low: float, high: float) -> np.ndarray:
    image -= np.float32(low)
    image /= np.float32(high - low)
    return np.clip(image, 0, 1, out=image)


def _otsu(values: np.ndarray) -> float:
    """The threshold with the most variance between its two sides, of 256 bins from the 0.1 to the 99.9 percentile.

    Of a single value, that value: the grid may miss all others, and large ones have no bins around them.
    """
    low, high = np.percentile(values, (0.1, 99.9))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    if high <= low:
        return low
    counts, edges = np.histogram(np.clip(values, low, high), 256, (low, high))
    centres = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts)[:-1], np.cumsum(counts * centres)
    above = counts.sum() - below
    between = (total[-1] * below / counts.sum() - total[:-1]) ** 2 / np.maximum(below * above, 1)
    return float(edges[1 + int(np.argmax(between))])
