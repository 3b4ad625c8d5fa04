"""What each method of the API does, as a sequence of requests, whoever carries them out.

A method is a generator: it yields calls of a transport, is sent their results, and returns what the user gets. `run`
carries them out with a blocking transport; `AsyncM3DClient` awaits them. A transport has

    infer(model, inputs, timeout) -> Outputs          one request, one response
    upload(file, inputs, timeout) -> Outputs          a scan to the model `study`; `inputs` are what comes with it
    stream(model, inputs, timeout) -> responses       one request, any number of responses, see `Responses`
    work(function, *arguments)                        that takes time, on this side
    is_ready() -> bool
    close()

where inputs are named by the tensors of engine.contract.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np

from engine import contract
from engine.api import (
    Answer,
    AnswerDetails,
    AnswerInfo,
    ChosenToken,
    EngineInfo,
    MeasuredMasks,
    Messages,
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
from engine.contract import Tensor
from engine.errors import Cancelled, InvalidInput, StudyNotFound, Unavailable, shortened
from engine.prompt.turns import USER, Turn, checked_turns, history_to_json
from engine.sampling import Sampling
from engine.seg_states import EACH, checked_merge, spans_of_words
from engine.source import Source, content_of

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # it would bring SciPy into every program that asks
    from engine.volume.crop import Crop

T = TypeVar("T")
Call = Callable[[Any], Any]
Steps = Generator[Call, Any, T]
Inputs = dict[Tensor, object]

# The steps of m3d_chat and m3d_segment, asked one by one: Triton does not pass a cancellation on to a step of an
# ensemble that is running, so that an answer nobody waits for any more would be decoded to its end.
STUDY, DECODER, SEGMENTATION, RETRIEVAL = "study", "decoder", "segmentation", "retrieval"


class Responses(Protocol):
    """The responses to one request. An asynchronous transport's `read` and `finish` are awaited."""

    def read(self) -> Any:
        """The next one's `Outputs`; None after the last."""
        ...

    def finish(self) -> Any:
        """Read to the end, once the last response that matters has come."""
        ...

    def close(self) -> None:
        """Cancel the request."""
        ...


class File:
    """A scan's file, in pieces that lie one behind the other. Whoever sends it takes them, and nobody else has them."""

    def __init__(self, pieces: Sequence[bytes | memoryview]):
        self._pieces: Sequence[bytes | memoryview] | None = pieces

    def take(self) -> Sequence[bytes | memoryview]:
        pieces, self._pieces = cast(Sequence[bytes | memoryview], self._pieces), None
        return pieces


class Outputs(dict[str, np.ndarray]):
    """A response's outputs by name. One that the contract has and the server did not send is another version's."""

    def __missing__(self, name: str):
        raise other_version(f"its response has no {name}")

    def text(self, name: str) -> str:
        """The one text of a BYTES output."""
        return self[name].reshape(-1)[0].decode("utf-8", errors="replace")


def other_version(what: str) -> Unavailable:
    """The error for a server whose tensors are not this client's."""
    return Unavailable(
        f"the server runs another version of m3d-engine than this client's {importlib.metadata.version('m3d-engine')} "
        f"({what}): install the same version on both sides"
    )


def not_served(what: str) -> Unavailable:
    """The error for a model that is not there. what: was said of it."""
    return Unavailable(
        f"the server does not serve this: {what}. A repository serves what its checkpoint has: "
        "ranking needs --clip-checkpoint at export, segmentation a checkpoint with a [SEG] token"
    )


def run(steps: Steps[T], transport: Any) -> T:
    """Carry the calls of a method out, one after the other. What a call raises is raised in the method."""
    try:
        call = next(steps)
        while True:
            try:
                result = call(transport)
            except BaseException as error:
                call = steps.throw(error)
            else:
                call = steps.send(result)
    except StopIteration as end:
        return end.value


