"""What the routes work with, and what each of them needs of its request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from engine import contract
from engine.api import EngineInfo
from engine.gateway.audit import Access
from engine.gateway.backend import AsyncM3D
from engine.gateway.door import Disconnected
from engine.gateway.files import Files
from engine.gateway.keys import Key, Role
from engine.gateway.metrics import Metrics
from engine.gateway.refusal import Refusal
from engine.gateway.seal import Seal
from engine.gateway.settings import GatewaySettings
from engine.gateway.studies import Studies

CHAT_MODEL, CLIP_MODEL = "m3d-lamed", "m3d-clip"
SERVED = {CHAT_MODEL: contract.CHAT, CLIP_MODEL: contract.RETRIEVE}  # by which model of the repository
INFO_S = 10.0
T = TypeVar("T")


class Served:
    """What answers, asked for again after INFO_S: no question waits for that each time."""

    def __init__(self, m3d: AsyncM3D, timeout: float):
        self._m3d, self._timeout = m3d, timeout
        self._info: EngineInfo | None = None
        self._asked = 0.0

    async def info(self) -> EngineInfo:
        if self._info is None or time.monotonic() - self._asked > INFO_S:
            self._info = await self._m3d.info(timeout=self._timeout)
            self._asked = time.monotonic()
        return self._info


@dataclass(frozen=True)
class Gateway:
    """What the routes work with."""

    m3d: AsyncM3D
    served: Served
    settings: GatewaySettings
    seal: Seal
    files: Files
    studies: Studies
    metrics: Metrics


def _access(request: Request) -> Access:
    return request.scope["m3d.access"]


def _gateway(request: Request) -> Gateway:
    return request.app.state.gateway


def allowed(role: Role) -> Callable[[Request], Key]:
    def key(request: Request) -> Key:
        found: Key = request.scope["m3d.key"]
        if role not in found.roles:
            raise Refusal(
                403, "role_missing", f"this key has the roles {', '.join(found.roles)}; {role} is needed here"
            )
        return found

    return key


This = Annotated[Gateway, Depends(_gateway)]
Note = Annotated[Access, Depends(_access)]
Asks = Annotated[Key, Depends(allowed("ask"))]
Uploads = Annotated[Key, Depends(allowed("upload"))]
Administers = Annotated[Key, Depends(allowed("admin"))]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; it is cancelled when the client goes."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def models_of(info: EngineInfo) -> list[str]:
    return [name for name, model in SERVED.items() if model in info.models]


async def info_of(gateway: Gateway, model: str, wanted: tuple[str, ...]) -> EngineInfo:
    """What answers. Raises Refusal for a model that is not served, or not by this route."""
    info = await gateway.served.info()
    usable = [name for name in models_of(info) if name in wanted]
    if model not in usable:
        message = f"the model {model[:100]!r} is not there for this: {', '.join(usable) or 'none'}"
        raise Refusal(404, "model_not_found", message, "model")
    return info
