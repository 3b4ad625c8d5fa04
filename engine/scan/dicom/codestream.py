"""What a compressed frame says of itself, read before a decoder trusts it."""

from __future__ import annotations

from dataclasses import dataclass

_START, _END = b"\xff\xd8", b"\xff\xd9"
# Start of frame: SOF0 to SOF15 without DHT, JPG and DAC, and JPEG-LS's SOF55.
_FRAMES = frozenset((*range(0xC0, 0xD0), 0xF7)) - {0xC4, 0xC8, 0xCC}
_JPEG_2000 = b"\xff\x4f\xff\x51"  # SOC, and SIZ behind it
_BOXES = 1 << 12  # JP2 boxes in front of a codestream, which DICOM forbids and some files have


@dataclass(frozen=True)
class Header:
    """Size in pixels, number of colour components, bits of a sample, and whether it says that samples are signed."""

    rows: int
    columns: int
    components: int
    precision: int
    signed: bool = False


def jpeg_header(frame: bytes) -> Header:
    """The header of a JPEG or JPEG-LS frame, which must reach to its end marker.

    Raises:
        ValueError: it is none, or was cut off.
    Source: ISO/IEC 10918-1 annex B, ISO/IEC 14495-1 annex C.
    """
    if frame[:2] != _START:
        raise ValueError("it does not start as JPEG")
    if frame.rstrip(b"\0")[-2:] != _END:  # a frame of odd length is padded
        raise ValueError("it ends before its end marker: it was cut off")
    position = 2
    while position + 10 <= len(frame):
        if frame[position] != 0xFF:
            break
        marker = frame[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _FRAMES:
            precision, rows, columns, components = (
                frame[position + 4],
                int.from_bytes(frame[position + 5 : position + 7], "big"),
                int.from_bytes(frame[position + 7 : position + 9], "big"),
                frame[position + 9],
            )
            return Header(rows, columns, components, precision)
        else:
            position += 2 + max(2, int.from_bytes(frame[position + 2 : position + 4], "big"))
    raise ValueError("it has no start of frame")


def jpeg2000_header(frame: bytes) -> Header:
    """The header of a JPEG 2000 frame.

    Raises:
        ValueError: it has none.
    Source: ISO/IEC 15444-1 A.5.1.
    """
    start = frame.find(_JPEG_2000, 0, _BOXES)
    size = frame[start + 8 : start + 43]
    if start < 0 or len(size) < 35:
        raise ValueError("it has no JPEG 2000 header")
    right, bottom, left, top = (int.from_bytes(size[at : at + 4], "big") for at in (0, 4, 8, 12))
    components, sample = int.from_bytes(size[32:34], "big"), size[34]
    return Header(bottom - top, right - left, components, (sample & 0x7F) + 1, bool(sample & 0x80))
