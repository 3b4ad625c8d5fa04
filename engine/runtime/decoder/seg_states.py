"""The hidden states that predict `[SEG]`, kept inside vLLM's worker while it decodes.

A mask needs the state (after the final norm) from which each `[SEG]` of an answer was sampled. vLLM computes these rows
anyway, one per request and step, and throws them away; the extension below keeps those whose sampled token is watched.
So there is no second forward pass, and a state is right however its step was scheduled: prefill in chunks, prefix from
the cache, preempted and computed again.

A request asks by `SamplingParams.extra_args`: {"seg_states": [key, token id, ...]}, with a key of our own, since vLLM
changes request ids. Its rows are found by (key, position in the answer).

Written against vLLM 0.32: model runner V1 (vllm/v1/worker/gpu_model_runner.py, whose subclass serves CPUs) and V2
(vllm/v1/worker/gpu/model_runner.py), without speculative decoding. `seg_state_check` checks states at every start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.runtime.decoder import engine_process

EXTRA_ARG = "seg_states"
UNCLAIMED_LIMIT = 256


@dataclass(frozen=True)
class Request:
    """A running request that watches tokens. prompt_length: rows before its first sampled token is fed back."""

    key: str
    tokens: frozenset[int]
    prompt_length: int


@dataclass(frozen=True)
class Step:
    """One step of the model: the rows its tokens were sampled from, and, once `is_ready()`, those tokens.

    watched: (row, request, position in the answer) of the requests that watch. sampled(): token ids by row.
    """

    rows: Any
    watched: list[tuple[int, Request, int]]
    is_ready: Callable[[], bool]
    sampled: Callable[[], Sequence]


class SegStates:
    """Kept rows by key and position; pure bookkeeping, no part of vLLM.

    Only watched rows outlive their step. A request's rows go when they are taken or dropped, or when it finishes with
    none; of finished requests that nobody asks for, the last UNCLAIMED_LIMIT stay.
    """

    def __init__(self, unclaimed_limit: int = UNCLAIMED_LIMIT):
        self._unclaimed_limit = unclaimed_limit
        self._running: dict[str, Request] = {}  # by vLLM's request id
        self._rows: dict[str, dict[int, object]] = {}  # by key, then position
        self._unclaimed: dict[str, None] = {}  # keys of finished requests with rows, oldest first
        self._pending: deque[Step | str] = deque()  # steps, and keys that finished after them
        self.preemptions = self.cut_prompts = 0

    def begin(self, request_id: str, request: Request) -> None:
        if request_id not in self._running:  # V2 announces a preempted request again
            self._rows[request.key] = {}
        self._running[request_id] = request

    def running(self, request_id: str) -> Request | None:
        return self._running.get(request_id)

    def record(self, step: Step) -> None:
        self._pending.append(step)
        self.settle()

    def finish(self, request_ids: Iterable[str]) -> None:
        self._pending.extend(r.key for r in (self._running.pop(i, None) for i in request_ids) if r)
        self.settle()

    def settle(self) -> None:
        """Work off what is known by now: on a GPU the tokens of the last steps may still be on their way."""
        while self._pending:
            first = self._pending[0]
            if isinstance(first, Step):
                if not first.is_ready():
                    return
                self._keep_hits(first)
            else:
                self._close(first)
            self._pending.popleft()

    def take(self, key: str, positions: Iterable[int]) -> list:
        """The rows at these positions of the answer, None where there is none; everything of `key` is forgotten."""
        self.settle()
        rows = self._rows.get(key, {})
        self.drop(key)
        return [rows.get(position) for position in positions]

    def drop(self, key: str) -> None:
        """Forget `key`, also what would still come."""
        self._rows.pop(key, None)
        self._unclaimed.pop(key, None)

    def counts(self) -> dict[str, int]:
        """What is kept now; and since the start, how often the engine ran out of KV cache and put a request back, and
        how many prompts were computed in chunks."""
        return {
            "running": len(self._running),
            "requests": len(self._rows),
            "rows": sum(map(len, self._rows.values())),
            "pending": len(self._pending),
            "preemptions": self.preemptions,
            "cut_prompts": self.cut_prompts,
        }

    def _keep_hits(self, step: Step) -> None:
        sampled = step.sampled()
        for row, request, position in step.watched:
            kept = self._rows.get(request.key)
            # A step may sample nothing for a request, and nothing is kept for one that was dropped meanwhile.
            if kept is not None and len(sampled[row]) and int(sampled[row][0]) in request.tokens:
                kept[position] = step.rows[row].clone()

    def _close(self, key: str) -> None:
        if not self._rows.get(key):
            self.drop(key)
            return
        self._unclaimed[key] = None
        if len(self._unclaimed) > self._unclaimed_limit:
            self.drop(next(iter(self._unclaimed)))


class SegStateExtension:
    """The part of vLLM's worker that keeps states (see worker_extension)."""

    model_runner: Any  # the worker's
    parallel_config: Any

    def watch_seg_states(self, owner: int) -> None:
        """Start to keep states, once, after the engine has started. owner: the process that the engine serves."""
        engine_process.end_with(owner)
        if self.parallel_config.world_size == 1:
            engine_process.end_at_once_when_asked()
            engine_process.ignore_interrupts()
        runner = self.model_runner
        engine_process.rank_tokens_without_compiling(runner)
        self.seg_states = states = SegStates()
        is_v2 = type(runner).__module__.startswith(("vllm.v1.worker.gpu.", "vllm.v1.worker.cpu."))
        rows_of = _rows_v2 if is_v2 else _rows_v1
        execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

        def execute_and_follow(scheduler_output, *args, **kwargs):
            if not kwargs.get("dummy_run"):
                for new in scheduler_output.scheduled_new_reqs:
                    computed = new.num_computed_tokens + scheduler_output.num_scheduled_tokens[new.req_id]
                    states.cut_prompts += computed < new.prompt_len
                    wish = (new.sampling_params and new.sampling_params.extra_args or {}).get(EXTRA_ARG)
                    if wish:
                        states.begin(new.req_id, Request(wish[0], frozenset(wish[1:]), new.prompt_len))
                states.finish(scheduler_output.finished_req_ids)
                states.preemptions += len(scheduler_output.preempted_req_ids or ())
            return execute_model(scheduler_output, *args, **kwargs)

        def sample_and_keep(*args, **kwargs):
            executed = runner.execute_model_state
            rows, watched = (None, []) if executed is None else rows_of(runner, executed, states.running)
            with engine_process.without_unused_generators(runner):
                output = sample_tokens(*args, **kwargs)
            if watched:
                states.record(Step(rows(), watched, *_sampled_tokens(output)))
            return output

        runner.execute_model, runner.sample_tokens = execute_and_follow, sample_and_keep

    def take_seg_states(self, key: str, positions: list[int]) -> list[bytes | None]:
        """fp32 rows of the request with this key by position in its answer; frees them all."""
        rows = self.seg_states.take(key, positions)
        return [None if row is None else row.float().cpu().numpy().tobytes() for row in rows]

    def drop_seg_states(self, key: str) -> None:
        self.seg_states.drop(key)

    def count_seg_states(self) -> dict[str, int]:
        self.seg_states.settle()
        return self.seg_states.counts()


