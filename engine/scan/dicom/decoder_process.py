"""The process that decodes compressed frames. `Decoder` runs this file as a script; the engine does not import it.

Messages in and out are those of decoder.py: in a JSON object (the frame's family, rows, columns, bits_allocated) and
the frame, out a JSON object (dtype and shape, or error, or the package that is missing) and the pixels.
"""

from __future__ import annotations

import sys

# Python put the script's folder there. The modules beside the script are no top-level modules. Python 3.10 lacks -P.
sys.path.pop(0)

import json
import os
import struct
from typing import Any

import numpy as np

try:
    import resource
except ImportError:  # Windows has no such limits: there `Decoder` bounds a frame by its time alone
    resource = None  # type: ignore[assignment]

# Of addresses, the libraries included: a frame that asks for more is refused, and the server keeps its memory.
_MEMORY = 4 << 30


def main() -> None:
    # Libraries print to standard output, too: that must not reach the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if resource:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's pixels
    if resource and sys.platform == "linux":  # macOS refuses that limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    while lengths := sys.stdin.buffer.read(16):
        head, body = struct.unpack(">QQ", lengths)
        request, frame = json.loads(sys.stdin.buffer.read(head)), sys.stdin.buffer.read(body)
        pixels = b""
        try:
            array = decoded(frame, **request)
            array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
            pixels, answer = array.tobytes(), {"dtype": array.dtype.str, "shape": array.shape}
        except ImportError:
            answer = {"missing": "imagecodecs"}
        except MemoryError:
            answer = {"error": f"it needs more than the {_MEMORY >> 30} GiB that a frame may take"}
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[-300:] or repr(error)}
        encoded = json.dumps(answer).encode()
        answers.write(struct.pack(">QQ", len(encoded), len(pixels)))
        answers.write(encoded)
        answers.write(pixels)
        answers.flush()


def decoded(frame: bytes, family: str, rows: int, columns: int, bits_allocated: int) -> np.ndarray:
    """The samples of a frame, in cells of the decoder's choice."""
    if family == "rle":
        return _rle(frame, rows, columns, bits_allocated)
    import imagecodecs

    decode = {
        "jpeg": imagecodecs.jpeg8_decode,  # lossless and 12 bits, too
        "jpeg-ls": imagecodecs.jpegls_decode,
        "jpeg 2000": imagecodecs.jpeg2k_decode,
    }[family]
    return decode(frame)


def _rle(frame: bytes, rows: int, columns: int, bits_allocated: int) -> np.ndarray:
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    options: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "bits_allocated": bits_allocated,
        "bits_stored": bits_allocated,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "pixel_representation": 0,
        "photometric_interpretation": "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }
    return get_decoder(RLELossless).as_array(encapsulate([frame]), decoding_plugin="pydicom", **options)[0]


if __name__ == "__main__":
    main()
