"""The Triton model that runs an exported ONNX graph on the CPU; the model of that name says which one.

On a GPU the same names are served by Triton's TensorRT and ONNX Runtime backends, without Python.
"""

from __future__ import annotations

from pathlib import Path

from engine import logs
from engine.runtime import triton_io
from engine.runtime.graphs import open_graph
from engine.runtime.settings import Settings


class TritonPythonModel:
    def initialize(self, args):
        logs.set_up(args["model_name"])
        repository = Path(args["model_repository"]).parent
        self.graph = open_graph(repository, args["model_name"], Settings.read(repository))

    def execute(self, requests):
        return [triton_io.answer(self._run, triton_io.Request(request)) for request in requests]

    def _run(self, request: triton_io.Request):
        return request.response(self.graph({name: request.needed_array(name) for name in self.graph.model.input_names}))
