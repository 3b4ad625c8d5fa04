"""The client: send a scan once, then ask about it, segment it, rank texts against it.

with M3DClient("localhost:8001") as client:
    study = client.upload("scan.nii.gz")
    for text in client.stream(study, "Describe the findings."):
        print(text, end="", flush=True)
    client.segment(study, "Please segment the liver.").save("liver.nii.gz")
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from tritonclient.grpc import service_pb2

from engine import contract
from engine.client.source import Source, content_of
from engine.client.wire import Connection, parts_of, size_of, text_of
from engine.contract import Tensor
from engine.errors import Cancelled, InvalidInput, M3DError, StudyNotFound, Unavailable
from engine.sampling import Sampling

if TYPE_CHECKING:  # imported when they are used: they read scans
    from engine.results.measurements import Measurements
    from engine.volume.crop import Crop

DEFAULT_URL = "localhost:8001"
# The steps of m3d_chat and m3d_segment, asked one by one: Triton does not pass a cancellation on to a step of an
# ensemble that is running, so that an answer nobody waits for any more would be decoded to its end.
_STUDY, _DECODER, _SEGMENTATION = "study", "decoder", "segmentation"


@dataclass(frozen=True, eq=False)
class Study:
    """A scan that the server holds.

    info: preset and why it was chosen, shape, spacing_mm, orientation, prepare_s (what preparing it took), cached, the
    model (its manifest's identity), and of a cropped scan crop, the voxels that the model sees.
    """

    handle: str
    info: dict
    source: Source | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"study {self.handle[:12]} ({self.info.get('preset')})"


@dataclass(frozen=True, eq=False)
class Answer:
    """text: without special tokens other than [SEG]. token_ids: with the final EOS if there was one.

    finish_reason: stop or length. boxes: float64 K x 6, voxel indices (i0,j0,k0,i1,j1,k1) of the scan's array axes.
    timings: the server's figures (prompt_tokens, cached_tokens, answer_tokens, and first_token_s and last_token_s since
    the question came) and this client's own first_text_s and total_s.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    boxes: np.ndarray
    timings: dict


@dataclass(frozen=True, eq=False)
class Segmentation:
    """mask: bool, the scan's own shape; None if the answer has no [SEG]. affine: 4 x 4, the scan's own, RAS+ mm.
    header: of the scan's NIfTI file, without free text; None for other scans.

    logits: float32 D x H x W in model space if they were asked for, else None. source, preset: of its study.
    """

    answer: Answer
    mask: np.ndarray | None
    affine: np.ndarray
    logits: np.ndarray | None = None
    header: bytes | None = None
    source: Source | None = field(default=None, repr=False)
    preset: str | None = None

    @cached_property
    def measurements(self) -> Measurements | None:
        """Volume, place and intensities, see `engine.results.measurements`; None without a mask.

        The intensities are the source's, which is read when this is first asked for. They are None if the study was
        known by its handle only, or if the source has changed since it was sent.
        """
        from engine.results.measurements import measure

        if self.mask is None:
            return None
        scan = self.source.read() if self.source else None
        if scan is not None and scan.array.shape != self.mask.shape:
            scan = None
        return measure(self.mask, self.affine, scan, preset=self.preset)

    def save(self, path: str | PathLike) -> Path:
        """Write the mask as NIfTI (.nii or .nii.gz) where the scan lies, see `engine.results.save_mask`.

        Raises InvalidInput without a mask.
        """
        from engine.results import save_mask

        if self.mask is None:
            raise InvalidInput(f"there is no mask to save: the answer has no [SEG] ({self.answer.text!r})")
        return save_mask(self.mask, self, path)


@dataclass(frozen=True, eq=False)
class Ranking:
    """texts as given, scores: float32, their cosine similarity with the scan.

    cut: for each text, whether it has more tokens than M3D-CLIP reads, so that its end has no part in the score.
    text_limit: how many that are, with [CLS] and [SEP]; 512 for the published checkpoint.
    """

    texts: tuple[str, ...]
    scores: np.ndarray
    cut: tuple[bool, ...]
    text_limit: int

    def sorted(self) -> list[tuple[str, float]]:
        """Texts with their scores, best first."""
        return [(self.texts[i], float(self.scores[i])) for i in np.argsort(-self.scores, kind="stable")]


