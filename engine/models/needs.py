"""What exporting and serving a checkpoint will need: disk, memory and time, before any of it starts."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ResourceExhausted
from engine.memory import available_memory
from engine.models.checkpoint import PARTS, lamed_shapes
from engine.models.clip import M3DClip
from engine.models.config import ClipConfig, LamedConfig
from engine.models.hub_cache import size_text
from engine.models.lamed import Lamed

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # of the language model; beside fp8 encoders it has bf16
SHARD_BYTES = 2_000_000_000  # of the language model, converted and written at a time
# Measured on 2 cores (Zen 5, 30 November 2026): an export's process beside the weights; a ViT of 88 M parameters
# exported and compared with PyTorch in 25 to 30 s; a checkpoint hashed, converted and written at 300 MB/s.
EXPORT_BYTES = 1_200_000_000
EXPORT_S_PER_PARAMETER = 3e-7
BYTES_PER_S = 300e6
SERVING_BYTES = 5_000_000_000  # Triton, vLLM with 1 GiB of KV cache, studies; as measured with models of 135M to 7B


@dataclass(frozen=True)
class Parts:
    """Parameters of each part of a checkpoint, in numbers."""

    llm: int
    vision: int
    segmentation: int
    clip: int = 0

    @property
    def encoders(self) -> int:
        return self.vision + self.segmentation + self.clip


@dataclass(frozen=True)
class Needs:
    """disk: bytes that the export writes. memory: bytes that its process holds at most. seconds: on this machine,
    about. serving: bytes of memory of the CPU server; on a GPU `m3d doctor` says what it needs."""

    disk: int
    memory: int
    seconds: float
    serving: int

    def __str__(self) -> str:
        minutes = max(1, round(self.seconds / 60))
        return (
            f"{size_text(self.disk)} of disk, {size_text(self.memory)} of memory and about {minutes} "
            f"minute{'s' if minutes > 1 else ''}"
        )

    def refuse(self, repository: Path, freed: int = 0) -> None:
        """Raise ResourceExhausted unless disk and memory are there.

        Args:
            repository: where the export is written to.
            freed: bytes of an earlier export there, which goes first.
        """
        disk, memory = shutil.disk_usage(repository).free + freed, available_memory()
        if self.disk > disk:
            raise ResourceExhausted(
                f"the export writes {size_text(self.disk)}, and {size_text(disk)} are free at {repository}: make "
                "room, or copy model_repository/ to a larger disk and name it with --repository "
                "(--force exports anyway)"
            )
        if self.memory > memory:
            raise ResourceExhausted(
                f"the export needs {size_text(self.memory)} of memory, and {size_text(memory)} are available: end "
                "other programs, or use a larger machine (--force exports anyway)"
            )


def parts_of(config: LamedConfig, clip: ClipConfig | None = None) -> Parts:
    """Counted on the device meta, so that nothing is read or allocated."""
    with torch.device("meta"):
        shapes = lamed_shapes(Lamed(config))
        clip_size = 0 if clip is None else sum(p.numel() for p in M3DClip(clip).parameters())
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    segmentation = sum(
        size for key, size in sizes.items() if key.startswith(("model.seg_module.", "model.seg_projector."))
    )
    llm = sum(size for key, size in sizes.items() if not key.startswith(tuple(PARTS)))
    if config.llm.get("tie_word_embeddings"):
        llm -= sizes.get("lm_head.weight", 0)
    return Parts(llm, sum(sizes.values()) - segmentation - llm, segmentation, clip_size)


def needs(parts: Parts, read: int, target: str, precision: str) -> Needs:
    """What an export will need.

    Args:
        parts: of the checkpoints. read: bytes of their files. target: cpu or tensorrt. precision: of the export.
    """
    llm = parts.llm * ITEM_BYTES[precision]
    # A plan is built beside the ONNX graph that it is built from, whose weights are there twice: as exported and typed.
    largest = max(parts.vision, parts.segmentation, parts.clip)
    beside = 3 * 4 * largest if target == "tensorrt" else 0
    graphs = 4 * parts.encoders
    return Needs(
        disk=llm + graphs + beside,
        # One encoder at a time: in PyTorch, and as its graph, or its plan while TensorRT builds it.
        memory=EXPORT_BYTES
        + 4 * parts.clip
        + max(2 * min(llm, SHARD_BYTES), (12 if target == "tensorrt" else 8) * largest),
        seconds=EXPORT_S_PER_PARAMETER * parts.encoders + (2 * read + llm) / BYTES_PER_S,
        serving=SERVING_BYTES + llm + graphs,
    )
