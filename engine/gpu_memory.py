"""What serving takes of each GPU's memory, planned before anything is loaded; and the language model's share of it.

Triton loads every graph on every GPU that it sees. The language model lies on the first one, or on the first
`tensor_parallel_size` of them. What a graph takes is the manifest's; what is estimated here has its source beside it.
No GPU has confirmed these numbers yet: `deploy/gpu_check.py` compares them with what a running server holds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from google.protobuf import text_format

from engine import gpu
from engine.contract import CLIP_ENCODERS, IMAGE_ENCODERS
from engine.errors import RepositoryError, Unavailable
from engine.gpu import Gpu
from engine.manifest import LLM_FOLDER, Manifest
from engine.runtime.decoder_settings import DecoderSettings

CUDA_POOL_BYTES = 256 << 20  # Triton's own, see engine/server/triton.py
# Estimates. A process with CUDA, cuBLAS and cuDNN: contexts take 0.3 to 0.6 GiB on data-centre GPUs.
CONTEXT_BYTES = 640 << 20
# Of the language model beside weights and results: captured CUDA graphs, workspaces of cuBLAS, compiled kernels.
ENGINE_BYTES = 1 << 30
# Stays free: allocators round up, and drivers keep some.
RESERVE_BYTES = 512 << 20
CHAT_TOKENS = 256  # question and answer of a usual chat, beside the visual tokens
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What a quantised language model's weights take of those in bf16: embeddings and the last layer stay as they are.
QUANTIZED = {"fp8": 0.55, "awq": 0.35}
_CONFIG = Path("decoder") / "config.pbtxt"


@dataclass(frozen=True)
class LanguageModel:
    """An exported language model's memory on one GPU, in bytes, but for `context` and `chat`, which are tokens.

    weights: as they lie on disk. working: results of one step, beside `ENGINE_BYTES`. row: of the KV cache, a token.
    context: of one chat at most. chat: of a usual one.
    """

    weights: int
    working: int
    row: int
    context: int
    chat: int

    @property
    def least(self) -> int:
        """What it takes with a KV cache for one whole context."""
        return self.weights + self.working + self.row * self.context

    def cache(self, share: int) -> int:
        """Bytes of its KV cache, if it may take `share` bytes in all."""
        return max(0, share - self.weights - self.working)

    def split(self, parts: int) -> LanguageModel:
        """Its part on each of `parts` GPUs; results of a step are on each of them."""
        return replace(self, weights=self.weights // parts, row=self.row // parts)


@dataclass(frozen=True)
class Plan:
    """What serving takes of one GPU.

    parts: bytes by what takes them, the language model aside; estimated: which of them are estimates. llm: on this GPU;
    None if it has none of it. most: the largest part of the GPU's memory that the language model may take, 0 to 1.
    """

    gpu: Gpu
    parts: dict[str, int]
    estimated: frozenset[str]
    llm: LanguageModel | None
    most: float

    @property
    def others(self) -> int:
        """Bytes of all but the language model."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that serving takes at least."""
        return self.others + (self.llm.least if self.llm else 0)

    @property
    def needed_in_all(self) -> int:
        """Bytes that the GPU must have, so that the language model gets what it needs."""
        return max(self.needed, math.ceil(self.llm.least / self.most)) if self.llm else self.needed

    def share(self, memory: int) -> int:
        """Bytes that the language model may take of a GPU that has `memory` bytes."""
        return max(0, min(int(self.most * memory), memory - self.others))

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table: what, and how much."""
        rows = [(name, gib(size) + " (estimated)" * (name in self.estimated)) for name, size in self.parts.items()]
        if self.llm is not None:
            rows += [
                ("language model: weights", gib(self.llm.weights)),
                ("language model: work", f"{gib(self.llm.working)} (estimated)"),
            ]
        if self.llm is not None and self.gpu.memory is not None:
            share = self.share(self.gpu.memory)
            cache = self.llm.cache(share)
            tokens = cache // self.llm.row
            rows += [
                (
                    "language model: KV cache",
                    f"{gib(cache)}: {tokens:,} tokens, which is {tokens // self.llm.chat:,} chats of {self.llm.chat} "
                    f"tokens at the same time",
                ),
                ("left to other programs", gib(max(0, self.gpu.memory - self.others - share))),
            ]
        return rows


def plans(repository: Path, manifest: Manifest, gpus: list[Gpu]) -> list[Plan]:
    """The plan of each GPU, in their order.

    Args:
        repository: was exported for target tensorrt. manifest: its own. gpus: all that Triton sees.

    Raises:
        RepositoryError: its files lack what a plan needs.
    """
    settings = decoder_settings(repository)
    parts, estimated = _parts(manifest)
    llm = language_model(repository, manifest, settings)
    with_llm = {**parts, "language model: CUDA": CONTEXT_BYTES}
    count = settings.tensor_parallel_size
    return [
        Plan(one, with_llm, estimated, llm.split(count), settings.gpu_memory_utilization)
        if index < count
        else Plan(one, parts, estimated, None, settings.gpu_memory_utilization)
        for index, one in enumerate(gpus)
    ]


def misfits(repository: Path, manifest: Manifest, gpus: list[Gpu]) -> list[str]:
    """Which GPUs are too small, and what to do; empty if none is. Raises RepositoryError as `plans`."""
    found = plans(repository, manifest, gpus)
    count = decoder_settings(repository).tensor_parallel_size
    if 0 < len(gpus) < count:
        there = f"there {'is 1 GPU' if len(gpus) == 1 else f'are {len(gpus)} GPUs'}"
        return [f"the decoder's parameter tensor_parallel_size is {count}, and {there}: lower it"]
    small = [plan.gpu for plan in found if plan.gpu.memory is not None and plan.gpu.memory < plan.needed_in_all]
    return [
        f"it needs {gib(plan.needed_in_all)} of GPU memory, {plan.gpu} has {gib(plan.gpu.memory)}: "
        + (gpu.leaving_out(gpus, small) or "; or ".join(_ways_out(plan, manifest)))
        for plan in found
        if plan.gpu in small and plan.gpu.memory is not None
    ]


def occupied(repository: Path, manifest: Manifest, gpus: list[Gpu]) -> list[str]:
    """Which GPUs are large enough and have too little memory free now, and what to do. Raises as `plans`."""
    return [
        f"{plan.gpu} has {gib(plan.gpu.free)} of memory free, {gib(plan.needed)} are needed: stop what uses it "
        "(nvidia-smi names the processes)"
        for plan in plans(repository, manifest, gpus)
        if plan.gpu.free is not None
        and plan.gpu.free < plan.needed
        and (plan.gpu.memory is None or plan.needed_in_all <= plan.gpu.memory)
    ]


def decoder_share(repository: Path, manifest: Manifest) -> float:
    """The part of a GPU's memory that the language model may take now, 0 to 1.

    It is at most what the setting says, what the plan leaves, whether or not the other models are loaded yet, and what
    is free. vLLM refuses to start with more than is free.

    Raises:
        Unavailable: less is free than the language model needs.
        RepositoryError: as `plans`.
    """
    settings = decoder_settings(repository)
    parts = [
        _share_now(plan)
        for plan in plans(repository, manifest, gpu.find_gpus())
        if plan.llm is not None and plan.gpu.memory is not None
    ]
    return min([settings.gpu_memory_utilization, *parts])


def _share_now(plan: Plan) -> float:
    memory, free, llm = plan.gpu.memory or 0, plan.gpu.free, plan.llm
    share = plan.share(memory)
    if free is not None:
        share = min(share, free - CONTEXT_BYTES - RESERVE_BYTES)
    if llm is not None and share < llm.least:
        raise Unavailable(
            f"{plan.gpu} has {gib(free)} of {gib(memory)} free, and the language model needs {gib(llm.least)} beside "
            f"{gib(CONTEXT_BYTES + RESERVE_BYTES)} for CUDA: `m3d doctor` prints the plan of its memory"
        )
    return int(1e4 * share / memory) / 1e4  # rounded down, so that vLLM finds as much


def decoder_settings(repository: Path) -> DecoderSettings:
    """The decoder's settings in a repository for a GPU. Raises RepositoryError for what cannot be read."""
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config = text_format.Parse((repository / _CONFIG).read_text(), ModelConfig())
    except (OSError, text_format.ParseError) as error:
        raise RepositoryError(f"{repository / _CONFIG} cannot be read: {error}") from error
    return DecoderSettings.from_parameters({name: value.string_value for name, value in config.parameters.items()})


