"""Everything known about a scan, computed once and kept in shared memory for all Python processes of one server.

A study is a folder named by its handle, which is a BLAKE3 of the scan's content, its affine, the preset, the crop and
the exported model: two patients never share an entry, and no entry outlives its model. The BLAKE3 has a key that only
this server knows: who does not have the handle cannot compute it, not even from the scan. The folder holds `info.json`
and one `.npy` file per piece; readers map the files (a `.npy` header keeps the data 64-byte aligned), so a piece is
read by any number of processes without a copy and stays valid for a reader even after its eviction.

Bounded in bytes, and by what the file system has left for it: the least recently used studies go first, never one whose
pieces are locked, that is, being computed. Locks are open-file-description locks on byte ranges of one file: they hold
between threads and processes alike, and the kernel frees them when their process dies.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from blake3 import blake3

from engine.errors import ResourceExhausted, StudyNotFound, shortened
from engine.runtime.server_folder import ServerFolder

if TYPE_CHECKING:  # it would bring SciPy into every process that only looks for studies
    from engine.volume.crop import Crop

PIECES = ("image", "visual_tokens", "segmentation_features", "clip_image")
DEFAULT_LIMIT_BYTES = 2 << 30
SMALLEST_LIMIT_BYTES = 1 << 20

_log = logging.getLogger(__name__)

_HANDLE = re.compile(r"[0-9a-f]{64}")
_INFO = "info.json"
_LOCKS, _LIMIT, _KEY = ".locks", ".limit", ".key"
_UNFINISHED = ".unfinished"
_BYTES_PER_STUDY = 16  # of the lock file: one per piece, with room for more pieces
_WHOLE_STORE = 0


def new_digest() -> blake3:
    """A BLAKE3 to `update` with a scan's bytes (anything with the buffer protocol). The costly part of a handle.

    As safe against collisions as SHA-256, and 4 times as fast even on a processor that has instructions for that.
    """
    return blake3(max_threads=blake3.AUTO)


def content_digest(data) -> str:
    """The digest of a scan's bytes, in hex."""
    return new_digest().update(data).hexdigest()


