"""How the decoder uses the machine: table `decoder` of a repository's settings.toml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from engine.errors import RepositoryError
from engine.manifest import Manifest
from engine.validation import CHECKED

ROOM = 32  # tokens for a short question and answer, beside the visual ones
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=CHECKED)
class DecoderSettings:
    """Settings with their allowed values; the defaults are those for a GPU.

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

    kv_cache_gib: Annotated[float, Field(ge=0)] = 0.0
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_num_seqs: _Positive = 64
    max_waiting: _Count = 256
    max_num_batched_tokens: _Positive = 4096
    block_size: Annotated[int, Field(ge=16, multiple_of=16)] = 16
    context_length: _Count = 0
    tensor_parallel_size: _Positive = 1
    threads: _Count = 0
    enforce_eager: bool = False
    restarts: _Count = 3

    def context_of(self, manifest: Manifest) -> int:
        """Tokens that prompt and answer share. Raises RepositoryError if the model, or a question, does not fit."""
        least = manifest.num_visual_tokens + ROOM
        if self.context_length > manifest.context_length or 0 < self.context_length < least:
            raise RepositoryError(
                f"decoder: setting context_length is {self.context_length}: the model has {manifest.context_length}, "
                f"and a question about a scan takes {least} at least; 0 takes the model's"
            )
        return self.context_length or manifest.context_length


@dataclass(frozen=True, config=CHECKED)
class CpuDecoderSettings(DecoderSettings):
    """The same with a CPU's defaults. Blocks of 32 rows are the smallest that a CPU handles well."""

    kv_cache_gib: Annotated[float, Field(ge=0)] = 1.0
    max_num_seqs: _Positive = 16
    max_waiting: _Count = 64
    max_num_batched_tokens: _Positive = 2048
    block_size: Annotated[int, Field(ge=16, multiple_of=16)] = 32
    enforce_eager: bool = True
