"""What the benchmark asks: the part of the common API (`engine.api.M3D`) that it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Answerer(Protocol):
    """Whoever answers questions about scans, from several threads at once: `M3DClient`, or `M3DEngine`."""

    def upload(self, scan: object) -> Any:
        """A study; the scan is decoded, preprocessed and encoded once."""
        ...

    def ask(self, study: object, question: str, **sampling: Any) -> Any:
        """An answer: text, token_ids, finish_reason, timings.first_token_s; with `choices`, see `choice_logprobs`."""
        ...

    def segment(self, study: object, question: str, return_logits: bool = False, **sampling: Any) -> Any:
        """answer; mask: bool, the scan's own shape, or None; affine; logits: float32 [D, H, W], or None."""
        ...

    def embed(self, study: object) -> np.ndarray:
        """float32 [E], of length 1."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Any:
        """embeddings: float32 [T, E], of length 1."""
        ...

    def info(self) -> Any:
        """model: which one answers, with manifest_sha256."""
        ...


def choice_logprobs(answer: Any) -> Mapping[str, float]:
    """Letter -> log-probability at the answer's start, of an answer that was asked for with `choices`."""
    return answer.choices
