"""OpenVINO on the CPU: an ONNX graph with its matrix products in bf16, where the processor multiplies bf16 natively.

ONNX Runtime has no bf16 on x86. On processors with AMX or AVX512-BF16 this is several times as fast as its fp32.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino

_TYPES = {openvino.Type.f32: "tensor(float)", openvino.Type.i64: "tensor(int64)"}


@dataclass(frozen=True)
class Node:
    """An input or output, as ONNX Runtime describes it: a free axis of `shape` is no number."""

    name: str
    type: str
    shape: list[int | None]


class OpenVinoSession:
    """What engine.runtime.onnx_session needs of onnxruntime.InferenceSession. One run at a time.

    threads: CPU threads of one run. The graph is compiled for a batch of one, and a larger batch runs one by one: with
    a free batch axis compiling takes many times as long, and on a CPU a larger batch gains nothing.
    """

    def __init__(self, path: str, threads: int):
        core = openvino.Core()
        model = core.read_model(path)
        self._inputs, self._outputs = ([_node(port) for port in ports] for ports in (model.inputs, model.outputs))
        model.reshape({node.name: [1, *(-1 if size is None else size for size in node.shape[1:])]
                       for node in self._inputs})
        self._model = core.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
        self._request = self._model.create_infer_request()

    def get_inputs(self) -> list[Node]:
        return self._inputs

    def get_outputs(self) -> list[Node]:
        return self._outputs

    def run(self, names: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        batch = len(next(iter(inputs.values())))
        rows = [self._run({name: array[i:i + 1] for name, array in inputs.items()}) for i in range(batch)]
        return [rows[0][name] if batch == 1 else np.concatenate([row[name] for row in rows]) for name in names]

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._request.infer(inputs, share_inputs=True)
        return {node.name: found[self._model.output(node.name)] for node in self._outputs}


def _node(port) -> Node:
    shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    return Node(port.get_any_name(), _TYPES.get(port.get_element_type(), str(port.get_element_type())), shape)
