"""Whether a scan is a CT in Hounsfield units: the one rule that preprocessing, pictures and measurements share.

DICOM says its modality. Other formats do not, so the values decide, by shares of voxels: single voxels, such as the
overshoot of an interpolation, decide nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.volume.views import sampled

# Shares of voxels from which on something counts; what they were chosen for is in tests/unit/test_modality.py.
_AIR = 0.03
_TISSUE = 0.01
_NEVER_CT = 0.02  # spread below -1400 HU, where nothing is but one padding value


@dataclass(frozen=True)
class Modality:
    """is_ct: whether the values are taken as Hounsfield units. is_guess: whether it may well be otherwise.

    reason: what it was decided by, without a full stop.
    """

    is_ct: bool
    is_guess: bool
    reason: str


def modality_of(
    array: np.ndarray,
    offset: float = 0.0,
    modality: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> Modality:
    """Decide whether a scan is a CT in Hounsfield units.

    Args:
        array: 3 axes in any order, any real dtype; the scan's value is array + offset.
        offset: see `engine.scan.Scan`.
        modality: DICOM's, for example CT or MR; None where the format does not say.
        value_range: lowest and highest value, offset added, if they are known already.
    """
    low, high = value_range or (float(array.min()) + offset, float(array.max()) + offset)
    values = f"the values run from {low:g} to {high:g}"
    sample = sampled(array).astype(np.float64).ravel()
    sample = sample[np.isfinite(sample)] + offset
    if modality:
        reason = f"the DICOM modality is {modality}"
        if modality == "CT" and sample.size and _is_shifted(sample):
            reason += (
                f"; but {values} and look like a CT without its rescale intercept: subtract 1024 (or the intercept of "
                "the scanner) from the values to get Hounsfield units"
            )
        return Modality(modality == "CT", False, reason)
    if not sample.size:
        return Modality(False, True, values)
    is_ct, is_guess, found = _by_values(sample)
    return Modality(is_ct, is_guess, f"{values}, {found}")


def is_ct(
    array: np.ndarray,
    offset: float = 0.0,
    *,
    modality: str | None = None,
    preset: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> bool:
    """Whether a scan is a CT: by DICOM's modality, else the preset (ct or mr) that the server chose, else its values.

    Args: as `modality_of` takes them; of presets, all but ct and mr decide nothing.
    """
    if modality:
        return modality == "CT"
    if preset in ("ct", "mr"):
        return preset == "ct"
    return modality_of(array, offset, value_range=value_range).is_ct


def _by_values(sample: np.ndarray) -> tuple[bool, bool, str]:
    """(is_ct, is_guess, what was found) of values as they are in the file."""
    inside = _without_padding(sample)
    if not inside.size:
        return False, True, "unlike Hounsfield units"

    def share(low: float, high: float) -> float:
        return float(np.count_nonzero((inside >= low) & (inside < high))) / inside.size

    def density(low: float, high: float) -> float:
        return share(low, high) / (high - low)

    spread_below = share(-np.inf, -1400)
    air = share(-1100, -900)
    # Lung lies at -900 to -700, and between that and fat there is little in any CT; a phase image is even.
    is_peak = density(-1100, -900) > 2 * density(-700, -250)
    tissue = share(-200, 300)
    if spread_below < _NEVER_CT:
        if air >= _AIR and is_peak and not _is_padded_mr(inside):
            found = f"{air:.0%} of them like air (-1000) and {tissue:.0%} like soft tissue in Hounsfield units"
            counts, edges = np.histogram(inside, 30, (-1300, -700))
            is_shifted = abs(edges[np.argmax(counts)] + 10 + 1000) > 60  # as of a cone beam's, or lung alone
            return True, tissue < _TISSUE or bool(is_shifted), found
        shifted = density(-1300, -1100) + density(-900, -600)
        if share(-1300, -600) >= _AIR and 700 * shifted > 3 * 700 * density(-600, -250) and not _is_padded_mr(inside):
            return True, True, f"{share(-1300, -600):.0%} of them near those of air and lung in Hounsfield units"
        # Without air, as of a CT cropped inside the body: fat and muscle, and less around 0, where the background and
        # the mean of other signed images lie; noise hides the gap, but not that bone makes one tail the longer one.
        low, middle, high = np.percentile(inside, (0.5, 50, 99.5))
        gap, tails = density(20, 80) / max(density(-20, 20), 1e-9), (high + low - 2 * middle) / max(high - low, 1e-9)
        is_body = tissue >= 0.6 and share(-200, -20) >= 0.01 and share(0, 100) >= 0.1
        if is_body and (gap > 1.3 or (gap > 0.9 and tails > 0.25)):
            return True, True, f"{tissue:.0%} of them like fat and soft tissue in Hounsfield units"
        is_even_around_zero = abs(low + high) < 0.15 * (high - low)
        has_range = -1100 <= low <= -850 and 100 <= high <= 4100 and share(-1100, -500) >= _AIR
        if has_range and not is_even_around_zero and not _is_padded_mr(inside):
            return True, True, "the range of Hounsfield units"
    if _is_shifted(sample):
        return (
            False,
            True,
            "and may be those of a CT that is stored without its rescale intercept, which are no Hounsfield units: if "
            "it is one, subtract 1024 (or the intercept of the scanner) and choose preset ct",
        )
    return False, True, "unlike Hounsfield units"


def _without_padding(sample: np.ndarray) -> np.ndarray:
    """Without the one value below all Hounsfield units that scanners and tools put outside the field of view."""
    lowest = sample.min()
    if lowest >= -1100:
        return sample
    is_padding = sample == lowest
    if 2 * np.count_nonzero(is_padding) < np.count_nonzero(sample < -1250):
        return sample
    return sample[~is_padding]


def _is_padded_mr(inside: np.ndarray) -> bool:
    """Whether the "air" is one value that a tool put around an MR, for example when it rotated it.

    A real CT has values between air and soft tissue, fat among them; a phantom without noise has few values in all.
    """
    air, body = inside[inside < -500], inside[inside >= -500]
    if not air.size or not body.size or np.count_nonzero(air == air.min()) < 0.95 * air.size:
        return False
    if np.count_nonzero(body < -20) >= 0.005 * body.size or np.unique(body).size <= 30:
        return False
    return bool(np.mean(body > 300) >= 0.45 or np.percentile(body, 99) > 2000)


def _is_shifted(sample: np.ndarray) -> bool:
    """Whether values look like HU + 1000 or + 1024: none negative, and what is not air is mostly 850 to 1350."""
    low, high = np.percentile(sample, (0.1, 99.9))
    body = sample[sample > 500]
    if low < 0 or not 1000 < high < 4200 or body.size < _AIR * sample.size:
        return False
    return float(np.mean((body >= 850) & (body < 1350))) >= 0.6