def language_model(repository: Path, manifest: Manifest, settings: DecoderSettings) -> LanguageModel:
    """What the exported language model takes. Raises RepositoryError without its config.json."""
    path = repository / LLM_FOLDER / "config.json"
    try:
        config = json.loads(path.read_text())
        item = ITEM_BYTES[manifest.precision]
        context = settings.context_length or manifest.context_length
        weights = sum(
            size
            for name, size in manifest.files.items()
            if name.startswith(str(LLM_FOLDER)) and name.endswith(".safetensors")
        )
        # The most that lives at one time: the residual stream, what a layer reads, queries, keys, values and their
        # result; gate, up and their product. Logits in fp32, their copy for sampling, and their sorted one.
        tokens = max(settings.max_num_batched_tokens, context)
        rows = 6 * config["hidden_size"] + 3 * config["intermediate_size"]
        results = item * tokens * rows + 4 * 3 * settings.max_num_seqs * config["vocab_size"]
        return LanguageModel(
            weights=weights,
            working=ENGINE_BYTES + results,
            row=cache_row_bytes(config, item),
            context=context + 2 * settings.block_size,  # whole blocks, and one that vLLM keeps for itself
            chat=min(context, manifest.num_visual_tokens + CHAT_TOKENS),
        )
    except (OSError, ValueError, KeyError) as error:
        raise RepositoryError(
            f"{path} does not say how large the language model is ({type(error).__name__}: {error}): export the "
            "repository again"
        ) from error


