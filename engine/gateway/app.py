"""The routes of the gateway."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from engine.api import EngineInfo, Segmentation, StudyInfo
from engine.gateway.audit import Access, Audit
from engine.gateway.backend import AsyncM3D
from engine.gateway.chat import Begun, Completion
from engine.gateway.door import Disconnected, Door
from engine.gateway.files import Content, Files, StoredFile
from engine.gateway.keys import Key, Keys, Role
from engine.gateway.metrics import Metrics
from engine.gateway.openai_types import ChatRequest, EmbeddingsRequest
from engine.gateway.refusal import Refusal, gone, invalid, not_found, unsupported
from engine.gateway.scans import Named
from engine.gateway.seal import Seal, new_secret
from engine.gateway.settings import GatewaySettings
from engine.gateway.studies import OpenStudy, Preparation, Studies
from engine.methods import checked_question
from engine.sampling import Sampling

CHAT_MODEL, CLIP_MODEL = "m3d-lamed", "m3d-clip"
SERVED = {CHAT_MODEL: "m3d_chat", CLIP_MODEL: "m3d_retrieve"}  # by which model of the repository
SWEEP_S = 60.0
INFO_S = 10.0
MASK_PURPOSE = "assistants_output"  # OpenAI's word for files that can be fetched
MAX_TEXTS = 2048
_WRITE_BYTES = 1 << 20
T = TypeVar("T")
_log = logging.getLogger(__name__)


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


def create(m3d: AsyncM3D, keys: Keys | None, settings: GatewaySettings, audit: Audit, server: str = "local") -> Door:
    """The gateway as an ASGI application.

    Args:
        m3d: who answers; it is closed with the application.
        keys: who may enter; None for everybody.
        settings: limits and retention times.
        audit: where accesses are written; it is closed with the application.
        server: name of who answers, in the ids of studies.
    """
    metrics = Metrics()
    files = Files(settings)
    seal = Seal(keys.secret if keys is not None else new_secret())
    studies = Studies(m3d, seal, files, metrics, settings, server)
    gateway = Gateway(m3d, Served(m3d, settings.timeout_s), settings, seal, files, studies, metrics)
    metrics.gauge("files", "files that are kept", lambda: files.count)
    metrics.gauge("file_bytes", "bytes of files that are kept or arrive", lambda: files.size)
    metrics.gauge("studies_known", "studies that the gateway knows", lambda: studies.count)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(gateway))
        try:
            yield
        finally:
            sweeping.cancel()
            await m3d.close()
            files.close()
            audit.close()

    app = FastAPI(
        title="M3D gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.gateway = gateway
    for kind in (Exception, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _raised)
    _add_routes(app)
    return Door(app, keys, settings, audit, metrics)


async def _sweep(gateway: Gateway) -> None:
    """Drop what has been kept long enough."""
    while True:
        await asyncio.sleep(SWEEP_S)
        gateway.files.sweep()
        try:
            await gateway.studies.sweep()
        except Exception as error:  # the server is away, mostly: the next time
            _log.warning("studies whose time is over could not be dropped: %s", type(error).__name__)


# --- errors ----------------------------------------------------------------------------------------------------------
async def _raised(_: Request, error: Exception) -> Response:
    """The door answers all errors."""
    # FastAPI makes an error of its own of what reading the body raises.
    if isinstance(error, HTTPException) and isinstance(error.__cause__, (Refusal, Disconnected)):
        raise error.__cause__
    raise _as_refusal(error)


def _as_refusal(error: Exception) -> Exception:
    """What FastAPI says, in the shape of all refusals; other errors as they are."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"] if each not in ("body", "query", "path"))
        return invalid(f"{place or 'the body'}: {first['msg']}", place or None)
    if isinstance(error, HTTPException):
        codes = {404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}
        known = {404: "there is no such route", 405: "this route has no such method"}
        code = codes.get(error.status_code, "invalid_body")
        return Refusal(error.status_code, code, known.get(error.status_code, str(error.detail)))
    return error


# --- what routes need ------------------------------------------------------------------------------------------------
def _access(request: Request) -> Access:
    return request.scope["m3d.access"]


def _gateway(request: Request) -> Gateway:
    return request.app.state.gateway


