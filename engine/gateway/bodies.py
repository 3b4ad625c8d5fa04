"""Scans that come as a request's body: into an anonymous file on disk, never whole into memory."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from typing import IO, Any

from fastapi import Request, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from engine.gateway.refusal import Refusal, invalid

_WRITE_BYTES = 1 << 20
_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _FILE, "purpose": {"type": "string"}}}
FORM_BODY = {"multipart/form-data": {"schema": _FORM}}
SCAN_BODY = FORM_BODY | {"application/octet-stream": {"schema": _FILE}}


def described(content: dict[str, Any]) -> dict[str, Any]:
    """What a route takes, for its description: `openapi_extra`."""
    return {"requestBody": {"required": True, "content": content}}


def returning(kind: str) -> dict[str, Any]:
    """Arguments of a route that returns no JSON, for its description."""
    return {"response_class": Response, "responses": {200: {"content": {kind: {"schema": {"type": "string"}}}}}}


async def form_file(request: Request) -> tuple[Any, UploadFile]:
    """The fields of a form, and the file in it, which is an anonymous one on disk."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "unsupported_media_type", "a form is wanted: multipart/form-data with the field file")
    try:
        form = await MultiPartParser(request.headers, _pieces(request), max_files=1, max_fields=16).parse()
    except (MultiPartException, KeyError) as error:
        raise invalid(f"the form cannot be read: {error}") from None
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise invalid("file: the form has no file of this name", "file")
    if not file.size:
        raise invalid("file: the file is empty", "file")
    return form, file


@contextlib.asynccontextmanager
async def received_file(request: Request, kind: str) -> AsyncIterator[IO[bytes]]:
    """The scan's file in a form or as the body, in an anonymous file on disk."""
    if kind == "multipart/form-data":
        form, upload = await form_file(request)
        try:
            for name in form:
                if name not in ("file", "purpose"):
                    message = "a form has the field file alone; preset and crop belong into the address: ?preset=ct"
                    raise invalid(f"{name[:60]}: {message}", name[:60], "unknown_parameter")
            yield upload.file
        finally:
            await upload.close()
        return
    if kind in ("application/x-www-form-urlencoded", "text/plain", "text/html"):
        raise Refusal(415, "unsupported_media_type", "a scan is sent as application/octet-stream, or in a form")
    with tempfile.TemporaryFile() as file:
        async for piece in _pieces(request):
            await asyncio.to_thread(file.write, piece)
        if not file.tell():
            raise invalid("the body is empty: it is to be the scan's file")
        yield file


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    """The body in pieces of a size that is worth a write on a thread each."""
    waiting = bytearray()
    async for piece in request.stream():
        waiting += piece
        if len(waiting) >= _WRITE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)
