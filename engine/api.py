"""The API: one protocol, `M3D`, and the types that its methods take and return.

`M3DEngine` (engine/local.py) answers in this process, `M3DClient` (engine/client) asks a server; programs that take an
`M3D` work with both. `AsyncM3DClient` has the same methods as coroutines.

    def report(m3d: M3D, scan: str) -> str:
        return m3d.ask(m3d.upload(scan), "Describe the findings.").text
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.errors import InvalidInput, Unavailable

if TYPE_CHECKING:  # imported when they are used: they read scans
    from engine.results.measurements import Measurements
    from engine.source import Source
    from engine.volume.crop import Crop


@dataclass(frozen=True)
class ModelInfo:
    """Which model answers, from the manifest of its repository.

    checkpoint: as given to the export. checkpoint_sha256: over the files that were read of it.
    target: cpu or tensorrt. precision: of the language model.
    manifest_sha256: of the whole manifest: two exports are the same if it is equal.
    """

    checkpoint: str
    checkpoint_sha256: str
    target: str
    precision: str
    manifest_sha256: str


@dataclass(frozen=True)
class EngineInfo:
    """What answers.

    model: its identity. models: what it serves, of m3d_chat, m3d_segment and m3d_retrieve. version: of m3d-engine.
    """

    model: ModelInfo
    models: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class StudyInfo:
    """How a scan was prepared.

    preset: the one that was used, of engine.volume.PRESETS. reason: why, and what of the scan's place is a guess.
    shape: of the scan's array. spacing_mm: of its axes. orientation: three letters, such as RAS.
    prepare_s: seconds that decoding and preprocessing took. cached: whether the scan was known already.
    model: that encoded it.
    crop: voxels of a cropped scan that the model sees, ((i0, i1), (j0, j1), (k0, k1)), half-open; None for the whole.
    """

    preset: str
    reason: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    orientation: str
    prepare_s: float
    cached: bool
    model: ModelInfo
    crop: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class Study:
    """A scan that was uploaded.

    handle: 64 hex digits. info: None of a study that is known by its handle only.
    source: where it came from: an evicted study is sent again from there. None after `forget`.
    """

    handle: str
    info: StudyInfo | None = None
    source: Source | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"study {self.handle[:12]}" + (f" ({self.info.preset})" if self.info else "")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. role: "user", "assistant", or "system" for the first turn."""

    role: str
    content: str


Messages = Sequence["Message | Mapping[str, str] | tuple[str, str]"]
"""The turns of a conversation: user and assistant in turn, the last one the user's; before them a system turn or none.
Each is a `Message`, a pair (role, text) or {"role": …, "content": …}."""


@dataclass(frozen=True)
class ScoredToken:
    """text: the token decoded alone. logprob: natural logarithm of the probability that the model gives it there."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class ChosenToken(ScoredToken):
    """A token of an answer. top: the likeliest tokens there, likeliest first, as many as were asked for."""

    top: tuple[ScoredToken, ...]


@dataclass(frozen=True, kw_only=True)
class AnswerDetails:
    """What an answer says if it was asked for.

    logprobs: one entry a token of the answer; empty without `Sampling.logprobs`. Where only some tokens are allowed
    (only_choices, json_schema), the others have no part in them.
    choices: of each of `Sampling.choices`, log p(its tokens | prompt): the natural logarithm of the likelihood that the
    answer begins with them, whatever else the answer says.
    history_used: whether the turns before the last question were read: False by a model that was trained on single
    questions, which got the last one alone. None where there were none.
    """

    logprobs: tuple[ChosenToken, ...] = ()
    choices: Mapping[str, float] = field(default_factory=dict)
    history_used: bool | None = None


@dataclass(frozen=True)
class AnswerInfo:
    """What an answer cost.

    prompt_tokens: rows of the prompt, visual tokens included. cached_tokens: those that the prefix cache had.
    first_token_s, last_token_s: seconds since the language model got the question.
    """

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    first_token_s: float
    last_token_s: float


@dataclass(frozen=True)
class Timings(AnswerInfo):
    """`AnswerInfo`, and seconds on the caller's side, since the question was sent.

    first_text_s: until the first text came, None for an answer without text. total_s: until the answer was whole.
    """

    first_text_s: float | None
    total_s: float


@dataclass(frozen=True, eq=False)
class Answer(AnswerDetails):
    """text: without special tokens other than [SEG]. token_ids: with the final EOS if there was one.

    finish_reason: stop or length. boxes: float64 K x 6, voxel indices (i0,j0,k0,i1,j1,k1) of the scan's array axes.
    logprobs, choices, history_used: see `AnswerDetails`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    boxes: np.ndarray
    timings: Timings


