"""The Triton model that runs an exported ONNX graph on the CPU; the model of that name says which one.

On a GPU the same names are served by Triton's TensorRT and ONNX Runtime backends, without Python.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.contract import MODELS
from engine.manifest import Manifest
from engine.runtime import triton_io
from engine.runtime.onnx_session import OnnxGraph, chosen_precision

# How much nicer than the language model. Each of a token's hundreds of products ends when its last thread does, so an
# encoder with an equal share of the cores slows an answer down four times, not twice. With this share (a quarter, while
# both want a core) an answer is twice as fast, and a scan takes a quarter longer beside answers that never pause.
_NICE = 5


class TritonPythonModel:
    def initialize(self, args):
        os.nice(_NICE)  # of this thread, which runs the graph, and of those that the graph's library starts from here
        folder = Path(args["model_repository"])
        manifest = Manifest.read(folder.parent)
        self.model = MODELS[args["model_name"]]
        self.graph = OnnxGraph(
            folder / args["model_version"] / "model.onnx",
            self.model,
            triton_io.parameter(args, "threads", 0),
            chosen_precision(triton_io.words(args, "precision", "fp32"), manifest.precision),
        )

    def execute(self, requests):
        return [triton_io.answer(self._run, request) for request in requests]

    def _run(self, request):
        # A graph's inputs are none of them optional.
        inputs: dict[str, Any] = {name: triton_io.array(request, name) for name in self.model.input_names}
        outputs = self.graph(inputs)
        return triton_io.response(request.requested_output_names(), **outputs)
