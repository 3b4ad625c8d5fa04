"""Asks all samples, whatever their tasks: several in flight, each scan uploaded once, a row for each answer."""

from __future__ import annotations

import base64
import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.bench.metrics import boxes, masks
from benchmarks.bench.rows import RowStore
from benchmarks.bench.samples import MASKED, TASKS, Sample, Truth, is_nifti, read_truth
from engine.api import M3D, Answer, Segmentation, Study
from engine.errors import InvalidInput, M3DError
from engine.prompt import parse_boxes
from training.data.sample import BrokenSample

NEW_TOKENS = 256  # of an answer at most, as in the reference
_TEXT_BATCH = 16


@dataclass(frozen=True)
class Run:
    """How samples are asked.

    answerer: a server's client, or an engine in this process. concurrency: samples in flight. new_tokens: of an answer
    at most. nsd_mm: tolerance of NSD.
    predictions: folder where predicted masks are kept, for the report's pictures.
    failed_share: of a task's samples, how many may fail before the run stops.
    """

    answerer: M3D
    predictions: Path
    concurrency: int = 8
    new_tokens: int = NEW_TOKENS
    nsd_mm: float = masks.NSD_MM
    failed_share: float = 0.0


def run(samples: Mapping[str, Sequence[Sample]], stores: Mapping[str, RowStore], settings: Run) -> dict[str, list[str]]:
    """Ask all samples that have no row yet, those of one scan together: it is encoded once for all tasks.

    Args:
        samples, stores: of each task.

    Returns:
        Of each task what failed, in words; those rows are missing.

    Raises:
        M3DError: of the sample that failed last, when more than `failed_share` of a task have, and at once if the
            server is gone.
    """
    failed: dict[str, list[str]] = {task: [] for task in samples}
    pending = [sample for task, found in samples.items() for sample in found if sample.key not in stores[task]]
    if not pending:
        return failed
    pending.sort(key=lambda sample: (str(sample.image), TASKS.index(sample.task), sample.key))
    total, studies = sum(map(len, samples.values())), Studies(settings.answerer, pending)
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[failed]}")) as progress:
        bar = progress.add_task("", total=total, completed=total - len(pending), failed="")
        for sample, outcome in _in_flight(_jobs(pending, studies, settings), settings.concurrency):
            task = sample.task
            if isinstance(outcome, M3DError):
                failed[task].append(f"{sample.key}: {outcome}")
                progress.update(bar, failed=f"{sum(map(len, failed.values()))} failed")
                most = int(settings.failed_share * len(samples[task]))
                if not isinstance(outcome, (InvalidInput, BrokenSample)) or len(failed[task]) > most:
                    raise outcome
            else:
                stores[task].append(outcome)
            progress.advance(bar)
    return failed


Job = tuple[Sample, Callable[[], dict]]


def _jobs(samples: Sequence[Sample], studies: Studies, settings: Run) -> Iterator[Job]:
    texts: dict[str, _Texts] = {}
    pairs = [sample for sample in samples if sample.task == "retrieval"]
    for start in range(0, len(pairs), _TEXT_BATCH):
        batch = pairs[start : start + _TEXT_BATCH]
        texts |= dict.fromkeys((sample.key for sample in batch), _Texts(settings.answerer, batch))
    for sample in samples:
        if sample.task == "retrieval":
            yield sample, lambda sample=sample: _embedded(sample, studies, texts[sample.key], settings)
        else:
            yield sample, lambda sample=sample: _asked(sample, studies, settings)


