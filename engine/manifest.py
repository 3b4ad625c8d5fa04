"""The manifest of an exported model repository: what was exported, from what, how exact, and how to feed it.

`export/build_engines.py` writes it as the last step, so that a repository with a manifest is complete; everything that
serves reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import with_config
from typing_extensions import TypedDict

from engine.api import EngineInfo, ModelInfo
from engine.contract import MODELS
from engine.errors import RepositoryError
from engine.validation import CHECKED, checked

FILE_NAME = "manifest.json"
FORMAT = 3  # 1: clip_text_encoder took texts of one length; 2: all prompts had one layout
LLM_FOLDER = Path("decoder") / "1" / "llm"
CLIP_TOKENIZER_FOLDER = Path("retrieval") / "1" / "tokenizer"
TENSORRT_CONFIG = Path("configs") / "tensorrt.pbtxt"  # of a graph, for `--model-config-name tensorrt`
_NAMED = 3  # files in a message
_open = with_config({**CHECKED, "extra": "allow"})


@_open
class Plan(TypedDict):
    """What decides where a graph's plan can be served, beside what else is known of it."""

    tensorrt: str
    compute_capability: str
    version_compatible: bool
    hardware_compatible: bool


@_open
class GpuMemory(TypedDict):
    """Bytes that a graph takes of a GPU once loaded, and where they are from, see `export/gpu_memory.py`."""

    weights: int
    contexts: list[int]
    bindings: int
    source: str


@_open
class Graph(TypedDict, total=False):
    """A graph's parts that are read, beside its errors against PyTorch."""

    plan: Plan | None
    gpu_memory: GpuMemory | None


