"""What the process of vLLM's engine needs beyond vLLM itself. All but `spawned_apart` runs inside that process."""

from __future__ import annotations

import os
import select
import signal
import tempfile
import threading
from contextlib import contextmanager
from multiprocessing import spawn, util
from pathlib import Path
from typing import Any

_spawning = threading.Lock()


@contextmanager
def spawned_apart(temporary: Path | None = None):
    """Let processes that this thread spawns meanwhile leave this program's main module alone.

    Python's `spawn` imports it in each new process. A user's script would run again there, from its top, and start
    another engine, unless all of it is behind `if __name__ == "__main__":`. vLLM's engine needs nothing of it.

    temporary: a folder for vLLM's sockets and temporary files, which it does not remove; None for the usual ones.
    """
    mine = threading.get_ident()

    def without_main(name: str) -> dict:
        data = preparation(name)
        if threading.get_ident() == mine:
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    with _spawning:
        preparation = spawn.get_preparation_data
        spawn.get_preparation_data = without_main
        try:
            with _folder_for_vllm(temporary):
                yield
        finally:
            spawn.get_preparation_data = preparation


@contextmanager
def _folder_for_vllm(temporary: Path | None):
    tempfile.gettempdir()  # which keeps this process's own for good
    names = () if temporary is None else ("TMPDIR", "VLLM_RPC_BASE_PATH")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(temporary)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def end_with(owner: int) -> None:
    """End this process when the process `owner` ends, however it ends: an engine would live on and hold its memory."""
    descriptor = os.pidfd_open(owner)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    def wait() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-owner", daemon=True).start()


def ignore_interrupts() -> None:
    """Let Ctrl-C pass: a terminal sends it to all processes, and who interrupts an answer wants to ask again. To be
    called on the main thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_at_once_when_asked() -> None:
    """Let SIGTERM end this process without the orderly way of vLLM. To be called on the main thread.

    There is nothing to save, and an engine without processes of its own has little to clear away; yet vLLM searches its
    whole heap for garbage, and Python takes all modules apart: 3 s, and twice as long beside other models that end.
    """

    def end(*_) -> None:
        try:
            util._exit_function()  # type: ignore[attr-defined]  # semaphores have names, which would stay
        finally:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)


def rank_tokens_without_compiling(runner) -> None:
    """Let a CPU's sampler count the ranks of tokens, which belong to log-probabilities, by PyTorch itself.

    vLLM compiles that function when the first request asks for log-probabilities: all others wait for seconds, and
    without a C++ compiler the engine dies. Only model runner V1.
    """
    if runner.device.type == "cpu":
        from vllm.v1.sample import sampler

        sampler.batched_count_greater_than = lambda scores, least: (scores >= least).sum(-1)


@contextmanager
def without_unused_generators(runner):
    """Keep vLLM from turning back the random generators of seeded requests whose sample it throws away.

    That happens after each chunk of a prompt but the last, and a CPU's generator cannot be turned back: vLLM 0.32
    raises, and the engine is gone for everybody. Here these requests sample without their generator, which then need
    not be turned back. Only model runner V1 on a CPU; elsewhere nothing is changed.
    """
    batch: Any = getattr(runner, "input_batch", None)
    if runner.device.type != "cpu" or not getattr(batch, "generators", None):
        yield
        return
    unused = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    aside = {row: batch.generators.pop(row) for row in unused if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(aside)
