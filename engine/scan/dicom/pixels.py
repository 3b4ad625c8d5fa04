"""The stored values of an image's frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from engine.errors import InvalidInput, one_line
from engine.scan.dicom.codestream import jpeg2000_header, jpeg_header
from engine.scan.dicom.dataset import CONVERT
from engine.scan.dicom.decoder import Decoder, DecodingFailed

_LOSSY_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit)
_LOSSY = (*_LOSSY_JPEG, JPEGLSNearLossless, JPEG2000, HTJ2K)
_JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
_JPEG_2000 = (JPEG2000Lossless, JPEG2000, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K)
_FAMILIES = {
    **dict.fromkeys((*_LOSSY_JPEG, JPEGLossless, JPEGLosslessSV1), "jpeg"),
    **dict.fromkeys(_JPEG_LS, "jpeg-ls"),
    **dict.fromkeys(_JPEG_2000, "jpeg 2000"),
    RLELossless: "rle",
}
_DECOMPRESS = "decompress the series first, for example with dcmdjpeg, dcmdjpls or gdcmconv --raw"
_ALLOCATED = (8, 16, 32)
_OVERLAYS = range(0x6000, 0x6020, 2)


def stored_pixels(name: str, dataset: pydicom.Dataset, frames: int, decoder: Decoder) -> np.ndarray:
    """[frames, rows, columns] as stored, before any rescale; integers of 8, 16 or 32 bits.

    Raises:
        InvalidInput: the pixels are no grey values, are damaged, or are compressed in a way that is not read.
        Unavailable: they are compressed, and their decoder is not installed.
    Source: DICOM PS3.3 C.7.6.3, PS3.5 section 8.
    """
    _check_grey(name, dataset)
    _check_bits(name, dataset)
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax:
        raise InvalidInput(f"{name} has the transfer syntax {syntax}, which is not known here: {CONVERT}")
    if not syntax.is_compressed:
        pixels = _native(name, dataset, frames)
    elif syntax in _FAMILIES:
        pixels = _decoded(name, dataset, frames, decoder)
        if syntax in _LOSSY:
            return pixels  # may go beyond the stored bits by what the compression changed
    else:
        raise InvalidInput(f"the pixels of {name} are compressed as {syntax.name}, which is not read: {_DECOMPRESS}")
    return _stored_bits(name, dataset, pixels)


def _check_grey(name: str, dataset: pydicom.Dataset) -> None:
    colours = dataset.get("PhotometricInterpretation")
    if colours == "MONOCHROME1":
        raise InvalidInput(
            f"{name} is a MONOCHROME1 image: low values are the bright ones; slices whose high values "
            f"are bright (MONOCHROME2) are wanted: invert the series, or export it as MONOCHROME2"
        )
    if dataset.get("SamplesPerPixel", 1) != 1 or colours != "MONOCHROME2":
        raise InvalidInput(
            f"{name} is a {colours} image; slices in grey values (MONOCHROME2) are wanted: leave out "
            f"screenshots and secondary captures"
        )


def _check_bits(name: str, dataset: pydicom.Dataset) -> None:
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    high = int(dataset.get("HighBit", stored - 1))
    if allocated not in _ALLOCATED or not 0 < stored <= allocated or dataset.PixelRepresentation not in (0, 1):
        raise InvalidInput(
            f"{name} has BitsAllocated {allocated}, BitsStored {stored}, PixelRepresentation "
            f"{dataset.PixelRepresentation}; 8, 16 or 32 bits a pixel are read, signed or not: {CONVERT}"
        )
    if high != stored - 1:
        raise InvalidInput(
            f"{name} has HighBit {high} with BitsStored {stored}: values that do not start at the lowest bit, as only "
            f"retired forms of DICOM have them, are not read: {CONVERT}"
        )


def _native(name: str, dataset: pydicom.Dataset, frames: int) -> np.ndarray:
    options: dict[str, Any] = {"view_only": True, "correct_unused_bits": False}
    try:
        pixels, _ = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, **options)
        return pixels.reshape(frames, dataset.Rows, dataset.Columns)
    except Exception as error:
        raise InvalidInput(
            f"the pixels of {name} cannot be read ({one_line(error)}): the file is truncated or damaged, export or "
            f"copy it again"
        ) from None


def _decoded(name: str, dataset: pydicom.Dataset, frames: int, decoder: Decoder) -> np.ndarray:
    syntax, allocated = dataset.file_meta.TransferSyntaxUID, int(dataset.BitsAllocated)
    signed = bool(dataset.PixelRepresentation)
    if signed and syntax in _LOSSY_JPEG:
        raise InvalidInput(
            f"{name} has signed pixels compressed as {syntax.name}, which knows unsigned ones only (PS3.5 8.2.1): "
            f"values around 0 would be torn apart; send the series as it was before that compression"
        )
    pixels = np.empty((frames, dataset.Rows, dataset.Columns), f"{'i' if signed else 'u'}{allocated // 8}")
    count = 0
    try:
        for frame in generate_frames(dataset.PixelData, number_of_frames=frames, extended_offsets=_offsets(dataset)):
            if count == frames:
                raise ValueError(f"there are more than the {frames} frames that NumberOfFrames says")
            precision = _checked_precision(syntax, frame, dataset)
            samples = decoder.decode(
                frame, family=_FAMILIES[syntax], rows=dataset.Rows, columns=dataset.Columns, allocated=allocated
            )
            pixels[count] = _cells(samples, precision, allocated, signed)
            count += 1
        if count < frames:
            raise ValueError(f"there are {count} of {frames} frames")
    except (DecodingFailed, ValueError, IndexError) as error:
        raise InvalidInput(
            f"the pixels of {name} are compressed as {syntax.name}, and frame {count + 1} could not be decoded "
            f"({one_line(error)}): copy the file again, or {_DECOMPRESS}"
        ) from None
    return pixels


def _offsets(dataset: pydicom.Dataset) -> tuple[bytes, bytes] | None:
    if "ExtendedOffsetTable" not in dataset or "ExtendedOffsetTableLengths" not in dataset:
        return None
    return dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths


def _checked_precision(syntax: str, frame: bytes, dataset: pydicom.Dataset) -> int:
    """Bits of a sample in a frame. Raises ValueError unless the frame's own header is what the data set says."""
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if syntax == RLELossless:
        return allocated  # a frame has no header that says it
    header = (jpeg2000_header if syntax in _JPEG_2000 else jpeg_header)(frame)
    said = (dataset.Rows, dataset.Columns)
    if (header.rows, header.columns) != said:
        raise ValueError(
            f"it has {header.rows} x {header.columns} pixels, while Rows and Columns say {said[0]} x {said[1]}"
        )
    if header.components != 1:
        raise ValueError(f"it has {header.components} colours, one is wanted")
    # Which bit is the sign's, if the stream has fewer than the data set says?
    sign_unknown = dataset.PixelRepresentation == 1 and header.precision < stored and not header.signed
    if header.precision > allocated or sign_unknown:
        raise ValueError(
            f"its samples have {header.precision} bits, while BitsAllocated and BitsStored say {allocated} and {stored}"
        )
    return header.precision


