"""Reads NIfTI-1 and NIfTI-2 from bytes that are not trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import nibabel as nib
import numpy as np

from engine.errors import InvalidInput
from engine.scan.affine import usable
from engine.scan.limits import Limits
from engine.scan.npy import without_frames
from engine.scan.parts import Volume
from engine.scan.voxels import raw_voxels

_MAX_HEADER = 16 << 20  # header and extensions in front of the voxels
_HEADERS = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of the unit of length
_STEP = 0.01  # of a stored step: rounding beyond it costs contrast
_HALF_TURN = 1e-7  # below it, a squared is a rounding of 0, as in nifti1_io.c: a half turn
_ROUNDING = 1e-3  # of a quaternion's squared length; a header has four digits at least


def header_class(head: bytes) -> type[nib.Nifti1Header] | None:
    """nibabel's header class if `head` (4 bytes or more) can be the start of a NIfTI file, of either byte order."""
    for order in ("little", "big"):
        if found := _HEADERS.get(int.from_bytes(head[:4], order)):
            return found
    return None


def is_nifti(head: bytes) -> bool:
    """Whether `head` (the first 540 bytes, or all there are) can be the start of a NIfTI file."""
    return len(head) >= 348 and header_class(head) is not None


def nifti_size(head: bytes, limits: Limits) -> int:
    """Bytes up to the end of the voxels. Raises InvalidInput for what is not one volume within the limits."""
    header = _header(head[:540])
    return _offset(header) + math.prod(_shape(header, limits)) * header.get_data_dtype().itemsize


def read_nifti(data: memoryview, limits: Limits) -> Volume:
    """The volume in an uncompressed file, with slope and intercept applied."""
    header = _header(bytes(data[:540]))
    shape = _shape(header, limits)
    dtype = header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf":
        raise InvalidInput(
            f"the NIfTI file holds {header.get_value_label('datatype')} values; one real number a voxel "
            f"is wanted: convert colour or complex images to grey values first"
        )
    offset = _offset(header)
    array = raw_voxels("NIfTI", data, offset, dtype, shape)
    slope, intercept = header.get_slope_inter()
    where = orientation(header)
    notes = (where.guess,) if where.guess else ()
    return Volume(rescale(array, slope or 1.0, intercept or 0.0), where.affine, geometry_header(header), notes)


