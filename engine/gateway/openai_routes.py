"""The routes that OpenAI's clients call: models, chat completions and embeddings."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from engine.api import EngineInfo
from engine.gateway.chat import Begun, Completion
from engine.gateway.context import (
    CHAT_MODEL,
    CLIP_MODEL,
    SERVED,
    Asks,
    Note,
    This,
    allowed,
    info_of,
    models_of,
    while_connected,
)
from engine.gateway.openai_types import ChatRequest, EmbeddingsRequest
from engine.gateway.refusal import unsupported
from engine.gateway.scans import Named
from engine.gateway.studies import OpenStudy, Preparation
from engine.sampling import Sampling

router = APIRouter()


@router.get("/v1/models", summary="What can be asked")
async def _models(gateway: This, _: Asks) -> dict[str, Any]:
    info = await gateway.served.info()
    return {"object": "list", "data": [_model_object(name, info) for name in models_of(info)]}


@router.get("/v1/models/{id}")
async def _model(id: str, gateway: This, _: Asks) -> dict[str, Any]:
    return _model_object(id, await info_of(gateway, id, tuple(SERVED)))


def _model_object(name: str, info: EngineInfo) -> dict[str, Any]:
    manifest = {"precision": info.model.precision, "manifest_sha256": info.model.manifest_sha256}
    return {"id": name, "object": "model", "created": 0, "owned_by": "m3d-engine", "m3d": manifest}


@router.post("/v1/chat/completions")
async def _chat(body: ChatRequest, request: Request, gateway: This, key: Asks, note: Note) -> Any:
    body.refuse_unsupported()
    info = await info_of(gateway, body.model, (CHAT_MODEL,))
    sampling = _checked(body.sampling())
    scan, turns = await asyncio.to_thread(body.conversation, request.scope["m3d.hold"])  # decodes what is inline
    note.question = turns[-1].text
    if not isinstance(scan, Named):
        allowed("upload")(request)

    async def begin(opened: OpenStudy) -> Begun:
        note.study = opened.public
        stream = gateway.m3d.stream(opened.study, messages=turns, timeout=gateway.settings.timeout_s, **sampling)
        try:
            return Begun(stream, await anext(stream, None), opened)
        except BaseException:
            await stream.aclose()
            raise

    preparation = Preparation(body.preset, body.crop)
    begun = await while_connected(request, gateway.studies.used(key.owner, scan, preparation, begin))
    completion = Completion(begun, body.model, info.model.manifest_sha256[:12], gateway.metrics)
    if not body.stream:
        try:
            return JSONResponse(await while_connected(request, completion.whole()))
        finally:
            await begun.stream.aclose()
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return _Events(completion.events(include_usage, note), begun)


class _Events(StreamingResponse):
    """Server-sent events of an answer, which is cancelled when they are not read to the end, or not at all."""

    def __init__(self, events: AsyncIterator[bytes], begun: Begun):
        super().__init__(events, media_type="text/event-stream")
        self._begun = begun

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._begun.stream.aclose()


def _checked(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling settings that are allowed: a scan is not sent for a question that cannot be asked."""
    Sampling.from_dict(sampling)
    return sampling


@router.post("/v1/embeddings")
async def _embeddings(
    body: EmbeddingsRequest, request: Request, gateway: This, key: Asks, note: Note
) -> dict[str, Any]:
    """M3D-CLIP's embeddings. Tokens are not counted: usage is 0."""
    items = await asyncio.to_thread(body.items, request.scope["m3d.hold"])
    await info_of(gateway, body.model, (CLIP_MODEL,))
    if any(not isinstance(item, (str, Named)) for item in items):
        allowed("upload")(request)
    preparation, timeout = Preparation(body.preset, body.crop), gateway.settings.timeout_s

    embedded_studies: dict[str, None] = {}

    async def embed(opened: OpenStudy) -> np.ndarray:
        embedded_studies[opened.public] = None
        note.study = ",".join(embedded_studies)
        return await gateway.m3d.embed(opened.study, timeout=timeout)

    async def embedded() -> tuple[list[np.ndarray], list[int]]:
        texts = [item for item in items if isinstance(item, str)]
        found = await gateway.m3d.embed_texts(texts, timeout=timeout) if texts else None
        of_texts = iter(found.embeddings if found else ())
        vectors = [
            next(of_texts) if isinstance(item, str) else await gateway.studies.used(key.owner, item, preparation, embed)
            for item in items
        ]
        places = [n for n, item in enumerate(items) if isinstance(item, str)]
        return vectors, [place for place, cut in zip(places, found.cut if found else ()) if cut]

    vectors, cut = await while_connected(request, embedded())
    if body.dimensions not in (None, len(vectors[0])):
        raise unsupported("dimensions", f"embeddings have {len(vectors[0])} dimensions")
    data = [
        {"object": "embedding", "index": n, "embedding": _vector(vector, body.encoding_format)}
        for n, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return {"object": "list", "model": body.model, "data": data, "usage": usage, "m3d": {"cut": cut}}


def _vector(vector: np.ndarray, encoding: str) -> str | list[float]:
    values = np.ascontiguousarray(vector, "<f4")
    return base64.b64encode(values.tobytes()).decode() if encoding == "base64" else values.tolist()
