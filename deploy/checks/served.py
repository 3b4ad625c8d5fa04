"""The running server: results of different volumes, masks, latency, memory; and the tests that need a server."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import cpu_roofline
from benchmarks.cpu_roofline import Rates, Stage
from benchmarks.scans import BenchmarkScan, different, phantom, read
from benchmarks.served import Served
from benchmarks.timings import Timing
from deploy.checks import order, plans, roofline
from deploy.checks.context import ROOT, Context, Failed
from deploy.checks.geometry import volumes
from deploy.checks.machine import said
from engine import gpu, gpu_memory
from engine.client import Segmentation, Study
from engine.contract import IMAGE
from engine.errors import M3DError
from engine.gpu_memory import CONTEXT_BYTES, RESERVE_BYTES, Plan
from engine.manifest import Manifest
from engine.models.checkpoint import open_lamed
from engine.models.config import LamedConfig
from engine.server import Server, free_ports
from m3d_demo.samples import write_sample

SEGMENTED_SCAN = "brain-mr"  # of m3d_demo.samples; the default question is about it
# Scans whose masks are asked for at the same time lack so many sixteenths of its slices, from above. The first two
# sixteenths are air, without which every scan is prepared.
CROPPED = (2, 3, 4, 5)
SEGMENT_TOKENS = 32
QUESTIONS = ("What does this scan show?", "Is there a mass?", "Which organs are visible?", "Describe the liver.")
QUESTION_TOKENS = 16  # about as many as those have
SCAN_SHAPE = (256, 256, 64)
LEAST_DICE = 0.99  # of a mask beside others and alone: answers in other company may differ in their last bits
LARGE_START_S = 900.0  # of another checkpoint than the demo's
START_S = 200.0  # until the models are ready; less than the limit of the step, so that the server says what is missing


@dataclass(frozen=True)
class Load:
    """How much is asked of the server.

    rounds: of all volumes at the same time. clients: at the same time, each about a known scan of its own. new_scans:
    one after the other. tokens: of an answer at most.
    """

    rounds: int
    clients: tuple[int, ...]
    new_scans: int
    tokens: int


LOAD = Load(rounds=4, clients=(1, 8, 64), new_scans=5, tokens=64)
TINY_LOAD = Load(rounds=1, clients=(1, 2), new_scans=2, tokens=8)


def serve(context: Context) -> Iterator[dict]:
    """Rows about one server of the plans that were built. No process but the server's own uses the GPU meanwhile."""
    repository = plans.repository(context, plans.SERVED)
    manifest = Manifest.read(repository)
    if not context.rates:
        raise Failed("nothing to compare with: run the step roofline before")
    own, before = plans.own_results(context), _used()
    (plan, *_) = gpu_memory.plans(repository, manifest, gpu.find_gpus()) or [None]
    with _server(repository, context) as server:
        yield from memory("when it is ready", before, plan)
        yield from asked(server, context, manifest, own)
        yield from memory("after the questions", before, plan)


def asked(server: Server, context: Context, manifest: Manifest, own: Mapping[str, np.ndarray]) -> Iterator[dict]:
    """Rows of all that is asked of a server that runs, for any target.

    Args:
        server: is ready. context: with the rates of this machine. manifest: of its repository.
        own: the right results of `plans.VOLUMES` volumes by the encoder's name, [N, ...].
    """
    load = TINY_LOAD if context.tiny else LOAD
    images = volumes(plans.VOLUMES, manifest.image_size).numpy()
    # Clients reach no encoder: this asks Triton itself, behind the front.
    yield from not_mixed_up(server.inside_url, images, own, manifest, load.rounds)
    config, _, _ = open_lamed(context.checkpoint)
    rates = roofline.rates(context)
    with closing(Served(server.url)) as served:
        fresh = different(phantom(SCAN_SHAPE))
        studies = [served.upload(next(fresh)) for _ in range(max(load.clients))]
        yield from latency(served, studies, config, manifest.precision, rates, load)
        yield new_scans(served, fresh, config, manifest, rates, load)
        if served.serves("m3d_segment"):
            yield _asked_for_masks(served, context)


def _server(repository: Path, context: Context) -> Server:
    """A server of these plans, which says what it loads in the check's log."""
    log = Path(context.work) / "triton.log"
    start_s = START_S if context.is_demo else LARGE_START_S
    return Server(repository, target="tensorrt", **free_ports(), log=log, start_timeout=start_s, on_progress=print)