class MeasuredMasks:
    """Masks of one scan. It is read once for the measurements of all, when the first of them are asked for.

    source: of the scan; None if that is not known.
    """

    def __init__(
        self, masks: Sequence[np.ndarray], affine: np.ndarray, source: Source | None, preset: str | None
    ) -> None:
        self._masks = masks
        self._affine = affine
        self._source = source
        self._preset = preset

    @cached_property
    def measurements(self) -> tuple[Measurements, ...]:
        """Of each mask, see `engine.results.measurements`.

        The intensities are the source's. They are None if the study was known by its handle only, if the source has
        changed since it was sent, or if it cannot be read here; `intensity_missing` says why.
        """
        from engine.results.measurements import measure

        scan, missing = None, "the study is known by its handle only"
        try:
            scan = self._source.read() if self._source else None
        except (InvalidInput, Unavailable) as error:
            missing = str(error)
        if scan is not None and any(scan.array.shape != mask.shape for mask in self._masks):
            missing = f"the mask has not the shape of the scan at its source, {scan.array.shape}"
            scan = None
        return tuple(measure(mask, self._affine, scan, preset=self._preset, missing=missing) for mask in self._masks)


@dataclass(frozen=True, eq=False)
class Segment:
    """One mask of an answer, and what it is of. A state that asks for nothing gives a mask without a voxel.

    mask: bool, the scan's own shape. affine, header: of the scan, see `Segmentation`.
    score: mean probability (sigmoid of the logits) of the model volume's voxels where it is above one half, so from 0.5
    to 1; None if there are none. It says how sure the mask head is of what it marks, not whether that is right: it is
    not calibrated.
    words: the part of the answer's text that leads to the [SEG], from the [SEG] before it or the answer's beginning; of
    one mask for all [SEG], up to the last. Without white space and punctuation at its ends; empty if there is none.
    span: where the words stand, `answer.text[span[0]:span[1]]`.
    logits: float32 D x H x W in model space if they were asked for, else None.
    measured, index: the masks that it is measured with, and which of them is its own.
    """

    mask: np.ndarray
    affine: np.ndarray
    score: float | None
    words: str
    span: tuple[int, int]
    measured: MeasuredMasks = field(repr=False)
    index: int = field(repr=False)
    logits: np.ndarray | None = None
    header: bytes | None = None

    @property
    def measurements(self) -> Measurements:
        """Volume, place and intensities, see `MeasuredMasks.measurements`."""
        return self.measured.measurements[self.index]

    def save(self, path: str | PathLike) -> Path:
        """Write the mask as NIfTI (uint8, 0 and 1) where the scan lies, see `engine.results.save_mask`.

        Args:
            path: a file name that ends with .nii or .nii.gz.

        Returns:
            The path.

        Raises:
            InvalidInput: the path has another ending, or cannot be written.
        """
        from engine.results import save_mask

        return save_mask(self.mask, self, path)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """mask: bool, the scan's own shape; None if the answer has no [SEG]. affine: 4 x 4, the scan's own, RAS+ mm;
    zeros without a mask. header: of the scan's NIfTI file, without free text; None for other scans.

    segments: one entry a mask: with merge="each" one for each [SEG] of the answer, in its order, and `mask` is their
    union; with merge="reference" one for all [SEG], whose mask is `mask`. None of an answer without [SEG].
    logits: float32 D x H x W in model space if they were asked for, else None; also None with merge="each", where each
    segment has its own. source, preset: of its study.
    """

    answer: Answer
    mask: np.ndarray | None
    affine: np.ndarray
    logits: np.ndarray | None = None
    header: bytes | None = None
    source: Source | None = field(default=None, repr=False)
    preset: str | None = None
    segments: tuple[Segment, ...] = ()

    @cached_property
    def measurements(self) -> Measurements | None:
        """Volume, place and intensities of `mask`, see `MeasuredMasks.measurements`; None without a mask."""
        if self.mask is None:
            return None
        if len(self.segments) == 1:  # the same mask, for which the scan is read already or will be
            return self.segments[0].measurements
        return MeasuredMasks([self.mask], self.affine, self.source, self.preset).measurements[0]

    def save(self, path: str | PathLike) -> Path:
        """Write `mask` as NIfTI (uint8, 0 and 1) where the scan lies, see `engine.results.save_mask`.

        Args:
            path: a file name that ends with .nii or .nii.gz.

        Returns:
            The path.

        Raises:
            InvalidInput: there is no mask, or the path has another ending or cannot be written.
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


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """texts as given, embeddings: float32 T x E, M3D-CLIP's, of length 1. cut, text_limit: see `Ranking`."""

    texts: tuple[str, ...]
    embeddings: np.ndarray
    cut: tuple[bool, ...]
    text_limit: int


class AnswerStream(Protocol):
    """An answer as it grows: iterate over its pieces of text; `answer` is the whole when the iteration is over.

    `close`, leaving a `with` block, or dropping the object cancels the request.
    """

    @property
    def answer(self) -> Answer | None: ...

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def close(self) -> None: ...

    def __enter__(self) -> AnswerStream: ...

    def __exit__(self, *_: object) -> None: ...


