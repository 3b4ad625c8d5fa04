"""Precision, written into the ONNX graph: TensorRT's strongly typed networks compute each node in its types there.

Matrix products, and what merely moves or scales their operands and results, become fp16 or bf16; what loses accuracy
there stays in fp32: layer norms, softmax, the residual stream, the patch embedding (which would round the voxels), and
everything that is not named here. fp8 is fp16 with the products of the transformer blocks quantised (E4M3, one scale
per activation tensor and per column of a weight).

Tensor cores add up products of bf16 in fp32 alone; those of fp16 in fp32 or in fp16, as TensorRT finds quicker. So each
product in fp16 has its operands cast to fp32 and its result cast back: TensorRT takes that as one kernel that reads and
writes fp16 and adds up in fp32 (its documentation, "Control of Computational Precision"). Around both products of an
attention it stays one fused kernel.

Graphs may come without their weights, as `onnx.load(..., load_external_data=False)` reads them: those that are needed
are read one at a time, and the others stay where they are.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engine.errors import M3DError
from export.graphs import EXTERNAL_DATA_BYTES

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
FP32_PARTS = frozenset({"norm", "softmax", "residual", "patch_embedding"})
FP8_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)

_LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT16}
_NUMPY = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16, TensorProto.FLOAT: np.float32}
_PRODUCTS = ("MatMul", "Gemm")
# These have the type of what they get, if all of it is in reduced precision.
_FOLLOWING = (
    "Reshape",
    "Transpose",
    "Slice",
    "Squeeze",
    "Unsqueeze",
    "Split",
    "Concat",
    "Expand",
    "Identity",
    "Add",
    "Mul",
    "Gelu",
    "Relu",
)
_SIZED = ("Reshape", "Slice", "Squeeze", "Unsqueeze", "Split", "Expand")  # only their first input is data


class GraphError(M3DError):
    """A graph is not of the kind that these transformations know."""


def typed(
    model: onnx.ModelProto,
    precision: str,
    amax: dict[str, float] | None = None,
    fp32_parts: frozenset[str] = FP32_PARTS,
    folder: Path | None = None,
) -> onnx.ModelProto:
    """A copy of the fp32 graph `model` with the types of `precision`; inputs and outputs stay in fp32.

    Args:
        model: the graph, with its weights or without.
        precision: one of PRECISIONS.
        amax: for fp8, the largest magnitude of each tensor of `fp8_inputs(model)`, from calibration.
        fp32_parts: what stays in fp32; given only to show what each part is worth.
        folder: where the weights lie that `model` came without.

    Raises:
        GraphError: the graph cannot be typed.
    """
    if precision not in PRECISIONS:
        raise GraphError(f"precision {precision!r} is unknown; known are {', '.join(PRECISIONS)}")
    model = plain_attention(model)
    if precision == "fp32":
        return model
    if precision == "fp8" and not amax:
        raise GraphError("fp8 needs calibration: the largest magnitudes of the products' inputs")
    _Typing(model.graph, _LOW[precision], amax if precision == "fp8" else None, fp32_parts, folder).rewrite()
    return model


def plain_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which keys reach their product by one transposition of the last two axes.

    The exporter reshapes keys to three axes and back, by sizes computed at run time; TensorRT then copies queries, keys
    and values before each attention.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = copied.graph
    producer = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type != "Softmax":
            continue
        scores = producer.get(node.input[0])
        scaled = producer.get(scores.input[1]) if scores is not None and scores.op_type == "MatMul" else None
        if scaled is None or scaled.op_type != "Mul":
            continue
        chain = [producer.get(scaled.input[0])]
        while len(chain) < 3 and chain[-1] is not None:
            chain.append(producer.get(chain[-1].input[0]))
        if [step and step.op_type for step in chain] != ["Reshape", "Transpose", "Reshape"]:
            continue
        back, transpose, flatten = chain
        if list(transpose.attribute[0].ints) != [0, 2, 1]:
            continue
        back.CopyFrom(
            helper.make_node("Transpose", [flatten.input[0]], list(back.output), name=back.name, perm=[0, 1, 3, 2])
        )
        back.metadata_props.extend(transpose.metadata_props)
    _drop_unused(graph)
    return copied


def fp8_inputs(model: onnx.ModelProto) -> list[str]:
    """The tensors that calibration has to watch: activations that enter quantised products, in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return list(dict.fromkeys(node.input[0] for node in model.graph.node if _is_quantised(node, constants)))


