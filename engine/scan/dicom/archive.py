"""The files of a zip in memory, within limits."""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator

from engine.errors import InvalidInput, one_line
from engine.scan.limits import Limits

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
)


def members(data: memoryview, limits: Limits) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the zip's files, one after the other.

    Never more than the declared size of a member is decompressed: a zip bomb that lies about it is a damaged file.

    Raises:
        InvalidInput: the zip is damaged or encrypted, or has more files or bytes than `limits` allow.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = [info for info in archive.infolist() if not info.is_dir()]
            if len(found) > limits.max_files:
                raise InvalidInput(
                    f"the folder or zip has {len(found):,} files, over this server's "
                    f"limit of {limits.max_files:,} (Limits.max_files): send one series only"
                )
            limits.check_bytes(sum(info.file_size for info in found), "the folder or unpacked zip")
            for info in found:
                with archive.open(info) as member:
                    content = member.read(info.file_size)
                yield info.filename, content
    except _DAMAGE as error:
        raise InvalidInput(
            f"the zip is damaged, encrypted or of an unknown kind ({one_line(error)}): zip the series again"
        ) from None
