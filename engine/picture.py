"""A picture of a segmentation: the scan in three planes with the masks' outlines, as a PNG."""

from __future__ import annotations

import importlib.util
import itertools
import math
import textwrap
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np

from engine.volume.modality import is_ct
from engine.volume.views import counts, sampled

BACKGROUND, TEXT, QUIET, MASK = "#0c1016", "#f2f4f7", "#9aa5b1", "#ff9f1c"
# Of several findings, in their order; as many as an answer may have (engine.seg_states.MAX_SEGMENTS).
COLOURS = (
    *(MASK, "#38a3ff", "#4be36c", "#ff4d9d", "#ffee33", "#a66bff", "#1fe0d6", "#ff4a2e"),
    *("#b8e986", "#c9b8ff", "#ffb8a8", "#1f8f5f", "#c07a30", "#5f6bff", "#e06bff", "#8fd8ff"),
)
WIDTH_INCHES, DPI = 12.0, 130
PANEL_INCHES = (1.2, 12.0)  # least and greatest height of the planes: no shape of scan makes a picture of any size
MOST_ELONGATED = 8.0  # a shorter axis is drawn as this part of the longest one, and the picture says so
_LEGEND_INCHES, _LEGEND_CHARACTERS = 0.2, 56  # of a line, and of a name in it
_MOST_PIXELS = 1500  # of a plane along an axis: more than is drawn of it
_DOT_INCHES = 0.08  # what is drawn smaller than this gets a ring around it
# Windows of computed tomography in Hounsfield units (low, high), by what the mask holds.
LUNG, SOFT_TISSUE, BONE = (-1350, 150), (-160, 240), (-500, 1300)


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here: matplotlib comes with the extra `picture`."""
    return importlib.util.find_spec("matplotlib") is not None


def montage(
    path: str | PathLike,
    scan: np.ndarray,
    affine: np.ndarray,
    mask: np.ndarray | None,
    title: str,
    subtitle: str = "",
    *,
    findings: Sequence[tuple[str, np.ndarray]] = (),
    modality: str | None = None,
    preset: str | None = None,
) -> Path:
    """Write a PNG with an axial, a coronal and a sagittal slice, in radiological view (patient's right on the left).

    Each plane lies where the mask is largest, of several findings where it cuts the most of them, or halfway through
    the scan. All planes have one scale, unless the scan
    is much longer along one axis than along another (MOST_ELONGATED). The picture's size, and the memory and time that
    it takes beside one pass over each mask, do not depend on the scan's size.

    Args:
        path: of the PNG.
        scan: 3 axes, any real dtype.
        affine: 4 x 4, voxel to world, RAS+ mm.
        mask: bool, the scan's shape, or None.
        title, subtitle: texts above the planes; three lines of each at most.
        findings: names and masks that `mask` is the union of; each is outlined in a colour of its own, and named below
            the planes with its number, from 1, and with its volume; the legend says which no plane cuts.
        modality, preset: DICOM's modality and the preset that the server chose, where they are known; see `window`.
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
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    scan = nibabel.apply_orientation(scan, to_lps)
    mask = nibabel.apply_orientation(_as_bool(mask), to_lps) if mask is not None and mask.any() else None
    low, high = window(scan, mask, modality=modality, preset=preset)
    outlined = [] if mask is None else [(mask, MASK)]
    if findings:
        masks = [nibabel.apply_orientation(_as_bool(each), to_lps) for _, each in findings]
        outlined = list(zip(masks, itertools.cycle(COLOURS)))
    filled = [counts(each) for each, _ in outlined]
    whole = None if mask is None else counts(mask) if findings else filled[0]
    at = _fullest_planes(scan.shape, whole, filled)
    legend = ["outline: mask"] if not findings else [_named(index, name) for index, (name, _) in enumerate(findings, 1)]
    legend = [f"{name}, {_volume(int(each[0].sum()) * voxel_ml)}{_cut(each, at)}" for name, each in zip(legend, filled)]

    true_size = np.array(scan.shape) * spacing
    size = np.maximum(true_size, true_size.max() / MOST_ELONGATED)
    planes = (("axial", 2, 0, 1, "RLAP"), ("coronal", 1, 0, 2, "RLSI"), ("sagittal", 0, 1, 2, "APSI"))
    widths = [size[across] for _, _, across, _, _ in planes]
    tallest = max(size[up] for _, _, _, up, _ in planes)
    header = 0.42 + 0.24 * len(_lines(title, 110)) + 0.2 * len(_lines(subtitle, 150))
    panel = float(np.clip((WIDTH_INCHES - 0.6) * tallest / (sum(widths) * 1.02), *PANEL_INCHES))
    mm_per_inch = max(tallest / panel, sum(widths) * 1.02 / (WIDTH_INCHES - 0.6))
    margin = (1 - sum(widths) * 1.02 / mm_per_inch / WIDTH_INCHES) / 2
    footer = 0.4 + _LEGEND_INCHES * math.ceil(len(findings) / 2)
    height = header + panel + footer + 0.05
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1,
        3,
        width_ratios=widths,
        left=margin,
        right=1 - margin,
        wspace=0.03,
        bottom=footer / height,
        top=1 - header / height,
    )
    for column, (name, axis, across, up, marks) in enumerate(planes):
        axes = figure.add_subplot(grid[column], anchor="C")
        extent = (0, size[across], size[up], 0) if up == 1 else (0, size[across], 0, size[up])
        origin: Literal["upper", "lower"] = "upper" if up == 1 else "lower"
        axes.imshow(
            _thinned(_plane(scan, axis, at[axis])).astype(np.float32),
            cmap="gray",
            vmin=low,
            vmax=high,
            extent=extent,
            origin=origin,
            interpolation="bilinear",
            aspect="equal",
        )
        for each, colour in outlined:
            plane = _gathered(_plane(each, axis, at[axis]))
            _outline(axes, plane, extent, origin, _DOT_INCHES * mm_per_inch, colour)
        axes.set_xlim(extent[:2])
        axes.set_ylim(extent[2:])
        _decorate(axes, marks, name)
        if column == 0 and size[across] == true_size[across]:
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
    for index, (words, (_, colour)) in enumerate(zip(legend, outlined)):
        x, y, align = 0.975, 0.14, "right"
        if findings:
            x, y, align = 0.025 + 0.5 * (index % 2), footer - 0.2 - _LEGEND_INCHES * (index // 2), "left"
        figure.text(x, y / height, words, color=colour, fontsize=9.5, ha=align)
    note = "not a medical device"
    if (size > true_size).any():
        note += "   ·   not to scale: short axes are drawn longer"
    figure.text(0.025, 0.14 / height, note, color=QUIET, fontsize=8.5)
    figure.savefig(path, facecolor=BACKGROUND)
    return Path(path)


def _fullest_planes(
    shape: tuple[int, ...], whole: Sequence[np.ndarray] | None, findings: Sequence[Sequence[np.ndarray]]
) -> list[int]:
    """The index of a plane along each axis. whole: voxels of the mask in each plane. findings: of each finding."""
    if whole is None:
        return [n // 2 for n in shape]
    at = []
    for axis, voxels in enumerate(whole):
        cut = np.sum([each[axis] > 0 for each in findings], axis=0)
        at.append(int(np.argmax(np.where(cut == cut.max(), voxels, -1))))
    return at


def _cut(filled: Sequence[np.ndarray], at: Sequence[int]) -> str:
    """What the legend says of a finding that no plane cuts."""
    if any(voxels[index] for voxels, index in zip(filled, at)) or not filled[0].any():
        return ""
    return ", not in these planes"


def _named(number: int, name: str) -> str:
    shortened = textwrap.shorten(name, _LEGEND_CHARACTERS, placeholder=" …") or "[SEG]"
    return f"{number}  " + shortened.replace("$", r"\$")


def _volume(millilitres: float) -> str:
    return f"{millilitres:,.1f} mL" if millilitres >= 1 else f"{millilitres * 1000:,.0f} mm³"


def window(
    scan: np.ndarray, mask: np.ndarray | None, *, modality: str | None = None, preset: str | None = None
) -> tuple[float, float]:
    """Lowest and highest value shown: for a CT a window that suits what the mask holds, else percentiles 1 to 99.8.

    A CT is what DICOM's `modality` or the `preset` ("ct", "mr") says, else what `engine.volume.modality` finds by the
    values. `scan` and `mask` have one shape; of large ones every n-th voxel is looked at.
    """
    values = sampled(scan).astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    value_range = float(values.min()), float(values.max())
    if is_ct(scan, modality=modality, preset=preset, value_range=value_range):
        inside = _median_inside(scan, mask) if mask is not None and mask.any() else 0.0
        return LUNG if inside < -300 else BONE if inside > 200 else SOFT_TISSUE
    present = values[values > values.min()]
    low, high = (np.percentile(values, 1), np.percentile(present, 99.8)) if present.size else (values.min(),) * 2
    return float(low), float(high if high > low else low + 1)


def _median_inside(scan: np.ndarray, mask: np.ndarray) -> float:
    """Of the mask's bounding box every n-th voxel: a small mask is not missed."""
    found = [np.flatnonzero(planes) for planes in counts(_as_bool(mask))]
    box = tuple(slice(indices[0], indices[-1] + 1) for indices in found)
    values, inside = sampled(scan[box]), sampled(mask[box]) != 0
    if not inside.any():  # so thin that none of these voxels is in it
        values, inside = scan[box], mask[box] != 0
    return float(np.median(values[inside]))


def _as_bool(mask: np.ndarray) -> np.ndarray:
    return mask if mask.dtype == bool else mask != 0


def _plane(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A view of the plane at an index of an axis; the axis that is drawn upwards comes first."""
    return array[(slice(None),) * axis + (index,)].T


def _thinned(plane: np.ndarray) -> np.ndarray:
    """At most _MOST_PIXELS rows and columns of a plane, evenly spread."""
    rows, columns = ((np.arange(m) * 2 + 1) * n // (2 * m) for n in plane.shape for m in (min(n, _MOST_PIXELS),))
    return plane[np.ix_(rows, columns)]


def _gathered(plane: np.ndarray) -> np.ndarray:
    """A mask's plane of the same size as `_thinned` makes it; nothing of the mask is lost on the way."""
    for axis, n in enumerate(plane.shape):
        size = min(n, _MOST_PIXELS)
        if size < n:
            plane = np.logical_or.reduceat(plane, np.arange(size) * n // size, axis=axis)
    return plane


def _outline(axes, mask: np.ndarray, extent, origin: str, dot_mm: float, colour: str) -> None:
    from matplotlib.colors import to_rgba

    if not mask.any():
        return
    fill = np.zeros((*mask.shape, 4), np.float32)
    fill[mask.astype(bool)] = to_rgba(colour, 0.18)
    axes.imshow(fill, extent=extent, origin=origin, interpolation="nearest", aspect="equal")
    # A margin closes outlines that touch the picture's edge.
    rows, columns = mask.shape
    height, width = abs(extent[3] - extent[2]) / rows, extent[1] / columns
    x = (np.arange(-1, columns + 1) + 0.5) * width
    y = (np.arange(-1, rows + 1) + 0.5) * height
    axes.contour(x, y, np.pad(mask.astype(np.float32), 1), levels=[0.5], colors=colour, linewidths=1.3)
    up, across = (np.flatnonzero(mask.any(other)) for other in (1, 0))
    if max((up[-1] + 1 - up[0]) * height, (across[-1] + 1 - across[0]) * width) < dot_mm:
        centre = ((across[0] + across[-1] + 1) / 2 * width, (up[0] + up[-1] + 1) / 2 * height)
        axes.plot(
            *centre, marker="o", markersize=12, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.3
        )


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
    power = 10.0 ** math.floor(math.log10(width_mm / 3))
    length = min(100, max(n * power for n in (1, 2, 5) if n * power <= width_mm / 3))
    start, end = 0.985 - length / width_mm, 0.985
    axes.plot([start, end], [0.03, 0.03], transform=axes.transAxes, color=TEXT, linewidth=2, solid_capstyle="butt")
    axes.text(
        (start + end) / 2,
        0.04,
        f"{length:g} mm",
        transform=axes.transAxes,
        color=TEXT,
        fontsize=8,
        ha="center",
        va="bottom",
    )


def _lines(text: str, width: int) -> list[str]:
    """At most three lines of `width` characters; `$` would start a formula."""
    return [line.replace("$", r"\$") for line in textwrap.wrap(text, width, max_lines=3, placeholder=" …")]
