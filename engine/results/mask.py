"""A mask as a NIfTI file that lies where its scan does, in every reader."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol

import nibabel as nib
import numpy as np
from isal import igzip

from engine.errors import InvalidInput
from engine.scan.affine import usable
from engine.scan.nifti import header_class, millimetres

NIFTI1_AXIS = (1 << 15) - 1  # voxels along an axis of a NIfTI-1 file at most
SCANNER = 1  # NIFTI_XFORM_SCANNER_ANAT
PLACE = (
    "pixdim",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
)
ROWS = ("srow_x", "srow_y", "srow_z")
SHEARED = 1e-4  # cosine between two axes of a grid that no quaternion describes


class Placed(Protocol):
    """What says where voxels lie: a `Scan`, or a `Segmentation`. header: of the NIfTI file, see `Scan.header`."""

    @property
    def affine(self) -> np.ndarray: ...

    @property
    def header(self) -> bytes | None: ...


def save_mask(mask: np.ndarray, scan: Placed, path: str | os.PathLike) -> Path:
    """Write a mask as NIfTI, uint8, 0 and 1.

    Args:
        mask: bool or 0/1, 3 axes, the scan's own shape and axis order.
        scan: what `read_scan` returned for the scan, or anything with its affine and header.
        path: a file name that ends with .nii or .nii.gz.

    Returns:
        The path. The file has the qform, sform, codes, units and voxel sizes of the scan's NIfTI header. For a scan
        without one (DICOM, arrays) the sform is its affine, and the qform the nearest one without shear, so that
        readers of ITK open the mask of a tilted series. An axis over 32,767 voxels makes it a NIfTI-2 file.

    Raises:
        InvalidInput: the mask has not 3 axes, or the path another ending, or cannot be written.

    Source: nifti1.h, nifti2.h.
    """
    try:
        path = Path(path)
    except TypeError as error:
        raise InvalidInput(f"a path to a .nii or .nii.gz file is wanted ({error})") from None
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InvalidInput(f"a mask is saved as .nii or .nii.gz, not as {path.name!r}")
    data = mask_bytes(mask, scan)
    try:
        path.write_bytes(igzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}") from None
    return path


def mask_bytes(mask: np.ndarray, scan: Placed) -> bytes:
    """What `save_mask` writes into a .nii file. Raises InvalidInput for a mask that has not the scan's shape."""
    mask = np.asarray(mask)
    if mask.ndim != 3:
        raise InvalidInput(f"a mask has the 3 axes of its scan, not {mask.ndim}")
    if mask.dtype != bool and (mask.dtype.kind not in "iuf" or not ((mask == 0) | (mask == 1)).all()):
        raise InvalidInput("a mask holds 0 and 1 only: compare probabilities with their threshold first")
    if not hasattr(scan, "affine") or not hasattr(scan, "header"):
        raise InvalidInput(f"what `read_scan` returned for the mask's scan is wanted, not {type(scan).__name__}")
    of_scan = getattr(scan, "array", mask).shape
    if mask.shape != of_scan:
        raise InvalidInput(
            f"the mask has shape {mask.shape}, its scan {of_scan}: masks have the scan's axes in its order"
        )
    header = mask_header(mask.shape, scan)
    voxels = np.asfortranarray(mask.astype(bool)).view(np.uint8)
    return bytes(header.binaryblock) + bytes(4) + voxels.tobytes(order="F")


def mask_header(shape: tuple[int, ...], scan: Placed) -> nib.Nifti1Header:
    """The header of a uint8 NIfTI file of this shape that lies where the scan does, little-endian."""
    source = None if scan.header is None else _read(scan.header)
    large = max(shape) > NIFTI1_AXIS or isinstance(source, nib.Nifti2Header)
    header = (nib.Nifti2Header if large else nib.Nifti1Header)(endianness="<")
    header["magic"] = b"n+2" if large else b"n+1"
    header["vox_offset"] = header.sizeof_hdr + 4
    header.set_data_dtype(np.uint8)
    header["dim"] = [3, *shape, 1, 1, 1, 1]
    if source is None:
        header.set_xyzt_units("mm")
        header.set_sform(scan.affine, SCANNER)
        header.set_qform(scan.affine, SCANNER, strip_shears=True)
        return header
    header["xyzt_units"] = int(source["xyzt_units"]) & 7  # that of length
    for name in (*PLACE, *ROWS):
        header[name] = source[name]
    header["pixdim"][4:] = 1
    if source["sform_code"] and not usable(source.get_sform()):
        # The scan's place is its qform's: an sform that puts voxels nowhere would put the mask there.
        header.set_sform(_in_unit(scan.affine, source), int(source["sform_code"]))
    elif not source["qform_code"] and source["sform_code"] and _is_sheared(source.get_sform()):
        header.set_qform(source.get_sform(), int(source["sform_code"]), strip_shears=True)
    parts = [float(source[f"quatern_{name}"]) for name in "bcd"]
    if source["qform_code"] and (length := math.hypot(*parts)) > 1:
        # A rounding above unit length: nibabel refuses to read it. Beside an sform it is exact in every reader.
        for name, part in zip("bcd", parts):
            header[f"quatern_{name}"] = part / length
        if not source["sform_code"]:
            header.set_sform(_in_unit(scan.affine, source), int(source["qform_code"]))
    return header


def _in_unit(affine: np.ndarray, source: nib.Nifti1Header) -> np.ndarray:
    """An affine in mm in the header's unit of length."""
    scale = 1 / millimetres(source)
    return np.diag([scale, scale, scale, 1]) @ affine


def _read(header: bytes) -> nib.Nifti1Header:
    kind = header_class(header[:4]) if len(header) >= 348 else None
    if kind is None:
        raise InvalidInput(f"{len(header)} bytes are no NIfTI header")
    return kind(header[: kind.template_dtype.itemsize], check=False)


def _is_sheared(affine: np.ndarray) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > SHEARED)
