"""The language model behind vLLM: answers questions about studies, streaming, many at a time."""

import atexit
import logging
import os
import sys
from pathlib import Path

from engine import logs
from engine.manifest import Manifest
from engine.runtime.decoder import Decoder
from engine.runtime.decoder_service import DecoderService
from engine.runtime.decoder_step import DecoderStep
from engine.runtime.run_folder import READY, RunFolder
from engine.runtime.settings import Settings
from engine.runtime.study_store import StudyStore

_log = logging.getLogger("engine.decoder")


class TritonPythonModel:
    def initialize(self, args):
        logs.set_up(args["model_name"])
        repository = Path(args["model_repository"]).parent
        settings = Settings.read(repository).decoder_on(Manifest.read(repository).target)
        self.health = "starting"
        self.folder = RunFolder.of_server()
        self.store = StudyStore.of_server()
        decoder = Decoder(repository, settings)
        self.service = DecoderService(DecoderStep(decoder, self.store), self._tell, _end)
        self.service.start()

    def is_ready(self):
        return self.health == READY  # Triton asks since python_backend's pull request 430, of February 2026

    def execute(self, requests):
        self.service.execute(requests)

    def finalize(self):
        self.service.close()
        self.store.close()
        # Python would take the modules of vLLM and PyTorch apart for 2 s, and Triton waits for the end of this process.
        atexit.register(os._exit, 0)

    def _tell(self, health):
        self.health = health
        if self.folder is not None:
            try:
                self.folder.health = health
            except OSError as error:  # a full disk must not keep the language model from being started again
                _log.error("the health of the language model could not be written", exc_info=error)


def _end(words):
    """Only a new process can help: the supervisor ends the server without this one, and a service manager
    starts it again."""
    # Not a record of the log: `engine.server` looks for these words at the start of a line.
    print(f"decoder: {words}: find the cause above, and start the server again", file=sys.stderr, flush=True)
    os._exit(1)
