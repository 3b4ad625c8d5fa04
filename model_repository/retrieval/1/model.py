"""Ranks texts against a scan; embeds scans, and texts."""

from pathlib import Path

from engine import logs
from engine.manifest import CLIP_TOKENIZER_FOLDER, Manifest
from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.request_pool import RequestPool
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
        self.desk = Desk(step, RequestPool(settings.threads, settings.waiting))

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()