class TextStream(Iterator[str]):
    """An answer as it grows: iterate over its pieces of text; `answer` is the whole when the iteration is over.

    `close`, leaving a `with` block, or dropping the object cancels the request on the server.
    """

    def __init__(self, responses: _Asked):
        self._responses = responses
        self._collected = _Collected()
        self.answer: Answer | None = None

    def __next__(self) -> str:
        while self.answer is None:
            outputs = next(self._responses, None)
            if outputs is None:
                raise Unavailable("the server closed the stream before the answer was complete")
            text = self._collected.add(outputs)
            self.answer = self._collected.finished()
            if self.answer:
                self._responses.finish()
            if text:
                return text
        raise StopIteration

    def close(self) -> None:
        self._responses.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class M3DClient:
    """A connection to one server; use it from as many threads as you like.

    timeout: seconds until a call fails with DeadlineExceeded (and is cancelled on the server), None for no limit; each
    method takes its own. All errors are of engine.errors. A method that wants a study also takes what `upload` does.
    """

    def __init__(self, url: str = DEFAULT_URL, timeout: float | None = 600.0):
        self.timeout = _checked_timeout(timeout)
        if not url or "://" in url:
            raise InvalidInput(
                f"the server's address is host:port of its gRPC port, such as {DEFAULT_URL}, not {url!r}"
            )
        self._connection = Connection(url)

    @property
    def url(self) -> str:
        return self._connection.url

    def __enter__(self) -> M3DClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def is_ready(self) -> bool:
        """Whether the server is there with all its models."""
        try:
            return self._connection.call("ServerReady", service_pb2.ServerReadyRequest(), 5.0).ready
        except M3DError:
            return False

    def server_info(self) -> dict:
        """{"triton": version, "models": {name: ready}} of the public models. Raises Unavailable."""
        metadata = self._connection.call("ServerMetadata", service_pb2.ServerMetadataRequest(), self.timeout)
        return {
            "triton": metadata.version,
            "models": {name: self._model_ready(name) for name, model in contract.MODELS.items() if model.ensemble},
        }

    def upload(
        self,
        scan: object,
        affine: np.ndarray | None = None,
        preset: str = "auto",
        *,
        crop: Crop | str | np.ndarray | None = None,
        timeout: float | None = None,
    ) -> Study:
        """Send a scan.

        Args:
            scan: a file's path, its bytes or a binary file object; a DICOM folder or a list of its files; a nibabel or
                SimpleITK image; or an array or tensor, which has three axes, or is 1 x D x H x W in 0-1 at the model's
                size. See `engine.scan.scan_pieces`.
            affine: of an array, 4 x 4, voxel to world, RAS+ mm; files bring theirs.
            preset: one of engine.volume.PRESETS.
            crop: the region that the model is to see: "i0:i1,j0:j1,k0:k1" in voxels of the scan's array axes,
                half-open; "x0:x1,y0:y1,z0:z1mm" in mm (RAS+); or six numbers in voxels, as `Answer.boxes` has them.
                Masks and boxes come back in the whole scan's space all the same.
            timeout: seconds, see the class.

        Raises:
            InvalidInput: for a scan, preset or crop that cannot be used.
        """
        from engine.scan import scan_pieces

        if not isinstance(preset, str):
            raise InvalidInput(f"a preset is named by a text, such as 'auto', not by {type(preset).__name__}")
        if crop is not None:
            from engine.volume.crop import Crop

            crop = Crop.of(crop)
        pieces, space = scan_pieces(scan, affine)
        source = Source(scan, affine, preset, crop, content_of(pieces))
        parts = _upload(pieces, space, preset, crop)
        # What was read of a file has no name here: it is let go with the last part, while the server works for seconds.
        del pieces
        outputs = self._connection.infer_in_turn(_STUDY, parts, self._timeout(timeout))
        return Study(text_of(outputs["STUDY"]), json.loads(text_of(outputs["STUDY_INFO"])), source)

    def stream(self, study, question: str, *, timeout: float | None = None, **sampling) -> TextStream:
        """Ask, and read the answer as it is made. sampling: see engine.sampling.Sampling."""
        return TextStream(self._ask(study, question, sampling, True, self._timeout(timeout)))

    def ask(self, study, question: str, *, timeout: float | None = None, **sampling) -> Answer:
        """Ask, and wait for the whole answer."""
        return self._whole(self._ask(study, question, sampling, False, self._timeout(timeout)))[0]

    def segment(
        self, study, question: str, return_logits: bool = False, *, timeout: float | None = None, **sampling
    ) -> Segmentation:
        """Ask for a structure, and get the answer with its mask."""
        left = _Countdown(self._timeout(timeout))
        asked = self._ask(study, question, sampling, False, left(), hint=True)
        answer, outputs = self._whole(asked)
        if not len(outputs["SEG_STATES"]):
            return Segmentation(answer, None, np.zeros((4, 4)), None)

        def draw(to: Study):
            inputs = {
                contract.STUDY_IN: to.handle,
                contract.SEG_STATES: outputs["SEG_STATES"],
                contract.RETURN_LOGITS: return_logits,
            }
            return self._connection.infer(_SEGMENTATION, inputs, left())

        drawn = self._resent(draw, asked.study, left())
        shape = drawn["MASK_SHAPE"]
        mask = np.unpackbits(drawn["MASK"], count=math.prod(shape)).reshape(shape).view(bool)
        logits = drawn["LOGITS"] if drawn["LOGITS"].size else None
        header = drawn["MASK_HEADER"].tobytes() or None
        of = asked.study
        return Segmentation(answer, mask, drawn["MASK_AFFINE"], logits, header, of.source, of.info.get("preset"))

    def rank(self, study, texts: Sequence[str], *, timeout: float | None = None) -> Ranking:
        """Score texts by how well they fit the scan (M3D-CLIP); the ranking says which texts were too long."""
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InvalidInput("texts must be a list of one or more texts that are not empty")
        timeout = self._timeout(timeout)
        study = self._as_study(study, timeout)

        def score(by: Study):
            return self._connection.infer(
                "m3d_retrieve", {contract.TEXTS: texts, contract.STUDY_IN: by.handle}, timeout
            )

        outputs = self._resent(score, study, timeout)
        return Ranking(
            tuple(texts), outputs["SCORES"], tuple(outputs["TEXT_CUT"].tolist()), int(outputs["TEXT_LIMIT"][0])
        )

    # --- inside ------------------------------------------------------------------------------------------------------
    def _ask(
        self, study, question: str, sampling: Mapping, streaming: bool, timeout: float | None, hint: bool = False
    ) -> _Asked:
        """hint: that a mask will be wanted, so that the server encodes for it while it decodes."""
        checked_question(question)
        settings = Sampling.from_dict(sampling).to_json()
        study = self._as_study(study, timeout)
        inputs = {contract.QUESTION: question, contract.SAMPLING: settings, contract.STREAM: streaming}

        def send(to: Study):
            handle = {contract.STUDY_IN: to.handle}
            if hint:
                with contextlib.suppress(StudyNotFound):  # the question meets it again, and sends the study
                    self._connection.infer(_STUDY, handle | {contract.SEGMENT_HINT: True}, timeout)
            return self._connection.stream(_DECODER, inputs | handle, timeout)

        return _Asked(send, study, lambda evicted: self._send_again(study, timeout, evicted))

    def _resent(self, request: Callable[[Study], dict[str, np.ndarray]], study: Study, timeout: float | None):
        """request(study); if the server has evicted the study, it is sent and asked again, once."""
        try:
            return request(study)
        except StudyNotFound as evicted:
            return request(self._send_again(study, timeout, evicted))

    def _whole(self, responses: _Asked) -> tuple[Answer, dict[str, np.ndarray]]:
        """The answer of a request that is answered by one response, and all its outputs."""
        collected = _Collected()
        try:
            for outputs in responses:
                collected.add(outputs)
                if answer := collected.finished():
                    responses.finish()
                    return answer, outputs
        finally:
            responses.close()
        raise Unavailable("the server closed the stream before the answer was complete")

    def _as_study(self, study, timeout: float | None) -> Study:
        return study if isinstance(study, Study) else self.upload(study, timeout=timeout)

    def _send_again(self, study: Study, timeout: float | None, evicted: StudyNotFound) -> Study:
        """Upload an evicted study again, from where it came.

        A server that was started anew gives it another handle, which the study has from then on.
        """
        if study.source is None:
            raise evicted
        source = study.source
        again = self.upload(source.scan, source.affine, source.preset, crop=source.crop, timeout=timeout)
        is_same_scan = cast(Source, again.source).content == source.content
        # The affine has no part in the content; the server tells what follows from it.
        told = ("model", "shape", "spacing_mm", "orientation")
        if not is_same_scan or any(again.info.get(name) != study.info[name] for name in told if name in study.info):
            raise InvalidInput(
                f"the server does not hold {study} any more, and now the scan at its source, or the "
                "server's model, is another: upload it again to ask about what is there now"
            )
        object.__setattr__(study, "handle", again.handle)  # else each question to come would send the scan again
        return study

    def _model_ready(self, name: str) -> bool:
        try:
            return self._connection.call("ModelReady", service_pb2.ModelReadyRequest(name=name), self.timeout).ready
        except M3DError:
            return False

    def _timeout(self, timeout: float | None) -> float | None:
        return self.timeout if timeout is None else _checked_timeout(timeout)


