"""Pictures of predictions: a slice of the scan with true and predicted outlines and boxes."""

from __future__ import annotations

import numpy as np

from engine.picture import BACKGROUND, MASK
from engine.prompt import parse_boxes
from training.data.sample import Sample

TRUE, PREDICTED = "#3ddc84", MASK
_INCHES, _DPI = 3.2, 80


def picture(sample: Sample, said: str, mask: np.ndarray | None) -> np.ndarray | None:
    """A slice of a sample's image, with what is right in green and what is predicted in red.

    Args:
        sample: its mask and the boxes of its answer, or of its question, are what is right.
        said: the answer; its boxes are drawn.
        mask: bool [D, H, W] that was predicted, or None.

    Returns:
        uint8 [rows, columns, 3], of the slice where both masks are largest, else the true mask or the predicted one;
        without masks, of the middle of the true box, else of the predicted one. None where there is neither mask nor
        box.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    true_boxes, boxes = parse_boxes(f"{sample.question} {sample.answer}"), parse_boxes(said)
    masks = {TRUE: None if sample.mask is None else sample.mask[0], PREDICTED: mask}
    slices = sample.image.shape[1]
    areas = [found.sum((1, 2)) for found in masks.values() if found is not None and found.any()]
    # A slice that shows both, if there is one.
    areas = [area for area in (np.prod(areas, axis=0), *areas) if area.any()] if areas else []
    places = [int(area.argmax()) for area in areas]
    places += [min(slices - 1, round((box[0] + box[3]) / 2 * slices)) for box in (*true_boxes, *boxes)]
    if not places:
        return None
    at, scan = places[0], sample.image[0]
    figure = Figure(figsize=(_INCHES, _INCHES), dpi=_DPI, facecolor=BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(scan[at], cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    for colour, found in masks.items():
        if found is not None and found[at].any():
            # A margin closes outlines that touch the picture's edge.
            edge = np.pad(found[at].astype(np.float32), 1)
            rows, columns = np.arange(-1, edge.shape[0] - 1), np.arange(-1, edge.shape[1] - 1)
            axes.contour(columns, rows, edge, levels=[0.5], colors=colour, linewidths=1.3)
    for colour, drawn in ((TRUE, true_boxes), (PREDICTED, boxes)):
        for box in drawn:
            _draw_box(axes, box, scan.shape, at, colour)
    axes.set_xlim(-0.5, scan.shape[2] - 0.5)
    axes.set_ylim(scan.shape[1] - 0.5, -0.5)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_box(axes, box: np.ndarray, shape: tuple[int, ...], at: int, colour: str) -> None:
    """First and last voxel ÷ length of each axis; dotted in slices that the box does not reach."""
    from matplotlib.patches import Rectangle

    first, last = box[:3] * shape, box[3:] * shape
    style = "-" if first[0] - 0.5 <= at <= last[0] + 0.5 else ":"
    corner, (height, width) = (first[2] - 0.5, first[1] - 0.5), (last - first + 1)[1:]
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.5, linestyle=style))
