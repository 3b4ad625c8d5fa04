"""Triton's own trace: when each of its models worked for a request, on the same clock as the client's.

Triton writes a list of events. Those with a `timestamps` list hold nanoseconds of the monotonic clock, which is also
time.perf_counter's on Linux; the others name the model of an id, and the id that called it.

It has no models that our Python models call (the encoders): Triton ends when it is to trace those for a request that is
answered through its sender. Their time is in Triton's statistics. Now and then it lacks a whole request to the decoder,
too; why is not known, so requests are shown that it has whole.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

# What is kept of a request to a model: that it was read from the network, waited, computed, and was sent.
STEPS = (
    ("GRPC_WAITREAD_END", "REQUEST_START", "read"),
    ("QUEUE_START", "COMPUTE_START", "queue"),
    ("COMPUTE_START", "COMPUTE_END", "compute"),
    ("GRPC_SEND_START", "GRPC_SEND_END", "send"),
)


@dataclass(frozen=True)
class Span:
    """A step of one request to one model. Seconds of the monotonic clock. called: by another model, not by a client."""

    model: str
    step: str
    start_s: float
    end_s: float
    called: bool


def read(path: Path) -> list[Span]:
    """The spans of the trace files `path`.0, `path`.1, ..., by their start; none if there are no files."""
    models: dict[int, str] = {}
    called: set[int] = set()
    stamps: dict[int, dict[str, int]] = {}
    events = itertools.chain.from_iterable(
        json.loads(file.read_text() or "[]") for file in path.parent.glob(f"{path.name}.*")
    )
    for event in events:
        if "model_name" in event:
            models[event["id"]] = event["model_name"]
        if "parent_id" in event:
            called.add(event["id"])
        for stamp in event.get("timestamps", ()):
            stamps.setdefault(event["id"], {})[stamp["name"]] = stamp["ns"]
    for ns in stamps.values():
        # A decoupled model's execution returns at once; it works until it has something to send.
        if "COMPUTE_END" in ns:
            ns["COMPUTE_END"] = max(ns["COMPUTE_END"], ns.get("GRPC_SEND_START", 0))
    found = [
        Span(models.get(id_, "?"), step, ns[start] / 1e9, ns[end] / 1e9, id_ in called)
        for id_, ns in stamps.items()
        for start, end, step in STEPS
        if start in ns and end in ns
    ]
    return sorted(found, key=lambda span: span.start_s)


def within(spans: list[Span], started: float, total_s: float) -> list[dict]:
    """{"model", "step", "start_s", "end_s", "called"} of the spans that began while one request ran alone.

    started: of that request, by time.perf_counter; the times are those since then.
    """
    return [
        {
            "model": s.model,
            "step": s.step,
            "start_s": s.start_s - started,
            "end_s": s.end_s - started,
            "called": s.called,
        }
        for s in spans
        if started <= s.start_s <= started + total_s
    ]
