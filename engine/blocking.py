"""The API on a blocking transport: what `M3DClient` and `M3DEngine` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from engine.api import M3D, Answer, EngineInfo, Messages, Ranking, Segmentation, Study, TextEmbeddings
from engine.methods import Asked, Methods, run

if TYPE_CHECKING:  # it would bring SciPy into every program that asks
    from engine.volume.crop import Crop

Self = TypeVar("Self", bound="BlockingM3D")


class TextStream:
    """An answer as it grows, see `engine.api.AnswerStream`."""

    def __init__(self, asked: Asked, transport: Any):
        self._asked = asked
        self._transport = transport

    @property
    def answer(self) -> Answer | None:
        return self._asked.answer

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        text = run(self._asked.next_text(), self._transport)
        if text is None:
            raise StopIteration
        return text

    def close(self) -> None:
        self._asked.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BlockingM3D(M3D):
    """`engine.api.M3D` on a transport of `engine.methods`. timeout: seconds, of calls that are given none."""

    def __init__(self, methods: Methods, transport: Any):
        self._methods = methods
        self._transport = transport

    @property
    def timeout(self) -> float | None:
        return self._methods.timeout

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def upload(
        self,
        scan: object,
        affine: np.ndarray | None = None,
        preset: str = "auto",
        *,
        crop: Crop | str | np.ndarray | None = None,
        timeout: float | None = None,
    ) -> Study:
        return run(self._methods.upload(scan, affine, preset, crop, timeout), self._transport)

    def ask(
        self,
        study: object,
        question: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Answer:
        return run(self._methods.ask(study, question, messages, timeout, sampling), self._transport)

    def stream(
        self,
        study: object,
        question: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> TextStream:
        asked = self._methods.asked(study, question, messages, sampling, True, timeout)
        run(asked.open(), self._transport)
        return TextStream(asked, self._transport)

    def segment(
        self,
        study: object,
        question: str | None = None,
        return_logits: bool = False,
        *,
        messages: Messages | None = None,
        merge: str = "reference",
        timeout: float | None = None,
        **sampling: Any,
    ) -> Segmentation:
        steps = self._methods.segment(study, question, messages, return_logits, merge, timeout, sampling)
        return run(steps, self._transport)

    def rank(self, study: object, texts: Sequence[str], *, timeout: float | None = None) -> Ranking:
        return run(self._methods.rank(study, texts, timeout), self._transport)

    def embed(self, study: object, *, timeout: float | None = None) -> np.ndarray:
        return run(self._methods.embed(study, timeout), self._transport)

    def embed_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> TextEmbeddings:
        return run(self._methods.embed_texts(texts, timeout), self._transport)

    def forget(self, study: Study, *, timeout: float | None = None) -> None:
        run(self._methods.forget(study, timeout), self._transport)

    def is_ready(self) -> bool:
        return self._transport.is_ready()

    def info(self, *, timeout: float | None = None) -> EngineInfo:
        return run(self._methods.info(timeout), self._transport)

    def close(self) -> None:
        self._transport.close()