class _Asked(Iterator):
    """The responses to one question. If the server has evicted the study, it is sent and asked again, once."""

    def __init__(self, send, study: Study, send_again):
        self._send = send
        self.study = study
        self._send_again = send_again
        self._responses = send(study)
        self._closed = False

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise Cancelled("the request was cancelled by this client")
        try:
            outputs = next(self._responses)
        except StudyNotFound as evicted:
            if self._send_again is None:
                raise
            self.study = self._send_again(evicted)
            self._responses = self._send(self.study)
            outputs = next(self._responses)
        self._send_again = None
        return outputs

    def finish(self) -> None:
        """Read to the end of the stream, once the answer is whole."""
        self._responses.finish()

    def close(self) -> None:
        self._closed = True
        self._responses.close()


class _Countdown:
    """Seconds that are left of a timeout for the calls that share it; None for no limit."""

    def __init__(self, timeout: float | None):
        self._end = None if timeout is None else time.monotonic() + timeout

    def __call__(self) -> float | None:
        return None if self._end is None else max(0.001, self._end - time.monotonic())


class _Collected:
    """What has come of an answer so far."""

    def __init__(self):
        self._started = time.monotonic()
        self._first_text_s: float | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._last: dict[str, np.ndarray] = {}

    def add(self, outputs: dict[str, np.ndarray]) -> str:
        text = text_of(outputs["TEXT"])
        if text and self._first_text_s is None:
            self._first_text_s = time.monotonic() - self._started
        self._texts.append(text)
        self._token_ids += outputs["TOKEN_IDS"].tolist()
        self._last = outputs
        return text

    def finished(self) -> Answer | None:
        reason = text_of(self._last["FINISH_REASON"])
        if not reason:
            return None
        info = json.loads(text_of(self._last["ANSWER_INFO"]) or "{}")
        timings = {**info, "first_text_s": self._first_text_s, "total_s": time.monotonic() - self._started}
        return Answer("".join(self._texts), tuple(self._token_ids), reason, self._last["BOXES"], timings)


