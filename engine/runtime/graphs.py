"""The exported graphs of a repository on this process's CPU.

On a GPU they are served by Triton's TensorRT and ONNX Runtime backends, without Python.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.contract import MODELS
from engine.errors import Unavailable
from engine.manifest import Manifest
from engine.runtime.onnx_session import OnnxGraph, chosen_precision
from engine.runtime.parameters import Parameters

# How much nicer than the language model. Each of a token's hundreds of products ends when its last thread does, so an
# encoder with an equal share of the cores slows an answer down four times, not twice. With this share (a quarter, while
# both want a core) an answer is twice as fast, and a scan takes a quarter longer beside answers that never pause.
_NICE = 5


def open_graph(repository: Path, model: str, parameters: Parameters) -> OnnxGraph:
    """The graph of a compute model. To be opened and run on one thread, which gives way to the language model."""
    os.nice(_NICE)  # of this thread, and of those that the graph's library starts from here
    return OnnxGraph(
        repository / model / "1" / "model.onnx",
        MODELS[model],
        parameters.integer("threads", 0),
        chosen_precision(parameters.text("precision", "fp32"), Manifest.read(repository).precision),
    )


class Graphs:
    """Some compute models of a repository that was exported for a CPU, each on a thread of its own, one run at a time.

    An object of it is an `Infer`.
    """

    def __init__(self, repository: Path, models: Iterable[str]):
        self._threads = {model: ThreadPoolExecutor(1, model) for model in models}
        opening = {
            model: thread.submit(open_graph, repository, model, Parameters.read(repository, model, "cpu"))
            for model, thread in self._threads.items()
        }
        try:
            self._graphs = {model: opened.result() for model, opened in opening.items()}
        except BaseException:
            self.close()
            raise

    def __call__(self, model: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run a batch, and wait."""
        if model not in self._graphs:
            raise Unavailable(f"{model} cannot be run: this repository does not serve it")
        return self._threads[model].submit(self._graphs[model], inputs).result()

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