def _cells(samples: np.ndarray, precision: int, allocated: int, signed: bool) -> np.ndarray:
    """Decoded samples in the data set's cells. JPEG and JPEG-LS know no sign: it is the top bit of `precision`."""
    if samples.dtype.kind == "i":
        if not signed and samples.min() < 0:
            raise ValueError("its samples are signed, while PixelRepresentation says that they are not")
        return samples.astype(f"{'i' if signed else 'u'}{allocated // 8}", copy=False)
    cells = samples.astype(f"u{allocated // 8}", copy=False)
    if not signed:
        return cells
    unused = allocated - precision
    return (cells << unused).view(f"i{allocated // 8}") >> unused


def _stored_bits(name: str, dataset: pydicom.Dataset, pixels: np.ndarray) -> np.ndarray:
    """The values in the stored bits alone: the bits above them are no part of a pixel (PS3.5 8.1.1)."""
    unused = int(dataset.BitsAllocated) - int(dataset.BitsStored)
    if not unused:
        return pixels
    values = pixels << unused
    values >>= unused  # repeats the sign
    above = pixels != values
    if not above.any():
        return pixels
    # Signed values with zeros above are what decoders and some scanners leave.
    zeros = (pixels[above] >> int(dataset.BitsStored)) == 0
    if zeros.all() or _has_overlay_in_pixels(dataset):
        return values
    raise InvalidInput(
        f"{name} has values beyond its {dataset.BitsStored} stored bits (BitsStored), such as {pixels[above][0]}: "
        f"either the values or BitsStored are wrong; export the series again"
    )


def _has_overlay_in_pixels(dataset: pydicom.Dataset) -> bool:
    """Whether an overlay lies in bits above the stored ones, as was allowed until 2004."""
    return any((group, 0x0102) in dataset and (group, 0x3000) not in dataset for group in _OVERLAYS)
