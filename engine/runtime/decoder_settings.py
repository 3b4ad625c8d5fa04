"""How the decoder uses the machine: the `parameters` of model_repository/decoder's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from engine.errors import RepositoryError
from engine.manifest import Manifest

ROOM = 32  # tokens for a short question and answer, beside the visual ones


@dataclass(frozen=True)
class DecoderSettings:
    """Settings with their allowed values; unknown ones are refused.

    kv_cache_gib: memory for the KV cache; 0 takes what gpu_memory_utilization leaves. One full context always fits.
    gpu_memory_utilization: part of the GPU's memory that vLLM may use at most, 0 to 1. It takes less if the plan of the
    memory (engine/gpu_memory.py), or what is free, leaves less.
    max_num_seqs: answers decoded at the same time. max_waiting: further ones that may wait; more are refused.
    max_num_batched_tokens: rows a step may compute, for whose results memory is kept; at least the context length is
    used.
    block_size: rows of a block of the KV cache. Whole blocks are reused, so small ones reuse more of a visual prefix;
    a CPU wants multiples of 32, a GPU of 16.
    context_length: shorter than the model's own, to save memory; 0 takes the model's.
    threads: of a CPU's engine; 0 takes every core.
    enforce_eager: start quickly instead of compiling the model first.
    restarts: how often an engine that died is started again within an hour.
    """

    kv_cache_gib: float = 0.0
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 64
    max_waiting: int = 256
    max_num_batched_tokens: int = 4096
    block_size: int = 16
    context_length: int = 0
    tensor_parallel_size: int = 1
    threads: int = 0
    enforce_eager: bool = False
    restarts: int = 3

    def __post_init__(self):
        for name, low in (
            ("kv_cache_gib", 0),
            ("max_num_seqs", 1),
            ("max_waiting", 0),
            ("max_num_batched_tokens", 1),
            ("block_size", 16),
            ("context_length", 0),
            ("tensor_parallel_size", 1),
            ("threads", 0),
            ("restarts", 0),
        ):
            if not low <= getattr(self, name) < math.inf:
                raise RepositoryError(f"decoder: parameter {name} must be {low} or more, not {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise RepositoryError(
                "decoder: parameter gpu_memory_utilization must be above 0 and at most 1, not "
                f"{self.gpu_memory_utilization}"
            )
        if self.block_size % 16:
            raise RepositoryError(f"decoder: parameter block_size must be a multiple of 16, not {self.block_size}")

    def context_of(self, manifest: Manifest) -> int:
        """Tokens that prompt and answer share. Raises RepositoryError if the model, or a question, does not fit."""
        least = manifest.num_visual_tokens + ROOM
        if self.context_length > manifest.context_length or 0 < self.context_length < least:
            raise RepositoryError(
                f"decoder: parameter context_length is {self.context_length}: the model has {manifest.context_length}, "
                f"and a question about a scan takes {least} at least; 0 takes the model's"
            )
        return self.context_length or manifest.context_length

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> DecoderSettings:
        """Settings from names and texts. Raises RepositoryError for unknown names and unreadable values."""
        known = {field.name: type(field.default) for field in fields(cls)}
        unknown = sorted(set(parameters) - set(known))
        if unknown:
            raise RepositoryError(f"decoder: unknown parameter {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**{name: _read(name, text, known[name]) for name, text in parameters.items()})


def _read(name: str, text: str, kind: type):
    try:
        return {"true": True, "false": False}[text.strip().lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise RepositoryError(f"decoder: parameter {name} must be {wanted}, not {text!r}") from None
