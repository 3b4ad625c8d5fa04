"""The keys file: who may enter, and the secret that public ids are sealed with.

A key is 256 random bits, so its SHA-256 is enough at rest: keys cannot be guessed, and a slow hash for passwords would
cost each request what it costs an attacker. The file is JSON, readable by its owner only (mode 0600), and is replaced
as a whole. Writers hold a lock on its folder, so that two commands at the same time do not lose a key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.errors import InvalidInput, Unavailable
from engine.gateway.seal import new_secret

Role = Literal["ask", "upload", "admin"]
ROLES: tuple[Role, ...] = ("ask", "upload", "admin")
DEFAULT_ROLES: tuple[Role, ...] = ("ask", "upload")
PREFIX = "m3d-"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Key(BaseModel):
    """Who has a key, and what it is good for. The key itself is not kept.

    owner: random, of this key alone: what one key's owner uploads is his only, and who gets the name of a revoked key
    gets none of it. hash: SHA-256 of the key, hex. created, expires: seconds since 1970. rate_per_minute, concurrency,
    max_upload_mb: limits of this key, None for the gateway's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=_NAME)]
    owner: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    hash: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    roles: Annotated[tuple[Role, ...], Field(min_length=1)]
    created: float
    expires: float | None = None
    rate_per_minute: Annotated[int, Field(ge=1)] | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    max_upload_mb: Annotated[int, Field(ge=1)] | None = None

    def has_expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires


class KeyFile(BaseModel):
    """What the keys file holds. secret: of the seal, see `engine.gateway.seal`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    secret: Base64Bytes
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True)
class _State:
    """What tells one version of the file from another."""

    inode: int
    size: int
    changed_ns: int


class Keys:
    """The keys of a file, for the gateway: read again when the file is another.

    No key is accepted if the file cannot be read: a revoked key must not live on because of a damaged file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._state: _State | None = None
        self._by_hash: dict[str, Key] = {}
        self._secret = b""
        self._read_if_changed()

    @property
    def secret(self) -> bytes:
        """Of the seal, as it was when the gateway started."""
        return self._secret

    def find(self, key: str) -> Key | None:
        """Whose key it is, expired ones included. Raises Unavailable if the file cannot be read."""
        self._read_if_changed()
        return self._by_hash.get(hash_of(key))

    def _read_if_changed(self) -> None:
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise _unreadable(self._path, error) from None
        state = _State(found.st_ino, found.st_size, found.st_mtime_ns)
        if state == self._state:
            return
        content = read(self._path)
        self._by_hash = {key.hash: key for key in content.keys}
        self._secret = self._secret or content.secret
        self._state = state


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add(
    path: Path,
    name: str,
    roles: tuple[str, ...] = DEFAULT_ROLES,
    *,
    days: float | None = None,
    rate_per_minute: int | None = None,
    concurrency: int | None = None,
    max_upload_mb: int | None = None,
) -> str:
    """Add a key to a file, which is made if it is not there.

    Args:
        path: of the keys file.
        name: 1 to 64 letters, digits, dots, underscores and dashes; not one that is there.
        roles: of ROLES.
        days: until the key expires; None for never.
        rate_per_minute, concurrency, max_upload_mb: see `Key`.

    Returns:
        The key: it is in no file, and cannot be shown again.

    Raises:
        InvalidInput: the name is taken, or a value is not allowed.
        Unavailable: the file cannot be read or written.
    """
    if days is not None and not 0 < days < 36_500:
        raise InvalidInput(f"a key expires after a number of days above 0 and below 36,500, not {days}")
    key = PREFIX + secrets.token_urlsafe(32)
    now = time.time()
    values = dict(
        name=name,
        owner=secrets.token_hex(16),
        hash=hash_of(key),
        roles=tuple(dict.fromkeys(roles)),
        created=now,
        expires=None if days is None else now + days * 86_400,
        rate_per_minute=rate_per_minute,
        concurrency=concurrency,
        max_upload_mb=max_upload_mb,
    )
    try:
        entry = Key.model_validate(values)
    except ValidationError as error:
        raise InvalidInput(f"the key cannot be added: {_causes(error)}; roles are {', '.join(ROLES)}") from None
    with _locked(path):
        content = read(path) if path.exists() else KeyFile.model_construct(secret=new_secret())
        if any(other.name == name for other in content.keys):
            raise InvalidInput(f"{path} has a key named {name}: revoke it, or give another name")
        _replace(path, content.model_copy(update={"keys": (*content.keys, entry)}))
    return key


def revoke(path: Path, name: str) -> None:
    """Take a key out of a file. Raises InvalidInput if there is none of this name."""
    with _locked(path):
        content = read(path)
        left = tuple(key for key in content.keys if key.name != name)
        if len(left) == len(content.keys):
            names = ", ".join(key.name for key in content.keys) or "none"
            raise InvalidInput(f"{path} has no key named {name}; it has {names}")
        _replace(path, content.model_copy(update={"keys": left}))


def read(path: Path) -> KeyFile:
    """The file's content. Raises Unavailable if it cannot be read, is open to other users, or is damaged."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read()
    except OSError as error:
        raise _unreadable(path, error) from None
    if mode & 0o077:
        raise Unavailable(f"the keys file {path} is open to other users (mode {mode:o}): chmod 600 {path}")
    try:
        return _CONTENT.validate_json(text)
    except ValidationError as error:
        raise Unavailable(f"the keys file {path} is damaged: {_causes(error)}") from None


_CONTENT = TypeAdapter(KeyFile)


def _unreadable(path: Path, error: OSError) -> Unavailable:
    return Unavailable(f"the keys file {path} cannot be read: {error.strerror}; `m3d keys add` makes one")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock on the file's folder against other writers of this module."""
    try:
        folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Unavailable(f"the folder of the keys file {path} cannot be opened: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path: Path, content: KeyFile) -> None:
    """Write the file anew: a reader finds the old one or the new one, also after a power failure."""
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with open(handle, "wb") as file:
                file.write(content.model_dump_json(indent=2, exclude_none=True).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise Unavailable(f"the keys file {path} cannot be written: {error.strerror}") from None


def _causes(error: ValidationError) -> str:
    """What is wrong, without the values: hashes and secrets stay out of messages."""
    causes = [f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors(include_input=False)]
    return "; ".join(causes[:3])