class Methods:
    """The methods of `engine.api.M3D` as steps. What can be refused without a request is refused at once.

    timeout: seconds, of a call that is given none; None for no limit.
    """

    def __init__(self, timeout: float | None):
        self.timeout = _checked_timeout(timeout)

    def upload(
        self, scan: object, affine: np.ndarray | None, preset: str, crop: Any, timeout: float | None
    ) -> Steps[Study]:
        return self.uploaded(scan, affine, preset, crop, self._left(timeout))

    def uploaded(
        self, scan: object, affine: np.ndarray | None, preset: str, crop: Any, left: Countdown
    ) -> Steps[Study]:
        """`upload`, as a part of a call whose time runs."""
        if not isinstance(preset, str):
            raise InvalidInput(f"a preset is named by a text, such as 'auto', not by {type(preset).__name__}")
        region = None
        if crop is not None:
            from engine.volume.crop import Crop

            region = Crop.of(crop)
        return self._upload(scan, affine, preset, region, left)

    def asked(
        self,
        study: object,
        question: str | None,
        messages: Messages | None,
        sampling: Mapping[str, Any],
        streaming: bool,
        timeout: float | None,
        hint: bool = False,
    ) -> Asked:
        """A question, not sent yet. hint: that a mask will be wanted, so that it is encoded for while decoding."""
        turns = _turns(question, messages)
        inputs: Inputs = {
            contract.QUESTION: turns[-1].text,
            contract.HISTORY: history_to_json(turns) if len(turns) > 1 else None,
            contract.SAMPLING: Sampling.from_dict(sampling).to_json(),
            contract.STREAM: streaming,
        }
        return Asked(self, study, inputs, self._seconds(timeout), hint)

    def ask(
        self,
        study: object,
        question: str | None,
        messages: Messages | None,
        timeout: float | None,
        sampling: Mapping[str, Any],
    ) -> Steps[Answer]:
        return _only_answer(self.asked(study, question, messages, sampling, False, timeout))

    def segment(
        self,
        study: object,
        question: str | None,
        messages: Messages | None,
        return_logits: bool,
        merge: str,
        timeout: float | None,
        sampling: Mapping[str, Any],
    ) -> Steps[Segmentation]:
        asked = self.asked(study, question, messages, sampling, False, timeout, hint=True)
        return self._segment(asked, return_logits, checked_merge(merge))

    def rank(self, study: object, texts: Sequence[str], timeout: float | None) -> Steps[Ranking]:
        return self._rank(study, _checked_texts(texts), self._left(timeout))

    def embed(self, study: object, timeout: float | None) -> Steps[np.ndarray]:
        left = self._left(timeout)
        known = yield from self.study_of(study, left)
        outputs = yield from self._resent(
            lambda by: lambda t: t.infer(RETRIEVAL, {contract.STUDY_IN: by.handle}, left()), known, left
        )
        return outputs[contract.SCAN_EMBEDDING]

    def embed_texts(self, texts: Sequence[str], timeout: float | None) -> Steps[TextEmbeddings]:
        return self._embed_texts(_checked_texts(texts), self._left(timeout))

    def forget(self, study: Study, timeout: float | None) -> Steps[None]:
        if not isinstance(study, Study):
            raise InvalidInput(f"forget takes a study, as upload returns it, not {type(study).__name__}")
        return self._forget(study, self._left(timeout))

    def info(self, timeout: float | None) -> Steps[EngineInfo]:
        left = self._left(timeout)
        outputs = yield lambda t: t.infer(STUDY, {contract.DESCRIBE: True}, left())
        return typed(EngineInfo, outputs.text(contract.MODEL_INFO))

    # --- inside ------------------------------------------------------------------------------------------------------
    def _upload(self, scan, affine, preset: str, crop: Crop | None, left: Countdown) -> Steps[Study]:
        file, space, content = yield lambda t: t.work(_packed, scan, affine)
        inputs: Inputs = {contract.AFFINE_IN: space, contract.PRESET: preset}
        if crop is not None:
            inputs |= {contract.CROP: crop.box, contract.CROP_UNIT: crop.unit}
        outputs = yield lambda t: t.upload(file, inputs, left())
        return Study(
            outputs.text(contract.STUDY),
            typed(StudyInfo, outputs.text(contract.STUDY_INFO)),
            Source(scan, affine, preset, crop, content),
        )

    def _segment(self, asked: Asked, return_logits: bool, merge: str) -> Steps[Segmentation]:
        answer, outputs = yield from asked.whole()
        if not len(outputs[contract.SEG_STATES]):
            return Segmentation(answer, None, np.zeros((4, 4)), None)

        def draw(to: Study) -> Call:
            inputs = {
                contract.STUDY_IN: to.handle,
                contract.SEG_STATES: outputs[contract.SEG_STATES],
                contract.RETURN_LOGITS: return_logits,
                contract.MERGE: merge,
            }
            return lambda t: t.infer(SEGMENTATION, inputs, asked.left())

        drawn = yield from self._resent(draw, asked.study, asked.left)
        spans = [(int(start), int(end)) for start, end in outputs[contract.SEG_SPANS]]
        preset = asked.study.info.preset if asked.study.info else None
        source = asked.study.source
        return (yield lambda t: t.work(_segmentation, answer, spans, drawn, merge, source, preset))

    def _rank(self, study: object, texts: Sequence[str], left: Countdown) -> Steps[Ranking]:
        known = yield from self.study_of(study, left)

        def score(by: Study) -> Call:
            return lambda t: t.infer(RETRIEVAL, {contract.TEXTS: texts, contract.STUDY_IN: by.handle}, left())

        outputs = yield from self._resent(score, known, left)
        return Ranking(tuple(texts), outputs[contract.SCORES], *_cut(outputs))

    def _embed_texts(self, texts: Sequence[str], left: Countdown) -> Steps[TextEmbeddings]:
        outputs = yield lambda t: t.infer(RETRIEVAL, {contract.TEXTS: texts}, left())
        return TextEmbeddings(tuple(texts), outputs[contract.TEXT_EMBEDDINGS], *_cut(outputs))

    def _forget(self, study: Study, left: Countdown) -> Steps[None]:
        try:
            yield lambda t: t.infer(STUDY, {contract.STUDY_IN: study.handle, contract.FORGET: True}, left())
        except StudyNotFound:
            object.__setattr__(study, "source", None)
            raise
        object.__setattr__(study, "source", None)  # else the next question would send the scan again

    def study_of(self, study: object, left: Countdown) -> Steps[Study]:
        """The study itself, or of what `upload` takes a new one."""
        if isinstance(study, Study):
            return study
        return (yield from self.uploaded(study, None, "auto", None, left))

    def send_again(self, study: Study, left: Countdown, evicted: StudyNotFound) -> Steps[None]:
        """Upload an evicted study again, from where it came.

        A server that was started anew gives it another handle, which the study has from then on.
        """
        if study.source is None:
            raise evicted
        source = study.source
        _log.info("the server no longer holds a study: its scan is sent again")
        again = yield from self._upload(source.scan, source.affine, source.preset, source.crop, left)
        is_same_scan = again.source is not None and again.source.content == source.content
        # The affine has no part in the content; the server tells what follows from it.
        compared = ("model", "shape", "spacing_mm", "orientation")
        if not is_same_scan or any(getattr(again.info, name) != getattr(study.info, name) for name in compared):
            raise InvalidInput(
                f"the server does not hold {study} any more, and now the scan at its source, or the "
                "server's model, is another: upload it again to ask about what is there now"
            )
        object.__setattr__(study, "handle", again.handle)  # else each question to come would send the scan again

    def _resent(self, request: Callable[[Study], Call], study: Study, left: Countdown) -> Steps[Outputs]:
        """The outputs of request(study); if the study was evicted, it is sent and the request is made again, once."""
        try:
            return (yield request(study))
        except StudyNotFound as evicted:
            yield from self.send_again(study, left, evicted)
        return (yield request(study))

    def _left(self, timeout: float | None) -> Countdown:
        return Countdown(self._seconds(timeout))

    def _seconds(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else _checked_timeout(timeout)


class Asked:
    """A question and the responses to it. If its study was evicted, it is sent and asked again, once.

    study, left: the question's, and what is left of the timeout, from `open` on. answer: the whole, once it is there.
    """

    def __init__(self, methods: Methods, study: object, inputs: Inputs, timeout: float | None, hint: bool):
        self._methods = methods
        self._given = study
        self._inputs = inputs
        self._timeout = timeout
        self._hint = hint
        self._responses: Any = None  # Responses, once the question is sent
        self._has_responded = self._closed = False
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._started = 0.0
        self._first_text_s: float | None = None
        self.study: Study
        self.left: Countdown
        self.answer: Answer | None = None

    def open(self) -> Steps[None]:
        """Send the question. The timeout begins."""
        self._check_open()
        self.left = Countdown(self._timeout)
        self.study = yield from self._methods.study_of(self._given, self.left)
        yield from self._send()
        self._started = time.monotonic()

    def next_text(self) -> Steps[str | None]:
        """The next piece of text; None when the answer is whole."""
        while self.answer is None:
            text = self._add((yield from self._read()))
            yield from self._finish()
            if text:
                return text
        return None

    def whole(self) -> Steps[tuple[Answer, Outputs]]:
        """Send the question, and wait for the answer; also the outputs of its last response."""
        try:
            yield from self.open()
            while True:
                outputs = yield from self._read()
                self._add(outputs)
                yield from self._finish()
                if self.answer is not None:
                    return self.answer, outputs
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the request."""
        self._closed = True
        if self._responses is not None:
            self._responses.close()

    def _send(self) -> Steps[None]:
        handle: Inputs = {contract.STUDY_IN: self.study.handle}
        if self._hint:
            try:
                yield lambda t: t.infer(STUDY, handle | {contract.SEGMENT_HINT: True}, self.left())
            except StudyNotFound:
                pass  # the question meets it again, and sends the study
        self._check_open()
        self._responses = yield lambda t: t.stream(DECODER, self._inputs | handle, self.left())

    def _check_open(self) -> None:
        if self._closed:
            raise Cancelled("the request was cancelled by this client")

    def _read(self) -> Steps[Outputs]:
        self._check_open()
        try:
            outputs = yield lambda _: self._responses.read()
        except StudyNotFound as evicted:
            if self._has_responded:
                raise
            self._has_responded = True
            yield from self._methods.send_again(self.study, self.left, evicted)
            yield from self._send()
            outputs = yield lambda _: self._responses.read()
        self._has_responded = True
        if outputs is None:
            raise Unavailable("the server closed the stream before the answer was complete")
        return outputs

    def _finish(self) -> Steps[None]:
        """Read to the end of the stream, if the answer is whole."""
        if self.answer is not None:
            yield lambda _: self._responses.finish()

    def _add(self, outputs: Outputs) -> str:
        text, now = outputs.text(contract.TEXT), time.monotonic() - self._started
        if text and self._first_text_s is None:
            self._first_text_s = now
        self._texts.append(text)
        self._token_ids += outputs[contract.TOKEN_IDS].tolist()
        if reason := outputs.text(contract.FINISH_REASON):
            cost, details = _info(outputs.text(contract.ANSWER_INFO))
            timings = Timings(**vars(cost), first_text_s=self._first_text_s, total_s=now)
            ids = tuple(self._token_ids)
            self.answer = Answer("".join(self._texts), ids, reason, outputs[contract.BOXES], timings, **vars(details))
        return text


def _only_answer(asked: Asked) -> Steps[Answer]:
    answer, _ = yield from asked.whole()
    return answer


class Countdown:
    """Seconds that are left of a timeout for the requests that share it; None for no limit."""

    def __init__(self, timeout: float | None):
        self._end = None if timeout is None else time.monotonic() + timeout

    def __call__(self) -> float | None:
        return None if self._end is None else max(0.001, self._end - time.monotonic())


def _packed(scan: object, affine: np.ndarray | None) -> tuple[File, np.ndarray | None, tuple[int, int]]:
    """A scan as a file, its affine, and what the file is known by."""
    from engine.scan import scan_pieces

    pieces, space = scan_pieces(scan, affine)
    return File(pieces), space, content_of(pieces)


def _segmentation(
    answer: Answer,
    spans: Sequence[tuple[int, int]],
    drawn: Outputs,
    merge: str,
    source: Source | None,
    preset: str | None,
) -> Segmentation:
    """spans: of each [SEG] in the answer's text. drawn: what the masks' model answered."""
    mask, affine = _unpacked(drawn[contract.MASK], drawn[contract.MASK_SHAPE]), drawn[contract.MASK_AFFINE]
    header = drawn[contract.MASK_HEADER].tobytes() or None
    masks = [mask]
    if merge == EACH:
        masks = [_unpacked(bits, drawn[contract.MASK_SHAPE]) for bits in drawn[contract.SEGMENT_MASKS]]
    words, scores = spans_of_words(answer.text, spans, merge), drawn[contract.SEGMENT_SCORES].tolist()
    if not len(words) == len(scores) == len(masks):
        raise other_version(f"it drew {len(masks)} masks with {len(scores)} scores for {len(words)} [SEG]")
    logits = np.split(drawn[contract.LOGITS], len(masks)) if drawn[contract.LOGITS].size else [None] * len(masks)
    measured = MeasuredMasks(masks, affine, source, preset)
    segments = tuple(
        Segment(
            masks[index],
            affine,
            None if math.isnan(scores[index]) else scores[index],
            answer.text[slice(*words[index])],
            words[index],
            measured,
            index,
            logits[index],
            header,
        )
        for index in range(len(masks))
    )
    return Segmentation(answer, mask, affine, None if merge == EACH else logits[0], header, source, preset, segments)


def _unpacked(bits: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """A mask from its packed bits."""
    return np.unpackbits(bits, count=math.prod(shape)).reshape(shape).view(bool)


def _cut(outputs: Outputs) -> tuple[tuple[bool, ...], int]:
    return tuple(outputs[contract.TEXT_CUT].tolist()), int(outputs[contract.TEXT_LIMIT][0])


def _info(text: str) -> tuple[AnswerInfo, AnswerDetails]:
    """What ANSWER_INFO says."""
    values = json.loads(text or "{}")
    details = values.pop("details", {})
    if "logprobs" in details:
        details["logprobs"] = [_chosen(each) for each in details["logprobs"]]
    return _typed(AnswerInfo, values), _typed(AnswerDetails, details)


def _chosen(values: dict[str, Any]) -> ChosenToken:
    return _typed(ChosenToken, {**values, "top": [_typed(ScoredToken, each) for each in values.get("top", ())]})


def typed(kind: type[T], text: str) -> T:
    """A JSON object as the dataclass that it stands for. Another one's is another version's."""
    return _typed(kind, json.loads(text or "{}"))


def _typed(kind: type[T], values: dict[str, Any]) -> T:
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise other_version(f"its {kind.__name__} has {', '.join(unknown)}")
    if "model" in values:
        values["model"] = _typed(ModelInfo, values["model"])
    try:
        return kind(**{name: _frozen(value) for name, value in values.items()})
    except TypeError as error:
        raise other_version(str(error)) from None


def _frozen(value: Any) -> Any:
    """Tuples for JSON's lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def checked_question(question: str) -> str:
    """The question. Raises InvalidInput for what no server answers."""
    if not isinstance(question, str):
        raise InvalidInput(f"the question must be a text, not {shortened(question)}")
    if not question.strip():
        raise InvalidInput("the question is empty: give a text")
    return question


def _turns(question: str | None, messages: Messages | None) -> list[Turn]:
    """The turns, of which the last is the question."""
    if messages is None:
        return [Turn(USER, checked_question(cast(str, question)))]
    if question is not None:
        raise InvalidInput("a question and messages are given: give one of them; the last message is the question")
    turns = checked_turns(messages)
    checked_question(turns[-1].text)
    return turns


def _checked_texts(texts: Sequence[str]) -> list[str]:
    found = [] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise InvalidInput(f"texts must be a list of one or more texts that are not empty, not {shortened(texts)}")
    return found


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
        raise InvalidInput(f"timeout must be a number of seconds above 0, or None for no limit, not {timeout!r}")
    return timeout