@dataclass(frozen=True)
class Manifest:
    """What a model repository holds.

    checkpoint, clip_checkpoint: as the export was told them; their SHA-256 is over the files that are read.
    checkpoint_commit, clip_checkpoint_commit: of their repositories on the hub; None for a local folder.
    image_size, patch_size: (D, H, W) of the model volume and of one patch, voxels.
    family: of the language model, one of `engine.models.language_model.FAMILIES`: says how prompts are laid out.
    num_visual_tokens: visual tokens a scan becomes. llm_width: width of the language model.
    seg_token_id, image_token_id: token ids; seg_token_id is None for a checkpoint without segmentation.
    eos_token_ids: tokens that end an answer, those of the layout and those of the checkpoint's settings.
    context_length: tokens that question, visual tokens and answer share.
    precision: of the language model, and of the encoders unless `plans` says otherwise.
    graphs: per ONNX graph {"sha256", "max_error", "mean_error", "bound", "opset"} against PyTorch on random input; for
    target tensorrt also {"plan": ...}: precision, errors, builder, TensorRT version, compute capability, bindings; and
    {"gpu_memory": ...}.
    models: the models of the repository that this export makes servable.
    plans: for target tensorrt, how the plans were built; empty for a CPU.
    quantization: of the language model's weights: {"scheme", "calibration", "perplexity", "perplexity_before",
    "agreement", "tokens", "bound"}, see `export/quantize.py`; empty where it has none.
    clip_text_length: most tokens of a text that retrieval reads; None without CLIP or without its tokenizer.
    files: size in bytes of every exported file, by path inside the repository.
    """

    checkpoint: str
    checkpoint_sha256: str
    target: str
    precision: str
    image_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    family: str
    num_visual_tokens: int
    llm_width: int
    vocab_size: int
    context_length: int
    image_token_id: int
    seg_token_id: int | None
    eos_token_ids: tuple[int, ...]
    models: tuple[str, ...]
    graphs: dict[str, Graph]
    versions: dict[str, str]
    checkpoint_commit: str | None = None
    clip_checkpoint: str | None = None
    clip_checkpoint_sha256: str | None = None
    clip_checkpoint_commit: str | None = None
    clip_text_length: int | None = None
    clip_image_size: tuple[int, int, int] | None = None
    plans: dict = field(default_factory=dict)
    quantization: dict = field(default_factory=dict)
    format: int = FORMAT
    files: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @property
    def identity(self) -> str:
        """SHA-256 over the whole manifest: part of every cache key, so that no cache outlives its model."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def model(self) -> ModelInfo:
        """Which model answers, as users are told."""
        return ModelInfo(self.checkpoint, self.checkpoint_sha256, self.target, self.precision, self.identity)

    @property
    def info(self) -> EngineInfo:
        """What answers, as users are told."""
        served = tuple(name for name, model in MODELS.items() if model.ensemble and name in self.models)
        return EngineInfo(self.model, served, importlib.metadata.version("m3d-engine"))

    @property
    def segments(self) -> bool:
        return "m3d_segment" in self.models

    @property
    def retrieves(self) -> bool:
        return "m3d_retrieve" in self.models

    @property
    def graph_plans(self) -> dict[str, dict]:
        """The "plan" entries of `graphs` that have one, by graph."""
        return _parts(self.graphs, "plan")

    @property
    def gpu_memory(self) -> dict[str, dict]:
        """The "gpu_memory" entries of `graphs` that have one, by graph."""
        return _parts(self.graphs, "gpu_memory")

    def check(self, repository: Path) -> None:
        """Raises RepositoryError if `repository` lacks a model's configuration, has that of another version of the
        engine, or lacks an exported file at its size."""
        absent = [model for model in self.models if not (repository / model / "config.pbtxt").is_file()]
        if absent:
            raise RepositoryError(
                f"{repository} lacks the models {', '.join(absent)} that its manifest lists: "
                "export into a complete copy of model_repository/"
            )
        if others := [
            f"{model} ({', '.join(lacks)})"
            for model in self.models
            if (lacks := _lacking(repository / model / "config.pbtxt", model))
        ]:
            raise RepositoryError(
                f"{repository} is a copy of another version's model_repository/, without these "
                f"tensors: {', '.join(others)}; copy the tracked files there again, what was exported "
                "may stay"
            )
        damaged = [
            f"{path} ({words})" for path, size in self.files.items() if (words := _damage(repository / path, size))
        ]
        if damaged:
            more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
            raise RepositoryError(
                f"{repository} does not hold what was exported, {', '.join(damaged[:_NAMED])}{more}: "
                "export the repository again"
            )

    def write(self, repository: Path) -> None:
        """Write atomically: a reader sees the whole manifest or none."""
        target = Path(repository) / FILE_NAME
        temporary = target.with_suffix(".json.tmp")
        temporary.write_text(self.to_json())
        temporary.replace(target)

    @classmethod
    def read(cls, repository: Path | str, target: str = "cpu") -> Manifest:
        """The manifest of `repository` (the folder that holds the models).

        target: what to export for if nothing was. Raises RepositoryError, with the way out, if there is no manifest, or
        a damaged one, or another engine's.
        """
        path = Path(repository) / FILE_NAME
        try:
            values = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise RepositoryError(
                f"{repository} was never exported (no {FILE_NAME}): run `python export/build_engines.py --checkpoint "
                f"CHECKPOINT --target {target} --repository {shlex.quote(str(repository))}` first"
            ) from None
        except ValueError as error:
            raise RepositoryError(f"{path} is not JSON ({error}): export the repository again") from None
        if not isinstance(values, dict):
            raise RepositoryError(f"{path} is not a JSON object: export the repository again")
        known = {f.name for f in fields(cls)}
        if values.get("format") != FORMAT or set(values) != known:
            raise RepositoryError(_other_version(path, values, target))
        try:
            return checked(cls, values)
        except ValueError as error:
            raise RepositoryError(f"{path} is damaged ({error}): export the repository again") from None


def _other_version(path: Path, values: dict[str, Any], target: str) -> str:
    """Why a manifest of another version of the engine cannot be served, and what to do."""
    versions, here = values.get("versions"), importlib.metadata.version("m3d-engine")
    written = versions.get("m3d-engine") if isinstance(versions, dict) else None
    by = "another version of m3d-engine" if written in (None, here) else f"m3d-engine {written}"
    source = values.get("checkpoint")
    checkpoint = shlex.quote(source) if isinstance(source, str) else "CHECKPOINT"
    more = [
        f"--{name.replace('_', '-')} {shlex.quote(str(values[name]))}"
        for name in ("precision", "clip_checkpoint")
        if values.get(name)
    ]
    return (
        f"{path} was written by {by} (format {values.get('format')}); this is {here}, which reads format {FORMAT}: "
        f"export again, `python export/build_engines.py --checkpoint {checkpoint} --target "
        f"{values.get('target', target)} {''.join(f'{option} ' for option in more)}--repository "
        f"{shlex.quote(str(path.parent))}`"
    )


def _parts(graphs: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: entry[part] for name, entry in graphs.items() if entry.get(part) is not None}


def _lacking(config: Path, model: str) -> list[str]:
    """Tensors of the contract that a model's configuration does not name."""
    text = config.read_text()
    return [tensor.name for tensor in (*MODELS[model].inputs, *MODELS[model].outputs) if f'"{tensor.name}"' not in text]


def _damage(file: Path, size: int) -> str | None:
    """What is wrong with an exported file of `size` bytes; None if nothing can be seen without reading it."""
    if not file.is_file():
        return "missing"
    found = file.stat().st_size
    return None if found == size else f"{found:,} bytes instead of {size:,}"
