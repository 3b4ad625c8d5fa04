"""The ONNX graphs: what each computes, how it is exported, and the proof that it computes what PyTorch does.

The wrappers only rename and bind; the arithmetic is the models'. Every graph has a dynamic batch axis in front and the
tensor names of `engine.contract`.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import contract
from engine.errors import M3DError
from engine.models.clip import M3DClip
from engine.models.lamed import Lamed
from engine.runtime.onnx_session import OnnxGraph
from engine.runtime.ort import onnxruntime
from export.fused_attention import translation_table

OPSET = 20
# Above this, weights lie in a file beside the graph: protobuf ends at 2 GiB, and packing them into it first takes six
# times their size in memory.
EXTERNAL_DATA_BYTES = 100_000_000
SEED = 20240331


class ExportError(M3DError):
    """A graph does not compute what PyTorch computes, within its bound."""


class Bound(nn.Module):
    """A function of a model as a module of its own, holding just the parameters it uses: what torch.export wants."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@dataclass(frozen=True)
class Graph:
    """One graph: its contract model, the function it computes, and the shape of each input without the batch axis.

    integers: for inputs of token ids and their mask, one above the largest id; their axis is free then, and
    `input_shapes` has its largest size. bound: largest error allowed against PyTorch, as a share of the largest output
    (or absolute, where that is below 1).
    """

    name: str
    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    bound: float = 1e-4
    integers: int | None = None

    @property
    def is_image_encoder(self) -> bool:
        return self.name in contract.IMAGE_ENCODERS

    @property
    def lengths(self) -> tuple[int, ...]:
        """Two sizes of the free axis, the largest first; empty where every axis but the batch is fixed."""
        return () if self.integers is None else (self.input_shapes[0][0], self.input_shapes[0][0] // 3)

    def random_inputs(self, batch: int, length: int | None = None) -> tuple[Tensor, ...]:
        """A batch of random values. length: of the free axis, the largest by default."""
        generator = torch.Generator().manual_seed(SEED + batch)
        if self.integers is not None:
            ids = torch.randint(self.integers, (batch, length or self.lengths[0]), generator=generator)
            mask = torch.ones_like(ids)
            mask[:, ids.shape[1] // 2 :] = 0  # half of it padding, so that the mask matters
            return ids, mask
        if self.is_image_encoder:
            return (torch.rand(batch, *self.input_shapes[0], generator=generator),)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in self.input_shapes)

    def random_batches(self) -> list[tuple[Tensor, ...]]:
        """Batches of 1 and 2, of different lengths where the length is free: they prove every free axis."""
        return [self.random_inputs(batch, length) for batch, length in zip((1, 2), self.lengths or (None, None))]


def lamed_graphs(model: Lamed) -> list[Graph]:
    """The graphs of an M3D-LaMed checkpoint; those of segmentation only if it has the parts."""
    config = model.config
    image = (1, *config.vision.image_size)
    vision = _part(model, "vision_tower", "mm_projector")
    graphs = [Graph("vision_encoder", Bound(vision, vision.encode_images), (image,))]
    if model.seg_module is not None:
        features = (config.segmentation.hidden_size, *config.segmentation.grid)
        encoder, head = _part(model.seg_module, "image_encoder"), _part(model, "seg_projector")
        head.seg_module = _part(model.seg_module, "prompt_encoder", "mask_decoder")
        graphs += [
            Graph("segmentation_encoder", Bound(encoder, encoder.encode), (image,)),
            Graph("segmentation_head", Bound(head, head.segment), (features, (config.llm_width,)), bound=1e-5),
        ]
    return graphs


def clip_graphs(model: M3DClip) -> list[Graph]:
    """The graphs of an M3D-CLIP checkpoint: the CLS features that retrieval compares."""
    text = (model.config.text_length,)
    vision = _part(model, "vision_encoder", "mm_vision_proj")
    language = _part(model, "language_encoder", "mm_language_proj")
    return [
        Graph(
            "clip_image_encoder",
            Bound(vision, lambda x: vision.encode_image(x)[:, 0]),
            ((1, *model.config.vision.image_size),),
            bound=1e-5,
        ),
        Graph(
            "clip_text_encoder",
            Bound(language, lambda ids, mask: language.encode_text(ids, mask)[:, 0]),
            (text, text),
            bound=1e-5,
            integers=model.language_encoder.config.vocab_size,
        ),
    ]


def _part(model: nn.Module, *names: str) -> Any:
    """`model` with these children alone. It does not hold the weights of the others, which can be freed before it."""
    part = copy.copy(model)
    part._modules = {name: child for name, child in model._modules.items() if name in names}
    part._parameters = {}
    return part


def build(graph: Graph, repository: Path, fused: bool) -> dict:
    """Export `graph` into the repository, run it, and return its manifest entry. Raises ExportError if it is off.

    fused: attention of the image encoders as ONNX Runtime's own operator (see `fused_attention`), else plain ONNX.
    """
    started = time.perf_counter()
    target = repository / graph.name / "1" / "model.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    _export(graph, target, fused)
    gc.collect()
    # An encoder that becomes a plan is not served in this form, so the server's own reading of it proves nothing.
    run = runner(target) if graph.is_image_encoder and not fused else OnnxGraph(target, contract.MODELS[graph.name])
    entry = {"opset": OPSET, "bound": graph.bound, **compare(graph, run, graph.bound)}
    del run
    entry["sha256"] = _sha256(sorted(target.parent.glob(f"{target.name}*")))
    entry["seconds"] = round(time.perf_counter() - started, 1)
    return entry


def _export(graph: Graph, target: Path, fused: bool) -> None:
    model = contract.MODELS[graph.name]
    table = translation_table() if fused and graph.is_image_encoder else None
    size = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    axes = {0: torch.export.Dim("batch", min=1, max=1024)}
    if graph.lengths:
        axes[1] = torch.export.Dim("tokens", min=1, max=graph.lengths[0])
    # torch.export specialises a batch of 1, hence 2. Its warnings speak of decompositions, not of this graph.
    with torch.inference_mode(), warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module,
            graph.random_batches()[1],
            target,
            input_names=model.input_names,
            output_names=model.output_names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            dynamic_shapes=(tuple(axes for _ in graph.input_shapes),),
            external_data=size > EXTERNAL_DATA_BYTES,
            custom_translation_table=table,
        )