def cache_row_bytes(config: dict, item: int) -> int:
    """Bytes of the KV cache for one token. config: of the language model. item: bytes of a number."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width * item


def gib(size: int | None) -> str:
    """Such as "1.5 GiB"."""
    return "unknown" if size is None else f"{size / (1 << 30):.2f} GiB"


def _parts(manifest: Manifest) -> tuple[dict[str, int], frozenset[str]]:
    """What all but the language model takes, and which of it is an estimate."""
    parts = {"Triton: CUDA and its pool": CONTEXT_BYTES + CUDA_POOL_BYTES}
    estimated = {*parts, "language model: CUDA", "reserve"}
    for name in manifest.graphs:
        memory = manifest.gpu_memory.get(name)
        if memory is None:
            raise RepositoryError(f"its manifest does not say what {name} takes of a GPU's memory: export it again")
        parts[name] = memory["weights"] + sum(memory["contexts"]) + memory["bindings"]
        if memory["source"] != "engine":
            estimated.add(name)
    return {**parts, "reserve": RESERVE_BYTES}, frozenset(estimated)


def _ways_out(plan: Plan, manifest: Manifest) -> list[str]:
    """What would make it fit, each in a few words; a larger GPU always does."""
    memory, llm = plan.gpu.memory or 0, plan.llm
    larger = f"take a GPU with {gib(plan.needed_in_all)} or more"
    if llm is None:
        return [larger]
    ways = {
        f"export with --llm-quantization {name}": replace(plan, llm=replace(llm, weights=round(part * llm.weights)))
        for name, part in QUANTIZED.items()
        if not manifest.quantization and manifest.precision != "fp32"
    }
    if manifest.precision == "fp32":
        # TensorRT has no fused attention in fp32: a plan then keeps all scores at once.
        encoders = {
            name: memory["weights"] // 2 + sum(memory["contexts"]) // 10 + memory["bindings"]
            for name, memory in manifest.gpu_memory.items()
            if name in IMAGE_ENCODERS
        }
        half = replace(llm, weights=llm.weights // 2, row=llm.row // 2)
        ways["export with --precision bf16"] = replace(plan, parts={**plan.parts, **encoders}, llm=half)
    if any(name in plan.parts for name in CLIP_ENCODERS):
        without = {name: size for name, size in plan.parts.items() if name not in CLIP_ENCODERS}
        ways["export without --clip-checkpoint, if no reports are ranked"] = replace(plan, parts=without)
    if llm.context > 1024:
        ways["set the decoder's parameter context_length to 1024"] = replace(plan, llm=replace(llm, context=1024))
    ways["set the decoder's parameter tensor_parallel_size to 2, on two such GPUs"] = replace(plan, llm=llm.split(2))
    return [words for words, other in ways.items() if other.needed_in_all <= memory] + [larger]
