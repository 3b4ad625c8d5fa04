"""Draws the masks that an answer's [SEG] states ask for; an answer without one passes through at once."""

from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.request_pool import RequestPool
from engine.runtime.segmentation import SegmentationStep, Segmenter
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        parameters = triton_io.parameters(args)
        self.store = StudyStore.of_server()
        step = SegmentationStep(Segmenter(self.store, triton_io.infer))
        self.desk = Desk(step, RequestPool.of(parameters))

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()
