"""OpenVINO on the CPU: an ONNX graph with its matrix products in bf16, where the processor multiplies bf16 natively.

ONNX Runtime has no bf16 on x86. Left to choose, OpenVINO would keep everything in bf16, the sums of all blocks and the
norms among it, and masks suffer; so only what goes into a product is rounded here, and the rest stays in fp32.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import openvino
from openvino import opset13 as op

from engine.processor import has_amx

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
        model = _core().read_model(path)
        self._inputs, self._outputs = ([_node(port) for port in ports] for ports in (model.inputs, model.outputs))
        model.reshape({node.name: [1, *(-1 if size is None else size for size in node.shape[1:])]
                       for node in self._inputs})
        _multiply_in_bf16(model, attention=not has_amx())
        self._model = _core().compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads})
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


@cache
def _core() -> openvino.Core:
    """One for this process. Each Core gives the process an alternate signal stack and on its end puts back the one that
    it found: two that end in the order in which they began leave one that is gone, and the next signal kills."""
    return openvino.Core()


def _multiply_in_bf16(model: openvino.Model, attention: bool) -> None:
    """Round what goes into products with weights and into attention, and what comes out of them, to bf16.

    attention: whether that, too. By AMX it takes the fixture's mask beyond the bound of 0.999 (Dice 0.9988; 0.9992 with
    attention in fp32), by AVX512-BF16 it does not (0.9994).
    """
    for node in model.get_ordered_ops():
        inputs, kind = [port.get_source_output() for port in node.inputs()], node.get_type_name()
        if kind == "MatMul" and inputs[1].get_node().get_type_name() == "Constant":
            product = _product(*inputs, node.get_attributes())
        elif kind == "ScaledDotProductAttention" and attention:
            product = op.scaled_dot_product_attention(*(op.convert(part, "bf16") for part in inputs))
        else:
            continue
        out = op.convert(product, "f32").output(0)
        out.set_names(node.output(0).get_names())
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(out)


def _product(x: openvino.Output, weights: openvino.Output, turned: Mapping[str, bool]) -> openvino.Node:
    """x @ weights in bf16, either transposed where `turned` says so.

    Rounding weights harms more than rounding everything else, since it is the same in every patch. So weights that bf16
    does not hold (those of published checkpoints are stored in it) become the sum of two that it does.
    """
    whole = weights.get_node().data
    first = (whole.view(np.uint32) & 0xFFFF0000).view(np.float32)
    rest = whole - first
    if rest.any():
        of_x = len(x.get_partial_shape()) - (2 if turned["transpose_a"] else 1)
        x, first = op.concat([x, x], of_x), np.concatenate([first, rest], 1 if turned["transpose_b"] else 0)
    return op.matmul(op.convert(x, "bf16"), op.convert(op.constant(first), "bf16"), turned["transpose_a"],
                     turned["transpose_b"])


def _node(port) -> Node:
    shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    return Node(port.get_any_name(), _TYPES.get(port.get_element_type(), str(port.get_element_type())), shape)
