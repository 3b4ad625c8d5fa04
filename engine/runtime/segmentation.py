"""From the `[SEG]` states of an answer to masks in the scan's own space."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine import contract
from engine.errors import InvalidInput
from engine.runtime.step import Inputs, Later, Outputs
from engine.runtime.study import Infer, segmentation_features
from engine.runtime.study_store import StudyStore
from engine.seg_states import EACH, REFERENCE, checked_merge, prompts
from engine.volume.geometry import Geometry


@dataclass(frozen=True)
class Mask:
    """What was drawn of an answer.

    packed: numpy.packbits of the mask in C order; of several masks their union. shape, affine: the scan's own. header:
    of the scan's NIfTI file (see `engine.scan.Scan`), else empty. logits: S*D x H x W, model space, one mask's behind
    the other's. scores: float32 [S], see `score_of`. segments: uint8 [S, bytes], each mask packed; 0 x 0 of one mask
    for all [SEG].
    """

    packed: np.ndarray
    shape: tuple[int, int, int]
    affine: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    segments: np.ndarray
    header: bytes = b""


NO_LOGITS = np.zeros((0, 0, 0), np.float32)
NO_SEGMENTS = np.zeros((0, 0), np.uint8)
NO_MASK = Mask(np.zeros(0, np.uint8), (0, 0, 0), np.zeros((4, 4)), NO_LOGITS, np.zeros(0, np.float32), NO_SEGMENTS)


class Segmenter:
    def __init__(self, store: StudyStore, infer: Infer):
        self.store = store
        self.infer = infer

    def mask(self, handle: str, states: np.ndarray, return_logits: bool = False, merge: str = REFERENCE) -> Mask:
        """The masks that `states` (K x H_llm, K >= 1) ask for.

        merge: reference: several `[SEG]` in an answer are averaged into one prompt, as in the reference, whose
        threshold is a logit above 0. each: one mask for each of them.

        Raises StudyNotFound if the study was evicted since the answer began, InvalidInput for states that are not
        finite, and for more masks than `most_segments`.
        """
        if not np.isfinite(states).all():
            raise InvalidInput("SEG_STATES has values that are not finite")
        info = self.store.info(handle)
        geometry = Geometry.from_dict(info["geometry"])
        wanted = prompts(states, merge, math.prod(geometry.scan_shape))
        features = segmentation_features(self.store, self.infer, handle)
        masks, scores, kept = [], [], []
        for logits in self._logits(features, wanted):
            probabilities = 0.5 + 0.5 * np.tanh(0.5 * logits)  # the sigmoid, without overflow
            masks.append(np.packbits(geometry.mask_to_scan(probabilities)))
            scores.append(score_of(probabilities))
            if return_logits:
                kept.append(logits)
        segments = np.stack(masks)
        return Mask(
            np.bitwise_or.reduce(segments),
            geometry.scan_shape,
            np.array(geometry.affine),
            np.concatenate(kept) if kept else NO_LOGITS,
            np.array(scores, np.float32),
            segments if merge == EACH else NO_SEGMENTS,
            base64.b64decode(info["header"]),
        )

    def _logits(self, features: np.ndarray, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """float32 D x H x W of each prompt, HEAD_MAX_BATCH of them at a time."""
        for start in range(0, len(wanted), contract.HEAD_MAX_BATCH):
            batch = wanted[start : start + contract.HEAD_MAX_BATCH]
            repeated = np.repeat(features[None], len(batch), axis=0)
            yield from self.infer("segmentation_head", {contract.FEATURES: repeated, contract.SEG_STATE: batch})[
                contract.MASK_LOGITS
            ][:, 0]


def score_of(probabilities: np.ndarray) -> float:
    """The mean of the probabilities that are above one half; NaN if none is.

    It says how sure the head is of what it marks, not whether that is right: it is not calibrated.
    """
    inside = probabilities[probabilities > 0.5]
    return float(inside.mean(dtype=np.float64)) if inside.size else math.nan


class SegmentationStep:
    """Draws the masks that an answer's [SEG] states ask for; an answer without one passes through at once."""

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter

    def __call__(self, inputs: Inputs) -> Outputs | Later:
        merge = checked_merge(inputs.text(contract.MERGE))
        if not len(inputs.needed_array(contract.SEG_STATES)):
            return _outputs(NO_MASK)
        return lambda: self._drawn(inputs, merge)

    def _drawn(self, inputs: Inputs, merge: str) -> Outputs:
        handle, states = inputs.needed_text(contract.STUDY), inputs.needed_array(contract.SEG_STATES)
        return _outputs(self.segmenter.mask(handle, states, inputs.flag(contract.RETURN_LOGITS), merge))


def _outputs(mask: Mask) -> Outputs:
    return {
        contract.MASK: mask.packed,
        contract.MASK_SHAPE: np.array(mask.shape, np.int64),
        contract.MASK_AFFINE: mask.affine,
        contract.MASK_HEADER: np.frombuffer(mask.header, np.uint8),
        contract.SEGMENT_MASKS: mask.segments,
        contract.SEGMENT_SCORES: mask.scores,
        contract.LOGITS: mask.logits,
    }
