"""MLPerf LoadGen as the load generator: it decides when a question comes, and whether the answers came in time.

Server: questions arrive at random, as a Poisson process of a given rate, whether or not earlier ones are answered.
SingleStream: one after the other. Offline: all at once.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlperf_loadgen as loadgen

from benchmarks.timings import Timing
from engine.cli import console

# MLPerf Inference's limits of the Server scenario for an 8B language model, at the 99th percentile.
TTFT_LIMIT_S, TPOT_LIMIT_S = 0.5, 0.03
SCENARIOS = {
    "SingleStream": loadgen.TestScenario.SingleStream,
    "Server": loadgen.TestScenario.Server,
    "Offline": loadgen.TestScenario.Offline,
}
MAX_IN_FLIGHT = 256
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class Limits:
    """What the 99th percentiles may be, seconds."""

    ttft_s: float = TTFT_LIMIT_S
    tpot_s: float = TPOT_LIMIT_S


@dataclass(frozen=True)
class Load:
    """What a run was and how it ended. rate: questions/s asked for (Server). arrivals_s: when they came.

    verdict: LoadGen's own, VALID or INVALID; summary: its summary, word for word.
    """

    scenario: str
    rate: float | None
    seconds: float
    arrivals_s: list[float]
    samples: list[Timing]
    verdict: str
    summary: str


def run(
    scenario: str,
    ask: Callable[[int], Iterator[int]],
    questions: int,
    *,
    rate: float | None = None,
    seconds: float = 10.0,
    limits: Limits = Limits(),
) -> Load:
    """Put a load on `ask` for `seconds` (Offline: until `questions` are answered).

    ask(number): the token counts of the pieces of the answer to one of `questions` questions, as they come; called
    from many threads. rate: questions/s of the Server scenario. Raises what `ask` raised first.
    """
    settings = loadgen.TestSettings()
    settings.scenario = SCENARIOS[scenario]
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.use_token_latencies = True
    settings.ttft_latency, settings.tpot_latency = (int(s * _SECOND_NS) for s in (limits.ttft_s, limits.tpot_s))
    settings.min_query_count = settings.max_query_count = 0
    settings.min_duration_ms = int(1000 * seconds)
    settings.max_duration_ms = int(1000 * seconds)
    if scenario == "Server":
        settings.server_target_qps = rate
        settings.min_query_count = 1
    elif scenario == "Offline":
        settings.offline_expected_qps = questions / seconds
        settings.min_duration_ms, settings.max_duration_ms = 0, 0
        settings.min_query_count, settings.max_query_count = questions, 0
    else:
        settings.min_query_count = 1
    system = _System(ask)
    with tempfile.TemporaryDirectory() as folder:
        log = loadgen.LogSettings()
        log.log_output.outdir, log.log_output.copy_summary_to_stdout = folder, False
        log.enable_trace = False
        system.be_tested(questions, settings, log)
        summary = Path(folder, "mlperf_log_summary.txt").read_text()
    verdict = re.search(r"^Result is : (\w+)", summary, re.M)[1]
    return Load(scenario, rate, system.took_s, system.arrivals_s, system.samples, verdict, summary)


class _System:
    """What LoadGen calls the system under test: takes questions at once, answers them from threads.

    LoadGen cannot be ended early, and an exception in what it calls kills the process. So it runs in a thread of its
    own; after an interrupt nothing comes back from here to it, and the thread stays where it is.
    """

    def __init__(self, ask: Callable[[int], Iterator[int]]):
        self.ask = ask
        self.samples: list[Timing] = []
        self.arrivals_s: list[float] = []
        self.error: BaseException | None = None
        self.took_s = 0.0
        self._pool = ThreadPoolExecutor(MAX_IN_FLIGHT, "questions")
        self._lock = threading.Lock()
        self._interrupted = False

    def be_tested(self, questions: int, settings: loadgen.TestSettings, log: loadgen.LogSettings) -> None:
        """Run LoadGen to its end. Raises what `ask` raised first."""
        test = threading.Thread(target=self._test, args=(questions, settings, log), name="loadgen", daemon=True)
        try:
            test.start()
            while test.is_alive():
                test.join(0.1)  # a signal just before a wait without an end would be seen at its end
        except BaseException:
            self._interrupted = True
            atexit.register(_exit_at_once)
            raise
        self._pool.shutdown()
        if self.error is not None:
            raise self.error

    def _test(self, questions: int, settings: loadgen.TestSettings, log: loadgen.LogSettings) -> None:
        system = loadgen.ConstructSUT(self._issue, lambda: None)
        library = loadgen.ConstructQSL(questions, questions, lambda indices: None, lambda indices: None)
        started = time.perf_counter()
        loadgen.StartTestWithLogSettings(system, library, settings, log)
        self.took_s = time.perf_counter() - started
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)

    def _issue(self, queries) -> None:
        now = time.perf_counter()
        for query in queries:
            if self._interrupted:
                threading.Event().wait()
            self.arrivals_s.append(now)
            self._pool.submit(self._answer, query.id, query.index, now)

    def _answer(self, id_: int, index: int, arrived: float) -> None:
        first, tokens = None, 0
        try:
            for count in self.ask(index):
                if self._interrupted:
                    return
                tokens += count
                if first is None:
                    first = self._first_token(id_, arrived)
        except Exception as error:  # LoadGen waits for every answer: the run is ended, then this is raised
            self.error = self.error or error
        if self._interrupted:
            return
        if first is None:
            first = self._first_token(id_, arrived)
        total = time.perf_counter() - arrived
        with self._lock:
            self.samples.append(Timing(total, first, tokens))
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(id_, 0, 0, max(tokens, 1))])

    def _first_token(self, id_: int, arrived: float) -> float:
        loadgen.FirstTokenComplete([loadgen.QuerySampleResponse(id_, 0, 0)])
        return time.perf_counter() - arrived


def _exit_at_once() -> None:
    """End the process without LoadGen's own destructors, which crash while it waits for answers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(console.INTERRUPTED)
