"""Long preparation work, case by case: parallel, resumable, with a progress bar and a report of what was skipped.

A case is made in a folder beside its own and renamed when it is complete, so a folder that is there is whole. It
remembers what it was made from: with the same sources and settings it is kept, else made again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from engine.errors import Cancelled, InvalidInput, M3DError
from training.files import write_json

_STAMP = "prepared.json"


@dataclass(frozen=True)
class LeftOut:
    """Something that was not prepared, and why. lost: the class of a structure that the model's volume cannot hold."""

    path: str
    cause: str
    lost: str | None = None


@dataclass(frozen=True)
class Job:
    """One case. sources: what it is read from. target: its folder. settings: what decides the result, for JSON.

    make: given an empty folder, writes the case there and returns what it left out; raises InvalidInput if the case is
    unusable. It runs in another process, so it must pickle.
    """

    name: str
    sources: tuple[Path, ...]
    target: Path
    settings: dict
    make: Callable[[Path], list[LeftOut]]


@dataclass(frozen=True)
class Outcome:
    """state: made, kept (it was complete) or skipped; then left_out says why."""

    name: str
    target: Path
    state: str
    left_out: tuple[LeftOut, ...] = field(default=())


def do(job: Job) -> Outcome:
    """Make one case, unless it is there; a case that cannot be made is skipped."""
    try:
        wanted = {"settings": job.settings, "sources": [_trace(path) for path in job.sources]}
        wanted = json.loads(json.dumps(wanted))  # as it is read back: lists for tuples
        if job.target.exists():
            stamp = _stamp(job.target)
            if stamp is None:
                raise InvalidInput(f"{job.target} exists and was not made by this command: move it away")
            if all(stamp.get(key) == value for key, value in wanted.items()):
                return Outcome(job.name, job.target, "kept", tuple(LeftOut(**entry) for entry in stamp["left_out"]))
        partial = job.target.with_name(f".{job.target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            left_out = job.make(partial)
            write_json(partial / _STAMP, wanted | {"left_out": [asdict(entry) for entry in left_out]})
            shutil.rmtree(job.target, ignore_errors=True)
            partial.rename(job.target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Outcome(job.name, job.target, "made", tuple(left_out))
    except InvalidInput as error:
        cause = str(error)
    except (OSError, MemoryError) as error:
        cause = f"{type(error).__name__}: {error}"
    return Outcome(job.name, job.target, "skipped", (LeftOut(str(job.sources[0]), cause),))


def do_all(jobs: Sequence[Job], workers: int, title: str) -> list[Outcome]:
    """The outcomes of all jobs, in their order, with a progress bar on a terminal."""
    try:
        outcomes = dict(progress(parallel(do, jobs, workers), len(jobs), title))
    except M3DError as error:
        raise type(error)(f"{error}; complete cases are kept, the same command goes on from there") from None
    return [outcomes[number] for number in range(len(jobs))]


def parallel(
    function: Callable, items: Sequence, workers: int, prepare: Callable | None = None, *given
) -> Iterator[tuple[int, object]]:
    """(number, function(item)) as they are done, by `workers` processes; prepare(*given) runs in each of them first.

    Raises M3DError if a process dies, Cancelled on Ctrl-C, when what is running has ended.
    """
    # Each worker is a core: threads inside would only fight for them.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    pool = ProcessPoolExecutor(
        min(workers, len(items) or 1), multiprocessing.get_context("spawn"), _start, (prepare, given)
    )
    try:
        if workers == 1:
            if prepare:
                prepare(*given)
            yield from ((number, function(item)) for number, item in enumerate(items))
        else:
            numbers = {pool.submit(function, item): number for number, item in enumerate(items)}
            for future in as_completed(numbers):
                yield numbers.pop(future), future.result()
    except BrokenProcessPool:
        raise M3DError(
            f"one of {workers} worker processes died, perhaps for lack of memory: use fewer --workers"
        ) from None
    except KeyboardInterrupt:
        raise Cancelled("interrupted") from None
    finally:
        pool.shutdown(cancel_futures=True)


def progress(results: Iterable, total: int, title: str) -> Iterator:
    """Passes results on, moving a progress bar on the standard error."""
    with Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(title, total=total)
        for result in results:
            yield result
            bar.advance(task)


def _start(prepare: Callable | None, given: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it lets the running cases finish
    # A parent that is killed takes its workers along; they would wait for work for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if prepare:
        prepare(*given)


def _trace(path: Path) -> list:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _stamp(folder: Path) -> dict | None:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
