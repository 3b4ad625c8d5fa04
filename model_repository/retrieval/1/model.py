"""Ranks texts against a scan."""

from functools import partial
from pathlib import Path

import numpy as np

from engine.manifest import CLIP_TOKENIZER_FOLDER, Manifest
from engine.runtime import triton_io
from engine.runtime.desk import Desk
from engine.runtime.retrieval import Retriever
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        repository = Path(args["model_repository"]).parent
        self.store = StudyStore.of_server()
        self.retriever = Retriever(
            self.store, Manifest.read(repository), repository / CLIP_TOKENIZER_FOLDER, triton_io.infer
        )
        self.desk = Desk(
            lambda request: partial(self._scores, request),
            threads=triton_io.parameter(args, "threads", 2),
            waiting=triton_io.parameter(args, "waiting", 64),
        )

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()

    def _scores(self, request):
        triton_io.needed_array(request, "TEXTS")
        scores, cut = self.retriever.rank(triton_io.needed_text(request, "STUDY"), triton_io.texts(request, "TEXTS"))
        return triton_io.response(
            request.requested_output_names(),
            SCORES=scores,
            TEXT_CUT=cut,
            TEXT_LIMIT=np.array([self.retriever.text_limit], np.int32),
        )
