"""Images that other people's libraries make, and what those say of them: what our readers are compared with."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import SimpleITK as sitk

SHAPE, SPACING, ORIGIN = (6, 5, 4), (0.7, 1.3, 2.9), (-31.5, 12.25, 104.0)


def _turned(angles) -> np.ndarray:
    return nib.eulerangles.euler2mat(*angles)


# All 48 ways in which axes can lie along the patient's, mirrored ones among them; and two oblique ones.
STRAIGHT = [
    np.diag(signs)[:, list(axes)].astype(float)
    for axes in permutations(range(3))
    for signs in product((1, -1), repeat=3)
]
DIRECTIONS = [*STRAIGHT, _turned((0.3, -0.2, 0.1)), _turned((-1.1, 0.4, 2.0)) @ np.diag([1, -1, 1])]
DTYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64)


def voxels(dtype=np.int16, shape=SHAPE) -> np.ndarray:
    """[i, j, k], no two axes alike."""
    return (np.random.default_rng(0).permutation(int(np.prod(shape))) % 120).reshape(shape).astype(dtype)


def itk_image(dtype=np.int16, direction=DIRECTIONS[-1]) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels(dtype).T))
    image.SetDirection(np.ravel(direction).tolist())
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    return image


def assert_as_itk(scan, image: sitk.Image) -> None:
    """The same value at each index, and each corner of the volume within 0.01 mm of where ITK has it."""
    np.testing.assert_array_equal(scan.array + scan.offset, sitk.GetArrayFromImage(image).T)
    for index in product(*((0, n - 1) for n in image.GetSize())):
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(scan.affine @ [*index, 1], [-x, -y, z, 1], atol=0.01)


def assert_as_nibabel(scan, image) -> None:
    np.testing.assert_array_equal(scan.array + scan.offset, np.asanyarray(image.dataobj).reshape(scan.array.shape))
    np.testing.assert_allclose(scan.affine, image.affine, atol=0.001)