def compare(
    graph: Graph,
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    bound: float,
    inputs: Sequence[tuple[Tensor, ...]] = (),
) -> dict:
    """Largest and mean error of `run` against PyTorch, as shares of the largest output; `inputs` are batches.

    By default the graph's `random_batches`. Raises ExportError beyond `bound`.
    """
    model = contract.MODELS[graph.name]
    errors = []
    for batch in inputs or graph.random_batches():
        with torch.inference_mode():
            expected = graph.module(*batch).numpy()
        (found,) = run({name: value.numpy() for name, value in zip(model.input_names, batch)}).values()
        if found.shape != expected.shape:
            raise ExportError(f"{graph.name}: the graph returns {found.shape}, PyTorch {expected.shape}")
        scale = max(1.0, float(np.abs(expected).max()))
        error = np.abs(found - expected) / scale
        errors.append((float(error.max()), float(error.mean())))
    largest, mean = max(e[0] for e in errors), max(e[1] for e in errors)
    if not largest <= bound:
        raise ExportError(
            f"{graph.name}: the exported graph is off by {largest:.2e} against PyTorch, {bound:.0e} is allowed"
        )
    return {"max_error": largest, "mean_error": mean}


def runner(model: Path | bytes, folder: Path | None = None) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """An ONNX graph as a function of named arrays, computed on the CPU node by node as it is written.

    Args:
        model: the file, or its bytes.
        folder: where the weights lie that are not in the bytes.
    """
    options = onnxruntime.SessionOptions()
    # Optimisations drop roundings.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # it copies the weights
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))


class _quiet:
    """Silences loggers for the time of a with block."""

    def __init__(self, *names: str):
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self):
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_):
        for logger, level in zip(self.loggers, self.levels):
            logger.setLevel(level)


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
