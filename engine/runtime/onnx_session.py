"""An exported graph on the CPU as a function of named arrays, checked against the tensor contract.

In fp32 by ONNX Runtime, in bf16 by OpenVINO.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from engine.contract import Model, Tensor
from engine.errors import InvalidInput, M3DError, RepositoryError
from engine.runtime.acceleration import multiplies_bf16, open_bf16

EXPORT_AGAIN = "export the repository again with export/build_engines.py"
_DTYPES = {"FP32": ("tensor(float)", np.float32), "INT64": ("tensor(int64)", np.int64)}


class OnnxGraph:
    """One graph of an exported repository, `path` = .../model.onnx (weights beside it if it is over 2 GB).

    threads: CPU threads for one run, 0 for all that this process may use. precision: of its products, fp32 or bf16.
    Raises RepositoryError if the file is missing, unreadable or not the graph that `model` promises.
    """

    def __init__(self, path: Path | str, model: Model, threads: int = 0, precision: str = "fp32"):
        self.model = model
        if not Path(path).is_file():
            raise RepositoryError(f"{model.name} has no graph ({path} is missing): {EXPORT_AGAIN}")
        try:
            self._session = _session(str(path), threads or len(os.sched_getaffinity(0)), precision)
        except RepositoryError:
            raise
        except Exception as error:  # neither library has a public base class of its errors
            library = "OpenVINO" if precision == "bf16" else "ONNX Runtime"
            raise RepositoryError(f"{model.name}: {library} cannot read {path} ({error}): {EXPORT_AGAIN}") from None
        self._shapes = {}
        for kind, promised, found in (
            ("input", model.inputs, self._session.get_inputs()),
            ("output", model.outputs, self._session.get_outputs()),
        ):
            _check_names(model.name, kind, promised, found)
            for tensor in promised:
                self._shapes[tensor.name] = _check_tensor(model.name, kind, tensor, found)

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch: every array has the batch axis in front. Contiguous inputs are read where they lie."""
        for tensor in self.model.inputs:
            self._check_input(tensor, inputs[tensor.name])
        try:
            outputs = self._session.run(self.model.output_names, inputs)
        except Exception as error:
            raise M3DError(f"{self.model.name} failed: {error}") from None
        return dict(zip(self.model.output_names, outputs))

    def _check_input(self, tensor: Tensor, array: np.ndarray) -> None:
        shape = self._shapes[tensor.name]
        fits = array.ndim == len(shape) and all(s is None or s == n for s, n in zip(shape, array.shape))
        if not fits or array.dtype != _DTYPES[tensor.dtype][1] or array.size == 0:
            wanted = " x ".join("any" if s is None else str(s) for s in shape)
            raise InvalidInput(
                f"{self.model.name}: {tensor.name} must be {tensor.dtype} {wanted}, "
                f"not {array.dtype} {' x '.join(map(str, array.shape))}"
            )


def chosen_precision(wanted: str, of_export: str) -> str:
    """fp32 or bf16 for the setting `precision`; auto is the export's, where this processor computes it natively."""
    if wanted == "auto":
        return "bf16" if of_export == "bf16" and multiplies_bf16() else "fp32"
    return wanted


def _session(path: str, threads: int, precision: str):
    if precision == "bf16":
        if not multiplies_bf16():
            raise RepositoryError("setting precision is bf16, which this processor does not have: take fp32 or auto")
        return open_bf16(path, threads)
    return onnxruntime.InferenceSession(path, _options(threads), ["CPUExecutionProvider"])


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The language model decodes on the same cores: waiting threads must not spin.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # An arena would keep the peak of a 3D volume's activations for good; a handful of allocations a run cost nothing.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return options


def _check_names(graph: str, kind: str, promised: tuple[Tensor, ...], found) -> None:
    wanted, given = sorted(t.name for t in promised), sorted(f.name for f in found)
    if wanted != given:
        raise RepositoryError(f"{graph}: the graph's {kind}s are {given}, this engine expects {wanted}: {EXPORT_AGAIN}")


def _check_tensor(graph: str, kind: str, tensor: Tensor, found) -> list[int | None]:
    """The graph's shape of `tensor` with the batch axis in front, None for a free axis."""
    node = next(f for f in found if f.name == tensor.name)
    shape = [size if isinstance(size, int) else None for size in node.shape]
    fits = len(shape) == 1 + len(tensor.dims) and all(
        promised in (-1, size) for promised, size in zip(tensor.dims, shape[1:])
    )
    if node.type != _DTYPES[tensor.dtype][0] or not fits:
        raise RepositoryError(
            f"{graph}: {kind} {tensor.name} is {node.type} {node.shape}, this engine expects "
            f"{tensor.dtype} [batch, {', '.join(map(str, tensor.dims))}]: {EXPORT_AGAIN}"
        )
    return shape
