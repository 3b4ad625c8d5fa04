"""An `AsyncM3D` that tests hold, and a gateway before it on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from pathlib import Path

import numpy as np
import uvicorn

from engine.api import (
    Answer,
    ChosenToken,
    EngineInfo,
    MeasuredMasks,
    ModelInfo,
    Ranking,
    ScoredToken,
    Segment,
    Segmentation,
    Study,
    StudyInfo,
    TextEmbeddings,
    Timings,
)
from engine.errors import InvalidInput, StudyNotFound
from engine.gateway.app import create
from engine.gateway.audit import Audit
from engine.gateway.keys import Keys
from engine.gateway.serving import configuration
from engine.gateway.settings import GatewaySettings

PATIENCE_S = 60
MODEL = ModelInfo("owner/name", "0" * 64, "cpu", "fp32", "f" * 64)
ANSWER = ("The liver ", "is ", "normal.")
EMBEDDING = np.array([0.6, 0.8], np.float32)


def answer(texts=ANSWER, sampling=None, history_used=None) -> Answer:
    """With a log-probability for each of the texts, and likelihoods of the choices, if they were asked for."""
    timings = Timings(300, 256, len(texts), 0.1, 0.2, first_text_s=0.1, total_s=0.2)
    sampling = sampling or {}
    most, scored = sampling.get("logprobs"), ()
    if most is not None:
        tops = (ScoredToken(0, "a", -0.5), ScoredToken(1, "\ufffd", float("-inf")))[:most]
        scored = tuple(ChosenToken(number, text, -0.5, tops) for number, text in enumerate(texts))
    choices = {text: -float(number + 1) for number, text in enumerate(sampling.get("choices", ()))}
    boxes = np.array([[0, 1, 2, 3, 4, 5.0]])
    details = {"logprobs": scored, "choices": choices, "history_used": history_used}
    return Answer("".join(texts), tuple(range(len(texts))), "stop", boxes, timings, **details)


class FakeM3D:
    """Answers ANSWER to everything. What it waits for: `may_answer` before the first text, `may_go_on` after it,
    `may_upload` and `may_forget`.

    uploads: contents, with what came with them. asked: (handle, question, sampling). turns: of the last question.
    held: the studies by handle. mask: of one [SEG]; with merge="each" there are two of them.
    error: raised instead of an answer; late_error: after its first text. ended: set when a stream was closed.
    """

    def __init__(self):
        self.uploads: list[tuple[bytes, str, str | None]] = []
        self.asked: list[tuple[str, str, dict]] = []
        self.turns: list = []
        self.held: dict[str, StudyInfo] = {}
        self.secret = b"server"
        self.texts = ANSWER
        self.mask: np.ndarray | None = np.ones((2, 3, 4), bool)
        self.error: Exception | None = None
        self.late_error: Exception | None = None
        self.upload_error: Exception | None = None
        self.ready = True
        self.may_answer, self.may_go_on = threading.Event(), threading.Event()
        self.may_upload, self.may_forget = threading.Event(), threading.Event()
        self.let_go()
        self.waiting = threading.Semaphore(0)  # released when something waits for one of them
        self.ended = threading.Event()
        self.closed = False

    async def upload(self, scan, affine=None, preset="auto", *, crop=None, timeout=None) -> Study:
        content = bytes(await asyncio.to_thread(scan.read))
        await self.wait(self.may_upload)
        if self.upload_error is not None:
            raise self.upload_error
        if preset not in ("auto", "ct"):
            raise InvalidInput(f"unknown preset {preset}")
        self.uploads.append((content, preset, crop))
        handle = hashlib.sha256(self.secret + content + preset.encode() + str(crop).encode()).hexdigest()
        cached = handle in self.held
        self.held[handle] = StudyInfo("ct", "it has negative values", (2, 3, 4), (1, 2, 3), "RAS", 0.5, cached, MODEL)
        return Study(handle, self.held[handle])

    def stream(self, study, *, messages, timeout=None, **sampling):
        return FakeStream(self, study, messages, sampling)

    async def segment(self, study, question, *, merge="reference", timeout=None, **sampling) -> Segmentation:
        self.check(study)
        self.asked.append((study.handle, question, sampling))
        affine = np.diag([1.0, 2, 3, 1])
        if self.mask is None:
            return Segmentation(answer(), None, affine)
        masks = [self.mask, ~self.mask] if merge == "each" else [self.mask]
        measured = MeasuredMasks(masks, affine, None, "ct")
        segments = tuple(
            Segment(mask, affine, 0.75, f"w{index}", (index, index + 2), measured, index)
            for index, mask in enumerate(masks)
        )
        return Segmentation(answer(("[SEG]",) * len(masks)), self.mask, affine, segments=segments)

    async def rank(self, study, texts, *, timeout=None) -> Ranking:
        self.check(study)
        scores = np.linspace(0, 1, len(texts), dtype=np.float32)
        return Ranking(tuple(texts), scores, tuple(len(text) > 9 for text in texts), 512)

    async def embed(self, study, *, timeout=None):
        self.check(study)
        return EMBEDDING

    async def embed_texts(self, texts, *, timeout=None) -> TextEmbeddings:
        vectors = np.tile(EMBEDDING[::-1], (len(texts), 1))
        return TextEmbeddings(tuple(texts), vectors, tuple(len(text) > 9 for text in texts), 512)

    async def forget(self, study, *, timeout=None) -> None:
        self.check(study)
        await self.wait(self.may_forget)
        del self.held[study.handle]

    async def describe(self, study, *, timeout=None) -> StudyInfo:
        self.check(study)
        return self.held[study.handle]

    async def info(self, *, timeout=None) -> EngineInfo:
        return EngineInfo(MODEL, ("m3d_chat", "m3d_segment", "m3d_retrieve"), "0.0")

    async def is_ready(self) -> bool:
        return self.ready

    async def close(self) -> None:
        self.closed = True

    def check(self, study) -> None:
        if self.error is not None:
            raise self.error
        if study.handle not in self.held:
            raise StudyNotFound(f"study {study.handle} is unknown")

    def let_go(self) -> None:
        """Nothing waits."""
        for event in (self.may_answer, self.may_go_on, self.may_upload, self.may_forget):
            event.set()

    async def wait(self, event: threading.Event) -> None:
        if not event.is_set():
            self.waiting.release()
            while not event.is_set():
                await asyncio.sleep(0.01)


class FakeStream:
    def __init__(self, m3d: FakeM3D, study, turns, sampling):
        self.m3d, self.study, self.turns, self.sampling = m3d, study, turns, sampling
        self.answer = None
        self.sent = 0

    def __aiter__(self):
        return self

    async def __anext__(self) -> str:
        m3d = self.m3d
        if not self.sent:
            await m3d.wait(m3d.may_answer)
            m3d.check(self.study)
            m3d.asked.append((self.study.handle, self.turns[-1].text, self.sampling))
            m3d.turns = [tuple(turn) for turn in self.turns]
        else:
            await m3d.wait(m3d.may_go_on)
            if m3d.late_error is not None:
                raise m3d.late_error
        if self.sent == len(m3d.texts):
            self.answer = answer(m3d.texts, self.sampling, False if len(self.turns) > 1 else None)
            raise StopAsyncIteration
        self.sent += 1
        return m3d.texts[self.sent - 1]

    async def aclose(self) -> None:
        self.m3d.ended.set()


class RunningGateway:
    """A gateway under uvicorn on a thread. url: of OpenAI's routes. audit: the lines until now."""

    def __init__(self, m3d, folder: Path, keys: Path | None, settings: GatewaySettings, questions=False, **tls):
        self.m3d = m3d
        self._audit = folder / "audit.jsonl"
        opened = Keys(keys) if keys is not None else None
        self.door = create(m3d, opened, settings, Audit(self._audit, questions), "fake:8001")
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(64)
        self.port = self._socket.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"
        self._server = uvicorn.Server(configuration(self.door, **tls))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._socket])))
        self._thread.start()

    @property
    def in_work(self) -> int:
        return self.door._concurrency.total

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    @property
    def files(self):
        return self.door._routes.state.gateway.files

    @property
    def studies(self):
        return self.door._routes.state.gateway.studies

    def audit(self) -> list[dict]:
        return [json.loads(line) for line in self._audit.read_text().splitlines()]

    def stop(self) -> None:
        self.m3d.let_go()
        if not self._thread.is_alive():
            return
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self.m3d.closed and self.in_work == 0 and self.door._room.taken == 0 and self.files.size == 0
