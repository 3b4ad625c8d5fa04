"""The exported graphs of a repository on this process's CPU.

On a GPU they are served by Triton's TensorRT and ONNX Runtime backends, without Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.contract import MODELS
from engine.errors import Unavailable
from engine.manifest import Manifest
from engine.runtime import acceleration
from engine.runtime.onnx_session import OnnxGraph, chosen_precision
from engine.runtime.settings import GraphSettings, Settings


def open_graph(repository: Path, model: str, settings: Settings) -> OnnxGraph:
    """The graph of a compute model. To be opened and run on one thread, which gives way to the language model."""
    acceleration.give_way()
    own: GraphSettings = getattr(settings, model)
    return OnnxGraph(
        repository / model / "1" / "model.onnx",
        MODELS[model],
        own.threads,
        chosen_precision(own.precision, Manifest.read(repository).precision),
    )


class Graphs:
    """Some compute models of a repository that was exported for a CPU, each on a thread of its own, one run at a time.

    An object of it is an `Infer`.
    """

    def __init__(self, repository: Path, models: Iterable[str], settings: Settings):
        self._threads = {model: ThreadPoolExecutor(1, model) for model in models}
        opening = {
            model: thread.submit(open_graph, repository, model, settings) for model, thread in self._threads.items()
        }
        try:
            self._graphs = {model: opened.result() for model, opened in opening.items()}
        except BaseException:
            self.close()
            raise

    def __call__(self, model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch, and wait."""
        if model not in self._graphs:
            raise Unavailable(f"{model} cannot be run: this repository does not serve it")
        return self._threads[model].submit(self._graphs[model], inputs).result()

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
