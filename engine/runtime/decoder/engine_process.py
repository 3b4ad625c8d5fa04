"""What the process of vLLM's engine needs beyond vLLM itself. Runs inside that process."""

from __future__ import annotations

import os
import select
import signal
import threading
from contextlib import contextmanager
from multiprocessing import util
from typing import Any


def end_with(owner: int) -> None:
    """End this process when the process `owner` ends, however it ends: an engine would live on and hold its memory."""
    descriptor = os.pidfd_open(owner)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    def wait() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-owner", daemon=True).start()


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


@contextmanager
def unused_generators_aside(runner):
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
