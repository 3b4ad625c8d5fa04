"""The names that users import. Each is loaded when it is first used: the processes of a server need none of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.api import M3D, Message, Study
    from engine.client import AsyncM3DClient, M3DClient
    from engine.local import M3DEngine

__all__ = ["M3D", "AsyncM3DClient", "M3DClient", "M3DEngine", "Message", "Study"]

_MODULES = {"M3D": "engine.api", "Message": "engine.api", "Study": "engine.api", "M3DEngine": "engine.local"}
_MODULES |= dict.fromkeys(("M3DClient", "AsyncM3DClient"), "engine.client")


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
