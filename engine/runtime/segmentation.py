"""From the `[SEG]` states of an answer to a mask in the scan's own space."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

from engine.errors import InvalidInput
from engine.runtime.step import Inputs, Later, Outputs
from engine.runtime.study import Infer, segmentation_features
from engine.runtime.study_store import StudyStore
from engine.seg_states import merged
from engine.volume.geometry import Geometry


@dataclass(frozen=True)
class Mask:
    """packed: numpy.packbits of the mask in C order. shape, affine: the scan's own. header: of the scan's NIfTI file
    (see `engine.scan.Scan`), else empty. logits: D x H x W, model space."""

    packed: np.ndarray
    shape: tuple[int, int, int]
    affine: np.ndarray
    logits: np.ndarray
    header: bytes = b""


NO_LOGITS = np.zeros((0, 0, 0), np.float32)
NO_MASK = Mask(np.zeros(0, np.uint8), (0, 0, 0), np.zeros((4, 4)), NO_LOGITS)


class Segmenter:
    def __init__(self, store: StudyStore, infer: Infer):
        self.store = store
        self.infer = infer

    def mask(self, handle: str, states: np.ndarray, return_logits: bool = False) -> Mask:
        """The one mask that `states` (K x H_llm, K >= 1) ask for.

        Several `[SEG]` in an answer are averaged into one prompt, as in the reference, whose threshold is a logit above
        0. Raises StudyNotFound if the study was evicted since the answer began.
        """
        if not np.isfinite(states).all():
            raise InvalidInput("SEG_STATES has values that are not finite")
        info = self.store.info(handle)
        geometry = Geometry.from_dict(info["geometry"])
        features = segmentation_features(self.store, self.infer, handle)
        state = merged(states)
        logits = self.infer("segmentation_head", FEATURES=features[None], SEG_STATE=state[None])["MASK_LOGITS"][0, 0]
        probabilities = 0.5 + 0.5 * np.tanh(0.5 * logits)  # the sigmoid, without overflow
        mask = geometry.mask_to_scan(probabilities)
        return Mask(
            np.packbits(mask),
            geometry.scan_shape,
            np.array(geometry.affine),
            logits if return_logits else NO_LOGITS,
            base64.b64decode(info["header"]),
        )


class SegmentationStep:
    """Draws the mask that an answer's [SEG] states ask for; an answer without one passes through at once."""

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter

    def __call__(self, inputs: Inputs) -> Outputs | Later:
        if not len(inputs.needed_array("SEG_STATES")):
            return _outputs(NO_MASK)
        return lambda: self._drawn(inputs)

    def _drawn(self, inputs: Inputs) -> Outputs:
        handle, states = inputs.needed_text("STUDY"), inputs.needed_array("SEG_STATES")
        return _outputs(self.segmenter.mask(handle, states, inputs.flag("RETURN_LOGITS")))


def _outputs(mask: Mask) -> Outputs:
    return {
        "MASK": mask.packed,
        "MASK_SHAPE": np.array(mask.shape, np.int64),
        "MASK_AFFINE": mask.affine,
        "MASK_HEADER": np.frombuffer(mask.header, np.uint8),
        "LOGITS": mask.logits,
    }
