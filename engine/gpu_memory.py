"""What serving takes of each GPU's memory, planned before anything is loaded; and the language model's share of it.

Triton loads every graph on every GPU that it sees. The language model lies on the first one, or on the first
`tensor_parallel_size` of them. What a graph takes is the manifest's; what is estimated here has its source beside it.
No GPU has confirmed these numbers yet: `deploy/gpu_check.py` compares them with what a running server holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from engine import gpu
from engine.contract import CLIP_ENCODERS, IMAGE_ENCODERS
from engine.errors import RepositoryError, Unavailable
from engine.gpu import Gpu
from engine.manifest import LLM_FOLDER, Manifest
from engine.runtime.decoder_settings import DecoderSettings
from engine.runtime.settings import Settings

CUDA_POOL_BYTES = 256 << 20  # Triton's own, see engine/server/triton.py
# Estimates. A process with CUDA, cuBLAS and cuDNN: contexts take 0.3 to 0.6 GiB on data-centre GPUs.
CONTEXT_BYTES = 640 << 20
# Of the language model beside weights and results: captured CUDA graphs, workspaces of cuBLAS, compiled kernels.
ENGINE_BYTES = 1 << 30
# Stays free: allocators round up, and drivers keep some.
RESERVE_BYTES = 512 << 20
CHAT_TOKENS = 256  # question and answer of a usual chat, beside the visual tokens
SHORT_CONTEXT = 1024
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What a quantised language model's weights take of those in bf16: embeddings and the last layer stay as they are.
QUANTIZED = {"fp8": 0.55, "awq": 0.35}


@dataclass(frozen=True)
class LanguageModel:
    """An exported language model's memory on one GPU, in bytes, but for `context` and `chat`, which are tokens.

    weights: as they lie on disk. working: results of one step, beside `ENGINE_BYTES`. row: of the KV cache, a token.
    context: of one chat at most. chat: of a usual one. fixed: the KV cache, if a setting says how large it is, whatever
    the share is; else 0.
    """

    weights: int
    working: int
    row: int
    context: int
    chat: int
    fixed: int = 0

    @property
    def least(self) -> int:
        """What it takes with a KV cache for one whole context, or with that of the setting."""
        return self.weights + self.working + max(self.fixed, self.row * self.context)

    def cache(self, share: int) -> int:
        """Bytes of its KV cache, if it may take `share` bytes in all."""
        return self.fixed or max(0, share - self.weights - self.working)

    def split(self, parts: int) -> LanguageModel:
        """Its part on each of `parts` GPUs; results of a step are on each of them."""
        return replace(self, weights=self.weights // parts, row=self.row // parts)  # `fixed` is of each GPU


@dataclass(frozen=True)
class Plan:
    """What serving takes of one GPU.

    parts: bytes by what takes them, the language model aside; estimated: which of them are estimates. llm: on this GPU;
    None if it has none of it. most: the largest part of the GPU's memory that the language model may take, 0 to 1.
    details: words about parts, for the table.
    """

    gpu: Gpu
    parts: dict[str, int]
    estimated: frozenset[str]
    llm: LanguageModel | None
    most: float
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def others(self) -> int:
        """Bytes of all but the language model."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that serving takes at least."""
        return self.others + (self.llm.least if self.llm else 0)

    @property
    def fits(self) -> bool:
        """Whether the GPU is large enough; True where its size is not known."""
        return self.gpu.memory is None or self.gpu.memory >= self.needed_in_all

    @property
    def needed_in_all(self) -> int:
        """Bytes that the GPU must have, so that the language model gets what it needs."""
        return max(self.needed, math.ceil(self.llm.least / self.most)) if self.llm else self.needed

    def share(self, memory: int) -> int:
        """Bytes that the language model takes of a GPU that has `memory` bytes."""
        share = max(0, min(int(self.most * memory), memory - self.others))
        return min(share, self.llm.least) if self.llm and self.llm.fixed else share

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table: what, and how much."""
        rows = [
            (name, gib(size) + self.details.get(name, "") + " (estimated)" * (name in self.estimated))
            for name, size in self.parts.items()
        ]
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
                    "tokens at the same time",
                ),
                ("left to other programs", gib(max(0, self.gpu.memory - self.others - share))),
            ]
        elif self.llm is not None:
            least = self.llm.least - self.llm.weights - self.llm.working
            rows.append(("language model: KV cache", f"{gib(least)} at least"))
        return rows


def plans(repository: Path, manifest: Manifest, gpus: list[Gpu]) -> list[Plan]:
    """The plan of each GPU, in their order.

    Args:
        repository: was exported for target tensorrt. manifest: its own. gpus: all that Triton sees.

    Raises:
        RepositoryError: its files lack what a plan needs.
    """
    return _plans(repository, manifest, gpus, decoder_settings(repository))


def _plans(repository: Path, manifest: Manifest, gpus: list[Gpu], settings: DecoderSettings) -> list[Plan]:
    parts, estimated, details = _parts(manifest)
    llm = language_model(repository, manifest, settings)
    with_llm = {**parts, "language model: CUDA": CONTEXT_BYTES}
    count, most = settings.tensor_parallel_size, settings.gpu_memory_utilization
    return [
        Plan(one, with_llm, estimated, llm.split(count), most, details)
        if index < count
        else Plan(one, parts, estimated, None, most, details)
        for index, one in enumerate(gpus)
    ]


def misfits(repository: Path, manifest: Manifest, gpus: list[Gpu]) -> list[str]:
    """Which GPUs are too small, and what to do; empty if none is. Raises RepositoryError as `plans`."""
    settings = decoder_settings(repository)
    found = _plans(repository, manifest, gpus, settings)
    count = settings.tensor_parallel_size
    if 0 < len(gpus) < count:
        there = f"there {'is 1 GPU' if len(gpus) == 1 else f'are {len(gpus)} GPUs'}"
        return [f"the decoder's parameter tensor_parallel_size is {count}, and {there}: lower it"]
    small = [plan for plan in found if not plan.fits]
    if not small:
        return []
    left = [one for one in gpus if one not in [plan.gpu for plan in small]]
    if len(left) >= count and all(plan.fits for plan in _plans(repository, manifest, left, settings)):
        ways = [cast(str, gpu.leaving_out(gpus, [plan.gpu for plan in small]))]
    else:
        most = max(plan.needed_in_all for plan in small)
        ways = [*_ways_out(repository, manifest, gpus, settings), f"take a GPU with {gib(most)} or more"]
    return [
        f"it needs {gib(plan.needed_in_all)} of GPU memory, {plan.gpu} has {gib(plan.gpu.memory)}: {'; or '.join(ways)}"
        for plan in small
    ]


def occupied(repository: Path, manifest: Manifest, gpus: list[Gpu]) -> list[str]:
    """Which GPUs are large enough and have too little memory free now, and what to do. Raises as `plans`."""
    return [
        f"{plan.gpu} has {gib(plan.gpu.free)} of memory free, {gib(plan.needed)} are needed: stop what uses it "
        "(nvidia-smi names the processes)"
        for plan in plans(repository, manifest, gpus)
        if plan.gpu.free is not None and plan.gpu.free < plan.needed and plan.fits
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
            f"the language model may take {gib(share)} of {plan.gpu}, which has {gib(free)} of {gib(memory)} free, and "
            f"needs {gib(llm.least)}: `m3d doctor` prints the plan of its memory"
        )
    return int(1e4 * share / memory) / 1e4  # rounded down, so that vLLM finds as much


def decoder_settings(repository: Path) -> DecoderSettings:
    """The decoder's settings in a repository for a GPU. Raises RepositoryError for what cannot be read."""
    return Settings.read(repository).decoder.tensorrt


