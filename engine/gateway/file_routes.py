"""/v1/files, as OpenAI has them: scans that are kept for a while, and masks to fetch."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from engine.gateway.audit import Access
from engine.gateway.bodies import FORM_BODY, described, form_file, returning
from engine.gateway.context import Asks, Gateway, Note, This, Uploads
from engine.gateway.files import MASK_PURPOSE, StoredFile
from engine.gateway.keys import Key
from engine.gateway.refusal import Refusal, gone, invalid, not_found

router = APIRouter(prefix="/v1/files")


@router.post("", summary="Upload a scan", openapi_extra=described(FORM_BODY))
async def _upload_file(request: Request, gateway: This, key: Uploads, note: Note) -> dict[str, Any]:
    with gateway.files.arriving(key.owner, request.scope["m3d.body_size"]):
        form, file = await form_file(request)
        purpose = form.get("purpose") or "user_data"
        if not isinstance(purpose, str) or len(purpose) > 64 or purpose == MASK_PURPOSE:
            raise invalid("purpose: user_data is wanted", "purpose")
        stored = gateway.files.keep(key.owner, file.file, file.filename, purpose)
    shown = file_object(gateway, stored)
    note.file = shown["id"]
    return shown


@router.get("")
async def _list_files(gateway: This, key: Uploads, purpose: str | None = None) -> dict[str, Any]:
    found = [each for each in gateway.files.of(key.owner) if purpose in (None, each.purpose)]
    return {"object": "list", "data": [file_object(gateway, each) for each in found], "has_more": False}


@router.get("/{id}")
async def _file(id: str, gateway: This, key: Asks, note: Note) -> dict[str, Any]:
    return file_object(gateway, _stored(gateway, key, id, note))


@router.get("/{id}/content", summary="Fetch a mask", **returning("application/gzip"))
async def _file_content(id: str, gateway: This, key: Asks, note: Note) -> Response:
    stored = _stored(gateway, key, id, note)
    if stored.purpose != MASK_PURPOSE:
        raise Refusal(403, "not_fetchable", "scans are not given out again; masks can be fetched")
    return Response(bytes(stored.content.read()), media_type="application/gzip")


@router.delete("/{id}")
async def _delete_file(id: str, gateway: This, key: Uploads, note: Note) -> dict[str, Any]:
    stored = _stored(gateway, key, id, note)
    gateway.files.delete(stored)
    gateway.studies.forget_file(stored)
    return {"id": id, "object": "file", "deleted": True}


def _stored(gateway: Gateway, key: Key, public: str, note: Access) -> StoredFile:
    name = gateway.seal.open_file(key.owner, public)
    if name is None:
        raise not_found("file", public)
    note.file = public  # only now: an id that was made up may be a name
    stored = gateway.files.get(key.owner, name)
    if stored is None:
        raise gone("the file is not kept any more (deleted, or its time is over): upload it again")
    return stored


def file_object(gateway: Gateway, stored: StoredFile) -> dict[str, Any]:
    return {
        "id": gateway.seal.file_id(stored.owner, stored.name),
        "object": "file",
        "bytes": stored.content.size,
        "created_at": int(stored.created),
        "expires_at": int(stored.expires),
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
    }