class StudyStore:
    """A folder of studies, shared by processes, bounded to `limit_bytes`.

    Without a `limit_bytes` the limit is the one that another process has set for the same folder. Raises
    ResourceExhausted if the folder's file system is too small for the limit.
    """

    def __init__(self, root: Path | str | ServerFolder, limit_bytes: int | None = None):
        self._folder_of_all = root if isinstance(root, ServerFolder) else ServerFolder(root)
        self.root = self._folder_of_all.path
        if limit_bytes is not None:
            _check_limit(self.root, limit_bytes)
            with self._locked(_WHOLE_STORE, 1):
                _write_atomically(self.root / _LIMIT, str(limit_bytes).encode())
        self._key = self._common_key()

    @classmethod
    def of_server(cls, limit_bytes: int | None = None) -> StudyStore:
        """The store of the tritonserver that this process belongs to; the same in all of its processes."""
        return cls(ServerFolder.of_server(), limit_bytes)

    def close(self) -> None:
        """Leave the store. The last process to leave removes it."""
        self._folder_of_all.leave()

    def __enter__(self) -> StudyStore:
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def limit_bytes(self) -> int:
        try:
            return int((self.root / _LIMIT).read_text())
        except FileNotFoundError:
            return default_limit(self.root)

    @property
    def used_bytes(self) -> int:
        return sum(_size(folder) for folder in self._studies())

    def handle_of(
        self, content: str, affine: np.ndarray | None, preset: str, model: str, crop: Crop | None = None
    ) -> str:
        """A scan's handle in this store, the same whenever it comes; in another store it has another.

        Args:
            content: its `content_digest`.
            affine: 4 x 4, or None.
            preset: as it was asked for.
            model: the manifest's identity.
            crop: the region that the model is to see, or None.

        Returns:
            BLAKE3 in hex over all of them, with the store's key.
        """
        space = None if affine is None else np.asarray(affine, np.float64).ravel().tolist()
        region = [] if crop is None else [crop.box, crop.unit]
        return blake3(json.dumps([content, space, preset, model, *region]).encode(), key=self._key).hexdigest()

    # --- reading -----------------------------------------------------------------------------------------------------
    def __contains__(self, handle: str) -> bool:
        return bool(_HANDLE.fullmatch(handle)) and (self.root / handle / _INFO).exists()

    def info(self, handle: str) -> dict:
        """What was stored with the study. Raises StudyNotFound."""
        folder = self._folder(handle)
        try:
            return json.loads((folder / _INFO).read_bytes())
        except FileNotFoundError:
            raise _not_found(handle) from None

    def get(self, handle: str, piece: str) -> np.ndarray | None:
        """A piece as a read-only memory map, or None if it is not computed yet. Raises StudyNotFound."""
        path = self._folder(handle) / _file_name(piece)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None

    # --- writing -----------------------------------------------------------------------------------------------------
    def add(self, handle: str, info: dict, image: np.ndarray) -> None:
        """Store a new study: `info` (JSON) and its model volume, 1 x D x H x W fp32. Visible whole or not at all.

        Raises ResourceExhausted if it does not fit the store.
        """
        if not _HANDLE.fullmatch(handle):
            raise ValueError(f"a study handle has 64 hex digits, not {handle!r}")
        document = json.dumps(info).encode()

        def write(unfinished: Path) -> None:
            unfinished.mkdir(mode=0o700)
            _write(unfinished / _INFO, document)
            _write_array(unfinished / _file_name("image"), image)
            if handle not in self:
                unfinished.rename(self.root / handle)

        self._make_room_and(write, handle, len(document) + _stored_size(image))

    def put(self, handle: str, piece: str, array: np.ndarray) -> None:
        """Add a piece to a study. Raises StudyNotFound if the study is gone, ResourceExhausted if it does not fit."""
        folder = self._folder(handle)

        def write(unfinished: Path) -> None:
            _write_array(unfinished, array)
            try:
                unfinished.rename(folder / _file_name(piece))
            except FileNotFoundError:
                raise _not_found(handle) from None

        self._make_room_and(write, handle, _stored_size(array))

    def computed(self, handle: str, piece: str, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A piece, made by `compute(image)` unless it is there; by one process only, however many ask at the same time.

        Raises StudyNotFound, ResourceExhausted, and whatever `compute` raises (then the next one tries again).
        """
        found = self.get(handle, piece)
        if found is None:
            with self.lock(handle, piece):
                found = self.get(handle, piece)
                if found is None:
                    # A study has its image from the start, and loses nothing while this lock is held.
                    self.put(handle, piece, compute(cast(np.ndarray, self.get(handle, "image"))))
                    found = cast(np.ndarray, self.get(handle, piece))
        return found

    def remove(self, handle: str) -> None:
        """Drop a study, whoever uses it: pieces that were read stay valid, one that is being computed finds no study.

        Raises StudyNotFound.
        """
        folder = self._folder(handle)
        with self._locked(_WHOLE_STORE, 1):
            _remove(self.root / _UNFINISHED)
            try:
                folder.rename(self.root / _UNFINISHED)
            except FileNotFoundError:
                raise _not_found(handle) from None
            _remove(self.root / _UNFINISHED)

    @contextmanager
    def lock(self, handle: str, piece: str):
        """Held while a piece is computed: others who want it wait here, and its study is not evicted meanwhile."""
        with self._locked(_first_byte(handle) + PIECES.index(piece), 1):
            yield

    # --- inside ------------------------------------------------------------------------------------------------------
    def _folder(self, handle: str) -> Path:
        """The folder of a known study, marked as just used."""
        if not _HANDLE.fullmatch(handle):
            raise _not_found(handle)
        folder = self.root / handle
        try:
            os.utime(folder / _INFO)
        except FileNotFoundError:
            raise _not_found(handle) from None
        return folder

    def _studies(self) -> list[Path]:
        return [Path(entry.path) for entry in os.scandir(self.root) if _HANDLE.fullmatch(entry.name)]

    def _common_key(self) -> bytes:
        """32 random bytes, made by the first process of this server that opens the store; the same in all of them."""
        path = self.root / _KEY
        with self._locked(_WHOLE_STORE, 1):
            if not path.exists():
                _write_atomically(path, secrets.token_bytes(32))
            return path.read_bytes()

    def _make_room_and(self, write: Callable[[Path], None], handle: str, size: int) -> None:
        """Evict until `size` more bytes of the study fit, then write; one writer at a time.

        So the bound holds exactly, and whatever lies at the path for unfinished work when the lock is ours was left by
        a killed process.

        Args:
            write: does the work at the path that it is given, and moves it from there. It is called again, after an
                eviction, when the file system is full: others use it, too.
            handle: of the study, which is not evicted.
            size: bytes that it gains.

        Raises:
            ResourceExhausted: if the study does not fit.
        """
        limit = self.limit_bytes
        own = _size(self.root / handle)
        if own + size > limit:
            raise ResourceExhausted(
                f"the study needs {_mb(own + size)}, more than the whole study store ({_mb(limit)}): raise the "
                f"setting study_store_mb of table study in settings.toml"
            )
        with self._locked(_WHOLE_STORE, 1):
            unfinished = self.root / _UNFINISHED
            _remove(unfinished)
            self._evict_until(limit - size, keep=handle)
            while True:
                try:
                    write(unfinished)
                    return
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                finally:
                    _remove(unfinished)
                if self._evict_oldest(keep=handle) is None:
                    raise ResourceExhausted(
                        f"no space left in {self.root.parent}: give it more (docker --shm-size), or lower the "
                        f"setting study_store_mb of table study in settings.toml"
                    )

    def _evict_until(self, wanted: int, keep: str) -> None:
        used = self.used_bytes
        while used > wanted and (freed := self._evict_oldest(keep)) is not None:
            used -= freed
        if used > wanted:
            raise ResourceExhausted(
                f"the study store ({_mb(self.limit_bytes)}) is full of studies that are being encoded: try again "
                f"shortly, or raise the setting study_store_mb of table study in settings.toml"
            )

    def _evict_oldest(self, keep: str) -> int | None:
        """Evict the least recently used study but `keep` and those that are being computed.

        Returns:
            Its bytes, or None if there is nothing to evict.
        """
        for folder in sorted(self._studies(), key=_last_use):
            size = _size(folder)
            if folder.name != keep and self._evict(folder):
                _log.info("a study was evicted: %s", _mb(size))
                return size
        return None

    def _evict(self, folder: Path) -> bool:
        try:
            with self._locked(_first_byte(folder.name), _BYTES_PER_STUDY, wait=False):
                folder.rename(self.root / _UNFINISHED)  # at once for everybody; deleting takes several steps
                _remove(self.root / _UNFINISHED)
                return True
        except BlockingIOError:
            return False

    @contextmanager
    def _locked(self, first: int, length: int, wait: bool = True):
        descriptor = os.open(self.root / _LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # struct flock: l_type, l_whence, l_start, l_len, l_pid (0 for open-file-description locks)
            request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
            yield
        finally:
            os.close(descriptor)


def default_limit(folder: Path) -> int:
    """2 GiB, or half of a smaller file system."""
    return min(DEFAULT_LIMIT_BYTES, _file_system_bytes(folder) // 2)


def _check_limit(root: Path, limit: int) -> None:
    available = _file_system_bytes(root)
    if not SMALLEST_LIMIT_BYTES <= limit <= available:
        raise ResourceExhausted(
            f"a study store of {_mb(limit)} is not possible in {root.parent}, which has {_mb(available)}; at least "
            f"{_mb(SMALLEST_LIMIT_BYTES)} are needed: give it more (docker --shm-size), or set the parameter "
            f"study_store_mb of table study in settings.toml"
        )


def _not_found(handle: str) -> StudyNotFound:
    return StudyNotFound(
        f"unknown study {shortened(handle)}: this server never had it or has evicted it, upload the scan again"
    )


def _first_byte(handle: str) -> int:
    """Where the locks of a study lie in the lock file: 56 bits of the handle, clear of the store's own byte."""
    return (1 + int(handle[:14], 16)) * _BYTES_PER_STUDY


def _file_name(piece: str) -> str:
    if piece not in PIECES:
        raise ValueError(f"unknown piece {piece!r}; known are {', '.join(PIECES)}")
    return f"{piece}.npy"


def _last_use(folder: Path) -> int:
    try:
        return (folder / _INFO).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:
        return 0


def _stored_size(array: np.ndarray) -> int:
    return array.nbytes + 128  # the header of a .npy file of few axes


def _file_system_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_blocks * status.f_frsize


def _write_array(path: Path, array: np.ndarray) -> None:
    array = np.ascontiguousarray(array)
    with _create(path) as file:
        # Not numpy.save: on a full file system it raises an error without its errno.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _write(path: Path, data: bytes) -> None:
    with _create(path) as file:
        file.write(data)


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + "-new")
    _remove(temporary)
    _write(temporary, data)
    temporary.rename(path)


def _create(path: Path):
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