def _allowed(role: Role) -> Callable[[Request], Key]:
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
Asks = Annotated[Key, Depends(_allowed("ask"))]
Uploads = Annotated[Key, Depends(_allowed("upload"))]
Administers = Annotated[Key, Depends(_allowed("admin"))]


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


# --- health and models -----------------------------------------------------------------------------------------------
def _add_routes(app: FastAPI) -> None:
    app.get("/", summary="What this is")(_root)
    app.get("/health/live", response_class=PlainTextResponse)(_live)
    app.get("/health/ready", response_class=PlainTextResponse)(_ready)
    app.get("/v1/models", summary="What can be asked")(_models)
    app.get("/v1/models/{id}")(_model)
    app.post("/v1/files", summary="Upload a scan (multipart: file, purpose)")(_upload_file)
    app.get("/v1/files")(_list_files)
    app.get("/v1/files/{id}")(_file)
    app.get("/v1/files/{id}/content", summary="Fetch a mask")(_file_content)
    app.delete("/v1/files/{id}")(_delete_file)
    app.post("/v1/studies", summary="Upload a scan and prepare it")(_create_study)
    app.get("/v1/studies/{id}")(_study)
    app.delete("/v1/studies/{id}")(_delete_study)
    app.post("/v1/studies/{id}/segment")(_segment)
    app.post("/v1/studies/{id}/rank")(_rank)
    app.post("/v1/chat/completions")(_chat)
    app.post("/v1/embeddings")(_embeddings)
    app.get("/metrics", response_class=PlainTextResponse)(_metrics)
    app.get("/openapi.json", include_in_schema=False)(_openapi)


async def _root() -> dict[str, str]:
    return {"name": "m3d-engine gateway", "api": "/v1", "openapi": "/openapi.json"}


async def _live() -> str:
    return "live\n"


async def _ready(gateway: This) -> Response:
    is_ready = await gateway.m3d.is_ready()
    return PlainTextResponse("ready\n" if is_ready else "the server does not answer\n", 200 if is_ready else 503)


async def _openapi(request: Request, _: Asks) -> dict[str, Any]:
    return request.app.openapi()


async def _metrics(gateway: This, _: Administers) -> Response:
    return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4")


async def _models(gateway: This, _: Asks) -> dict[str, Any]:
    info = await gateway.served.info()
    return {"object": "list", "data": [_model_object(name, info) for name in _served(info)]}


async def _model(id: str, gateway: This, _: Asks) -> dict[str, Any]:
    return _model_object(id, await _info_of(gateway, id, tuple(SERVED)))


def _served(info: EngineInfo) -> list[str]:
    return [name for name, model in SERVED.items() if model in info.models]


async def _info_of(gateway: Gateway, model: str, wanted: tuple[str, ...]) -> EngineInfo:
    """What answers. Raises Refusal for a model that is not served, or not by this route."""
    info = await gateway.served.info()
    usable = [name for name in _served(info) if name in wanted]
    if model not in usable:
        message = f"the model {model[:100]!r} is not there for this: {', '.join(usable) or 'none'}"
        raise Refusal(404, "model_not_found", message, "model")
    return info


def _model_object(name: str, info: EngineInfo) -> dict[str, Any]:
    manifest = {"precision": info.model.precision, "manifest_sha256": info.model.manifest_sha256}
    return {"id": name, "object": "model", "created": 0, "owned_by": "m3d-engine", "m3d": manifest}


# --- files -----------------------------------------------------------------------------------------------------------
async def _upload_file(request: Request, gateway: This, key: Uploads) -> dict[str, Any]:
    with gateway.files.arriving(key.owner, request.scope["m3d.body_size"]):
        form, file = await _form_file(request)
        purpose = form.get("purpose") or "user_data"
        if not isinstance(purpose, str) or len(purpose) > 64 or purpose == MASK_PURPOSE:
            raise invalid("purpose: user_data is wanted", "purpose")
        stored = gateway.files.keep(key.owner, file.file, file.filename, purpose)
    return _file_object(gateway, stored)


async def _form_file(request: Request) -> tuple[Any, UploadFile]:
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


async def _list_files(gateway: This, key: Uploads, purpose: str | None = None) -> dict[str, Any]:
    found = [each for each in gateway.files.of(key.owner) if purpose in (None, each.purpose)]
    return {"object": "list", "data": [_file_object(gateway, each) for each in found], "has_more": False}


