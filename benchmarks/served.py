"""The engine's side: a running server, asked through the client library as users do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from benchmarks.scans import BenchmarkScan
from benchmarks.timings import Timing
from engine.client import Answer, M3DClient, Segmentation, Study
from engine.errors import InvalidInput
from engine.scan import pack_scan

ENCODERS = ("vision_encoder", "segmentation_encoder", "segmentation_head")
GRAPHS = (*ENCODERS, "clip_image_encoder", "clip_text_encoder")


class Served:
    """One server, by its gRPC address.

    The parts of a sample: prepare (reading and preprocessing the scan), the graphs by name (from Triton's statistics,
    only where one request runs at a time), prefill and decode (the language model as its clock has it, vLLM's own
    scheduling included).
    """

    def __init__(self, url: str):
        self.url = url
        self.client = M3DClient(url)
        self._triton = InferenceServerClient(url)

    def close(self) -> None:
        self.client.close()
        self._triton.close()

    def upload(self, scan: BenchmarkScan) -> Study:
        return self.client.upload(scan.array, scan.affine)

    def cold(self, scan: BenchmarkScan, question: str, tokens: int) -> tuple[Timing, Study]:
        """A question about a scan that the server has never seen: upload, then answer."""
        before = self._compute_s()
        started = time.perf_counter()
        study = self.upload(scan)
        uploaded = time.perf_counter() - started
        if study.info.cached:
            raise InvalidInput(
                "the server knows a scan that should be new to it: give a --scan with more than a few intensities"
            )
        asked = self.ask(study, question, tokens)
        parts = {"prepare": study.info.prepare_s, **self._since(before), **asked.parts}
        return replace(
            asked, total_s=uploaded + asked.total_s, first_s=uploaded + asked.first_s, parts=parts, started=started
        ), study

    def follow_up(self, study: Study, question: str, tokens: int) -> Timing:
        """Another question, with none beside it: if the server has to encode the scan again, its parts say so."""
        before = self._compute_s()
        asked = self.ask(study, question, tokens)
        return replace(asked, parts={**asked.parts, **self._since(before)})

    def upload_again(self, scan: BenchmarkScan) -> Timing:
        """A scan that the server should know; without parts if it does."""
        started = time.perf_counter()
        study = self.upload(scan)
        parts = {} if study.info.cached else {"prepare": study.info.prepare_s}
        return Timing(time.perf_counter() - started, parts=parts)

    def ask(self, study: Study, question: str, tokens: int) -> Timing:
        """A question, maybe one of many at the same time."""
        started = time.perf_counter()
        first = None
        with self.client.stream(study, question, max_new_tokens=tokens) as stream:
            for _ in stream:
                first = first or time.perf_counter() - started
        total = time.perf_counter() - started
        # The only token of an empty answer is the one that ends it.
        return _sample(started, total, first or total, stream.answer)

    def pieces(self, study: Study, question: str, tokens: int) -> Iterator[int]:
        """Ask; yields 1 for each piece of text as it comes, and at the end how many tokens the answer had beyond."""
        with self.client.stream(study, question, max_new_tokens=tokens) as stream:
            seen = 0
            for _ in stream:
                seen += 1
                yield 1
        yield max(0, len(stream.answer.token_ids) - seen)

    def segment(self, study: Study, question: str, tokens: int) -> tuple[Timing, Segmentation]:
        before = self._compute_s()
        started = time.perf_counter()
        found = self.client.segment(study, question, max_new_tokens=tokens)
        asked = _sample(started, time.perf_counter() - started, None, found.answer)
        return replace(asked, parts={**asked.parts, **self._since(before)}), found

    def during(self, work: Callable[[], object], study: Study, questions: Iterator[str], tokens: int) -> list[Timing]:
        """Questions one after the other while a thread does `work`; the last one may outlast it."""
        with ThreadPoolExecutor(1) as pool:
            working, samples = pool.submit(work), []
            while not samples or not working.done():
                samples.append(self.ask(study, next(questions), tokens))
            working.result()
        return samples

    def on_the_wire(
        self, scan: BenchmarkScan, questions: Iterator[str], segment_question: str | None, tokens: int
    ) -> dict[str, int]:
        """Bytes of gRPC messages: `scan` as a file; `upload` and `answer` of a new scan; `follow_up`; and of a mask
        `mask` (the response that has it), `logits` (a float for each of its voxels), `segment` (all messages
        of the request).

        Each is what both sides sent. Without a `segment_question` the last three are left out.
        """
        with M3DClient(self.url) as client:
            connection = client._transport
            connection.stub = counted = _CountedStub(connection.stub)
            found = {"scan": len(pack_scan(scan.array, scan.affine)[0])}
            study = client.upload(scan.array, scan.affine)
            found["upload"] = counted.taken()
            for name in ("answer", "follow_up"):
                client.ask(study, next(questions), max_new_tokens=tokens)
                found[name] = counted.taken()
            if segment_question:
                mask = client.segment(study, segment_question, max_new_tokens=tokens).mask
                found |= {
                    "mask": counted.largest,
                    "logits": mask.size * np.dtype(np.float32).itemsize,
                    "segment": counted.taken(),
                }
        return found

    def rank(self, study: Study, texts: Sequence[str]) -> Timing:
        before = self._compute_s()
        started = time.perf_counter()
        self.client.rank(study, texts)
        return Timing(time.perf_counter() - started, parts=self._since(before))

    def serves(self, model: str) -> bool:
        return model in self.client.info().models

    def chats(
        self, studies: Sequence[Study], questions: Sequence[str], tokens: int, concurrency: int
    ) -> tuple[float, list[Timing]]:
        """`concurrency` clients, each asking one question after the other about a study of its own.

        questions: what each of them asks. Returns the seconds it all took, and the samples.
        """
        barrier = threading.Barrier(concurrency + 1)

        def chat(study: Study) -> list[Timing]:
            barrier.wait()
            return [self.ask(study, question, tokens) for question in questions]

        with ThreadPoolExecutor(concurrency) as pool:
            chats = [pool.submit(chat, study) for study in studies[:concurrency]]
            barrier.wait()
            started = time.perf_counter()
            samples = [sample for done in chats for sample in done.result()]
            return time.perf_counter() - started, samples

    def parameter(self, model: str, name: str) -> str | None:
        """A parameter of a model's configuration, None if there is none or the server does not say."""
        try:
            parameters = self._triton.get_model_config(model).config.parameters
        except InferenceServerException:
            return None
        return parameters[name].string_value if name in parameters else None

    # --- what the server says ----------------------------------------------------------------------------------------
    def _compute_s(self) -> dict[str, float]:
        """Seconds that the graphs have computed since the server started."""
        stats = self._triton.get_inference_statistics().model_stats
        return {model.name: model.inference_stats.compute_infer.ns / 1e9 for model in stats if model.name in GRAPHS}

    def _since(self, before: dict[str, float]) -> dict[str, float]:
        return {name: seconds - before[name] for name, seconds in self._compute_s().items() if seconds > before[name]}


