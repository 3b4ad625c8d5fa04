"""How much sooner the same samples are answered than in the reference's way: one at a time, by eager PyTorch.

Both sides begin with the scan's file and end with the text or the mask; neither knows a scan at first. Likelihoods of
choices, which the reference does not compute, are left out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
from rich.progress import track

from benchmarks.baseline import Baseline
from benchmarks.bench.runner import Studies, answered
from benchmarks.bench.samples import MASKED, Sample, Truth, is_nifti, read_truth
from benchmarks.scans import BenchmarkScan
from engine.api import M3D


def chosen(samples: Mapping[str, Sequence[Sample]], most: int) -> list[Sample]:
    """Samples of all tasks with an answer: all of one scan after the other, the same ones in every run."""
    found = [sample for task, of in samples.items() if task != "retrieval" for sample in of]

    def order(sample: Sample) -> tuple[bytes, str, str]:
        return hashlib.sha256(f"{sample.scan}/{sample.image.name}".encode()).digest(), sample.task, sample.key

    return sorted(found, key=order)[:most]


def compared(m3d: M3D, eager: Baseline, samples: Sequence[Sample], concurrency: int, new_tokens: int) -> dict:
    """Time both sides. The studies of these scans are dropped from the engine first.

    Returns:
        n, scans, concurrency; precision of eager PyTorch; engine, eager: {"seconds" of all, "parts": part -> seconds of
        all}, of the engine as each sample waited for them, several at a time; ratio of eager to engine.
    """
    truths = [read_truth(sample) for sample in samples]
    engine = _engine(m3d, samples, truths, concurrency, new_tokens)
    slow = _eager(eager, samples, truths, new_tokens)
    return {
        "n": len(samples),
        "scans": len({sample.image for sample in samples}),
        "concurrency": concurrency,
        "precision": eager.precision,
        "engine": engine,
        "eager": slow,
        "ratio": round(slow["seconds"] / engine["seconds"], 2),
    }


def _engine(m3d: M3D, samples: Sequence[Sample], truths: Sequence[Truth], concurrency: int, new_tokens: int) -> dict:
    for image in {sample.image for sample in samples}:
        m3d.forget(m3d.upload(image))
    studies = Studies(m3d, samples)

    def one(pair: tuple[Sample, Truth]) -> dict[str, float]:
        sample, truth = pair
        study, upload_s = studies(sample.image)
        began = time.monotonic()
        found = answered(m3d, sample, truth, study, new_tokens, likelihoods=False)
        taken = time.monotonic() - began
        timings = (found.answer if sample.task in MASKED else found).timings
        studies.done(sample.image)
        parts = {"upload": upload_s, "first token": timings.first_token_s}
        parts["other tokens"] = timings.last_token_s - timings.first_token_s
        return parts | {"mask and the rest": taken - timings.last_token_s}

    started = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        parts = list(pool.map(one, zip(samples, truths)))
    return _sums(time.monotonic() - started, parts)


def _eager(eager: Baseline, samples: Sequence[Sample], truths: Sequence[Truth], new_tokens: int) -> dict:
    eager.ask(_scan(samples[0]), truths[0].question, 1)  # the first run of a process takes longer
    started, parts = time.monotonic(), []
    for sample, truth in track(list(zip(samples, truths)), description="eager PyTorch"):
        scan = _scan(sample)
        if sample.task in MASKED:
            timed, _ = eager.segment(scan, truth.question, new_tokens)
        else:
            timed = eager.ask(scan, truth.question, new_tokens)
        parts.append({**timed.parts, "the rest": timed.total_s - sum(timed.parts.values())})
    return _sums(time.monotonic() - started, parts)


def _scan(sample: Sample) -> BenchmarkScan:
    if is_nifti(sample.image):
        image = nibabel.load(sample.image)
        return BenchmarkScan(np.asanyarray(image.dataobj), image.affine)
    return BenchmarkScan(np.load(sample.image), None)


def _sums(seconds: float, parts: Sequence[Mapping[str, float]]) -> dict:
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        "seconds": round(seconds, 5),
        "parts": {name: round(sum(part.get(name, 0.0) for part in parts), 4) for name in names},
    }