def not_mixed_up(
    url: str, images: np.ndarray, own: Mapping[str, np.ndarray], manifest: Manifest, rounds: int
) -> Iterator[dict]:
    """Rows for each encoder: volumes in the order A A A A B B B B A B, and all at the same time.

    Args:
        url: Triton's own, which serves the encoders. images: fp32 [N, 1, D, H, W]. own: the right results by the
            encoder's name, [N, ...]. manifest: has the bounds. rounds: of all volumes at the same time.
    """
    for name, results in own.items():
        entry = manifest.graphs[name]
        bound = entry.get("plan", entry)["bound"]
        run = encoder(url, name, images)
        for check in (order.in_a_row(run, results, bound), order.at_once(run, results, bound, rounds)):
            yield {**check, "what": f"{name}, {check['what']}"}


def encoder(url: str, name: str, images: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that has the server encode the image of a number; it may be called from many threads."""
    from tritonclient.grpc import InferenceServerClient, InferInput

    here = threading.local()  # a client is for one thread

    def run(number: int) -> np.ndarray:
        if not hasattr(here, "client"):
            here.client = InferenceServerClient(url)
        image = images[number : number + 1]
        tensor = InferInput(IMAGE.name, list(image.shape), "FP32")
        tensor.set_data_from_numpy(image)
        return here.client.infer(name, [tensor]).as_numpy(plans.ENCODERS[name])[0]

    return run


def _asked_for_masks(served: Served, context: Context) -> dict:
    try:
        path = write_sample(SEGMENTED_SCAN, Path(context.work) / "scans")
    except (M3DError, OSError, subprocess.SubprocessError) as error:
        return {"what": "masks", "not asked for": f"the sample scan {SEGMENTED_SCAN} is not to be had: {error}"}
    return masks(served, read(path), context.segment_question)


def masks(served: Served, scan: BenchmarkScan, question: str) -> dict:
    """A row: masks of several scans that are asked for at the same time, against each asked for alone.

    Args:
        served: the server. scan: of which each study lacks some more of the upper slices. question: that asks for one.
    """
    slices = scan.array.shape[2]
    crops = [BenchmarkScan(scan.array[:, :, : slices - slices * n // 16], scan.affine) for n in CROPPED]
    studies = [served.upload(crop) for crop in crops]

    def found(study: Study) -> Segmentation:
        return served.segment(study, question, SEGMENT_TOKENS)[1]

    alone = list(map(found, studies))
    with ThreadPoolExecutor(len(studies)) as pool:
        together = list(pool.map(found, studies))
    named = {"what": f"masks of {len(studies)} scans at the same time, Dice against each alone"}
    if unmasked := [one.answer.text for one in (*alone, *together) if one.mask is None]:
        return {**named, "no mask, but": f"{unmasked[0]}: give a --segment-question", "ok": False}
    least = min(_dice(one.mask > 0, other.mask > 0) for one, other in zip(alone, together))
    voxels = [int((one.mask > 0).sum()) for one in alone]
    return {
        **named,
        "least Dice": least,
        "bound": LEAST_DICE,
        "voxels": ", ".join(f"{count:,}" for count in voxels),
        # Masks that are alike would not show that two were exchanged.
        "ok": least >= LEAST_DICE and len(set(voxels)) == len(voxels),
    }


def latency(
    served: Served, studies: Sequence[Study], config: LamedConfig, precision: str, rates: Rates, load: Load
) -> Iterator[dict]:
    """Rows of what some clients at a time wait for, who ask about a known scan each, against the roofline."""
    numbers = itertools.count()  # no question twice, so that no answer's prefill is cached as a whole

    def questions() -> list[str]:
        return [f"{question} ({next(numbers)})" for question in QUESTIONS]

    served.chats(studies, questions()[:1], load.tokens, max(load.clients))  # every visual prefix is read once
    for clients in load.clients:
        seconds, samples = served.chats(studies, questions(), load.tokens, clients)
        counted = _stages(config, precision, precision, load, clients)
        row = _waited("questions about known scans", clients, samples, counted["decode"].seconds(rates))
        yield {**row, "tokens/s": sum(sample.tokens for sample in samples) / seconds}


def new_scans(
    served: Served, fresh: Iterator[BenchmarkScan], config: LamedConfig, manifest: Manifest, rates: Rates, load: Load
) -> dict:
    """A row of what a client waits for who asks about new scans, one after the other; the upload counts.

    Args:
        fresh: scans that the server has never seen.
    """
    samples = [served.cold(next(fresh), QUESTIONS[0], load.tokens)[0] for _ in range(load.new_scans)]
    graphs = manifest.plans.get("precision", "fp32")
    # A plan in fp8 has fp16 beside it, which the floor knows.
    counted = _stages(config, manifest.precision, "fp16" if graphs == "fp8" else graphs, load, 1)
    least = counted["vision_encoder"].seconds(rates) + counted["prefill"].seconds(rates)
    row = _waited("a question about a new scan", 1, samples, counted["decode"].seconds(rates))
    parts = {
        f"{name} ms": 1e3 * statistics.median(seconds)
        for name in ("prepare", "vision_encoder", "prefill")
        if (seconds := [sample.parts[name] for sample in samples if name in sample.parts])
    }
    return {**row, "least first token ms": 1e3 * least, **parts}


def _stages(config: LamedConfig, llm: str, graphs: str, load: Load, at_once: int) -> dict[str, Stage]:
    return cpu_roofline.stages(
        config,
        llm=llm,
        graphs=graphs,
        question_tokens=QUESTION_TOKENS,
        answer_tokens=load.tokens,
        at_once=at_once,
    )


def _waited(what: str, clients: int, samples: Sequence[Timing], least_s: float) -> dict:
    """A row of medians. least_s: that a step of all answers takes at the least."""
    first = [sample.first_s for sample in samples if sample.first_s is not None]
    later = [sample.per_token_s for sample in samples if sample.per_token_s is not None]
    if not first or not later:
        raise Failed("answers of fewer than two tokens: nothing to measure")
    token = statistics.median(later)
    return {
        "what": what,
        "clients": clients,
        "first token ms": 1e3 * statistics.median(first),
        "worst first token ms": 1e3 * max(first),
        "ms a token": 1e3 * token,
        "least ms a token": 1e3 * least_s,
        "of the roofline": f"{least_s / token:.0%}",
    }


def memory(when: str, before: float, plan: Plan | None) -> Iterator[dict]:
    """Rows: what the server holds of the GPU, which must not be more than was planned, and what each process holds.

    Args:
        before: GiB in use before the server started. plan: of the first GPU; None if nvidia-smi finds none.
    """
    if plan is None or plan.gpu.memory is None:
        return
    share = plan.share(plan.gpu.memory)
    # The reserve stays free: on a GPU that the plan fills, more than that would be hidden else.
    held, planned = _used() - before, (plan.others - RESERVE_BYTES + share) / 2**30
    of_vllm = share + CONTEXT_BYTES
    most = {"tritonserver": planned - of_vllm / 2**30, "VLLM::EngineCore": of_vllm / 2**30}
    yield {
        "what": f"GPU memory {when}, GiB",
        "held": held,
        "of": plan.gpu.memory / 2**30,
        "planned": planned,
        "of that the language model": share / 2**30,
        "ok": held <= planned,
    }
    for name, gib in held_by_process().items():
        row = {"what": f"GPU memory of {name} {when}, GiB", "held": gib}
        yield {**row, "planned": most[name], "ok": gib <= most[name]} if name in most else row


def held_by_process() -> dict[str, float]:
    """GiB of GPUs by the name of the program. Empty where nvidia-smi does not see processes, as in some containers."""
    found: dict[str, float] = {}
    for line in said(
        "nvidia-smi", "--query-compute-apps=process_name,used_memory", "--format=csv,noheader,nounits"
    ).splitlines():
        name, _, mib = line.rpartition(",")
        if mib.strip().isdecimal():
            program = name.strip().rpartition("/")[2]
            found[program] = found.get(program, 0.0) + int(mib) / 2**10
    return found


def _used() -> float:
    """GiB of the first GPU that are in use, by whomever."""
    (first, *_) = gpu.find_gpus() or [None]
    if first is None or first.memory is None or first.free is None:
        return 0.0
    return (first.memory - first.free) / 2**30


def _dice(one: np.ndarray, other: np.ndarray) -> float:
    """1 for masks that are alike, 0 for those that share nothing or are both empty."""
    both = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / both if both else 0.0


def fixtures(context: Context) -> Iterator[dict]:
    """The recorded reference through export and the running server, by the test that does it on a CPU."""
    # The checkout may be read-only: pytest keeps no cache in it.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/functional/test_exactness.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "M3D_TEST_TARGET": "tensorrt"})
    yield {"what": command[-1], "ok": done.returncode == 0}


def benchmark(context: Context) -> Iterator[dict]:
    """benchmarks/latency.py against a server of its own; no baseline, which would hold the model on the GPU twice."""
    repository, result = plans.repository(context, plans.SERVED), Path(context.work) / "latency.json"
    with _server(repository, context) as server:
        plans.python(
            [
                "benchmarks/latency.py",
                *("--server", server.url),
                *("--checkpoint", context.checkpoint),
                *("--repository", str(repository)),
                *("--baseline", ""),
                *("--segment-question", context.segment_question),
                *("--json", str(result)),
            ]
        )
    yield {"what": "benchmarks/latency.py", "file": str(result), "ok": result.is_file()}
