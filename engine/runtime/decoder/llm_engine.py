"""vLLM's engine over an exported language model: started, checked, watched, restarted, stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import InvalidInput, M3DError, Unavailable, one_line
from engine.gpu_memory import cache_bytes
from engine.memory import available_memory
from engine.runtime.acceleration import Pass
from engine.runtime.decoder import engine_process, seg_states, vllm_environment, worker_extension
from engine.runtime.decoder.seg_state_check import check_same_states, check_seg_states
from engine.runtime.decoder_settings import DecoderSettings
from engine.runtime.run_folder import READY

_log = logging.getLogger(__name__)

RESTART_WINDOW_S = 3600
WATCH_INTERVAL_S = 1.0
SHUTDOWN_S = 10.0  # until an engine that does not end by itself is killed
FURTHEST_PASS = Pass.DECODE_KERNEL  # on a CPU
STARTING, RESTARTING, STOPPED = "starting", "restarting", "stopped"


class LlmEngine:
    """One AsyncLLM at a time, used from one asyncio loop.

    folder: an exported language model. context_length: rows of prompt and answer. padding_id: a token id no answer has.
    memory_share: tells, at each start, which part of a GPU's memory vLLM may take; by default the settings say it.

    An engine that dies fails the answers in progress with Unavailable and is restarted in the background, at most
    `settings.restarts` times an hour; `health` says where it stands (READY, or words for the client), `layers` how the
    layers are computed. on_health: is told `health` whenever it changes. on_broken: is told, once, what happened when
    the engine has died too often or does not start again; it never comes back then. Both are called on the loop.
    temporary: a folder for what vLLM leaves.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        context_length: int,
        padding_id: int,
        settings: DecoderSettings,
        on_health: Callable[[str], None] = lambda words: None,
        on_broken: Callable[[str], None] = lambda words: None,
        memory_share: Callable[[], float] | None = None,
        temporary: Path | None = None,
    ):
        self.folder = folder
        self.temporary = temporary
        self.dtype = dtype
        self.context_length = context_length
        self.padding_id = padding_id
        self.settings = settings
        self._on_health = on_health
        self._on_broken = on_broken
        self._memory_share = memory_share or (lambda: settings.gpu_memory_utilization)
        self._health = STARTING
        self.layers = Pass.VLLM
        self._llm: Any = None  # an AsyncLLM, while one runs
        self._deaths: deque[float] = deque()
        self._tasks: set[asyncio.Task] = set()
        self._restart_task: asyncio.Task | None = None

    @property
    def health(self) -> str:
        return self._health

    def _become(self, health: str) -> None:
        level = logging.INFO if health in (STARTING, READY, STOPPED) else logging.WARNING
        _log.log(level, "the language model is %s", health)
        self._health = health
        self._on_health(health)

    # --- life --------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Load the model and check its `[SEG]` states. Raises RepositoryError if they are off."""
        vllm_environment.prepare(self.settings.threads)
        making = asyncio.get_running_loop().run_in_executor(None, self._make)
        try:
            llm = await asyncio.shield(making)
        except asyncio.CancelledError:  # stopped meanwhile: what is being made must not outlive this
            await _end(await making)
            raise
        except RuntimeError as error:  # vLLM's, when its process ends: that process has printed why
            raise Unavailable(
                f"the language model's process did not start ({one_line(error)}); this machine has "
                f"{available_memory() / 1e9:.1f} GB of memory left. The process printed the reason before; "
                "`m3d inspect` says how much memory the model needs"
            ) from error
        try:
            await llm.collective_rpc("watch_seg_states", args=(os.getpid(),))
            self._llm = llm
            checked = await check_seg_states(self.folder, self.dtype, self._greedy, self.take_states)
            self.layers = Pass(min(await llm.collective_rpc("shorten_pass", args=(int(FURTHEST_PASS),))))
            if self.layers is not Pass.VLLM:
                await check_same_states(checked, self._greedy, self.take_states)
        except BaseException:
            self._llm = None
            await _end(llm)
            raise
        self._become(READY)
        self._spawn(self._watch(llm))

    async def stop(self) -> None:
        """End the engine and its process; answers in progress fail with Unavailable."""
        self._become(STOPPED)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        llm, self._llm = self._llm, None
        if llm is not None:
            await _end(llm)

    async def abandon(self) -> None:
        """This process is about to end, and the engine's with it: nobody is to report that, or to restart it."""
        self._become(STOPPED)
        if self._llm is not None and self._llm.output_handler is not None:
            self._llm.output_handler.cancel()

    async def restarted(self) -> None:
        """Wait for the restart in the background, if there is one."""
        if self._restart_task is not None:
            await self._restart_task

    @property
    def process_ids(self) -> list[int]:
        """The engine's own processes."""
        return [] if self._llm is None else [process.pid for process in _processes(self._llm)]

    # --- work --------------------------------------------------------------------------------------------------------
    async def generate(self, rows: torch.Tensor, params, key: str, salt: str) -> AsyncGenerator:
        """vLLM's outputs for the prompt `rows` [T, H]; ends in "stop" or "length". Close it to stop decoding.

        key: unique, names the states. salt: prompts share cached blocks only under the same one.
        Raises Unavailable when the engine is not ready or dies, InvalidInput for what vLLM refuses.
        """
        if self.health == READY and self._llm.errored:
            self._died(self._llm)
        if self.health != READY:
            raise Unavailable(f"the language model is {self.health}: {self._way_out()}")
        async with aclosing(self._outputs(rows, params, key, salt)) as outputs:
            async for output in outputs:
                yield output

    async def take_states(self, key: str, positions: list[int]) -> np.ndarray:
        """fp32 [K, H] of the watched tokens at these positions of the answer; frees everything of `key`."""
        (rows, *_) = await self._llm.collective_rpc("take_seg_states", args=(key, positions))
        if None in rows:
            raise M3DError(f"the hidden state of token {positions[rows.index(None)]} of the answer is missing")
        return np.stack([np.frombuffer(row, np.float32) for row in rows])

    def drop_states(self, key: str) -> None:
        """Free everything of `key`, in the background."""
        if self._llm is not None and not self._llm.errored:
            self._spawn(self._llm.collective_rpc("drop_seg_states", args=(key,)))

    async def count_states(self) -> dict[str, int]:
        """What the worker keeps, see `SegStates.counts`."""
        return (await self._llm.collective_rpc("count_seg_states"))[0]

    async def _outputs(self, rows, params, key, salt) -> AsyncGenerator:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import embeds_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        # None of these ids is embedded (is_token_ids). They keep vLLM's repetition penalty, which looks at the ids of
        # the prompt, from reading those that another request has left in the batch; it penalises the padding instead.
        prompt = embeds_input(
            rows, cache_salt=salt, prompt_token_ids=[self.padding_id] * len(rows), is_token_ids=[False] * len(rows)
        )
        llm = self._llm
        try:
            async with aclosing(llm.generate(prompt, params, key)) as outputs:
                async for output in outputs:
                    if output.finished and output.outputs[0].finish_reason not in ("stop", "length"):
                        if params.structured_outputs is not None and not llm.errored:
                            raise _not_held()
                        raise Unavailable(
                            "the language model was stopped in the middle of this answer "
                            f"({output.outputs[0].finish_reason}): ask again when the server is ready"
                        )
                    yield output
        except (VLLMClientError, ValueError) as error:
            raise InvalidInput(f"the language model refuses this request: {one_line(error)}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            if not llm.errored:
                if params.structured_outputs is not None:
                    raise _not_held() from error
                raise
            self._died(llm)
            raise Unavailable(
                f"the language model stopped while it answered; it is {self.health} now: {self._way_out()}"
            ) from error

    async def _greedy(self, rows: torch.Tensor, length: int, key: str, watched: list[int]) -> list[int]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=length,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={seg_states.EXTRA_ARG: [key, *watched]},
        )
        async for output in self._outputs(rows, params, key, "check"):
            said = list(output.outputs[0].token_ids)
        return said

    # --- inside ------------------------------------------------------------------------------------------------------
    def _make(self):
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = self.settings
        arguments = AsyncEngineArgs(
            model=str(self.folder),
            dtype=str(self.dtype).removeprefix("torch."),
            enable_prompt_embeds=True,
            worker_extension_cls=worker_extension.NAME,
            max_model_len=self.context_length,
            max_num_seqs=settings.max_num_seqs,
            block_size=settings.block_size,
            enable_prefix_caching=True,
            # Never less than the longest prompt, so that a prompt alone is never cut into chunks.
            max_num_batched_tokens=max(settings.max_num_batched_tokens, self.context_length),
            kv_cache_memory_bytes=self._kv_cache_bytes(),
            gpu_memory_utilization=self._memory_share(),
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=settings.enforce_eager,
            generation_config="vllm",
            # One library, whose limits are known. JSON without spaces at will: a model may write them without end.
            structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
            disable_log_stats=True,
        )
        with engine_process.spawned_apart(self.temporary):
            return AsyncLLM.from_engine_args(arguments)

    def _kv_cache_bytes(self) -> int | None:
        config = json.loads((self.folder / "config.json").read_text())
        return cache_bytes(config, self.dtype.itemsize, self.context_length, self.settings)

    async def _watch(self, llm) -> None:
        while not llm.errored:
            await asyncio.sleep(WATCH_INTERVAL_S)
        self._died(llm)

    def _died(self, llm) -> None:
        if llm is not self._llm or self.health != READY:
            return
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > self.settings.restarts:
            self._break(f"it stopped {len(self._deaths)} times within an hour; the server's log says why")
        else:
            self._become(RESTARTING)
            self._restart_task = self._spawn(self._restart(llm))

    async def _restart(self, dead) -> None:
        try:
            await _end(dead)
            await self.start()
        except Exception as error:
            self._break(f"it did not start again: {one_line(error)}")

    def _break(self, why: str) -> None:
        self._become(f"out of order ({why})")
        self._on_broken(f"the language model is {self.health}")

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        task.cancelled() or task.exception()  # a dead engine is noticed by the watch, not here

    def _way_out(self) -> str:
        """For a client, when it is not ready."""
        return "try again in a minute" if self.health in (STARTING, RESTARTING) else "the server must be started again"


def _not_held() -> InvalidInput:
    """The error for an answer that cannot go on within its constraint, or whose constraint cannot be compiled."""
    return InvalidInput(
        "the answer cannot be held to its json_schema or choices: no token of this model continues it within them; "
        "give another schema, or none"
    )


def _processes(llm) -> list:
    return llm.engine_core.resources.engine_manager.processes


async def _end(llm) -> None:
    """Returns when the engine's processes are gone; vLLM alone may leave one that it has just killed."""
    from vllm.v1.engine.exceptions import EngineDeadError

    processes = _processes(llm)
    if llm.output_handler is not None:  # it would report the end as an error
        llm.output_handler.cancel()
        llm.output_processor.propagate_error(EngineDeadError())
    await asyncio.to_thread(llm.shutdown, SHUTDOWN_S)
    llm.shutdown = lambda: None  # its finaliser would call it again while Python ends
    for process in processes:
        await asyncio.to_thread(process.join)
