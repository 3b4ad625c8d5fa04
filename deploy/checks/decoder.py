"""vLLM's engine on the recorded model: does it start, answer like the reference, and hand out the right states?"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import torch

from deploy.checks.context import Context
from deploy.checks.fixtures import Case
from deploy.checks.reference import BOUNDS, IMAGE_START
from engine.models.checkpoint import build_lamed, open_lamed
from engine.runtime.decoder import vllm_environment
from engine.runtime.decoder.llm_engine import LlmEngine
from engine.runtime.decoder.seg_states import EXTRA_ARG
from engine.runtime.decoder_settings import DecoderSettings
from export.llm import write_llm

AT_ONCE = 8
BLOCK_SIZES = {"cuda": 16, "cpu": 32}  # as model_repository/decoder has them
# Of states in fp32, as a share of the largest value: tests/fixtures/README.md's, and vLLM's own order of sums.
FP32_BOUND = 1e-3


def start(context: Context) -> Iterator[dict]:
    """Rows for the engine in fp32, which must answer like the reference, and in bf16, as it is served.

    In fp32 it starts quickly, without compiling the model; the small sizes are tried in fp32 alone. The last one is
    started a second time, when its caches are full.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Empty ones: else an earlier run would decide how long a first start takes.
        os.environ |= {"VLLM_CACHE_ROOT": f"{folder}/vllm", "TRITON_CACHE_DIR": f"{folder}/triton"}
        case = Case.write("dev_small", Path(folder))
        config, weights, source = open_lamed(case.folder)
        for precision in ("fp32",) if context.tiny else ("fp32", "bf16"):
            exported = Path(folder) / precision
            write_llm(config, weights, source, exported, precision, progress=print)
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            # On the CPU: the engine's process has the GPU's memory for itself.
            model = build_lamed(config, weights, dtype)
            with torch.inference_mode():
                visual = model.encode_images(case.volume.to(dtype))
                asked = torch.tensor([case.spec["input_ids"]])
                rows = model.prompt_embeddings(asked, visual, IMAGE_START)[0].clone()
            # Half of the GPU, of which other programs may hold a part; the cache of the recorded model is small.
            settings = DecoderSettings(
                kv_cache_gib=1.0,
                gpu_memory_utilization=0.5,
                max_num_seqs=AT_ONCE,
                block_size=BLOCK_SIZES[context.device],
                enforce_eager=precision == "fp32",
            )
            vllm_environment.prepare(settings.threads)
            engine = LlmEngine(exported, dtype, config.context_length, padding_id=0, settings=settings)
            yield from _in_a_loop(_asked(engine, rows, case, precision))
        again = LlmEngine(exported, dtype, config.context_length, padding_id=0, settings=settings)
        yield from _in_a_loop(_started(again, precision, "the engine starts again, with full caches"))


def _in_a_loop(rows: AsyncGenerator[dict]) -> Iterator[dict]:
    """The rows of an asynchronous generator, as they come."""
    loop = asyncio.new_event_loop()
    try:
        while (row := loop.run_until_complete(anext(rows, None))) is not None:
            yield row
    finally:
        loop.run_until_complete(rows.aclose())
        loop.close()


async def _started(engine: LlmEngine, precision: str, what: str) -> AsyncGenerator[dict]:
    """A row; the engine runs until this is closed."""
    started = time.perf_counter()
    try:
        await engine.start()  # raises where its own check of the states fails
        yield {"precision": precision, "what": what, "seconds": time.perf_counter() - started, "ok": True}
    finally:
        await engine.stop()


async def _asked(engine: LlmEngine, rows: torch.Tensor, case: Case, precision: str) -> AsyncGenerator[dict]:
    async with aclosing(_started(engine, precision, "the engine starts")) as starting:
        yield await anext(starting)
        first = await _answer(engine, rows, case, "first")
        yield _compared("an answer", precision, [first], case)
        many = await asyncio.gather(*(_answer(engine, rows, case, f"of {n}") for n in range(AT_ONCE)))
        yield _compared(f"{AT_ONCE} answers at the same time", precision, many, case)


async def _answer(engine: LlmEngine, rows: torch.Tensor, case: Case, key: str) -> tuple[list[int], np.ndarray | None]:
    """The greedy answer to the recorded question, and the state of its `[SEG]`; None without one."""
    from vllm import SamplingParams

    seg = case.spec["seg_token_id"]
    params = SamplingParams(
        max_tokens=case.spec["generate"]["max_new_tokens"],
        temperature=0,
        detokenize=False,
        extra_args={EXTRA_ARG: [key, seg]},
    )
    said: list[int] = []
    async for output in engine.generate(rows, params, key, "gpu-check"):
        said = list(output.outputs[0].token_ids)
    positions = [position for position, token in enumerate(said) if token == seg]
    return said, (await engine.take_states(key, positions)) if positions else None


def _compared(what: str, precision: str, answers: list[tuple[list[int], np.ndarray | None]], case: Case) -> dict:
    """In fp32 every token and state must be the recorded one; in bf16 those up to the first other token."""
    wanted, positions = case.spec["output_ids"], case.spec["seg_positions"]
    recorded = case.expected["step_hidden"][positions]
    bound = FP32_BOUND if precision == "fp32" else BOUNDS[precision][1]
    same = sum(said == wanted for said, _ in answers)
    comparable = [states for said, states in answers if said[: positions[-1] + 1] == wanted[: positions[-1] + 1]]
    errors = [
        float(np.abs(states - recorded).max() / np.abs(recorded).max())
        if states is not None and states.shape == recorded.shape
        else float("inf")
        for states in comparable
    ]
    error = max(errors, default=float("nan"))
    right = all(e <= bound for e in errors)
    if precision == "fp32":
        right = right and same == len(answers)
    return {
        "precision": precision,
        "what": what,
        "as recorded": f"{same} of {len(answers)}",
        "error of [SEG] states": error,
        "bound": bound,
        "ok": right,
    }
