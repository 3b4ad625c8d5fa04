"""The engine's side: a running server, asked through the client library as users do."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from tritonclient.grpc import InferenceServerClient

from benchmarks.samples import Sample
from benchmarks.scans import BenchmarkScan
from engine.client import Answer, M3DClient, Segmentation, Study

ENCODERS = ("vision_encoder", "segmentation_encoder", "segmentation_head")


class Served:
    """One server, by its gRPC address.

    The parts of a sample: prepare (reading and preprocessing the scan), the graphs by name (from Triton's statistics,
    only where one request runs at a time), prefill and decode (the language model as its clock has it, vLLM's own
    scheduling included).
    """

    def __init__(self, url: str):
        self.client = M3DClient(url)
        self._triton = InferenceServerClient(url)

    def close(self) -> None:
        self.client.close()
        self._triton.close()

    def upload(self, scan: BenchmarkScan) -> Study:
        return self.client.upload(scan.array, scan.affine)

    def cold(self, scan: BenchmarkScan, question: str, tokens: int) -> tuple[Sample, Study]:
        """A question about a scan that the server has never seen: upload, then answer."""
        before = self._compute_s()
        started = time.perf_counter()
        study = self.upload(scan)
        uploaded = time.perf_counter() - started
        asked = self.ask(study, question, tokens)
        parts = {"prepare": study.info["prepare_s"], **self._since(before), **asked.parts}
        return Sample(uploaded + asked.total_s, uploaded + asked.first_s, asked.tokens, asked.prompt_tokens,
                      parts), study

    def ask(self, study: Study, question: str, tokens: int) -> Sample:
        """A question about a scan that the server knows."""
        started = time.perf_counter()
        first = None
        with self.client.stream(study, question, max_new_tokens=tokens) as stream:
            for _ in stream:
                first = first or time.perf_counter() - started
        return _sample(time.perf_counter() - started, first, stream.answer)

    def pieces(self, study: Study, question: str, tokens: int) -> Iterator[int]:
        """Ask; yields 1 for each piece of text as it comes, and at the end how many tokens the answer had beyond."""
        with self.client.stream(study, question, max_new_tokens=tokens) as stream:
            seen = 0
            for _ in stream:
                seen += 1
                yield 1
        yield max(0, len(stream.answer.token_ids) - seen)

    def segment(self, study: Study, question: str, tokens: int) -> tuple[Sample, Segmentation]:
        before = self._compute_s()
        started = time.perf_counter()
        found = self.client.segment(study, question, max_new_tokens=tokens)
        asked = _sample(time.perf_counter() - started, None, found.answer)
        return replace(asked, parts={**asked.parts, **self._since(before)}), found

    def during(self, work: Callable[[], object], study: Study, question: str, tokens: int) -> Sample:
        """`ask` while a thread does `work` again and again."""
        stop = threading.Event()

        def again() -> None:
            while not stop.is_set():
                work()

        thread = threading.Thread(target=again)
        thread.start()
        try:
            return self.ask(study, question, tokens)
        finally:
            stop.set()
            thread.join()

    def rank(self, study: Study, texts: Sequence[str]) -> Sample:
        started = time.perf_counter()
        self.client.rank(study, texts)
        return Sample(time.perf_counter() - started)

    def serves(self, model: str) -> bool:
        return self.client.server_info()["models"][model]

    def chats(self, studies: Sequence[Study], questions: Sequence[str], tokens: int, concurrency: int
              ) -> tuple[float, list[Sample]]:
        """`concurrency` clients, each asking one question after the other about a study of its own.

        questions: what each of them asks. Returns the seconds it all took, and the samples.
        """
        barrier = threading.Barrier(concurrency + 1)

        def chat(study: Study) -> list[Sample]:
            barrier.wait()
            return [self.ask(study, question, tokens) for question in questions]

        with ThreadPoolExecutor(concurrency) as pool:
            chats = [pool.submit(chat, study) for study in studies[:concurrency]]
            barrier.wait()
            started = time.perf_counter()
            samples = [sample for done in chats for sample in done.result()]
            return time.perf_counter() - started, samples

    # --- what the server says ----------------------------------------------------------------------------------------
    def _compute_s(self) -> dict[str, float]:
        """Seconds that the graphs have computed since the server started."""
        stats = self._triton.get_inference_statistics().model_stats
        return {model.name: model.inference_stats.compute_infer.ns / 1e9 for model in stats if model.name in ENCODERS}

    def _since(self, before: dict[str, float]) -> dict[str, float]:
        return {name: seconds - before[name] for name, seconds in self._compute_s().items() if seconds > before[name]}


def _sample(total: float, first: float | None, answer: Answer) -> Sample:
    clock = answer.timings
    parts = {"prefill": clock["first_token_s"], "decode": clock["last_token_s"] - clock["first_token_s"]}
    return Sample(total, first, len(answer.token_ids), clock["prompt_tokens"], parts)


def payload_bytes(found: Segmentation) -> tuple[int, int]:
    """(bytes of the mask on the wire, bytes of its logits as floats)."""
    packed = -(-found.mask.size // 8)
    return packed, found.mask.size * np.dtype(np.float32).itemsize
