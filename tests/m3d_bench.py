"""Stand-ins for the tests of M3D-Bench: whoever answers, and what a killed run starts."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from engine.api import Answer, Segmentation, Timings
from tests.m3d_data import LIVER, SIZE

REPORT = "Finding 5. The left lung is clear."
BOX = "It is at <bx_start>[0.125, 0.125, 0.062, 0.500, 0.469, 0.344]<bx_end>."  # of LIVER


@dataclass(frozen=True)
class Model:
    checkpoint: str = "tiny"
    manifest_sha256: str = "0" * 64


class Answerer:
    """What M3D-Bench uses of `engine.api.M3D`.

    It answers every question about the liver rightly, and draws the liver for all others.

    texts: question's part -> what is said then. killed_after: kills this process with that answer.
    models: that are served.
    """

    def __init__(
        self,
        model: Model = Model(),
        texts: dict[str, str] | None = None,
        killed_after: int | None = None,
        models: tuple[str, ...] = ("m3d_chat", "m3d_segment", "m3d_retrieve"),
    ):
        self.model, self.texts, self.killed_after, self.models = model, texts or {}, killed_after, models
        self.uploads: list[str] = []
        self.questions: list[str] = []
        self.forgotten: list[str] = []
        self.choices: list[tuple[str, ...]] = []
        self.in_flight = 0
        self._lock = threading.Lock()

    def info(self):
        return SimpleNamespace(model=self.model, models=self.models)

    def upload(self, scan):
        with self._lock:
            self.uploads.append(str(scan))
        return SimpleNamespace(path=str(scan))

    def ask(self, study, question, **sampling):
        with self._lock:
            self.questions.append(question)
            self.choices.append(sampling.get("choices", ()))
            if len(self.questions) == self.killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
        said = next((text for part, text in self.texts.items() if part in question), None)
        if said is None:
            said = "A. Axial" if "Choices:" in question else BOX if "liver" in question else REPORT
        return Answer(
            text=said,
            token_ids=(1, 2, 3),
            finish_reason="stop",
            boxes=np.zeros((0, 6)),
            timings=Timings(100, 0, 3, 0.25, 0.5, 0.25, 0.5),
            choices={choice: -float(number) for number, choice in enumerate(sampling.get("choices", ()))},
        )

    def segment(self, study, question, return_logits=False, **sampling):
        answer = self.ask(study, question, **sampling)
        mask = np.zeros(SIZE, bool)
        mask[LIVER] = True
        logits = np.where(mask, 9, -9).astype(np.float32) if return_logits else None
        return Segmentation(answer=answer, mask=mask, affine=np.eye(4), logits=logits)

    def forget(self, study):
        with self._lock:
            self.forgotten.append(study.path)

    def embed(self, study):
        return embedding(Path(study.path).parent.name[-1])

    def embed_texts(self, texts):
        return SimpleNamespace(embeddings=np.stack([embedding(text.split()[1][0]) for text in texts]))


def embedding(name: str) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
    vector = rng.normal(size=8).astype(np.float32)
    return vector / np.linalg.norm(vector)


def bench(arguments: list[str], answerer) -> int:
    """m3d_bench.py with `answerer` instead of a server, and without WordNet."""
    import contextlib
    from unittest import mock

    from benchmarks import m3d_bench
    from engine.errors import Unavailable

    offline = mock.Mock(side_effect=Unavailable("offline"))
    answers = mock.Mock(return_value=contextlib.nullcontext(answerer))
    with mock.patch.object(m3d_bench, "_answerer", answers), mock.patch.object(m3d_bench, "load_meteor", offline):
        return m3d_bench.main(arguments)


def kill_after(answers: int) -> None:
    """Kill this process with the answer of that number that an `M3DEngine` gives."""
    from itertools import count

    from engine import M3DEngine

    given, ask = count(1), M3DEngine.ask

    def counted(*args, **kwargs):
        answer = ask(*args, **kwargs)
        if next(given) == answers:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    M3DEngine.ask = counted


if __name__ == "__main__":
    killed_after, *arguments = sys.argv[1:]
    if "--repository" in arguments:
        from benchmarks import m3d_bench

        kill_after(int(killed_after))
        m3d_bench.main(arguments)
    else:
        bench(arguments, Answerer(killed_after=int(killed_after)))
