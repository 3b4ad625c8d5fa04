"""Steps of a GPU check that end in every way a step can; see test_gpu_check.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import numpy as np

from deploy.checks.context import Context, Failed


def passes(context: Context) -> Iterator[dict]:
    yield {"what": "a fact", "value": context.checkpoint}
    yield {"what": "a check", "ok": True}


def rates(context: Context) -> Iterator[dict]:
    yield {"rate": "copy", "per_s": 2.0}


def tells_its_rates(context: Context) -> Iterator[dict]:
    yield {"rates": context.rates}


def is_wrong(context: Context) -> Iterator[dict]:
    yield {"what": "one", "ok": True}
    yield {"what": "another", "ok": False}


def is_wrong_by_numpy(context: Context) -> Iterator[dict]:
    yield {"what": "far off", "error": float("nan"), "ok": np.float64("nan") <= 1}


def raises(context: Context) -> Iterator[dict]:
    yield {"what": "before"}
    print("RootError: what an engine's process said", flush=True)
    raise Failed("too far off")


def crashes(context: Context) -> Iterator[dict]:
    yield {"what": "before"}
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(context: Context) -> Iterator[dict]:
    yield {"what": "before"}
    os._exit(3)


def tells_nothing(context: Context) -> Iterator[dict]:
    return iter(())


def hangs(context: Context) -> Iterator[dict]:
    """Ignores a polite end, and so does the program that it has started."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started = subprocess.Popen(["sleep", "600"])
    yield {"what": "pids", "value": [os.getpid(), started.pid]}
    time.sleep(600)
