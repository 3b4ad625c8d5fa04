"""The language model behind vLLM: answers questions about studies, streaming, many at a time."""

import json
from pathlib import Path

from engine.runtime.answer_desk import AnswerDesk
from engine.runtime.decoder import Decoder
from engine.runtime.decoder.settings import DecoderSettings
from engine.runtime.study_store import StudyStore


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        settings = DecoderSettings.from_parameters({name: value["string_value"] for name, value in parameters.items()})
        self.store = StudyStore.of_server()
        self.desk = AnswerDesk(Decoder(Path(args["model_repository"]).parent, settings), self.store)
        self.desk.start()

    def execute(self, requests):
        self.desk.execute(requests)

    def finalize(self):
        self.desk.close()
        self.store.close()