def _in_flight(jobs: Iterator[Job], concurrency: int) -> Iterator[tuple[Sample, dict | M3DError]]:
    """Outcomes as they come; at most `concurrency` jobs have been begun and not been handed on."""
    with ThreadPoolExecutor(concurrency) as pool:
        running: dict[Future, Sample] = {}
        try:
            while True:
                while len(running) < concurrency and (job := next(jobs, None)):
                    running[pool.submit(job[1])] = job[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    sample = running.pop(future)
                    try:
                        yield sample, future.result()
                    except M3DError as error:
                        yield sample, error
        finally:
            for future in running:
                future.cancel()


class _Once:
    """The result of one call, or its error, for all that ask for it; the first one makes it."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._lock = make, threading.Lock()
        self._future: Future | None = None

    def __call__(self) -> tuple[Any, bool]:
        """(result, whether this call made it)."""
        with self._lock:
            mine = self._future is None
            if self._future is None:
                self._future = Future()
        if mine:
            try:
                self._future.set_result(self._make())
            except BaseException as error:
                self._future.set_exception(error)
        return self._future.result(), mine


class Studies:
    """Each scan's study, uploaded when its first sample wants it, and let go of with its last one."""

    def __init__(self, answerer: M3D, samples: Sequence[Sample]):
        self._answerer = answerer
        self._left = Counter(sample.image for sample in samples)
        self._studies: dict[Path, _Once] = {}
        self._lock = threading.Lock()

    def __call__(self, image: Path) -> tuple[Study, float]:
        """(study, seconds that the upload took: 0 if another sample made it)."""
        started = time.monotonic()
        with self._lock:
            once = self._studies.setdefault(image, _Once(lambda: self._answerer.upload(image)))
        study, mine = once()
        return study, time.monotonic() - started if mine else 0.0

    def done(self, image: Path) -> None:
        with self._lock:
            self._left[image] -= 1
            if not self._left[image]:
                self._studies.pop(image, None)


class _Texts:
    """The embeddings of a batch of reports, computed when the first of its samples wants one."""

    def __init__(self, answerer: M3D, samples: Sequence[Sample]):
        def embed() -> dict[str, np.ndarray | BrokenSample]:
            texts: dict[str, str] = {}
            found: dict[str, np.ndarray | BrokenSample] = {}
            for sample in samples:
                try:
                    texts[sample.key] = read_truth(sample).answer
                except BrokenSample as error:  # it fails alone, not with the batch
                    found[sample.key] = error
            embeddings = answerer.embed_texts(list(texts.values())).embeddings
            return found | dict(zip(texts, embeddings, strict=True))

        self._once = _Once(embed)

    def __call__(self, sample: Sample) -> np.ndarray:
        found = self._once()[0][sample.key]
        if isinstance(found, BrokenSample):
            raise found
        return found


# --- one sample ------------------------------------------------------------------------------------------------------
def _asked(sample: Sample, studies: Studies, settings: Run) -> dict:
    """The row of a sample: what was asked and answered, what was measured of boxes and masks, and times."""
    try:
        truth = read_truth(sample)
        study, upload_s = studies(sample.image)
        started = time.monotonic()
        found = answered(settings.answerer, sample, truth, study, settings.new_tokens)
        seconds = time.monotonic() - started
        answer = found.answer if isinstance(found, Segmentation) else found
        return {
            **_common(sample),
            "question": truth.question,
            "answer": truth.answer,
            "prediction": answer.text,
            **_measured(sample, truth, found, settings),
            "tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "times": {
                "upload_s": round(upload_s, 4),
                "first_token_s": round(answer.timings.first_token_s, 4),
                "answer_s": round(seconds, 4),
            },
        }
    finally:
        studies.done(sample.image)


def answered(
    m3d: M3D, sample: Sample, truth: Truth, study: Study, new_tokens: int, likelihoods: bool = True
) -> Answer | Segmentation:
    """What is said about a sample; of closed questions with the likelihood of each letter, if it is asked for."""
    if sample.task in MASKED:
        return m3d.segment(study, truth.question, not is_nifti(sample.image), max_new_tokens=new_tokens)
    choices = tuple(sample.choices) if likelihoods else ()
    return m3d.ask(study, truth.question, max_new_tokens=new_tokens, choices=choices)


def _measured(sample: Sample, truth: Truth, found: Answer | Segmentation, settings: Run) -> dict:
    """What a row holds beside texts."""
    if isinstance(found, Segmentation):
        return _mask(sample, truth, found, settings)
    if sample.task == "vqa-closed":
        return {"choices": sample.choices, "choice": sample.choice, "logprobs": _logprobs(found)}
    return _box(truth, found) if sample.task == "rec" else {}