def _sample(started: float, total: float, first: float | None, answer: Answer) -> Timing:
    clock = answer.timings
    parts = {"prefill": clock.first_token_s, "decode": clock.last_token_s - clock.first_token_s}
    return Timing(total, first, len(answer.token_ids), clock.prompt_tokens, parts, clock.cached_tokens, started)


class _CountedStub:
    """Triton's gRPC service, with the bytes of the messages counted that go there and come back."""

    def __init__(self, stub):
        self._stub = stub
        self._sizes: list[int] = []

    @property
    def largest(self) -> int:
        """Bytes of the largest message since the last `taken`."""
        return max(self._sizes)

    def taken(self) -> int:
        """Bytes of all messages since the last call."""
        sizes, self._sizes = self._sizes, []
        return sum(sizes)

    def ModelInfer(self, request, timeout=None):
        return self.count(self._stub.ModelInfer(self.count(request), timeout=timeout))

    def ModelStreamInfer(self, requests, timeout=None):
        return _CountedCall(self._stub.ModelStreamInfer(map(self.count, requests), timeout=timeout), self.count)

    def count(self, message):
        self._sizes.append(message.ByteSize())
        return message


class _CountedCall:
    """A streaming call, as far as the client uses it."""

    def __init__(self, call, count: Callable):
        self._call = call
        self._count = count
        self.cancel = call.cancel

    def __iter__(self):
        return self

    def __next__(self):
        return self._count(next(self._call))
