"""What image objects of other libraries hold: nibabel's and SimpleITK's, with their geometry."""

from __future__ import annotations

import sys
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import SpatialImage

from engine.errors import InvalidInput, one_line
from engine.scan.affine import LPS_TO_RAS, affine_of, checked_affine
from engine.scan.arrays import real_volume
from engine.scan.nifti import geometry_header
from engine.scan.npy import npy_pieces

Pieces = tuple[bytes | memoryview, ...]
_ITK_NUMBERS = [f"sitk{name}" for name in ("UInt8", "UInt16", "UInt32", "UInt64", "Int8", "Int16", "Int32", "Int64")]
_ITK_NUMBERS += ["sitkFloat32", "sitkFloat64"]
_ITK = ("GetSize", "GetSpacing", "GetOrigin", "GetDirection")


def is_image(source: object) -> bool:
    """Whether `source` is an image that brings its geometry: of nibabel, SimpleITK or ITK."""
    return isinstance(source, SpatialImage) or _is_itk(source)


def image_pieces(source: Any) -> tuple[Pieces, np.ndarray | None]:
    """(a file, affine or None if the file has its own) of an image. Raises InvalidInput for what is not one volume.

    A NIfTI image goes as NIfTI, with its values as they are stored and its header without free text; others as .npy.
    """
    if _is_itk(source):
        return _itk_pieces(source)
    try:
        if isinstance(source, nib.Nifti1Pair):
            return _nifti_pieces(source), None
        if type(source.header) is nib.AnalyzeHeader and np.allclose(source.affine, source.header.get_base_affine()):
            # An Analyze header has no orientation. As NIfTI without one, it comes with the note that it is a guess.
            return _nifti_pieces(source), None
        array = np.asanyarray(source.dataobj)
    except InvalidInput:
        raise
    except Exception as error:  # the file behind it is gone, truncated or damaged, or its header was changed
        raise InvalidInput(
            f"the {_name(source)} cannot be read ({one_line(error)}): save it, and hand over the path"
        ) from None
    affine = None if source.affine is None else checked_affine(source.affine)
    return npy_pieces(_one_volume(array, source)), affine


def _one_volume(array: np.ndarray, image: Any) -> np.ndarray:
    """The volume in an image's array: unlike in a plain array, its axes of space are the first three."""
    if array.ndim > 3 and set(array.shape[3:]) == {1}:
        array = array.reshape(array.shape[:3])
    return real_volume(array, f"the {_name(image)}", exactly=True)


def _nifti_pieces(image: Any) -> Pieces:
    """One NIfTI file. Its values are not scaled and stored anew, which would round them: `image.to_bytes` does."""
    given = image.header
    kind = nib.Nifti2Header if isinstance(given, nib.Nifti2Header) else nib.Nifti1Header
    if isinstance(given, nib.Nifti1Header):  # of a pair, or of one file
        header = kind(given.binaryblock, given.endianness, check=False)
    else:
        header = kind.from_header(given)
    proxy, slope, intercept = image.dataobj, 1.0, 0.0
    if isinstance(proxy, ArrayProxy):
        stored, slope, intercept = np.asanyarray(proxy.get_unscaled()), proxy.slope, proxy.inter
    else:
        stored = np.asanyarray(proxy)
    stored = _one_volume(stored, image)
    if stored.dtype.kind == "b" or stored.dtype == np.float16:  # NIfTI has neither
        stored = stored.astype(np.uint8 if stored.dtype.kind == "b" else np.float32)
    header.set_data_dtype(stored.dtype)
    header.set_data_shape(stored.shape)
    if image.affine is not None and not np.allclose(image.affine, header.get_best_affine()):
        header.set_sform(checked_affine(image.affine), code="aligned")  # as nibabel does when it saves
        header.set_qform(image.affine, code="unknown")
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = slope, intercept
    voxels = np.asfortranarray(stored, dtype=header.get_data_dtype())
    return geometry_header(header), bytes(4), voxels.T.data  # 4 bytes that say: no extensions


def _is_itk(source: object) -> bool:
    return all(callable(getattr(type(source), name, None)) for name in _ITK)


def _itk_pieces(image: Any) -> tuple[Pieces, np.ndarray]:
    sitk = sys.modules.get("SimpleITK")
    if sitk is None or not isinstance(image, sitk.Image):
        raise InvalidInput(
            f"a {_name(image)} is not read here: write it to a file and hand over the path, or hand over a SimpleITK "
            "image"
        )
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InvalidInput(
            f"the {_name(image)} has size {' x '.join(map(str, image.GetSize()))} with "
            f"{image.GetNumberOfComponentsPerPixel()} values a voxel; one volume of 3 axes with one value a voxel is "
            f"wanted: hand over one of a series, such as image[:, :, :, 0]"
        )
    if image.GetPixelID() not in (getattr(sitk, name, None) for name in _ITK_NUMBERS):
        # Asked for the values of a label map, SimpleITK ends the process.
        raise InvalidInput(
            f"the {_name(image)} holds {image.GetPixelIDTypeAsString()} values; real numbers are wanted: convert it, "
            f"for example with SimpleITK.Cast or SimpleITK.LabelMapToLabel"
        )
    array = sitk.GetArrayFromImage(image)  # a copy: a view would not keep the image's memory alive
    array = real_volume(array, f"the {_name(image)}").T
    steps = (np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()).T
    return npy_pieces(array), affine_of("SimpleITK image's", steps.tolist(), image.GetOrigin(), LPS_TO_RAS)


def _name(source: object) -> str:
    return f"{type(source).__module__.partition('.')[0]} {type(source).__name__}"