async def _file(id: str, gateway: This, key: Asks) -> dict[str, Any]:
    return _file_object(gateway, _stored(gateway, key, id))


async def _file_content(id: str, gateway: This, key: Asks) -> Response:
    stored = _stored(gateway, key, id)
    if stored.purpose != MASK_PURPOSE:
        raise Refusal(403, "not_fetchable", "scans are not given out again; masks can be fetched")
    return Response(bytes(stored.content.read()), media_type="application/gzip")


async def _delete_file(id: str, gateway: This, key: Uploads) -> dict[str, Any]:
    gateway.files.delete(_stored(gateway, key, id))
    return {"id": id, "object": "file", "deleted": True}


def _stored(gateway: Gateway, key: Key, public: str) -> StoredFile:
    name = gateway.seal.open_file(key.owner, public)
    if name is None:
        raise not_found("file", public)
    stored = gateway.files.get(key.owner, name)
    if stored is None:
        raise gone("the file is not kept any more (deleted, or its time is over): upload it again")
    return stored


def _file_object(gateway: Gateway, stored: StoredFile) -> dict[str, Any]:
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


# --- studies ---------------------------------------------------------------------------------------------------------
class StudyOfFile(BaseModel):
    """A study of a file that was uploaded to /v1/files: it is sent again from there if the server evicts it."""

    model_config = ConfigDict(extra="forbid")

    file_id: str
    preset: str = "auto"
    crop: str | None = None


