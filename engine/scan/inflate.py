"""Reads compressed bytes that are not trusted, only as far as they are wanted."""

from __future__ import annotations

import numpy as np
from isal import isal_zlib  # zlib's interface, at least twice as fast: gunzip is most of the time a large CT takes

from engine.errors import InvalidInput

_CHUNK = 1 << 20
_FEED, _MOST_FEED = 1 << 10, 1 << 16  # small at first: a file may consist of millions of tiny members
_GZIP_OR_ZLIB = 47  # zlib's window bits for either


class Inflate:
    """A gzip stream (one or more members, zeros between and behind them) or a zlib stream, read piece by piece.

    name: what it is, for errors. position: where in `data` it starts.
    """

    def __init__(self, data: memoryview, name: str = "the gzip stream", position: int = 0):
        self._data, self._name, self._position = data, name, position
        self._is_gzip = bytes(data[position : position + 2]) == b"\x1f\x8b"
        self._ended = False  # whether the last member was read
        self._inflate, self._tail, self._feed = _member(), b"", _FEED

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end of the stream. Raises InvalidInput if it is cut off or damaged."""
        pieces, missing = [], size
        while missing:
            if self._inflate.eof and not self._next_member():
                break
            compressed = self._tail or self._take()
            if not compressed:
                raise InvalidInput(f"{self._name} is truncated: the file was cut off, copy or compress it again")
            try:
                piece = self._inflate.decompress(compressed, missing)
            except isal_zlib.error as error:  # type: ignore[misc]  # to its stub an instance, no class
                raise InvalidInput(f"{self._name} is damaged ({error}): copy or compress the file again") from None
            self._tail = self._inflate.unconsumed_tail
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def fill(self, size: int, head: bytes = b"") -> memoryview:
        """`head` and what follows it, up to `size` bytes in all; fewer if the stream ends before.

        Reads as far as the checksum if the stream ends there. `size` must have been checked against the limits.
        """
        head = head[:size]  # a tiny scan may be followed by something else
        buffer = np.empty(size, np.uint8)
        buffer[: len(head)] = np.frombuffer(head, np.uint8)
        filled = len(head)
        while filled < size and (piece := self.read(min(_CHUNK, size - filled))):
            buffer[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
            filled += len(piece)
        self.read(1)
        return buffer.data[:filled]

    def _next_member(self) -> bool:
        """Whether another gzip member follows; zeros before it are skipped, as gzip and tape blocks pad with them."""
        if self._ended or not self._is_gzip:
            return False
        self._position -= len(self._inflate.unused_data)
        size = _FEED
        while (piece := bytes(self._data[self._position : self._position + size])) and not piece.strip(b"\0"):
            self._position += len(piece)
            size = min(2 * size, _CHUNK)
        self._position += len(piece) - len(piece.lstrip(b"\0"))
        self._ended = bytes(self._data[self._position : self._position + 2]) != b"\x1f\x8b"
        if not self._ended:
            self._inflate, self._tail, self._feed = _member(), b"", _FEED
        return not self._ended

    def _take(self) -> bytes:
        piece = bytes(self._data[self._position : self._position + self._feed])
        self._position += len(piece)
        self._feed = min(2 * self._feed, _MOST_FEED)
        return piece


def _member():
    return isal_zlib.decompressobj(wbits=_GZIP_OR_ZLIB)