def language_model(repository: Path, manifest: Manifest, settings: DecoderSettings) -> LanguageModel:
    """What the exported language model takes. Raises RepositoryError without its config.json."""
    path, context = repository / LLM_FOLDER / "config.json", settings.context_of(manifest)
    try:
        config = json.loads(path.read_text())
        item = ITEM_BYTES[manifest.precision]
        heads, count = config["num_attention_heads"], settings.tensor_parallel_size
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
        row, blocks = cache_row_bytes(config, item), context + 2 * settings.block_size  # as `cache_bytes` has it
    except (OSError, ValueError, KeyError) as error:
        raise RepositoryError(
            f"{path} does not say how large the language model is ({type(error).__name__}: {error}): export the "
            "repository again"
        ) from error
    if heads % count:
        raise RepositoryError(
            f"decoder: setting tensor_parallel_size is {count}, which does not divide the {heads} heads of the "
            "language model"
        )
    return LanguageModel(
        weights=weights,
        working=ENGINE_BYTES + results,
        row=row,
        context=blocks,
        chat=min(context, manifest.num_visual_tokens + CHAT_TOKENS),
        fixed=cache_bytes(config, item, context, settings) or 0,
    )


def cache_bytes(config: dict, item: int, context: int, settings: DecoderSettings) -> int | None:
    """The KV cache as the settings have it, but room for one whole context at least; None leaves it to vLLM.

    Args:
        config: of the language model. item: bytes of a number. context: tokens of prompt and answer.
    """
    if not settings.kv_cache_gib:
        return None
    rows = context + 2 * settings.block_size  # whole blocks, and one that vLLM keeps for itself
    return max(int(settings.kv_cache_gib * 2**30), rows * cache_row_bytes(config, item))


