"""/v1/studies: scans that are prepared once, their masks and rankings."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from typing import IO, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from isal import igzip
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.api import Segment, Segmentation, StudyInfo
from engine.gateway.audit import Access
from engine.gateway.bodies import SCAN_BODY, described, received_file
from engine.gateway.context import Asks, Gateway, Note, This, Uploads, while_connected
from engine.gateway.file_routes import file_object
from engine.gateway.files import Content
from engine.gateway.keys import Key
from engine.gateway.refusal import invalid, not_found
from engine.gateway.scans import Named
from engine.gateway.studies import OpenStudy, Preparation
from engine.methods import checked_question
from engine.results import mask_bytes
from engine.results.measurements import Measurements
from engine.sampling import Sampling

MAX_TEXTS = 2048
router = APIRouter(prefix="/v1/studies")


class StudyOfFile(BaseModel):
    """A study of a file that was uploaded to /v1/files: it is sent again from there if the server evicts it."""

    model_config = ConfigDict(extra="forbid")

    file_id: str
    preset: str = "auto"
    crop: str | None = None


_OF_FILE = {"application/json": {"schema": StudyOfFile.model_json_schema()}}


@router.post("", summary="Upload a scan and prepare it", openapi_extra=described(SCAN_BODY | _OF_FILE))
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
        async with received_file(request, kind) as file:
            work = gateway.studies.upload(key.owner, Content(file), preparation)
            return _study_object(note, await while_connected(request, work))


@router.get("/{id}")
async def _study(id: str, gateway: This, key: Asks, note: Note) -> dict[str, Any]:
    gateway.studies.known(key.owner, id)
    note.study = id  # only now: an id that was made up may be a name
    opened, info = await gateway.studies.described(key.owner, id)
    return _study_object(note, opened, info)


@router.delete("/{id}")
async def _delete_study(id: str, gateway: This, key: Uploads, note: Note) -> dict[str, Any]:
    gateway.studies.known(key.owner, id)
    note.study = id
    await gateway.studies.delete(key.owner, id)
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
    """A question that asks for a structure; sampling as of chat completions. merge: see `engine.api.M3D.segment`."""

    model_config = ConfigDict(extra="forbid")

    question: str
    merge: Literal["reference", "each"] = "reference"
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


@router.post("/{id}/segment")
async def _segment(
    id: str, body: SegmentRequest, request: Request, gateway: This, key: Asks, note: Note
) -> dict[str, Any]:
    """The answer and its segments: masks as files of gzipped NIfTI, see /v1/files/{id}/content, and measurements."""
    note.question = checked_question(body.question)
    sampling = body.model_dump(exclude={"question", "merge", "max_tokens"}, exclude_none=True)
    if body.max_tokens is not None:
        sampling["max_new_tokens"] = body.max_tokens
    Sampling.from_dict(sampling)  # before the scan is asked for

    async def segment(opened: OpenStudy) -> Segmentation:
        study, timeout = opened.study, gateway.settings.timeout_s
        return await gateway.m3d.segment(study, body.question, merge=body.merge, timeout=timeout, **sampling)

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
    """One entry a mask. Without intensities: the scan's voxels are the server's."""
    with ExitStack() as unkept:
        measured: list[Measurements] = []
        files: list[IO[bytes]] = []
        for segment in found.segments:
            measured.append(await asyncio.to_thread(lambda of: of.measurements, segment))
            files.append(unkept.enter_context(tempfile.TemporaryFile()))
            await asyncio.to_thread(_write_mask, segment, files[-1])
        stored = gateway.files.keep_masks(key.owner, files)
        unkept.pop_all()
    return [
        {
            "index": index,
            "words": segment.words,
            "span": segment.span,
            "score": segment.score,
            "mask": file_object(gateway, mask),
            "measurements": measures.to_dict(),
        }
        for index, (segment, mask, measures) in enumerate(zip(found.segments, stored, measured))
    ]


def _write_mask(segment: Segment, file: IO[bytes]) -> None:
    """As gzipped NIfTI, into a file that has no name: it is gone with the process, whatever ends it."""
    file.write(igzip.compress(mask_bytes(segment.mask, segment), mtime=0))


class RankRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


@router.post("/{id}/rank")
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
