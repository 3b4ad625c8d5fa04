"""A graph's TensorRT plan: calibrated, typed, compared with PyTorch, built, and compared again where there is a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from engine.manifest import TENSORRT_CONFIG
from engine.packages import cache_folder
from export import tensorrt, typed_graph
from export.build_settings import BuildSettings
from export.graphs import Graph, compare

# Largest error allowed against fp32 PyTorch, as a share of the largest output; README.md has what is measured.
BOUNDS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-2, "fp8": 1e-1}
TYPED = "model.typed.onnx"


def build(
    graph: Graph,
    repository: Path,
    precision: str,
    settings: BuildSettings,
    volumes: Sequence[np.ndarray],
    progress: Callable[[str], None],
) -> dict:
    """Turn the exported ONNX graph of `graph` in `repository` into a plan; returns the plan's manifest entry.

    volumes: scans as the model sees them, fp32 [1, D, H, W] in 0..1: fp8 is calibrated on them, and every precision is
    compared with PyTorch on them, besides random values. The ONNX files are removed: Triton serves the plan.
    Raises ExportError (out of bounds) and what `tensorrt.build` raises.
    """
    settings.refuse(precision)
    folder = repository / graph.name / "1"
    exported, typed = folder / "model.onnx", folder / TYPED
    amax = None
    if precision == "fp8":
        progress(f"calibrating fp8 on {len(volumes)} scans")
        amax = calibrate(exported, volumes)
    model = typed_graph.typed(onnx.load(exported), precision, amax)
    key = tensorrt.structure_key(model, settings) if settings.strip_weights else None
    inputs = [
        *([graph.random_inputs(1)] if precision != "fp8" else []),
        *((torch.tensor(volume)[None],) for volume in volumes),
    ]
    errors = compare(graph, on_cpu(model), BOUNDS[precision], inputs)
    typed_graph.save(model, typed)  # afterwards its large weights are in the file alone
    del model
    progress(f"{precision}: off by {errors['max_error']:.1e} at most, {BOUNDS[precision]:.0e} allowed (on the CPU)")
    plan = folder / tensorrt.PLAN[settings.builder]
    entry = {"precision": precision, "bound": BOUNDS[precision], **errors, "compared": "typed graph on the CPU"}
    entry.update(_stripped_and_refitted(typed, plan, settings, key) if key else tensorrt.build(typed, plan, settings))
    attentions = f", {entry['fused_attentions']} fused attentions" if entry["fused_attentions"] else ""
    progress(f"{plan.name}: {entry['bytes'] / 1e6:,.0f} MB{attentions} ({entry['build_seconds']} s)")
    if settings.builder == "tensorrt" and tensorrt.can_run():
        entry |= compare(graph, lambda batch: tensorrt.run(plan, "tensorrt", batch), BOUNDS[precision], inputs)
        entry["compared"] = "plan on the GPU"
        progress(f"off by {entry['max_error']:.1e} at most on the GPU")
    for path in (*folder.glob("model.onnx*"), *folder.glob(f"{TYPED}*")):
        path.unlink()
    return entry


def calibrate(graph: Path, volumes: Sequence[np.ndarray]) -> dict[str, float]:
    """The largest magnitude of every tensor that fp8 quantises, over `volumes`, from the fp32 ONNX file `graph`."""
    model = typed_graph.plain_attention(onnx.load(graph))
    watched = typed_graph.fp8_inputs(model)
    for name in watched:
        # Reduced in the graph: the tensors of all blocks at once would not fit into memory.
        model.graph.node.extend(
            [
                onnx.helper.make_node("Abs", [name], [f"{name}_abs"]),
                onnx.helper.make_node("ReduceMax", [f"{name}_abs"], [f"{name}_max"], keepdims=0),
            ]
        )
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_max", onnx.TensorProto.FLOAT, []))
    session = _session(model)
    outputs = [f"{name}_max" for name in watched]
    found = [session.run(outputs, {session.get_inputs()[0].name: volume[None]}) for volume in volumes]
    return {name: float(max(values)) for name, *values in zip(watched, *found)}


def on_cpu(model: onnx.ModelProto) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The typed graph `model` as a function of named arrays, with the rounding that it has on a GPU."""
    session = _session(typed_graph.rounded(model))
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))


def write_config(name: str, repository: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write the model's TENSORRT_CONFIG: config.pbtxt, and a warm-up with this checkpoint's own sizes.

    shapes: of each input, without the batch axis. config.pbtxt itself fits every checkpoint.
    """
    folder = repository / name
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    for batch in (1, config.max_batch_size):
        warmup = config.model_warmup.add(name=f"batch {batch}", batch_size=batch)
        for tensor in config.input:
            given = warmup.inputs[tensor.name]
            given.data_type = tensor.data_type
            given.dims.extend(shapes[tensor.name])
            given.zero_data = True
    target = folder / TENSORRT_CONFIG
    target.parent.mkdir(exist_ok=True)
    target.write_text(
        f"# Written by export/build_engines.py for the checkpoint that lies here.\n"
        f"{text_format.MessageToString(config)}"
    )


def _stripped_and_refitted(typed: Path, plan: Path, settings: BuildSettings, key: str) -> dict:
    """Build the plan without weights, or take it from the cache, and put the weights in."""
    known = cache_folder() / "plans" / key
    stripped = known / tensorrt.STRIPPED_PLAN
    if not stripped.is_file():
        known.mkdir(parents=True, exist_ok=True)
        partial = stripped.with_suffix(".partial")
        stripped.with_suffix(".json").write_text(json.dumps(tensorrt.build(typed, partial, settings)))
        partial.replace(stripped)
    entry = json.loads(stripped.with_suffix(".json").read_text())
    tensorrt.refit(stripped, typed, plan, settings.builder)
    plan.with_name(tensorrt.REPORT).write_text((known / tensorrt.REPORT).read_text())
    return {**entry, "structure_sha256": key, "bytes": plan.stat().st_size}


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Optimisations drop roundings.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
