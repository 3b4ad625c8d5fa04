"""Draws the mask that an answer's [SEG] states ask for; an answer without one passes through at once."""

from functools import partial

import numpy as np

from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.segmentation import NO_MASK, Segmenter
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        self.store = StudyStore.of_server()
        self.segmenter = Segmenter(self.store, triton_io.infer)
        self.desk = Desk(
            self._answer,
            threads=triton_io.parameter(args, "threads", 2),
            waiting=triton_io.parameter(args, "waiting", 64),
        )

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()

    def _answer(self, request):
        nothing_to_do = not len(triton_io.needed_array(request, "SEG_STATES"))
        return _response(request, NO_MASK) if nothing_to_do else partial(self._mask, request)

    def _mask(self, request):
        mask = self.segmenter.mask(
            triton_io.needed_text(request, "STUDY"),
            triton_io.needed_array(request, "SEG_STATES"),
            triton_io.flag(request, "RETURN_LOGITS"),
        )
        return _response(request, mask)


def _response(request, mask):
    return triton_io.response(
        request.requested_output_names(),
        MASK=mask.packed,
        MASK_SHAPE=np.array(mask.shape, np.int64),
        MASK_AFFINE=mask.affine,
        MASK_HEADER=np.frombuffer(mask.header, np.uint8),
        LOGITS=mask.logits,
    )
