"""The language model behind vLLM: answers questions about studies, streaming, many at a time."""

import atexit
import os
import sys
from pathlib import Path

from engine.runtime import triton_io
from engine.runtime.answer_desk import AnswerDesk
from engine.runtime.decoder import Decoder
from engine.runtime.decoder_settings import DecoderSettings
from engine.runtime.decoder_step import DecoderStep
from engine.runtime.run_folder import READY, RunFolder
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        settings = DecoderSettings.from_parameters(triton_io.parameters(args).values)
        self.health = "starting"
        self.folder = RunFolder.of_server()
        self.store = StudyStore.of_server()
        decoder = Decoder(Path(args["model_repository"]).parent, settings)
        self.desk = AnswerDesk(DecoderStep(decoder, self.store), self._tell, _end)
        self.desk.start()

    def is_ready(self):
        return self.health == READY  # Triton asks since python_backend's pull request 430, of February 2026

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()
        # Python would take the modules of vLLM and PyTorch apart for 2 s, and Triton waits for the end of this process.
        atexit.register(os._exit, 0)

    def _tell(self, health):
        self.health = health
        if self.folder is not None:
            try:
                self.folder.health = health
            except OSError as error:  # a full disk must not keep the language model from being started again
                triton_io.log_error("how the language model is could not be told", error)


def _end(words):
    """Only a new process can help: the keeper ends the server without this one, and a supervisor starts it again."""
    # Not by Triton's logger: it writes later, and this process has no later.
    print(f"decoder: {words}: find the cause above, and start the server again", file=sys.stderr, flush=True)
    os._exit(1)
