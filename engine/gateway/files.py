"""Files that clients upload, and masks that wait to be fetched: on disk, without a name, for a bounded time.

A file is an anonymous temporary one: it has no path that a request could reach, and is gone with the process, whatever
ends it. It lies in the folder for temporary files (TMPDIR).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from engine.gateway.refusal import Refusal, gone
from engine.gateway.settings import MB, GatewaySettings

MASK_PURPOSE = "assistants_output"  # OpenAI's word for files that can be fetched
_NAME_CHARACTERS = 200


class Content:
    """What is in an anonymous file, as `M3D.upload` takes it: read by mapping it, so that it is not in memory twice.

    It is not handed over as bytes: those are looked at as a path first, and as no path, as it has none.
    """

    def __init__(self, file: IO[bytes]):
        file.flush()
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self) -> memoryview:
        """Raises Refusal (410) for a file that was deleted while a request waited to read it."""
        try:
            return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b"")
        except ValueError:
            if not self._file.closed:
                raise
            raise gone("the file was deleted meanwhile: upload it again") from None

    def close(self) -> None:
        """The disk's room is free once no view of the content is left."""
        self._file.close()


@dataclass(frozen=True)
class StoredFile:
    """name: random, of the public id. filename: as the client called it, for the client only. created, expires: seconds
    since 1970. purpose: as OpenAI has it; MASK_PURPOSE for what the gateway made.
    """

    name: bytes
    owner: str
    filename: str
    purpose: str
    content: Content
    created: float
    expires: float


class Files:
    """The kept files of all owners. clock: seconds since 1970."""

    def __init__(self, settings: GatewaySettings, clock: Callable[[], float] = time.time):
        self._settings = settings
        self._clock = clock
        self._files: dict[bytes, StoredFile] = {}
        self._arriving: dict[object, tuple[str, int]] = {}

    @property
    def count(self) -> int:
        return len(self._files)

    @property
    def size(self) -> int:
        """Bytes that are kept, and that may arrive."""
        masks = (each.content.size for each in self._files.values() if each.purpose == MASK_PURPOSE)
        return sum(size for _, size in self._taken()) + sum(masks)

    @contextlib.contextmanager
    def arriving(self, owner: str, size: int) -> Iterator[None]:
        """Room for an upload of at most `size` bytes until it is kept or let go. Raises Refusal without room."""
        self.sweep()
        taken = [*self._taken(), (owner, size)]
        most, most_files = self._settings.files_mb * MB, self._settings.max_files
        own = [each for who, each in taken if who == owner]
        if len(own) > max(1, most_files // 2) or sum(own) > most // 2:
            message = "the files of this key take all the room that one key may have: delete some"
            raise Refusal(429, "storage_exceeded", message)
        if len(taken) > most_files or sum(each for _, each in taken) > most:
            raise Refusal(503, "overloaded", "there is no room for more files now: try again later", retry_after=60)
        arrival = object()
        self._arriving[arrival] = owner, size
        try:
            yield
        finally:
            del self._arriving[arrival]

    def keep(self, owner: str, file: IO[bytes], filename: str | None, purpose: str) -> StoredFile:
        """Keep a file, of which there is no other user. The name is for its owner to read, and for nothing else."""
        now = self._clock()
        shown = re.sub(r"[^\w.() -]", "_", (filename or "").replace("\\", "/").rpartition("/")[2])[-_NAME_CHARACTERS:]
        stored = StoredFile(
            name=secrets.token_bytes(16),
            owner=owner,
            filename=shown or "file",
            purpose=purpose,
            content=Content(file),
            created=now,
            expires=now + 3600 * self._settings.file_hours,
        )
        self._files[stored.name] = stored
        return stored

    def keep_masks(self, owner: str, masks: Sequence[IO[bytes]]) -> list[StoredFile]:
        """Keep the masks of one answer, all or none. They take no room of uploads: the owner's oldest masks go.

        Raises Refusal for more than one owner may have.
        """
        contents = [Content(file) for file in masks]
        number, size = len(contents), sum(content.size for content in contents)
        most, most_masks = self._settings.masks_mb * MB, self._settings.max_masks
        if number > most_masks or size > most:
            message = (
                f"the answer has {number} masks of {size:,} bytes; a key may have {most_masks} of {most:,} bytes: ask "
                "for fewer structures at a time, or crop the scan"
            )
            raise Refusal(429, "storage_exceeded", message)
        self.sweep()
        kept = [each for each in self._files.values() if each.owner == owner and each.purpose == MASK_PURPOSE]
        for oldest in kept:  # in the order in which they were made
            if number + len(kept) <= most_masks and size + sum(each.content.size for each in kept) <= most:
                break
            kept = kept[1:]
            self.delete(oldest)
        return [self.keep(owner, file, f"mask_{n + 1}.nii.gz", MASK_PURPOSE) for n, file in enumerate(masks)]

    def get(self, owner: str, name: bytes) -> StoredFile | None:
        """None for a file that is not kept any more."""
        self.sweep()
        stored = self._files.get(name)
        return stored if stored is not None and stored.owner == owner else None

    def of(self, owner: str) -> list[StoredFile]:
        """The newest first."""
        self.sweep()
        return sorted((each for each in self._files.values() if each.owner == owner), key=lambda each: -each.created)

    def delete(self, stored: StoredFile) -> None:
        del self._files[stored.name]
        stored.content.close()

    def sweep(self) -> None:
        """Let go what has been kept long enough."""
        now = self._clock()
        for stored in [each for each in self._files.values() if each.expires <= now]:
            self.delete(stored)

    def close(self) -> None:
        for stored in list(self._files.values()):
            self.delete(stored)

    def _taken(self) -> Iterator[tuple[str, int]]:
        uploads = (stored for stored in self._files.values() if stored.purpose != MASK_PURPOSE)
        yield from ((stored.owner, stored.content.size) for stored in uploads)
        yield from self._arriving.values()
