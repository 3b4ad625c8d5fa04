"""Draws the masks that an answer's [SEG] states ask for; an answer without one passes through at once."""

from pathlib import Path

from engine import logs
from engine.runtime import triton_io
from engine.runtime.request_pool import RequestPool
from engine.runtime.request_service import RequestService
from engine.runtime.segmentation import SegmentationStep, Segmenter
from engine.runtime.settings import Settings
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        logs.set_up(args["model_name"])
        settings = Settings.read(Path(args["model_repository"]).parent).segmentation
        self.store = StudyStore.of_server()
        step = SegmentationStep(Segmenter(self.store, triton_io.infer))
        self.service = RequestService(step, RequestPool(settings.threads, settings.waiting))

    def execute(self, requests):
        self.service.execute(requests)

    def finalize(self):
        self.service.close()
        self.store.close()