def module_of(node: NodeProto) -> str:
    """The PyTorch module a node comes from, e.g. `vision_tower.blocks.0.attn.qkv`; empty if the graph does not say."""
    properties = {entry.key: entry.value for entry in node.metadata_props}
    try:
        scopes = ast.literal_eval(properties.get("pkg.torch.onnx.name_scopes", "[]"))
    except (SyntaxError, ValueError):
        return ""
    return scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""  # what `graphs` wraps models in


def free_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose declared inputs and outputs have free axes, as Triton's ONNX Runtime backend wants for dims of -1.

    The backend refuses a configuration that leaves open what the graph fixes.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for value in (*copied.graph.input, *copied.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis and dim.HasField("dim_value") and dim.dim_value != 1:
                dim.dim_param = f"{value.name}_{axis}"
    return copied


def save(model: onnx.ModelProto, path) -> None:
    """Write the graph, large weights into `<name>.data` beside it: those are gone from `model` afterwards."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save(
        model, path, save_as_external_data=size > EXTERNAL_DATA_BYTES, location=f"{path.name}.data", size_threshold=1024
    )


@dataclass
class _Typing:
    """One rewriting of a graph, node by node in its order."""

    graph: onnx.GraphProto
    low: int
    amax: dict[str, float] | None
    fp32_parts: frozenset[str]
    folder: Path | None

    def rewrite(self) -> None:
        graph = self.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        values = (*graph.input, *graph.output, *graph.value_info)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types.update({name: tensor.data_type for name, tensor in self.constants.items()})
        self.nodes: list[NodeProto] = []
        self.cast: dict[tuple[str, int], str] = {}
        outputs = {value.name for value in graph.output}
        for node in list(graph.node):
            self._rewrite(node, outputs)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        _drop_unused(graph)

    def _rewrite(self, node: NodeProto, outputs: set[str]) -> None:
        positions = self._data_inputs(node)
        if not positions or node.op_type in ("Constant", "Shape"):
            self.nodes.append(node)
            return
        wanted = self.low if self._is_low(node, positions) else TensorProto.FLOAT
        quantised = wanted == self.low and self.amax is not None and _is_quantised(node, self.constants)
        widened = wanted == self.low == TensorProto.FLOAT16 and node.op_type in _PRODUCTS and not quantised
        for position in positions:
            name = node.input[position]
            if not quantised:
                name = self._as(name, wanted)
                node.input[position] = self._as(name, TensorProto.FLOAT) if widened else name
            elif position == 0:
                node.input[0] = self._quantised(name)
            else:
                node.input[position] = self._quantised_weight(name)
        self.nodes.append(node)
        if widened:
            result = node.output[0]
            node.output[0] = f"{result}_summed"
            self._node("Cast", [f"{result}_summed"], result, to=wanted)
            node = self.nodes[-1]
        for index, name in enumerate(node.output):
            self.types[name] = wanted
            if name in outputs and wanted != TensorProto.FLOAT:
                node.output[index] = inner = f"{name}_typed"
                self._node("Cast", [inner], name, to=TensorProto.FLOAT)

    def _data_inputs(self, node: NodeProto) -> list[int]:
        """Positions of the floating-point inputs."""
        inputs = node.input[:1] if node.op_type in _SIZED else node.input
        return [i for i, name in enumerate(inputs) if self.types.get(name) in (TensorProto.FLOAT, self.low)]

    def _is_low(self, node: NodeProto, positions: list[int]) -> bool:
        part = "patch_embedding" in module_of(node) and "patch_embedding"
        if node.op_type in _PRODUCTS:
            return part not in self.fp32_parts
        following = [
            *_FOLLOWING,
            *("LayerNormalization" for _ in "x" if "norm" not in self.fp32_parts),
            *("Softmax" for _ in "x" if "softmax" not in self.fp32_parts),
        ]
        names = [node.input[i] for i in positions]
        if node.op_type not in following:
            return False
        moving = [name for name in names if name not in self.constants]
        if not moving:  # an expanded parameter, such as the class token
            return "residual" not in self.fp32_parts
        # A bias is a vector; a position embedding begins the residual stream.
        constant_ranks = [len(self.constants[name].dims) for name in names if name in self.constants]
        if node.op_type == "Add" and "residual" in self.fp32_parts and max(constant_ranks, default=0) > 1:
            return False
        return all(self.types[name] == self.low for name in moving)

    def _as(self, name: str, wanted: int) -> str:
        """`name` in the type `wanted`: itself, or a cast of it that is made once."""
        if self.types[name] == wanted:
            return name
        if (name, wanted) not in self.cast:
            result = self.cast[name, wanted] = f"{name}_{TensorProto.DataType.Name(wanted).lower()}"
            if name in self.constants:
                self._constant(result, self._values(name).astype(_NUMPY[wanted]))
            else:
                self._node("Cast", [name], result, to=wanted)
            self.types[result] = wanted
        return self.cast[name, wanted]

    def _quantised(self, name: str) -> str:
        """Activations: one scale for the tensor, from calibration."""
        result = f"{name}_dequantised"
        if result not in self.types:
            if name not in self.amax:
                raise GraphError(f"calibration has no largest magnitude of {name}")
            scale, zero = f"{name}_scale", f"{name}_zero"
            self._constant(scale, np.asarray(max(self.amax[name], 1e-6) / FP8_MAX, _NUMPY[self.low]))
            self._constant(zero, np.zeros((), ml_dtypes.float8_e4m3fn))
            self._node("QuantizeLinear", [self._as(name, self.low), scale, zero], f"{name}_fp8")
            self._node("DequantizeLinear", [f"{name}_fp8", scale, zero], result)
            self.types[result] = self.low
        return result

    def _quantised_weight(self, name: str) -> str:
        """Weights: quantised here, one scale per column."""
        result = f"{name}_dequantised"
        if result not in self.types:
            values = self._values(name)
            scales = (np.maximum(np.abs(values).max(axis=0), 1e-6) / FP8_MAX).astype(_NUMPY[self.low])
            quantised = np.clip(values / scales.astype(np.float32), -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
            self._constant(f"{name}_fp8", quantised)
            self._constant(f"{name}_scale", scales)
            self._constant(f"{name}_zero", np.zeros(scales.shape, ml_dtypes.float8_e4m3fn))
            self._node("DequantizeLinear", [f"{name}_fp8", f"{name}_scale", f"{name}_zero"], result, axis=1)
            self.types[result] = self.low
        return result

    def _values(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[name], str(self.folder or ""))

    def _constant(self, name: str, values: np.ndarray) -> None:
        self.graph.initializer.append(numpy_helper.from_array(values, name))

    def _node(self, op_type: str, inputs: list[str], output: str, **attributes) -> None:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"{op_type}_{output}", **attributes))


def _is_quantised(node: NodeProto, constants) -> bool:
    """Products of activations and weights inside the transformer blocks; first and last layers stay in fp16."""
    return node.op_type == "MatMul" and node.input[1] in constants and ".blocks." in f".{module_of(node)}."


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and weights that no output depends on."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    kept.reverse()
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)
    if len(weights) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(weights)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The typed `model` for machines without kernels of its types: fp32 arithmetic, each result rounded to its type.

    That is what the graph asks of a GPU's tensor cores, up to the order of sums: operands in reduced precision, sums in
    fp32, the result rounded. ONNX Runtime on a CPU knows no bf16 products and skips roundings in fp16.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = copied.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types.update({value.name: value.type.tensor_type.elem_type for value in graph.input})
    low = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    nodes = []
    for tensor in graph.initializer:
        if tensor.data_type in low:  # cast when it is used: as fp32 it would take twice the memory all the time
            nodes.append(helper.make_node("Cast", [f"{tensor.name}_stored"], [tensor.name], to=TensorProto.FLOAT))
            tensor.name = f"{tensor.name}_stored"
    for node in list(graph.node):
        to = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
        if node.op_type == "DequantizeLinear":
            kind = types[node.input[1]]
        elif node.op_type in ("Shape", "Constant", "QuantizeLinear"):
            kind = None
        else:
            kind = to or types.get(node.input[0])
        types.update(dict.fromkeys(node.output, kind))
        nodes.append(node)
        if kind not in low:
            continue
        if to is not None:
            node.attribute[0].i = TensorProto.FLOAT
        for index, name in enumerate(node.output):
            node.output[index] = f"{name}_exact"
            nodes += [
                helper.make_node("Cast", [f"{name}_exact"], [f"{name}_rounded"], to=kind),
                helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT),
            ]
    del graph.node[:]
    graph.node.extend(nodes)
    return copied
