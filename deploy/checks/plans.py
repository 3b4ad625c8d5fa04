"""TensorRT's plans, built by the export's own command; each is compared with PyTorch on the GPU there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from deploy.checks.context import ROOT, Context, Failed
from engine.contract import FEATURES, IMAGE, VISUAL_TOKENS
from engine.errors import M3DError
from engine.manifest import Manifest

SERVED = "fp16"
OTHERS = ("fp32", "bf16", "fp8")
SCANS = ("brain-mr", "spine-ct")
VOLUMES = 8  # that are sent to the server, and whose own results are kept
ENCODERS = {"vision_encoder": VISUAL_TOKENS, "segmentation_encoder": FEATURES}  # and their output


def build_served(context: Context) -> Iterator[dict]:
    """Rows for the plans in the precision that is served; keeps their own results for the step served."""
    yield from _built(context, SERVED, [])
    yield from _keep_own_results(context)


def build_others(context: Context) -> Iterator[dict]:
    """Rows for the plans in the other precisions, compared on real scans where there are any; fp8 needs them."""
    from m3d_demo.samples import write_sample

    scans: list[Path] = []
    try:
        scans += [write_sample(name, Path(context.work) / "scans") for name in SCANS]
    except (M3DError, OSError, subprocess.SubprocessError) as error:
        yield {"precision": "fp8", "what": "sample scans", "not there": str(error)}
    for precision in OTHERS if scans else OTHERS[:-1]:
        yield from _built(context, precision, scans)


def repository(context: Context, precision: str) -> Path:
    """Where the export of this precision lies."""
    return Path(context.work) / precision / "model_repository"


def own_results(context: Context) -> dict[str, np.ndarray]:
    """By the encoder's name, what its plan gives for each of the volumes, [VOLUMES, ...]."""
    with np.load(_own(context)) as kept:
        return dict(kept)


def _own(context: Context) -> Path:
    return Path(context.work) / "own.npz"


def _built(context: Context, precision: str, scans: Sequence[Path]) -> Iterator[dict]:
    target = _fresh_repository(repository(context, precision))
    command = ["export/build_engines.py", "--checkpoint", context.checkpoint, "--target", "tensorrt"]
    command += ["--precision", precision, "--repository", str(target), "--force"]
    command += ["--timing-cache", str(Path(context.work) / "timing.cache")]
    python([*command, *(["--calibration", *map(str, scans)] if scans else [])])
    for name, entry in Manifest.read(target).graphs.items():
        if "plan" not in entry:
            continue
        plan = entry["plan"]
        yield {
            "precision": precision,
            "what": name,
            "compared": plan["compared"],
            "max error": plan["max_error"],
            "mean error": plan["mean_error"],
            "bound": plan["bound"],
            "fused attentions": plan["fused_attentions"],
            "MB": round(plan["bytes"] / 1e6),
            # The export fails beyond its bound; without CUDA in PyTorch it compares the graph alone.
            "ok": plan["compared"] == "plan on the GPU",
        }


def _keep_own_results(context: Context) -> Iterator[dict]:
    """Run the plans here, so that the step that serves takes no memory of the GPU beside the server."""
    from deploy.checks.geometry import volumes
    from export import tensorrt

    folder = repository(context, SERVED)
    images = volumes(VOLUMES, Manifest.read(folder).image_size).numpy()
    results = {}
    for name, output in ENCODERS.items():
        plan = folder / name / "1" / tensorrt.PLAN["tensorrt"]
        if plan.is_file():
            found = [tensorrt.run(plan, "tensorrt", {IMAGE: image[None]})[output][0] for image in images]
            results[name] = np.stack(found)
    np.savez(_own(context), **results)
    yield {"precision": SERVED, "what": f"own results of {', '.join(results)} kept", "ok": bool(results)}


def _fresh_repository(target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    exported = shutil.ignore_patterns(
        "*.onnx*", "*.plan", "layers.txt", "tensorrt.pbtxt", "llm", "tokenizer", "manifest.json", "__pycache__"
    )
    return shutil.copytree(ROOT / "model_repository", target, ignore=exported)


def python(command: Sequence[str]) -> None:
    """Run a program of this checkout. Raises Failed if it fails; its words are in the log."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:
        raise Failed(f"{command[0]} ended with status {done.returncode}")