def cache_row_bytes(config: dict, item: int) -> int:
    """Bytes of the KV cache for one token. config: of the language model. item: bytes of a number."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width * item


def gib(size: int | None) -> str:
    """Such as "1.5 GiB"."""
    return "unknown" if size is None else f"{size / (1 << 30):.2f} GiB"


def _parts(manifest: Manifest) -> tuple[dict[str, int], frozenset[str], dict[str, str]]:
    """What all but the language model takes, which of it is an estimate, and words about it."""
    parts = {"Triton: CUDA and its pool": CONTEXT_BYTES + CUDA_POOL_BYTES}
    estimated, details = {*parts, "language model: CUDA", "reserve"}, {}
    for name in manifest.graphs:
        memory = manifest.gpu_memory.get(name)
        if memory is None:
            raise RepositoryError(f"its manifest does not say what {name} takes of a GPU's memory: export it again")
        parts[name] = memory["weights"] + sum(memory["contexts"]) + memory["bindings"]
        contexts = " + ".join(gib(size) for size in memory["contexts"])
        details[name] = f": weights {gib(memory['weights'])}, results {contexts}, in and out {gib(memory['bindings'])}"
        if memory["source"] != "engine":
            estimated.add(name)
    return {**parts, "reserve": RESERVE_BYTES}, frozenset(estimated), details


def _ways_out(repository: Path, manifest: Manifest, gpus: list[Gpu], settings: DecoderSettings) -> list[str]:
    """Changes each of which alone would make it fit, in a few words: of settings first, then of the export."""
    usual, count = DecoderSettings(), settings.tensor_parallel_size
    changed = {
        name: replace(settings, **{name: getattr(usual, name)})
        for name in ("gpu_memory_utilization", "kv_cache_gib", "max_num_batched_tokens", "max_num_seqs")
        if getattr(settings, name) != getattr(usual, name)
    }
    ways = {
        f"set the decoder's {name} to {getattr(usual, name)}": _plans(repository, manifest, gpus, other)
        for name, other in changed.items()
    }
    if settings.context_of(manifest) > SHORT_CONTEXT:
        shorter = replace(settings, context_length=SHORT_CONTEXT)
        ways[f"set the decoder's context_length to {SHORT_CONTEXT}"] = _plans(repository, manifest, gpus, shorter)
    plans = _plans(repository, manifest, gpus, settings)
    if manifest.precision == "fp32":
        ways["export with --precision bf16"] = [_in_bf16(plan, manifest) for plan in plans]
    elif not manifest.quantization:
        for name, part in QUANTIZED.items():
            ways[f"export with --llm-quantization {name}"] = [_with_llm(plan, weights=part) for plan in plans]
    if any(name in manifest.graphs for name in CLIP_ENCODERS):
        ways["export without --clip-checkpoint, if no reports are ranked"] = [
            replace(plan, parts={name: size for name, size in plan.parts.items() if name not in CLIP_ENCODERS})
            for plan in plans
        ]
    # Each of twice as many GPUs like these has half of what it has now, but for results of a step.
    ways[f"set the decoder's tensor_parallel_size to {2 * count}, on {2 * count} such GPUs"] = [
        replace(plan, llm=plan.llm and plan.llm.split(2)) for plan in plans
    ]
    return [words for words, others in ways.items() if all(plan.fits for plan in others)]


def _with_llm(plan: Plan, weights: float) -> Plan:
    return replace(plan, llm=plan.llm and replace(plan.llm, weights=round(weights * plan.llm.weights)))


def _in_bf16(plan: Plan, manifest: Manifest) -> Plan:
    """A plan in fp32 as it would be in bf16. TensorRT has no fused attention in fp32: a plan then keeps all scores."""
    encoders = {
        name: memory["weights"] // 2 + sum(memory["contexts"]) // 10 + memory["bindings"]
        for name, memory in manifest.gpu_memory.items()
        if name in IMAGE_ENCODERS
    }
    half = plan.llm and replace(plan.llm, weights=plan.llm.weights // 2, row=plan.llm.row // 2)
    return replace(plan, parts={**plan.parts, **encoders}, llm=half)
