"""OpenVINO on the CPU: an ONNX graph with its matrix products in bf16, where the processor multiplies bf16 natively.

ONNX Runtime has no bf16 on x86. Left to choose, OpenVINO would keep everything in bf16, the sums of all blocks and the
norms among it, and masks suffer; so only what goes into a product or comes out of it is rounded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import openvino
from openvino import opset13 as op

# What a product's result passes through on its way into the next one: activations are computed with the product, in
# fp32, before it is rounded.
_KEEP_BF16 = {"Reshape", "Transpose", "Slice", "Squeeze", "Gelu"}
# Products before the first block of a ViT, and in it: patch embedding; qkv, attention's output, both of the MLP.
_EMBEDDING, _BLOCK = 1, 4
_FP32, _BF16 = openvino.Type.f32, openvino.Type.bf16
_TYPES = {_FP32: "tensor(float)", openvino.Type.i64: "tensor(int64)"}


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
        model.reshape(
            {node.name: [1, *(-1 if size is None else size for size in node.shape[1:])] for node in self._inputs}
        )
        _multiply_in_bf16(model)
        self._model = _core().compile_model(
            model,
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads},
        )
        self._request = self._model.create_infer_request()

    def get_inputs(self) -> list[Node]:
        return self._inputs

    def get_outputs(self) -> list[Node]:
        return self._outputs

    def run(self, names: Sequence[str], inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        batch = len(next(iter(inputs.values())))
        rows = [self._run({name: array[i : i + 1] for name, array in inputs.items()}) for i in range(batch)]
        return [rows[0][name] if batch == 1 else np.concatenate([row[name] for row in rows]) for name in names]

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._request.infer(inputs, share_inputs=True)
        return {node.name: found[self._model.output(node.name)] for node in self._outputs}


@cache
def _core() -> openvino.Core:
    """One for this process. Each Core gives the process an alternate signal stack and on its end puts back the one that
    it found: two that end in the order in which they began leave one that is gone, and the next signal kills."""
    return openvino.Core()


def _multiply_in_bf16(model: openvino.Model) -> None:
    """Let products with weights and attention read and write bf16; what they write stays so until it is summed up.

    Left in fp32 is what costs little and would make much of the error: the patch embedding, the projector behind the
    vision encoder's pooling (few rows, and more than half of the whole error), and where features are not pooled, the
    first block, whose error all others pass on.
    """
    nodes = model.get_ordered_ops()
    products = [node for node in nodes if _has_constant(node, "MatMul")]
    pooled = any(node.get_type_name() == "AvgPool" for node in nodes)
    most = max(map(_rows, products), default=0)
    chosen = {
        node.get_name() for node in products[_EMBEDDING if pooled else _EMBEDDING + _BLOCK :] if 2 * _rows(node) > most
    }
    for node in nodes:
        ports, kind = node.inputs(), node.get_type_name()
        if node.get_name() in chosen:
            _round_product(node)
        elif (kind == "ScaledDotProductAttention" or _adds_bias(node)) and _is_bf16(ports[0]):
            for port in ports:
                _convert(port, _BF16)
        elif not (kind in _KEEP_BF16 and _is_bf16(ports[0])):
            for port in filter(_is_bf16, ports):
                _convert(port, _FP32)
        node.validate_and_infer_types()  # what it writes is known from here on


def _adds_bias(node: openvino.Node) -> bool:
    return _has_constant(node, "Add") and len(node.get_input_shape(1)) == 1


def _has_constant(node: openvino.Node, kind: str) -> bool:
    return node.get_type_name() == kind and node.input_value(1).get_node().get_type_name() == "Constant"


def _rows(product: openvino.Node) -> int:
    shape = product.get_output_partial_shape(0)
    return shape[len(shape) - 2].get_length()


def _round_product(node: openvino.Node) -> None:
    """Weights that bf16 does not hold (those of published checkpoints are stored in it) become the sum of two that it
    does: rounding them harms more than rounding anything else, since it is the same in every patch."""
    turned, rows = node.get_attributes(), node.input(0)
    _convert(rows, _BF16)
    weights = node.input_value(1).get_node().data
    first = (weights.view(np.uint32) & 0xFFFF0000).view(np.float32)
    rest = weights - first
    if rest.any():
        of_rows = len(rows.get_partial_shape()) - (2 if turned["transpose_a"] else 1)
        rows.replace_source_output(op.concat([rows.get_source_output()] * 2, of_rows).output(0))
        parts = np.concatenate([first, rest], 1 if turned["transpose_b"] else 0)
        node.input(1).replace_source_output(op.constant(parts).output(0))
    _convert(node.input(1), _BF16)


def _is_bf16(port: openvino.Input) -> bool:
    return port.get_source_output().get_element_type() == _BF16


def _convert(port: openvino.Input, dtype: openvino.Type) -> None:
    if port.get_source_output().get_element_type() != dtype:
        port.replace_source_output(op.convert(port.get_source_output(), dtype.to_string()).output(0))


def _node(port) -> Node:
    shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    return Node(port.get_any_name(), _TYPES.get(port.get_element_type(), str(port.get_element_type())), shape)
