"""Pictures of single cases: slices of the scan with true and predicted outlines or boxes, as PNG."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel
import numpy as np

from benchmarks.bench.runner import read_kept
from benchmarks.bench.samples import is_nifti
from engine.picture import BACKGROUND, MASK, TEXT, window
from training.data.sample import BrokenSample

TRUE, PREDICTED = "#3ddc84", MASK
_INCHES, _DPI = 3.2, 90


def picture(row: dict, predictions: Path) -> bytes:
    """PNG of a row's scan: where the truth is largest, and where the prediction is if that is another slice.

    Args:
        row: of a run. Its files are read again.
        predictions: folder of the masks that the run kept.

    Raises:
        BrokenSample: if a file is not there any more.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    image = Path(row["image"])
    scan = _slices(image)
    masks = {TRUE: _true_mask(row), PREDICTED: _predicted_mask(row, predictions)}
    boxes = {TRUE: row.get("box"), PREDICTED: row.get("predicted_box")}
    shown = dict.fromkeys(
        at for colour in (TRUE, PREDICTED) if (at := _place(masks[colour], boxes[colour], len(scan))) is not None
    ) or {len(scan) // 2: None}
    low, high = window(scan, masks[TRUE])
    figure = Figure(figsize=(_INCHES * len(shown), _INCHES), dpi=_DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    for column, at in enumerate(shown):
        axes = figure.add_axes((column / len(shown), 0, 1 / len(shown), 1))
        axes.imshow(scan[at], cmap="gray", vmin=low, vmax=high)
        axes.set_axis_off()
        for colour, mask in masks.items():
            if mask is not None and mask[at].any():
                # A margin closes outlines that touch the picture's edge.
                axes.contour(
                    np.arange(-1, mask.shape[2] + 1),
                    np.arange(-1, mask.shape[1] + 1),
                    np.pad(mask[at].astype(np.float32), 1),
                    levels=[0.5],
                    colors=colour,
                    linewidths=1.3,
                )
        for colour, box in boxes.items():
            _draw_box(axes, box, scan.shape, at, colour)
        axes.set_xlim(-0.5, scan.shape[2] - 0.5)
        axes.set_ylim(scan.shape[1] - 0.5, -0.5)
        axes.text(
            0.02, 0.98, f"slice {at + 1} of {len(scan)}", transform=axes.transAxes, color=TEXT, fontsize=8, va="top"
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=BACKGROUND)
    return file.getvalue()


def _slices(path: Path) -> np.ndarray:
    """[slices, rows, columns] of an image or a mask; of NIfTI files axial ones, patient's right on the left."""
    try:
        if not is_nifti(path):
            array = np.load(path, mmap_mode="r")
            return np.asarray(array[0] if array.ndim == 4 else array)
        image = nibabel.as_closest_canonical(nibabel.load(path))
        return np.asanyarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)
    except (OSError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise BrokenSample(path, f"cannot be read: {error}") from None


def _true_mask(row: dict) -> np.ndarray | None:
    if not row.get("mask"):
        return None
    mask = _slices(Path(row["mask"]))
    return (mask != 0 if row["label"] is None else mask == row["label"]) if mask.size > 1 else None


def _predicted_mask(row: dict, predictions: Path) -> np.ndarray | None:
    if not row.get("predicted_mask"):
        return None
    try:
        mask = read_kept(predictions / row["predicted_mask"])
    except (OSError, ValueError) as error:
        raise BrokenSample(predictions / row["predicted_mask"], f"cannot be read: {error}") from None
    image = Path(row["image"])
    if not is_nifti(image):
        return mask
    there = nibabel.Nifti1Image(mask.astype(np.uint8), nibabel.load(image).affine)
    canonical = nibabel.as_closest_canonical(there)
    return np.asanyarray(canonical.dataobj)[::-1, ::-1].transpose(2, 1, 0) != 0


def _place(mask: np.ndarray | None, box: list[float] | None, slices: int) -> int | None:
    """The slice in which a mask is largest, or the middle one of a box."""
    if mask is not None and mask.any():
        return int(np.argmax(mask.sum(axis=(1, 2))))
    return None if box is None else min(slices - 1, round((box[0] + box[3]) / 2 * slices))


def _draw_box(axes, box: list[float] | None, shape: tuple[int, ...], at: int, colour: str) -> None:
    """A box (first and last voxel ÷ length of each axis), dashed in slices that it does not reach."""
    from matplotlib.patches import Rectangle

    if box is None:
        return
    first, last = (np.array(ends) * shape for ends in (box[:3], box[3:]))
    style = "-" if first[0] - 0.5 <= at <= last[0] + 0.5 else ":"
    corner, size = (first[2] - 0.5, first[1] - 0.5), (last - first + 1)[[2, 1]]
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.5, linestyle=style))
