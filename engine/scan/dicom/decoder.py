"""Decoding of compressed frames, in a process of its own.

imagecodecs decodes (libjpeg-turbo, CharLS, OpenJPEG), and pydicom does RLE. Not GDCM, pydicom's usual plugin:
python-gdcm 3.2.6 aborts or crashes on damaged frames and on valid ones of 7 bits; it has no JPEG Extended of 12 bits by
pydicom; and its libraries replace zlib in every process that imports pydicom or nibabel
(`import gdcm, gzip; gzip.compress(b"x")` ends in "double free or corruption").
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np

from engine.errors import Unavailable

_SCRIPT = Path(__file__).with_name("decoder_process.py")
# Of the environment; no secrets. Windows needs SYSTEMROOT to start a Python.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_ALL", "SYSTEMROOT")


class DecodingFailed(Exception):
    """A frame could not be decoded; the message says why."""


class Decoder:
    """Decodes frames one at a time; a context manager, whose process starts with the first frame.

    Decoders are native code. Damaged frames make them abort or overrun memory: no upload may do that to a server.

    seconds: for one frame; then the process is killed. On Linux its memory is bounded, too.
    """

    def __init__(self, seconds: float = 60.0):
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def decode(self, frame: bytes, *, family: str, rows: int, columns: int, allocated: int) -> np.ndarray:
        """The samples [rows, columns] of one frame, in cells of the decoder's choice.

        Args:
            frame: one frame's codestream.
            family: jpeg, jpeg-ls, jpeg 2000 or rle.
            rows, columns, allocated: size in pixels, and bits of a cell in the data set (used by rle).

        Raises:
            DecodingFailed: the decoder refused the frame, died of it, or took too long.
            Unavailable: the decoder is not installed.
        """
        process = self._running()
        request = json.dumps({"family": family, "rows": rows, "columns": columns, "bits_allocated": allocated}).encode()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            send(cast(IO[bytes], process.stdin), request, frame)
            answer, pixels = receive(cast(IO[bytes], process.stdout))
        except (OSError, EOFError):
            code = process.wait()
            self.__exit__(None, None, None)
            raise DecodingFailed(
                f"decoding one frame took longer than {self._seconds:g} s" if late.is_set() else _end(code)
            ) from None
        finally:
            timer.cancel()
        found = json.loads(answer)
        if package := found.get("missing"):
            raise Unavailable(
                f"compressed DICOM cannot be decoded here, {package} is not installed: pip install 'm3d-engine[dicom]'"
            )
        if cause := found.get("error"):
            # What a damaged frame left in the libraries must not reach the next one.
            self.__exit__(None, None, None)
            raise DecodingFailed(cause)
        if found["shape"] != [rows, columns]:
            raise DecodingFailed(f"pixels of the shape {found['shape']} came out, not {rows} x {columns}")
        return np.frombuffer(pixels, found["dtype"]).reshape(rows, columns)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, str(_SCRIPT)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            except (OSError, ValueError) as error:
                raise DecodingFailed(f"the decoder's process does not start: {error}") from None
        return self._process


def send(stream: IO[bytes], head: bytes, body: Any) -> None:
    """One message to the other process: the lengths of its two parts, and the parts."""
    stream.write(struct.pack(">QQ", len(head), len(body)))
    stream.write(head)
    stream.write(body)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """One message of the other process. Raises EOFError if there is none, or not all of it."""
    lengths = _exactly(stream, 16)
    head, body = struct.unpack(">QQ", lengths)
    return _exactly(stream, head), _exactly(stream, body)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _end(code: int) -> str:
    if code < 0:
        return f"the decoder died of it ({signal.Signals(-code).name}): the frame is damaged"
    return f"the decoder's process ended with {code}"