def _logprobs(found: Answer) -> dict[str, float | None]:
    """Of each choice, as JSON can hold it: None for -inf, a letter that cannot be said."""
    for letter, value in found.choices.items():
        if math.isnan(value) or value == math.inf:
            raise InvalidInput(f"the log-probability of choice {letter} is {value}: the model's numbers are broken")
    return {letter: None if value == -math.inf else value for letter, value in found.choices.items()}


def _common(sample: Sample) -> dict:
    row = {"key": sample.key, "scan": sample.scan, "image": str(sample.image), "groups": sample.groups}
    if sample.structure is not None:
        row["structure"] = sample.structure
    return row


def _box(truth: Truth, answer: Answer) -> dict:
    found = parse_boxes(answer.text)
    return {
        "box": None if truth.box is None else truth.box.tolist(),
        "predicted_box": found[0].tolist() if len(found) else None,
        "size": list(truth.mask.shape),
        "reference": {"IoU": boxes.hull_iou(boxes.reference_box(answer.text), boxes.reference_box(truth.answer))},
    }


def _mask(sample: Sample, truth: Truth, found: Segmentation, settings: Run) -> dict:
    present = bool(truth.mask.any())
    if found.mask is not None and found.mask.shape != truth.mask.shape:
        raise InvalidInput(
            f"{sample.image}: the predicted mask has shape {found.mask.shape}, the true one {truth.mask.shape}"
        )
    if found.logits is not None and found.logits.shape != truth.mask.shape:
        raise InvalidInput(
            f"{sample.image} has shape {truth.mask.shape}, the model's volume {found.logits.shape}, where the "
            "reference's Dice is taken: write the data in the model's size"
        )
    mask = np.zeros_like(truth.mask) if found.mask is None else found.mask
    sound: dict[str, float | None] = {
        "Dice": masks.dice(mask, truth.mask) if present else None,
        "mask found": float(found.mask is not None) if present else None,
        "absent: no mask": None if present else float(not mask.any()),
    }
    if truth.spacing_mm is not None:
        sound["HD95"] = masks.hd95(mask, truth.mask, truth.spacing_mm) if present else None
        sound["NSD"] = masks.nsd(mask, truth.mask, truth.spacing_mm, settings.nsd_mm) if present else None
    # The true mask of a NIfTI file is not known in the model's volume, where the logits are.
    reference = {} if is_nifti(sample.image) else {"Dice": masks.soft_dice(found.logits, truth.mask)}
    return {
        "mask": str(sample.mask),
        "label": sample.label,
        "share": float(truth.mask.mean()),
        "predicted_mask": _kept(mask, sample, settings.predictions) if mask.any() else None,
        "reference": reference,
        "sound": sound,
    }


def _kept(mask: np.ndarray, sample: Sample, folder: Path) -> str:
    """The name of the file that the mask is kept in: a few kB."""
    name = f"{hashlib.sha256(f'{sample.task} {sample.key}'.encode()).hexdigest()[:20]}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / name, bits=np.packbits(mask), shape=mask.shape)
    return name


def read_kept(path: Path) -> np.ndarray:
    """bool: a mask that a run has kept."""
    with np.load(path) as found:
        shape = tuple(found["shape"])
        return np.unpackbits(found["bits"], count=int(np.prod(shape))).reshape(shape).astype(bool)


def _embedded(sample: Sample, studies: Studies, texts: _Texts, settings: Run) -> dict:
    """The row of a pair: the embeddings of scan and report, base64 of float32."""
    try:
        truth = read_truth(sample)
        study, upload_s = studies(sample.image)
        started = time.monotonic()
        scan, text = settings.answerer.embed(study), texts(sample)
        return {
            **_common(sample),
            "answer": truth.answer,
            "scan_embedding": encoded(scan),
            "text_embedding": encoded(text),
            "times": {"upload_s": round(upload_s, 4), "answer_s": round(time.monotonic() - started, 4)},
        }
    finally:
        studies.done(sample.image)


def encoded(embedding: np.ndarray) -> str:
    return base64.b64encode(np.asarray(embedding, "<f4").tobytes()).decode()


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