class M3D(Protocol):
    """Interface for questions about scans. Methods may be called by several threads at the same time.

    Where a method wants a study it also takes what `upload` takes. All errors are of engine.errors: InvalidInput for
    what cannot be used, StudyNotFound for a study that is not held (any more), ResourceExhausted and Unavailable where
    nothing is answered now. A method that takes a timeout, in seconds, raises DeadlineExceeded when it has passed, and
    what it waited for is cancelled; None means the object's own timeout.
    """

    def upload(
        self,
        scan: object,
        affine: np.ndarray | None = None,
        preset: str = "auto",
        *,
        crop: Crop | str | np.ndarray | None = None,
        timeout: float | None = None,
    ) -> Study:
        """Hand a scan over; it is decoded, preprocessed and encoded once.

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

        Returns:
            The study, which questions, masks and rankings refer to.

        Raises:
            InvalidInput: for a scan, preset or crop that cannot be used.
        """
        ...

    def ask(
        self,
        study: object,
        question: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> Answer:
        """Ask, and wait for the whole answer.

        Args:
            study: a `Study`, or what `upload` takes.
            question: a text.
            messages: instead of the question, the turns of a conversation that ends with one. The scan belongs to the
                user's first turn. `Answer.history_used` says whether the model reads more than the last question.
            timeout: seconds, see the class.
            **sampling: see `engine.sampling.Sampling`.

        Returns:
            The answer: text, token ids, boxes (float64 [K, 6], voxels of the scan's array axes) and timings in seconds.

        Raises:
            InvalidInput: for a study, question, messages or sampling that cannot be used.
            StudyNotFound: the study is not held any more, and is known by its handle only.
        """
        ...

    def stream(
        self,
        study: object,
        question: str | None = None,
        *,
        messages: Messages | None = None,
        timeout: float | None = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Ask, and read the answer as it is made. Arguments as of `ask`."""
        ...

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
        """Ask for a structure, and get the answer with its mask.

        Args:
            study, question, messages, timeout, **sampling: as of `ask`.
            return_logits: also return the masks' logits.
            merge: what several [SEG] in an answer give: "reference": one mask from the mean of their states, as the
                reference does; "each": one mask for each of them, see `Segmentation.segments`.

        Returns:
            The answer; its mask, bool, the scan's shape and affine (RAS+ mm), or None without a [SEG];
            the masks of each [SEG] with their scores; logits, if asked for, float32 [D, H, W] in model space.

        Raises:
            InvalidInput: as of `ask`; with "each" also for more [SEG] than `engine.seg_states.most_segments`.
        """
        ...

    def rank(self, study: object, texts: Sequence[str], *, timeout: float | None = None) -> Ranking:
        """Score texts by how well they fit the scan (M3D-CLIP).

        Args:
            study: a `Study`, or what `upload` takes.
            texts: T texts, such as reports; of each, M3D-CLIP reads the first `Ranking.text_limit` tokens.
            timeout: seconds, see the class.

        Returns:
            The texts with their cosine similarities to the scan, float32 [T] in -1..1, and which texts were too long.

        Raises:
            InvalidInput: for no texts, empty texts, or too many.
            Unavailable: the repository was exported without M3D-CLIP.
        """
        ...

    def embed(self, study: object, *, timeout: float | None = None) -> np.ndarray:
        """M3D-CLIP's embedding of the scan.

        Args:
            study: a `Study`, or what `upload` takes.
            timeout: seconds, see the class.

        Returns:
            float32 [E], of length 1: its dot product with a text's embedding is the score of `rank`.

        Raises:
            Unavailable: the repository was exported without M3D-CLIP.
        """
        ...

    def embed_texts(self, texts: Sequence[str], *, timeout: float | None = None) -> TextEmbeddings:
        """M3D-CLIP's embeddings of texts.

        Args:
            texts: T texts, as of `rank`.
            timeout: seconds, see the class.

        Returns:
            The texts with their embeddings, float32 [T, E], each of length 1, and which texts were too long.

        Raises:
            InvalidInput, Unavailable: as of `rank`.
        """
        ...

    def forget(self, study: Study, *, timeout: float | None = None) -> None:
        """Drop the study and all that was computed of it.

        The study cannot be asked about any more: it is not sent again from where it came. What the language model's
        prefix cache has of it cannot be found without the study, and is overwritten when the room is needed.

        Raises:
            StudyNotFound: if the study is not held (any more).
        """
        ...

    def describe(self, study: Study, *, timeout: float | None = None) -> StudyInfo:
        """How a study was prepared, also of one that is known by its handle only.

        Args:
            study: as `upload` returned it, or `Study(handle)`.
            timeout: seconds, see the class.

        Returns:
            Preset and its reason, the scan's shape, spacing in mm and orientation, the crop, and the model.

        Raises:
            StudyNotFound: if the study is not held (any more).
        """
        ...

    def is_ready(self) -> bool:
        """Whether all models are loaded."""
        ...

    def info(self, *, timeout: float | None = None) -> EngineInfo:
        """Which model answers, and what it can do."""
        ...

    def close(self) -> None:
        """End what is in work, which fails with Cancelled; later calls fail with Unavailable."""
        ...
