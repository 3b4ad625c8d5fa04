"""The manifest of an exported model repository: what was exported, from what, how exact, and how to feed it.

`export/build_engines.py` writes it as the last step, so that a repository with a manifest is complete; everything that
serves reads it.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from engine.errors import RepositoryError

FILE_NAME = "manifest.json"
FORMAT = 1
LLM_FOLDER = Path("decoder") / "1" / "llm"
CLIP_TOKENIZER_FOLDER = Path("retrieval") / "1" / "tokenizer"
TENSORRT_CONFIG = Path("configs") / "tensorrt.pbtxt"  # of a graph, for `--model-config-name tensorrt`


@dataclass(frozen=True)
class Manifest:
    """What a model repository holds.

    image_size, patch_size: (D, H, W) of the model volume and of one patch, voxels.
    num_visual_tokens: visual tokens a scan becomes. llm_width: width of the language model.
    seg_token_id, image_token_id: token ids; seg_token_id is None for a checkpoint without segmentation.
    context_length: tokens that question, visual tokens and answer share.
    precision: of the language model, and of the encoders unless `plans` says otherwise.
    graphs: per ONNX graph {"sha256", "max_error", "mean_error", "bound", "opset"} against PyTorch on random input; for
    target tensorrt also {"plan": ...}: precision, errors, builder, TensorRT version, compute capability, bindings.
    models: the models of the repository that this export makes servable.
    plans: for target tensorrt, how the plans were built; empty for a CPU.
    quantization: of the language model's weights: {"scheme", "calibration", "perplexity", "perplexity_before",
    "agreement", "tokens", "bound"}, see `export/quantize.py`; empty where it has none.
    clip_text_length: tokens that retrieval pads texts to; None without CLIP or without its tokenizer.
    files: size in bytes of every exported file, by path inside the repository.
    """

    checkpoint: str
    checkpoint_sha256: str
    target: str
    precision: str
    image_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    num_visual_tokens: int
    llm_width: int
    vocab_size: int
    context_length: int
    image_token_id: int
    seg_token_id: int | None
    eos_token_ids: tuple[int, ...]
    models: tuple[str, ...]
    graphs: dict[str, dict]
    versions: dict[str, str]
    clip_checkpoint: str | None = None
    clip_checkpoint_sha256: str | None = None
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
    def model(self) -> dict[str, str]:
        """Which model answers, as clients are told: checkpoint, its SHA-256, target, precision, and the identity."""
        return {"checkpoint": self.checkpoint, "checkpoint_sha256": self.checkpoint_sha256, "target": self.target,
                "precision": self.precision, "manifest_sha256": self.identity}

    @property
    def segments(self) -> bool:
        return "m3d_segment" in self.models

    @property
    def retrieves(self) -> bool:
        return "m3d_retrieve" in self.models

    def write(self, repository: Path) -> None:
        """Write atomically: a reader sees the whole manifest or none."""
        target = Path(repository) / FILE_NAME
        temporary = target.with_suffix(".json.tmp")
        temporary.write_text(self.to_json())
        temporary.replace(target)

    @classmethod
    def read(cls, repository: Path | str) -> "Manifest":
        """The manifest of `repository` (the folder that holds the models). Raises RepositoryError if there is none."""
        path = Path(repository) / FILE_NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise RepositoryError(
                f"{repository} was never exported (no {FILE_NAME}): run "
                f"`python export/build_engines.py --checkpoint CHECKPOINT --target cpu --repository {repository}` first"
            ) from None
        except ValueError as error:
            raise RepositoryError(f"{path} is not JSON ({error}): export the repository again") from None
        if not isinstance(values, dict):
            raise RepositoryError(f"{path} is not a JSON object: export the repository again")
        if values.get("format") != FORMAT:
            raise RepositoryError(f"{path} has format {values.get('format')}, this engine reads {FORMAT}: export again")
        known = {f.name for f in fields(cls)}
        missing = [f.name for f in fields(cls) if f.name not in values]
        if missing or set(values) - known:
            raise RepositoryError(f"{path} does not fit this engine (missing {missing}, "
                                  f"unknown {sorted(set(values) - known)}): export again")
        tuples = ("image_size", "patch_size", "eos_token_ids", "models", "clip_image_size")
        return cls(**{k: tuple(v) if k in tuples and v is not None else v for k, v in values.items()})
