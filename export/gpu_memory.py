"""What a graph takes of a GPU's memory once it is loaded: weights, memory of its execution, inputs and outputs.

The manifest has it for every graph of target tensorrt, under "gpu_memory", in bytes:

    weights     the files of the graph, which are weights but for a few per cent
    contexts    memory for results in between. Of a plan one number for each profile, at its largest batch: Triton makes
                an execution context for each. Of an ONNX graph one number, at the largest batch that Triton makes
    bindings    inputs and outputs of the largest batch
    source      where `contexts` is from. "engine": TensorRT says what it will allocate. "build log": TensorRT has said
                it while it built, without a GPU to ask it on; TensorRT for RTX has other kernels than what Triton
                loads. "graph": an estimate from the sizes of the graph's tensors
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.typed_graph import GraphError

# ONNX Runtime's arena took this much of `live_bytes`: 1.4 to 1.9 times for the masks' head in batches of 1 to 8, 2.7
# times for BERT in batches of 4 and 8 texts of 512 tokens (on a CPU, without memory patterns, 30 November 2026).
ARENA = 2.7
# Their result lies where their input does.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
_SMALL = 64  # numbers in a constant that a shape may be computed from


def of_plan(plan: Path, entry: dict, model: onnx.ModelProto, shapes: Sequence[tuple[int, ...]]) -> dict:
    """The manifest's "gpu_memory" of a plan.

    Args:
        plan: its file.
        entry: what `tensorrt.build` says of it. "context_bytes" and "context_source" are taken out.
        model: the typed graph that it was built from, with its weights or without.
        shapes: of the graph's inputs, without the batch axis.
    """
    contexts, source = entry.pop("context_bytes"), entry.pop("context_source")
    sizes = [[(most, *shape) for shape in shapes] for _, _, most in entry["profiles"]]
    if contexts is None:
        contexts, source = [live_bytes(model, one)[0] for one in sizes], "graph"
    return {
        "weights": plan.stat().st_size,
        "contexts": contexts,
        "bindings": max(live_bytes(model, one)[1] for one in sizes),
        "source": source,
    }


def of_graph(path: Path, shapes: Sequence[tuple[int, ...]], batch: int) -> dict:
    """The manifest's "gpu_memory" of the ONNX file `path`, for inputs of these shapes without the batch axis."""
    live, bindings = live_bytes(onnx.load(path, load_external_data=False), [(batch, *shape) for shape in shapes])
    weights = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return {"weights": weights, "contexts": [round(ARENA * live)], "bindings": bindings, "source": "graph"}


def live_bytes(model: onnx.ModelProto, sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The most that results take at one time if each is freed after its last use; and what inputs and outputs take.

    Args:
        model: the graph, with its weights or without.
        sizes: shape of each input, batch included.

    Returns:
        Both in bytes.

    Raises:
        GraphError: the sizes do not fix the shape of every result.
    """
    graph = _sized(model, sizes)
    known = {value.name: _bytes(value) for value in (*graph.value_info, *graph.output)}
    place: dict[str, str] = {}  # of a view: the tensor whose memory it has
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        if node.op_type in _VIEWS:
            place[node.output[0]] = place.get(node.input[0], node.input[0])
        for name in (*node.input, *node.output):
            last[place.get(name, name)] = index
    kept = {place.get(value.name, value.name) for value in graph.output}
    alive: dict[str, int] = {}
    most = 0
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name and name not in place:
                size = known.get(name)
                if size is None:
                    raise GraphError(f"{name} ({node.op_type}) has no fixed shape for inputs of {list(sizes)}")
                alive[name] = size
        most = max(most, sum(alive.values()))
        for name in [name for name in alive if last[name] == index and name not in kept]:
            del alive[name]
    return most, sum(_bytes(value) or 0 for value in (*graph.input, *graph.output))


def _sized(model: onnx.ModelProto, sizes: Sequence[Sequence[int]]) -> onnx.GraphProto:
    """The graph with inputs of these sizes, and in `value_info` what is known of the shape of every result then."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = copied.graph
    for value, shape in zip(graph.input, sizes, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dim.dim_value = size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    while True:
        del graph.value_info[:]  # what the exporter wrote names free axes
        inferred = onnx.shape_inference.infer_shapes(copied, data_prop=True).graph
        if not _fold(graph, {value.name: _shape(value) for value in (*inferred.input, *inferred.value_info)}):
            return inferred


def _fold(graph: onnx.GraphProto, shapes: dict[str, list[int] | None]) -> bool:
    """Replace what follows from the shapes alone by constants, since the inference does not carry all of that on.

    Returns:
        Whether there was anything to replace.
    """
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT64 and not tensor.external_data and math.prod(tensor.dims) <= _SMALL
    }
    found = {}
    for node in graph.node:
        if node.op_type == "Shape" and shapes.get(node.input[0]) is not None:
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            shape = shapes[node.input[0]][ends.get("start", 0) : ends.get("end")]
            found[node.output[0]] = np.array(shape, np.int64)
        elif node.op_type != "Constant" and node.input and all(name in constants for name in node.input):
            given = {name: constants[name] for name in node.input}
            found |= zip(node.output, ReferenceEvaluator(node).run(None, given))
    replaced = [node for node in graph.node if node.output[0] in found]
    for node in replaced:
        graph.node.remove(node)
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in found.items())
    return bool(replaced)


def _shape(value: onnx.ValueInfoProto) -> list[int] | None:
    """Shape of a tensor; None if an axis is free."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return [dim.dim_value for dim in tensor.shape.dim]


def _bytes(value: onnx.ValueInfoProto) -> int | None:
    """Size of a tensor; None if an axis is free."""
    shape = _shape(value)
    item = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
    return None if shape is None else item * math.prod(shape)
