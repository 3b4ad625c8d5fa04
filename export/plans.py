"""A graph's TensorRT plan: calibrated, typed, compared with PyTorch, built, and compared again where there is a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from engine.cache import cache_folder
from engine.manifest import TENSORRT_CONFIG
from export import gpu_memory, tensorrt, typed_graph
from export.build_settings import BuildSettings
from export.graphs import Graph, compare, runner

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
    """Turn the exported ONNX graph of `graph` in `repository` into a plan. The ONNX files are removed afterwards.

    Args:
        graph: the graph, which is in `repository` as ONNX.
        repository: the model repository.
        precision: one of typed_graph.PRECISIONS.
        settings: how the plan is built.
        volumes: scans as the model sees them, fp32 [1, D, H, W] in 0..1: fp8 is calibrated on them, and every precision
            is compared with PyTorch on them, besides random values.
        progress: is told what happens.

    Returns:
        "plan" and "gpu_memory" of the graph's manifest entry.

    Raises:
        ExportError: the plan, or the typed graph, is out of bounds. Also what `tensorrt.build` raises.
    """
    settings.refuse(precision)
    folder = repository / graph.name / "1"
    exported, typed = folder / "model.onnx", folder / TYPED
    amax = None
    if precision == "fp8":
        progress(f"calibrating fp8 on {len(volumes)} scans")
        amax = calibrate(exported, volumes)
    # Weights stay in files wherever they can: three copies of them in memory are more than all the rest.
    model = typed_graph.typed(onnx.load(exported, load_external_data=False), precision, amax, folder=folder)
    key = tensorrt.structure_key(model, settings) if settings.strip_weights else None
    inputs = [
        *([graph.random_inputs(1)] if precision != "fp8" else []),
        *((torch.tensor(volume)[None],) for volume in volumes),
    ]
    typed_graph.save(model, typed)
    model = onnx.load(typed, load_external_data=False)  # the former one keeps its memory
    errors = compare(graph, on_cpu(model, folder), BOUNDS[precision], inputs)
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
    memory = gpu_memory.of_plan(plan, entry, model, graph.input_shapes)
    for path in (*folder.glob("model.onnx*"), *folder.glob(f"{TYPED}*")):
        path.unlink()
    return {"plan": entry, "gpu_memory": memory}


def calibrate(graph: Path, volumes: Sequence[np.ndarray]) -> dict[str, float]:
    """The largest magnitude of every tensor that fp8 quantises, over `volumes`, from the fp32 ONNX file `graph`."""
    model = typed_graph.plain_attention(onnx.load(graph, load_external_data=False))
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
    run, image = runner(model.SerializeToString(), graph.parent), model.graph.input[0].name
    found = [run({image: volume[None]}) for volume in volumes]
    return {name: max(float(outputs[f"{name}_max"]) for outputs in found) for name in watched}


def on_cpu(
    model: onnx.ModelProto, folder: Path | None = None
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The typed graph `model` as a function of named arrays, with the rounding that it has on a GPU.

    folder: where the weights lie that are not in `model`.
    """
    return runner(typed_graph.rounded(model).SerializeToString(), folder)


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
