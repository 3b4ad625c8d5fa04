"""The application: all routes, what they share, and the form of their errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from engine.gateway import file_routes, openai_routes, study_routes
from engine.gateway.audit import Audit
from engine.gateway.backend import AsyncM3D
from engine.gateway.bodies import returning
from engine.gateway.context import Administers, Asks, Gateway, Served, This
from engine.gateway.docs_page import docs_page
from engine.gateway.door import AccessMiddleware, Disconnected
from engine.gateway.files import Files
from engine.gateway.keys import Keys
from engine.gateway.metrics import Metrics
from engine.gateway.refusal import ErrorBody, Refusal, invalid
from engine.gateway.seal import Seal, new_secret
from engine.gateway.settings import GatewaySettings
from engine.gateway.studies import Studies

SWEEP_S = 60.0
open_router, router = APIRouter(), APIRouter()  # open: without a key
_log = logging.getLogger(__name__)


def create(
    m3d: AsyncM3D, keys: Keys | None, settings: GatewaySettings, audit: Audit, server: str = "local"
) -> AccessMiddleware:
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
    bearer = Security(
        HTTPBearer(auto_error=False, description="a key of `m3d keys add`")
    )  # which the middleware checks
    errors = {"description": "OpenAI's error shape", "model": ErrorBody}
    app.include_router(open_router, responses={"default": errors})
    for each in (router, openai_routes.router, file_routes.router, study_routes.router):
        app.include_router(each, dependencies=[bearer], responses={"default": errors})
    return AccessMiddleware(app, keys, settings, audit, metrics)


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
    """The access middleware answers all errors."""
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
        allow = (error.headers or {}).get("Allow")
        return Refusal(error.status_code, code, known.get(error.status_code, str(error.detail)), allow=allow)
    return error


# --- what is asked of the gateway itself -----------------------------------------------------------------------------
@open_router.get("/", summary="What this is")
async def _root() -> dict[str, str]:
    return {"name": "m3d-engine gateway", "api": "/v1", "openapi": "/openapi.json", "docs": "/docs"}


@open_router.get("/health/live", **returning("text/plain"))
async def _live() -> Response:
    return PlainTextResponse("live\n")


@open_router.get("/health/ready", **returning("text/plain"))
async def _ready(gateway: This) -> Response:
    is_ready = await gateway.m3d.is_ready()
    return PlainTextResponse("ready\n" if is_ready else "the server does not answer\n", 200 if is_ready else 503)


@router.get("/openapi.json", include_in_schema=False)
async def _openapi(request: Request, _: Asks) -> dict[str, Any]:
    return request.app.openapi()


@router.get("/docs", include_in_schema=False)
async def _docs(request: Request, _: Asks) -> Response:
    return docs_page(request.app.openapi())


@router.get("/metrics", **returning("text/plain"))
async def _metrics(gateway: This, _: Administers) -> Response:
    return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4")
