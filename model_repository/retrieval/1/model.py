"""Ranks texts against a scan; embeds scans, and texts."""

from pathlib import Path

from engine import logs
from engine.manifest import CLIP_TOKENIZER_FOLDER, Manifest
from engine.runtime import triton_io
from engine.runtime.request_pool import RequestPool
from engine.runtime.request_service import RequestService
from engine.runtime.retrieval import RetrievalStep, Retriever
from engine.runtime.settings import Settings
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        logs.set_up(args["model_name"])
        repository = Path(args["model_repository"]).parent
        settings = Settings.read(repository).retrieval
        self.store = StudyStore.of_server()
        tokenizer = repository / CLIP_TOKENIZER_FOLDER
        step = RetrievalStep(Retriever(self.store, Manifest.read(repository), tokenizer, triton_io.infer))
        self.service = RequestService(step, RequestPool(settings.threads, settings.waiting))

    def execute(self, requests):
        self.service.execute(requests)

    def finalize(self):
        self.service.close()
        self.store.close()
