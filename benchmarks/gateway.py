"""The gateway beside gRPC: what it adds to a first token and to a new scan, and what many streams cost it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx

from benchmarks.scans import BenchmarkScan
from engine.errors import Unavailable
from engine.scan import pack_scan

ROOT = Path(__file__).resolve().parent.parent
STREAMS = 64  # clients that stream at the same time
_PATIENCE_S = 600.0
_LIMITS = ("--rate-per-minute", "1000000", "--concurrency", "1000")


class Gateway:
    """`m3d gateway` before a server, asked over HTTP on the loopback. Without keys: they cost one hash a request."""

    def __init__(self, process: subprocess.Popen, url: str):
        self._process = process
        self._url = url
        self._http = httpx.Client(base_url=url, timeout=_PATIENCE_S)

    @classmethod
    @contextlib.contextmanager
    def before(cls, server: str) -> Iterator[Gateway]:
        """server: its gRPC address."""
        with tempfile.TemporaryDirectory() as folder:
            where = ("--server", server, "--no-keys", "--port", "0", "--audit", f"{folder}/audit.jsonl")
            with subprocess.Popen(
                [sys.executable, "-m", "engine.cli", "gateway", *where, *_LIMITS],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                try:
                    gateway = cls(process, _ready(process))
                    with contextlib.closing(gateway._http):
                        yield gateway
                finally:
                    process.terminate()

    def upload(self, scan: BenchmarkScan) -> str:
        """The id of the scan's study."""
        content, _ = pack_scan(scan.array, scan.affine)
        answer = self._http.post("/studies", content=content, headers={"content-type": "application/octet-stream"})
        return answer.raise_for_status().json()["id"]

    def first_s(self, study: str, question: str, tokens: int) -> float:
        """Seconds until the first text of an answer, which is read to its end."""
        started, first = time.perf_counter(), None
        with self._http.stream("POST", "/chat/completions", json=_body(study, question, tokens)) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if first is None and _has_text(line):
                    first = time.perf_counter() - started
        return first or time.perf_counter() - started

    def streaming_share(self, study: str, questions: list[str], tokens: int) -> float:
        """Of one core, what the gateway takes while all questions are streamed at the same time."""
        return asyncio.run(self._streaming_share(study, questions, tokens))

    async def _streaming_share(self, study: str, questions: list[str], tokens: int) -> float:
        limits = httpx.Limits(max_connections=len(questions))
        async with httpx.AsyncClient(base_url=self._url, timeout=_PATIENCE_S, limits=limits) as http:

            async def read(question: str) -> None:
                async with http.stream("POST", "/chat/completions", json=_body(study, question, tokens)) as answer:
                    answer.raise_for_status()
                    async for _ in _lines(answer):
                        pass

            used, started = self._cpu_s(), time.perf_counter()
            await asyncio.gather(*map(read, questions))
            return (self._cpu_s() - used) / (time.perf_counter() - started)

    def _cpu_s(self) -> float:
        """Seconds of a core that its process has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _ready(process: subprocess.Popen) -> str:
    said = ""
    while (found := re.search(r"ready on (\S+)", said)) is None:
        line = process.stderr.readline() if process.stderr else ""
        if not line:
            raise Unavailable(f"the gateway did not start: {said}")
        said += line
    return found[1]


def _body(study: str, question: str, tokens: int) -> dict:
    content = [{"type": "file", "file": {"file_id": study}}, {"type": "text", "text": question}]
    return {
        "model": "m3d-lamed",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "stream": True,
    }


def _has_text(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Each line of an answer. Raises Unavailable for an error in it."""
    async for line in answer.aiter_lines():
        if line.startswith('data: {"error"'):
            raise Unavailable(f"an answer broke off: {line[:500]}")
        yield line
