"""Precisions, times and memory on the GPU; on a CPU the same by the clock."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP, REPEATS, LEAST_REPEATS = 2, 20, 3
LONGEST_S = 1.0  # of the repetitions of one measurement


def exact_fp32() -> None:
    """fp32 means fp32: PyTorch's default for convolutions is TF32."""
    use_tf32(False)


def use_tf32(wanted: bool) -> None:
    """Let products and convolutions of fp32 round their factors to 10 bits, or not."""
    torch.backends.cuda.matmul.allow_tf32 = wanted
    torch.backends.cudnn.allow_tf32 = wanted


def seconds(run: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """The median time of `run()` after a warm-up, launches included; of fewer repetitions where one takes long."""
    for _ in range(WARM_UP):
        run()
    first = _times(run, device, 1)[0]
    return statistics.median(_times(run, device, max(LEAST_REPEATS, min(repeats, int(LONGEST_S / max(first, 1e-9))))))


def _times(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    if device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return [after - before for before, after in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in zip(events, events[1:])]


def replayed(run: Callable[[], object], device: str) -> Callable[[], object]:
    """`run` as one launch: captured into a CUDA graph, which reads and writes the same tensors each time.

    Returns `run` itself on a CPU. It is run a few times first. Raises RuntimeError where it cannot be captured.
    """
    if device == "cpu":
        run()
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], float | str]]:
    """While it is open: gives a function that says how many GiB tensors took at most since; "" on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else ""


def forget(device: str) -> None:
    """Give the memory of tensors that are gone back."""
    if device == "cuda":
        torch.cuda.empty_cache()
