"""What is missing or broken, before anything runs: every sample's files are looked at.

Of .npy files the header and the length, of NIfTI files, whose end may be cut off or spoilt in the compression, all.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel
import numpy as np
from nibabel.openers import ImageOpener

from benchmarks.bench.samples import Sample, is_nifti, words_of
from engine.errors import InvalidInput
from training.data.reading import ABSENT
from training.data.sample import BrokenSample

MOST_BROKEN = 0.01  # share of a task's samples
_SHOWN = 10
_PART = 1 << 20  # bytes


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be asked about. path: the file; cause: what is wrong with it."""

    key: str
    path: str
    cause: str


@dataclass(frozen=True)
class Checked:
    """The samples of a task that can be asked about, and those that cannot."""

    task: str
    samples: tuple[Sample, ...]
    broken: tuple[Broken, ...]

    @cached_property
    def causes(self) -> Counter:
        """How many samples are broken, by cause."""
        return Counter(broken.cause for broken in self.broken)

    def refuse(self, most: float = MOST_BROKEN) -> None:
        """Raises InvalidInput, with files and causes, if more than this share is broken."""
        total = len(self.samples) + len(self.broken)
        if len(self.broken) <= most * total:
            return
        raise InvalidInput(
            f"{len(self.broken)} of {total} samples of {self.task} are broken, and at most {most:.1%} may be "
            f"(--broken-share):\n{self.words()}"
        )

    def words(self) -> str:
        """The causes with their counts, and the first files."""
        lines = [f"  {count} x {cause}" for cause, count in self.causes.most_common(_SHOWN)]
        lines += [f"  {broken.path}: {broken.cause}" for broken in self.broken[:_SHOWN]]
        if len(self.broken) > _SHOWN:
            lines.append(f"  ... and {len(self.broken) - _SHOWN} more")
        return "\n".join(lines)


def check(task: str, samples: Sequence[Sample]) -> Checked:
    """Look at the files of all samples, each file once."""
    look = _Look()
    good, broken = [], []
    for sample in samples:
        try:
            look(sample)
            good.append(sample)
        except BrokenSample as error:
            broken.append(Broken(sample.key, " and ".join(error.paths), error.cause))
    return Checked(task, tuple(good), tuple(broken))


class _Look:
    """Raises BrokenSample for a sample that cannot be asked about."""

    def __init__(self):
        self._images: dict[Path, tuple[int, ...] | BrokenSample] = {}

    def __call__(self, sample: Sample) -> None:
        if sample.broken:
            raise sample.broken
        shape = self._image(sample)
        if sample.structure is None:  # the words about a structure depend on its mask
            words_of(sample)
        if sample.mask is None:
            return
        found = stored_shape(sample.mask)
        if found != shape and not (found == ABSENT and sample.label is None):
            raise BrokenSample(sample.mask, f"the mask has shape {found}, its image {shape}")

    def _image(self, sample: Sample) -> tuple[int, ...]:
        if sample.image not in self._images:
            try:
                shape = stored_shape(sample.image)
                if not is_nifti(sample.image) and (len(shape) != 4 or shape[0] != 1):
                    raise BrokenSample(sample.image, f"the image has shape {shape}, wanted is 1 x D x H x W")
                self._images[sample.image] = shape
            except BrokenSample as error:
                self._images[sample.image] = error
        found = self._images[sample.image]
        if isinstance(found, BrokenSample):
            raise found
        return found


def stored_shape(path: Path) -> tuple[int, ...]:
    """The shape that a file's header says, of which the file has all bytes. Raises BrokenSample."""
    try:
        if is_nifti(path):
            return _whole_nifti(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BrokenSample(path, "is missing") from None
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        kind = "NIfTI" if is_nifti(path) else ".npy"
        raise BrokenSample(path, f"is not a whole {kind} file ({type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise BrokenSample(path, "is not one .npy array of real numbers")
    return array.shape


def _whole_nifti(path: Path) -> tuple[int, ...]:
    """The shape of a NIfTI file. It is read to its end, in parts: memory for a whole scan is not needed."""
    stored = nibabel.load(path).dataobj
    count = 0
    with ImageOpener(path) as file:
        while part := file.read(_PART):
            count += len(part)
    if count < (wanted := stored.offset + math.prod(stored.shape) * stored.dtype.itemsize):
        raise EOFError(f"{count} of {wanted} bytes")
    return tuple(stored.shape)
