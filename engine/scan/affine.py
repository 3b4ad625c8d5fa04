"""Affines: 4 x 4 matrices from voxel indices to mm in RAS+, as formats and users give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.errors import InvalidInput

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])

# Without an affine an array is taken as slices x rows x columns, 1 mm apart, as the model's own volumes are: from
# inferior to superior, anterior to posterior, right to left.
ARRAY_AFFINE = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], float)


def usable(affine: np.ndarray) -> bool:
    """Whether a 4x4 matrix maps voxels to millimetres: finite, affine, and not flat."""
    if not (np.isfinite(affine).all() and np.array_equal(affine[3], [0, 0, 0, 1])):
        return False
    columns = affine[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    return bool(lengths.min() > 1e-6 and abs(np.linalg.det(columns / lengths)) > 1e-3)


def checked_affine(affine: object) -> np.ndarray:
    """An affine that a user gave, as float64 [4, 4]. Raises InvalidInput if it maps voxels nowhere."""
    try:
        matrix = np.array(affine, float)
    except Exception:  # an object that is no matrix raises whatever it likes when numpy asks it for numbers
        matrix = np.empty(0)
    if matrix.shape != (4, 4) or not usable(matrix):
        raise InvalidInput(
            "the affine must be a finite, invertible 4 x 4 matrix with last row 0 0 0 1, from voxel "
            "indices to mm in RAS+ (as nibabel's `image.affine`)"
        )
    return matrix


def affine_of(name: str, axes: Sequence[Sequence[float]], origin: Sequence[float], world: np.ndarray) -> np.ndarray:
    """The affine of a file, from what its header says.

    Args:
        name: of the format, for the error.
        axes: for each array axis the step from one voxel to the next, in the file's own space.
        origin: where the centre of the first voxel lies, in the same space.
        world: [4, 4], from the file's space to RAS+ mm.

    Raises:
        InvalidInput: the axes are missing, not finite or lie in one plane.
    """
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(axes, float).T
    matrix[:3, 3] = origin
    with np.errstate(all="ignore"):  # what comes out is looked at
        matrix = world @ matrix
    if not usable(matrix):
        raise InvalidInput(
            f"the {name} header has an orientation or voxel sizes that cannot be: the steps along its axes are "
            f"{', '.join(str(tuple(float(x) for x in axis)) for axis in axes)} from {tuple(float(x) for x in origin)}; "
            f"set them before sending the scan"
        )
    return matrix
