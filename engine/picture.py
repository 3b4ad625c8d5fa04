"""A picture of a segmentation: the scan in three planes with the mask's outline, as a PNG."""

from __future__ import annotations

import textwrap
from os import PathLike
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np

BACKGROUND, TEXT, QUIET, MASK = "#0c1016", "#f2f4f7", "#9aa5b1", "#ff9f1c"
WIDTH_INCHES, DPI = 12.0, 130
# Windows of computed tomography in Hounsfield units (low, high), by what the mask holds.
LUNG, SOFT_TISSUE, BONE = (-1350, 150), (-160, 240), (-500, 1300)
_SAMPLES = 2_000_000


def montage(
    path: str | PathLike, scan: np.ndarray, affine: np.ndarray, mask: np.ndarray | None, title: str, subtitle: str = ""
) -> Path:
    """Write a PNG with an axial, a coronal and a sagittal slice, in radiological view (patient's right on the left).

    scan: 3 axes; affine: 4 x 4, voxel to world, RAS+ mm; mask: bool, the scan's shape, or None. Each plane lies where
    the mask is largest, or halfway through the scan. All planes have one scale.
    """
    title, subtitle = title.strip(), subtitle.strip()
    # Imported here: nothing else of the client needs it, and it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # From here on the axes run to the patient's left, back and head.
    to_lps = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(("L", "P", "S"))
    )
    order = np.argsort(to_lps[:, 0])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[order]
    scan = nibabel.apply_orientation(scan, to_lps)
    mask = nibabel.apply_orientation(mask, to_lps) if mask is not None and mask.any() else None
    low, high = window(scan, mask)
    at = [
        scan.shape[axis] // 2 if mask is None else int(np.argmax(mask.sum(axis=tuple({0, 1, 2} - {axis}))))
        for axis in range(3)
    ]

    size = np.array(scan.shape) * spacing
    planes = (("axial", 2, 0, 1, "RLAP"), ("coronal", 1, 0, 2, "RLSI"), ("sagittal", 0, 1, 2, "APSI"))
    widths = [size[across] for _, _, across, _, _ in planes]
    tallest = max(size[up] for _, _, _, up, _ in planes)
    header = 0.42 + 0.24 * len(_lines(title, 110)) + 0.2 * len(_lines(subtitle, 150))
    panel = (WIDTH_INCHES - 0.6) * tallest / (sum(widths) * 1.02)
    height = header + panel + 0.45
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1, 3, width_ratios=widths, left=0.025, right=0.975, wspace=0.03, bottom=0.4 / height, top=1 - header / height
    )
    for column, (name, axis, across, up, marks) in enumerate(planes):
        axes = figure.add_subplot(grid[column], anchor="C")
        extent = (0, size[across], size[up], 0) if up == 1 else (0, size[across], 0, size[up])
        origin: Literal["upper", "lower"] = "upper" if up == 1 else "lower"
        axes.imshow(
            scan.take(at[axis], axis).T.astype(np.float32),
            cmap="gray",
            vmin=low,
            vmax=high,
            extent=extent,
            origin=origin,
            interpolation="bilinear",
            aspect="equal",
        )
        if mask is not None:
            _outline(axes, mask.take(at[axis], axis).T, extent, origin)
        _decorate(axes, marks, name)
        if column == 0:
            _scale_bar(axes, size[across])
    figure.text(
        0.025, 1 - 0.2 / height, "\n".join(_lines(title, 110)), color=TEXT, fontsize=14, va="top", weight="bold"
    )
    figure.text(
        0.025,
        1 - (0.3 + 0.24 * len(_lines(title, 110))) / height,
        "\n".join(_lines(subtitle, 150)),
        color=QUIET,
        fontsize=10.5,
        va="top",
    )
    if mask is not None:
        millilitres = mask.sum() * spacing.prod() / 1000
        volume = f"{millilitres:,.1f} mL" if millilitres >= 1 else f"{millilitres * 1000:,.0f} mm³"
        figure.text(0.975, 0.14 / height, f"outline: mask, {volume}", color=MASK, fontsize=9.5, ha="right")
    figure.text(0.025, 0.14 / height, "not a medical device", color=QUIET, fontsize=8.5)
    figure.savefig(path, facecolor=BACKGROUND)
    return Path(path)


def window(scan: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    """Lowest and highest value shown: a CT window that suits what the mask holds, else percentiles 1 to 99.8."""
    values = scan.ravel()[:: max(1, scan.size // _SAMPLES)]
    if values.min() < -500 and values.max() > 100:
        inside = float(np.median(scan[mask])) if mask is not None else 0.0
        return LUNG if inside < -300 else BONE if inside > 200 else SOFT_TISSUE
    present = values[values > values.min()]
    low, high = (np.percentile(values, 1), np.percentile(present, 99.8)) if present.size else (values.min(),) * 2
    return float(low), float(high if high > low else low + 1)


def _outline(axes, mask: np.ndarray, extent, origin: str) -> None:
    from matplotlib.colors import to_rgba

    if not mask.any():
        return
    fill = np.zeros((*mask.shape, 4), np.float32)
    fill[mask.astype(bool)] = to_rgba(MASK, 0.18)
    axes.imshow(fill, extent=extent, origin=origin, interpolation="nearest", aspect="equal")
    # A margin closes outlines that touch the picture's edge.
    rows, columns = mask.shape
    height, width = abs(extent[3] - extent[2]) / rows, extent[1] / columns
    x = (np.arange(-1, columns + 1) + 0.5) * width
    y = (np.arange(-1, rows + 1) + 0.5) * height
    axes.contour(x, y, np.pad(mask.astype(np.float32), 1), levels=[0.5], colors=MASK, linewidths=1.3)


def _decorate(axes, marks: str, name: str) -> None:
    from matplotlib.patheffects import withStroke

    left, right, top, bottom = tuple(marks)
    legible = [withStroke(linewidth=2, foreground=BACKGROUND)]
    axes.set_axis_off()
    for x, y, mark, across, up in (
        (0.015, 0.5, left, "left", "center"),
        (0.985, 0.5, right, "right", "center"),
        (0.5, 0.985, top, "center", "top"),
        (0.5, 0.015, bottom, "center", "bottom"),
    ):
        axes.text(
            x,
            y,
            mark,
            transform=axes.transAxes,
            color=TEXT,
            fontsize=10,
            ha=across,
            va=up,
            weight="bold",
            path_effects=legible,
        )
    axes.text(0.015, 0.985, name, transform=axes.transAxes, color=TEXT, fontsize=9, va="top", path_effects=legible)


def _scale_bar(axes, width_mm: float) -> None:
    length = next((n for n in (100, 50, 20, 10, 5, 2) if n < width_mm / 3), 1)
    start, end = 0.985 - length / width_mm, 0.985
    axes.plot([start, end], [0.03, 0.03], transform=axes.transAxes, color=TEXT, linewidth=2, solid_capstyle="butt")
    axes.text(
        (start + end) / 2,
        0.04,
        f"{length} mm",
        transform=axes.transAxes,
        color=TEXT,
        fontsize=8,
        ha="center",
        va="bottom",
    )


def _lines(text: str, width: int) -> list[str]:
    """At most three lines of `width` characters; `$` would start a formula."""
    return [line.replace("$", r"\$") for line in textwrap.wrap(text, width, max_lines=3, placeholder=" …")]
