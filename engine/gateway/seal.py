"""Public ids: sealed tokens, so that no table of owners is needed.

The id of a study is its server and handle, encrypted and authenticated with the owner and the kind of id as associated
data (AES-SIV, RFC 5297, of `cryptography`). An id of somebody else, of another kind, or one that was made up does not
open: it is as unknown as one that never was.

AES-SIV because it needs no nonce: the same study has the same id for its owner each time, and ids do not grow by one.
Fernet would give each answer another id and has a readable time in it; itsdangerous signs, but lets everybody read the
handle. The handle has a secret of its server in it, and the id one of the gateway: neither follows from a scan.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

_HANDLE_BYTES = 32
_MAX_TOKEN = 400


@dataclass(frozen=True)
class SealedStudy:
    """server: which server holds the study, by its name in the gateway. handle: there, 64 hex digits."""

    server: str
    handle: str


class Seal:
    """Makes and opens public ids. secret: of `new_secret`; with it the ids of all owners can be made."""

    def __init__(self, secret: bytes):
        self._cipher = AESSIV(secret)

    def study_id(self, owner: str, study: SealedStudy) -> str:
        handle = bytes.fromhex(study.handle)
        if len(handle) != _HANDLE_BYTES:
            raise ValueError(f"a study handle has {2 * _HANDLE_BYTES} hex digits, not {len(study.handle)}")
        return "study-" + self._sealed("study", owner, handle + study.server.encode())

    def open_study(self, owner: str, public: str) -> SealedStudy | None:
        """What the id stands for; None if it is not an id of this owner's."""
        content = self._opened("study", owner, public)
        if content is None or len(content) < _HANDLE_BYTES:
            return None
        return SealedStudy(content[_HANDLE_BYTES:].decode(), content[:_HANDLE_BYTES].hex())

    def file_id(self, owner: str, name: bytes) -> str:
        return "file-" + self._sealed("file", owner, name)

    def open_file(self, owner: str, public: str) -> bytes | None:
        return self._opened("file", owner, public)

    def _sealed(self, kind: str, owner: str, content: bytes) -> str:
        token = self._cipher.encrypt(content, [kind.encode(), owner.encode()])
        return base64.urlsafe_b64encode(token).rstrip(b"=").decode()

    def _opened(self, kind: str, owner: str, public: str) -> bytes | None:
        found = re.fullmatch(rf"{kind}-([A-Za-z0-9_-]{{1,{_MAX_TOKEN}}})", public)
        if found is None:
            return None
        try:
            token = base64.urlsafe_b64decode(found[1] + "=" * (-len(found[1]) % 4))
            content = self._cipher.decrypt(token, [kind.encode(), owner.encode()])
        except (InvalidTag, binascii.Error, ValueError):
            return None
        # Base64 has several spellings of the same bytes, of which one is the id.
        return content if self._sealed(kind, owner, content) == found[1] else None


def new_secret() -> bytes:
    return AESSIV.generate_key(512)
