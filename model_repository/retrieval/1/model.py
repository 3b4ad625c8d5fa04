"""Ranks texts against a scan; embeds scans, and texts."""

from pathlib import Path

from engine.manifest import CLIP_TOKENIZER_FOLDER, Manifest
from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.request_pool import RequestPool
from engine.runtime.retrieval import RetrievalStep, Retriever
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        repository, parameters = Path(args["model_repository"]).parent, triton_io.parameters(args)
        self.store = StudyStore.of_server()
        tokenizer = repository / CLIP_TOKENIZER_FOLDER
        step = RetrievalStep(Retriever(self.store, Manifest.read(repository), tokenizer, triton_io.infer))
        self.desk = Desk(step, RequestPool.of(parameters))

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()