def _rows_v1(runner, executed, running):
    batch, scheduled = runner.input_batch, executed.scheduler_output.num_scheduled_tokens
    ends = (int(batch.num_computed_tokens_cpu[i]) + scheduled[id_] for i, id_ in enumerate(batch.req_ids))
    return lambda: executed.sample_hidden_states, _watched(batch.req_ids, ends, running)


def _rows_v2(runner, executed, running):
    batch, n = executed.input_batch, executed.input_batch.num_reqs
    ends = (batch.num_computed_tokens_np[:n] + batch.num_scheduled_tokens[:n]).tolist()
    # Gathered after sampling at no risk: the next forward, which may reuse the buffer, is queued later.
    return lambda: executed.hidden_states[batch.logits_indices], _watched(batch.req_ids, ends, running)


def _watched(request_ids, ends, running) -> list[tuple[int, Request, int]]:
    """ends: rows of each request computed after this step. Before the prompt's end a step samples nothing."""
    found = ((row, running(request_id), end) for row, (request_id, end) in enumerate(zip(request_ids, ends)))
    return [
        (row, request, end - request.prompt_length)
        for row, request, end in found
        if request is not None and end >= request.prompt_length
    ]


def _sampled_tokens(output) -> tuple[Callable[[], bool], Callable[[], Sequence]]:
    """(is_ready, token ids by row) of what `sample_tokens` returned, without waiting for the device."""
    if hasattr(output, "copy_event"):  # V2
        return output.copy_event.query, lambda: output.sampled_token_ids
    if hasattr(output, "async_copy_ready_event"):  # V1 with asynchronous scheduling
        return output.async_copy_ready_event.query, lambda: output.sampled_token_ids_cpu
    return lambda: True, lambda: output.sampled_token_ids