def _upload(
    pieces: Iterable[bytes | memoryview], affine: np.ndarray | None, preset: str, crop: Crop | None
) -> Iterator[dict[Tensor, object]]:
    """The inputs of the requests that bring a scan: of one with the whole file, or of one for each part."""
    parts: list[tuple[bytes | memoryview, ...]] = list(parts_of(pieces)) or [(b"",)]
    size, start, name = sum(map(size_of, parts)), 0, secrets.token_hex(16)
    for part in parts:
        inputs: dict[Tensor, object] = {contract.VOLUME: part}
        end = start + size_of(part)
        if len(parts) > 1:
            inputs |= {contract.UPLOAD: name, contract.UPLOAD_RANGE: (start, size)}
        if end == size:
            inputs |= {contract.AFFINE_IN: affine, contract.PRESET: preset}
            if crop is not None:
                inputs |= {contract.CROP: crop.box, contract.CROP_UNIT: crop.unit}
        yield inputs
        start = end


def checked_question(question: str) -> str:
    """The question. Raises InvalidInput for what no server answers."""
    if not isinstance(question, str) or not question.strip():
        raise InvalidInput("the question is empty: give a text")
    return question


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
        raise InvalidInput(f"timeout must be a number of seconds above 0, or None for no limit, not {timeout!r}")
    return timeout