def rescale(array: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """slope * array + intercept.

    Whole numbers stay whole where they fit 16 bits; else float32, or float64 where it rounds.
    """
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise InvalidInput(f"the intensity scaling (slope {slope}, intercept {intercept}) is not finite")
    if (slope, intercept) == (1, 0):
        return array
    if slope == 1 and intercept == int(intercept) and array.dtype.kind in "iu" and array.dtype.itemsize <= 2:
        low, high = int(array.min()) + intercept, int(array.max()) + intercept
        if low >= -(1 << 15) and high < 1 << 15:
            # Wraps around in 16 bits on the way and comes out right, as the result fits.
            return np.add(array.astype(np.int16), np.array(int(intercept) & 0xFFFF, np.uint16).view(np.int16))
    # Far from 0, float32 would blur the contrast: `read_scan` takes the offset off before it rounds.
    blurred = np.spacing(np.float32(min(abs(intercept), 1e30))) > _STEP * abs(slope)
    wide = blurred or array.dtype.itemsize > 4 or (array.dtype.kind in "iu" and array.dtype.itemsize == 4)
    scaled: np.ndarray = array.astype(np.float64 if wide else np.float32)
    scaled *= slope
    scaled += intercept
    return scaled


def _header(head: bytes) -> nib.Nifti1Header:
    kind = cast(type[nib.Nifti1Header], header_class(head))  # whoever calls this has looked
    try:
        header = kind(head[: kind.template_dtype.itemsize], check=False)
        if header["magic"].item().rstrip(b"\0")[:2] not in (b"n+", b"n\0"):
            raise InvalidInput(
                "the file is the header of an Analyze or two-file NIfTI image, without voxels: convert "
                "it to one .nii or .nii.gz file"
            )
        header.get_data_dtype(), header.get_data_offset(), header.get_slope_inter()
        return header
    except (
        nib.spatialimages.HeaderDataError,
        nib.wrapstruct.WrapStructError,
        KeyError,
        ValueError,
        OverflowError,
    ) as error:
        raise InvalidInput(f"the NIfTI header is damaged ({error})") from None


def _shape(header: nib.Nifti1Header, limits: Limits) -> tuple[int, ...]:
    try:
        shape = without_frames(tuple(int(n) for n in header.get_data_shape()))
    except nib.spatialimages.HeaderDataError as error:
        raise InvalidInput(f"the NIfTI header is damaged ({error})") from None
    if any(n < 0 for n in shape):
        raise InvalidInput(f"the NIfTI header has negative sizes {shape}: it is damaged")
    limits.check_shape(shape)
    return shape


def _offset(header: nib.Nifti1Header) -> int:
    offset = int(header.get_data_offset())
    if not header.sizeof_hdr <= offset <= _MAX_HEADER:
        raise InvalidInput(
            f"the NIfTI header is damaged: it puts the voxels at byte {offset}, expected "
            f"{header.sizeof_hdr} to {_MAX_HEADER:,}"
        )
    return offset


@dataclass(frozen=True)
class Orientation:
    """Where a NIfTI's voxels lie. affine: float64 [4, 4], voxel indices to mm, RAS+. guess: what of it the header does
    not say, a sentence; None if it says all."""

    affine: np.ndarray
    guess: str | None = None


def orientation(header: nib.Nifti1Header) -> Orientation:
    """The sform if set and usable, else the qform, in mm; voxel sizes alone, said to be a guess, if neither is set.

    Raises InvalidInput, with the cause, for an orientation that is set and cannot be read: it never becomes a default.
    Source: nifti1.h, methods 1 to 3.
    """
    unit = millimetres(header)
    codes = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    if wrong := [f"{name}_code is {code}" for name, code in codes.items() if code < 0]:
        raise InvalidInput(f"the NIfTI header is damaged: {' and '.join(wrong)}; set the orientation before sending it")
    causes = []
    for name, read in (("sform", _sform), ("qform", _qform)):
        if codes[name]:
            try:
                return Orientation(_scaled(read(header), unit), _disputed(header) if name == "qform" else None)
            except ValueError as error:
                causes.append(f"the {name} {error}")
    if causes:
        raise InvalidInput(
            f"the NIfTI header has an orientation that cannot be read: {', and '.join(causes)}; set it anew, for "
            "example with nibabel's set_sform, before sending the scan"
        )
    base = header.get_base_affine()
    if not usable(base):
        raise InvalidInput(
            "the NIfTI header has no orientation, and its voxel sizes are missing or not finite; set them, for example "
            "with nibabel, before sending the scan"
        )
    return Orientation(
        _scaled(base, unit),
        "the file has no orientation (sform_code and qform_code are 0): that its axes run to the patient's left, front "
        "and head is a guess, left and right with it",
    )


def _disputed(header: nib.Nifti1Header) -> str | None:
    """What readers make different things of: nifti1.h forbids it, ITK turns the axis round, nibabel does not."""
    qfac, *sizes = np.array(header["pixdim"][:4], float)
    if min(sizes) >= 0 and (qfac >= 0 or qfac == -1):
        return None
    return (
        f"the qform has {'a negative voxel size' if min(sizes) < 0 else f'qfac {qfac:g}'}, which readers take in "
        "different ways: it is read as SimpleITK reads it, and which side is left is a guess"
    )


def millimetres(header: nib.Nifti1Header) -> float:
    """Millimetres in the header's unit of length; none given counts as mm, as everywhere."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in _MILLIMETRES:
        raise InvalidInput(f"the NIfTI header is damaged: {unit} is no unit of length (1 metre, 2 mm, 3 micron)")
    return _MILLIMETRES[unit]


def _sform(header: nib.Nifti1Header) -> np.ndarray:
    """Raises ValueError for one that puts voxels nowhere."""
    affine = header.get_sform()
    if not usable(affine):
        raise ValueError("is singular or not finite")
    return affine


def _qform(header: nib.Nifti1Header) -> np.ndarray:
    """As nifti1.h and SimpleITK read it: qfac is -1 below 0, else 1; a rounding above unit length has a = 0; an axis
    with a negative voxel size runs backwards. Raises ValueError for what is no rotation, or has no voxel sizes.
    """
    quaternion = np.array([header[f"quatern_{name}"] for name in "bcd"], float)
    offset = np.array([header[f"qoffset_{name}"] for name in "xyz"], float)
    qfac, *sizes = np.array(header["pixdim"][:4], float)
    for name, values in (
        ("quaternion", quaternion),
        ("offset", offset),
        ("qfac (pixdim[0])", qfac),
        ("voxel sizes", sizes),
    ):
        if not np.isfinite(values).all():
            raise ValueError(f"has a {name} that is not finite ({np.array2string(np.asarray(values), separator=', ')})")
    if not all(sizes):
        raise ValueError(f"has a voxel size of 0 (pixdim {sizes[0]:g}, {sizes[1]:g}, {sizes[2]:g})")
    length = float(quaternion @ quaternion)
    if length > 1 + _ROUNDING:
        raise ValueError(f"has a quaternion of length {math.sqrt(length):.4g}, which is no rotation")
    if length > 1 - _HALF_TURN:
        quaternion = quaternion / math.sqrt(length)
    affine = np.eye(4)
    whole = [math.sqrt(max(0.0, 1 - float(quaternion @ quaternion))), *quaternion]
    affine[:3, :3] = nib.quaternions.quat2mat(whole) * [sizes[0], sizes[1], sizes[2] * (-1 if qfac < 0 else 1)]
    affine[:3, 3] = offset
    if not usable(affine):
        raise ValueError("is singular")
    return affine


def _scaled(affine: np.ndarray, unit: float) -> np.ndarray:
    return np.diag([unit, unit, unit, 1]) @ np.asarray(affine, float)


def geometry_header(header: nib.Nifti1Header) -> bytes:
    """The header's bytes without what may name a patient or a place: all its texts, and that extensions follow."""
    kept = header.copy()
    for name, (dtype, *_) in kept.template_dtype.fields.items():
        if dtype.kind == "S" and name != "magic":
            kept[name] = b""
    return bytes(kept.binaryblock)