async def _create_study(
    request: Request,
    gateway: This,
    key: Uploads,
    note: Note,
    preset: Annotated[str, Query()] = "auto",
    crop: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    """The body is the scan's file itself, a form with the field file, or JSON with the file_id of a kept file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            wanted = StudyOfFile.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise invalid(f"{place or 'the body'}: {first['msg']}", place or None) from None
        if not wanted.file_id.startswith("file-"):
            raise not_found("file", wanted.file_id)
        preparation = Preparation(wanted.preset, wanted.crop)
        work = gateway.studies.opened(key.owner, Named(wanted.file_id, "file_id"), preparation)
        return _study_object(note, await while_connected(request, work))
    preparation = Preparation(preset, crop)
    with gateway.files.arriving(key.owner, request.scope["m3d.body_size"]):
        async with _received_file(request, kind) as file:
            work = gateway.studies.upload(key.owner, Content(file), preparation)
            return _study_object(note, await while_connected(request, work))


async def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    """The body in pieces of a size that is worth a write on a thread each."""
    waiting = bytearray()
    async for piece in request.stream():
        waiting += piece
        if len(waiting) >= _WRITE_BYTES:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


@contextlib.asynccontextmanager
async def _received_file(request: Request, kind: str) -> AsyncIterator[IO[bytes]]:
    """The scan's file in a form or as the body, in an anonymous file on disk."""
    if kind == "multipart/form-data":
        _, upload = await _form_file(request)
        try:
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


async def _study(id: str, gateway: This, key: Asks, note: Note) -> dict[str, Any]:
    opened, info = await gateway.studies.described(key.owner, id)
    return _study_object(note, opened, info)


async def _delete_study(id: str, gateway: This, key: Uploads, note: Note) -> dict[str, Any]:
    await gateway.studies.delete(key.owner, id)
    note.study = id
    return {"id": id, "object": "study", "deleted": True}


def _study_object(note: Access, opened: OpenStudy, info: StudyInfo | None = None) -> dict[str, Any]:
    note.study = opened.public
    info = info or opened.study.info
    shown = {"id": opened.public, "object": "study", "notes": list(opened.notes)}
    if info is None:
        return shown
    return shown | {
        "preset": info.preset,
        "reason": info.reason,
        "shape": info.shape,
        "spacing_mm": info.spacing_mm,
        "orientation": info.orientation,
        "crop": info.crop,
        "prepare_s": info.prepare_s,
        "model": {"precision": info.model.precision, "manifest_sha256": info.model.manifest_sha256},
    }


class SegmentRequest(BaseModel):
    """A question that asks for a structure; sampling as of chat completions."""

    model_config = ConfigDict(extra="forbid")

    question: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


async def _segment(
    id: str, body: SegmentRequest, request: Request, gateway: This, key: Asks, note: Note
) -> dict[str, Any]:
    """The answer and its segments: masks as files of gzipped NIfTI, see /v1/files/{id}/content, and measurements."""
    note.question = checked_question(body.question)
    sampling = body.model_dump(exclude={"question", "max_tokens"}, exclude_none=True)
    if body.max_tokens is not None:
        sampling["max_new_tokens"] = body.max_tokens
    _checked(sampling)

    async def segment(opened: OpenStudy) -> Segmentation:
        study, timeout = opened.study, gateway.settings.timeout_s
        return await gateway.m3d.segment(study, body.question, timeout=timeout, **sampling)

    opened = gateway.studies.known(key.owner, id)
    note.study = id
    work = gateway.studies.used(key.owner, Named(id, "id"), opened.preparation, segment)
    found = await while_connected(request, work)
    gateway.metrics.answered(found.answer)
    return {
        "object": "segmentation",
        "study": id,
        "answer": found.answer.text,
        "finish_reason": found.answer.finish_reason,
        "segments": await _segments(gateway, key, found),
    }


async def _segments(gateway: Gateway, key: Key, found: Segmentation) -> list[dict[str, Any]]:
    """One entry a mask. The API has one mask an answer today; its `segments` will be told here, one by one."""
    if found.mask is None:
        return []
    measured = await asyncio.to_thread(lambda: found.measurements)
    file = await asyncio.to_thread(_mask_file, found)
    size = Content(file).size
    with gateway.files.arriving(key.owner, size):
        stored = gateway.files.keep(key.owner, file, "mask.nii.gz", MASK_PURPOSE)
    shown = measured.to_dict() if measured is not None else None
    return [{"index": 0, "mask": _file_object(gateway, stored), "measurements": shown}]


def _mask_file(found: Segmentation) -> IO[bytes]:
    """The mask as an anonymous file: the folder that it was written into is gone."""
    with tempfile.TemporaryDirectory(prefix="m3d-mask-") as folder:
        return open(found.save(Path(folder) / "mask.nii.gz"), "rb")


class RankRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


async def _rank(id: str, body: RankRequest, request: Request, gateway: This, key: Asks, note: Note) -> dict[str, Any]:
    """Texts with their scores, best first."""

    async def rank(opened: OpenStudy) -> Any:
        return await gateway.m3d.rank(opened.study, body.texts, timeout=gateway.settings.timeout_s)

    opened = gateway.studies.known(key.owner, id)
    note.study = id
    work = gateway.studies.used(key.owner, Named(id, "id"), opened.preparation, rank)
    found = await while_connected(request, work)
    order = np.argsort(-found.scores, kind="stable").tolist()
    data = [{"index": i, "text": found.texts[i], "score": float(found.scores[i]), "cut": found.cut[i]} for i in order]
    return {"object": "ranking", "study": id, "data": data, "text_limit": found.text_limit}


# --- OpenAI's routes -------------------------------------------------------------------------------------------------
async def _chat(body: ChatRequest, request: Request, gateway: This, key: Asks, note: Note) -> Any:
    body.refuse_unsupported()
    info = await _info_of(gateway, body.model, (CHAT_MODEL,))
    scan, question, unread = await asyncio.to_thread(body.conversation)  # decodes what is inline
    note.question = checked_question(question)
    sampling = _checked(body.sampling())
    if not isinstance(scan, Named):
        _allowed("upload")(request)

    async def begin(opened: OpenStudy) -> Begun:
        note.study = opened.public
        stream = gateway.m3d.stream(opened.study, question, timeout=gateway.settings.timeout_s, **sampling)
        try:
            return Begun(stream, await anext(stream, None), opened, unread)
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


async def _embeddings(body: EmbeddingsRequest, request: Request, gateway: This, key: Asks) -> dict[str, Any]:
    """M3D-CLIP's embeddings. Tokens are not counted: usage is 0."""
    items = await asyncio.to_thread(body.items)
    await _info_of(gateway, body.model, (CLIP_MODEL,))
    if any(not isinstance(item, (str, Named)) for item in items):
        _allowed("upload")(request)
    preparation, timeout = Preparation(body.preset, body.crop), gateway.settings.timeout_s

    async def embed(opened: OpenStudy) -> np.ndarray:
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
