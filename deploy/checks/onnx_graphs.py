"""The exported graphs in ONNX Runtime against the recorded reference; on a GPU with and without TF32.

Triton's ONNX Runtime serves the mask head and the text encoder, with TF32 unless a configuration turns it off.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from deploy.checks.context import Context, Failed
from deploy.checks.fixtures import Case
from deploy.checks.reference import CLIP, FEATURES, Value, bound
from engine.contract import MODELS
from engine.models.checkpoint import load_clip, load_lamed
from export.graphs import build, clip_graphs, lamed_graphs

CUDA = "CUDAExecutionProvider"


def compare(context: Context) -> Iterator[dict]:
    """Rows {"runs on", "what", "error", "bound", "ok"} for each graph and each way to run it."""
    with tempfile.TemporaryDirectory() as folder:
        lamed, clip = (Case.write(name, Path(folder)) for name in ("dev_small", "dev_clip"))
        model, _ = load_lamed(lamed.folder, with_llm=False)
        clip_model, _ = load_clip(clip.folder)
        for graph in (*lamed_graphs(model), *clip_graphs(clip_model)):
            # Compares with PyTorch, and raises where the graph is off.
            entry = build(graph, Path(folder), fused=False)
            yield {"what": f"{graph.name}, against PyTorch", "error": entry["max_error"], "bound": entry["bound"]}
        with torch.inference_mode():
            features = model.seg_module.encode(lamed.volume).numpy()
        for way, providers in _ways():
            yield from _recorded(Path(folder), way, providers, lamed, clip, features)


def _ways() -> Iterator[tuple[str, list]]:
    yield "the CPU", ["CPUExecutionProvider"]
    if CUDA in onnxruntime.get_available_providers():
        yield "the GPU, fp32", [(CUDA, {"use_tf32": "0"})]
        yield "the GPU, TF32", [(CUDA, {"use_tf32": "1"})]


def _recorded(folder: Path, way: str, providers: list, lamed: Case, clip: Case, features: np.ndarray) -> Iterator[dict]:
    """The recorded outputs of all graphs, each from recorded or exact inputs."""

    def run(name: str, *inputs: np.ndarray) -> np.ndarray:
        session = onnxruntime.InferenceSession(str(folder / name / "1" / "model.onnx"), providers=providers)
        if way.startswith("the GPU") and session.get_providers()[0] != CUDA:
            raise Failed(f"ONNX Runtime does not use the GPU, but {session.get_providers()[0]}")
        return session.run(None, dict(zip(MODELS[name].input_names, inputs)))[0]

    state = lamed.expected["step_hidden"][lamed.spec["seg_positions"]].mean(axis=0, keepdims=True)
    volume = lamed.volume.numpy()
    tokens, seg = run("vision_encoder", volume)[0], run("segmentation_encoder", volume)[0]
    mask = run("segmentation_head", features, state)[0, 0]
    ids, attended = (np.array(clip.spec[key], np.int64) for key in ("input_ids", "attention_mask"))
    image, text = run("clip_image_encoder", clip.volume.numpy()), run("clip_text_encoder", ids, attended)
    expected = lamed.expected
    for name, value in (
        ("vision_encoder", Value("proj_first", tokens[:4, :16], expected["proj_first"], FEATURES)),
        (
            "segmentation_encoder",
            Value("seg_image_first", seg.reshape(len(seg), -1).T[:4, :16], expected["seg_image_first"], FEATURES),
        ),
        ("segmentation_head", Value("seg_logits", mask[::4, ::16, ::16], expected["seg_logits"], FEATURES)),
        ("clip_image_encoder", Value("image_cls", image[:, :32], clip.expected["image_cls"], CLIP)),
        ("clip_text_encoder", Value("text_cls", text[:, :32], clip.expected["text_cls"], CLIP)),
    ):
        most = bound("tf32" if way.endswith("TF32") else "fp32", value)
        yield {"runs on": way, "what": name, "error": value.error, "bound": most, "ok": bool(value.error <= most)}
