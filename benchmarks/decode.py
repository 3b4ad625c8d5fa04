"""How should vLLM decode on this CPU? Eager or compiled, threads, binding and waiting, against the memory's bandwidth.

    python benchmarks/decode.py --repository DIR

Each way runs in a process of its own, without Triton: answers alone about a new scan and about a known one, then eight
at the same time. The floor of a token is reading the weights and the cache once, at the bandwidth measured here.
Leave the machine alone meanwhile: about 40 s for each way, two minutes for the compiled one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks import command, cpu_roofline
from benchmarks.command import at_least, say, several
from benchmarks.report import table
from engine.cli import console
from engine.errors import InvalidInput
from engine.manifest import Manifest
from engine.models.checkpoint import open_lamed
from engine.runtime.acceleration import Pass
from engine.runtime.decoder_settings import DecoderSettings
from engine.runtime.settings import Settings
from engine.sampling import Sampling

AT_ONCE = 8
QUESTION = "What does this scan show?"
TIMEOUT_S = 300
RESULT = "result: "  # before what a process has measured, as vLLM may print, too


@dataclass(frozen=True)
class Way:
    """A way to decode: what differs from the configuration.

    environment: of vLLM's process. furthest: through layers.
    """

    settings: dict = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    furthest: Pass = Pass.DECODE_KERNEL


WAYS = {
    "as configured": Way(),
    "without the decode kernel": Way(furthest=Pass.DIRECT),
    "vLLM's own pass": Way(furthest=Pass.VLLM),
    "one thread": Way({"threads": 1}),
    "waiting threads sleep": Way(environment={"GOMP_SPINCOUNT": "0"}),
    "waiting threads spin": Way(environment={"GOMP_SPINCOUNT": "infinity"}),
    "threads bound by OpenMP": Way(environment={"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}),
    # vLLM binds the threads of workers with a process of their own only.
    "threads bound by vLLM": Way(
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    ),
    "compiled": Way({"enforce_eager": False}),
}


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    body = _measure_alone if arguments.way_alone else _measure_and_tell
    return console.run(lambda: body(arguments), command.SIGNALS)


def _measure_alone(arguments: argparse.Namespace) -> int:
    found = asyncio.run(_measure_here(arguments, WAYS[arguments.way_alone]))
    print(f"{RESULT}{json.dumps(found)}", flush=True)
    return 0


def _measure_and_tell(arguments: argparse.Namespace) -> int:
    result = measure(arguments)
    print("\n" + text(result))
    return int(bool(result["failures"]))


def measure(arguments: argparse.Namespace) -> dict:
    """{"settings", "rates", "floor", "ways": {name: samples}, "failures": {name: words}, ...}, JSON-ready."""
    if unknown := sorted(set(arguments.ways) - set(WAYS)):
        raise InvalidInput(f"unknown: {', '.join(unknown)}; the ways are {', '.join(WAYS)}")
    manifest = Manifest.read(arguments.repository)
    say("the machine's rates")
    rates = cpu_roofline.measure(seconds=arguments.floor_seconds)
    config, _, _ = open_lamed(arguments.checkpoint or manifest.checkpoint)
    alone, together = (
        cpu_roofline.stages(
            config, llm=manifest.precision, graphs="fp32", question_tokens=12, answer_tokens=arguments.tokens, at_once=n
        )["decode"].seconds(rates)
        for n in (1, AT_ONCE)
    )
    result = {
        "precision": manifest.precision,
        "tokens": arguments.tokens,
        "rates": asdict(rates),
        "settings": asdict(configured(arguments.repository)),
        "floor": {"per_token_s": alone, "tokens_per_s": AT_ONCE / together},
        "ways": {},
        "failures": {},
    }
    for name in arguments.ways:
        say(name)
        words = [
            sys.executable,
            __file__,
            "--repository",
            arguments.repository,
            "--tokens",
            arguments.tokens,
            "--repeats",
            arguments.repeats,
            "--way-alone",
            name,
        ]
        try:
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, timeout=arguments.timeout)
        except subprocess.TimeoutExpired:
            result["failures"][name] = f"not done after {arguments.timeout:g} s"
        else:
            if done.returncode:
                result["failures"][name] = f"exit status {done.returncode}"
            else:
                (said,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
                result["ways"][name] = json.loads(said.removeprefix(RESULT))
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


def configured(repository: Path) -> DecoderSettings:
    """What the repository's settings say."""
    return Settings.read(repository).decoder.cpu


async def _measure_here(arguments: argparse.Namespace, way: Way) -> dict:
    """{"start_s", "new": [[first_s, total_s], ...], "known": ..., "together": [tokens/s, ...]} of one way."""
    from engine.runtime.decoder import Decoder, llm_engine, vllm_environment

    llm_engine.FURTHEST_PASS = way.furthest
    for variables in (vllm_environment._ALWAYS, vllm_environment._ON_CPU):
        variables.update(way.environment)
    decoder = Decoder(arguments.repository, replace(configured(arguments.repository), **way.settings))
    shape = decoder.manifest.num_visual_tokens, decoder.manifest.llm_width
    scans = [
        np.random.default_rng(n).normal(0, 0.1, shape).astype(np.float32) for n in range(AT_ONCE + arguments.repeats)
    ]
    asked = iter(range(10**9))  # no question twice

    async def ask(scan: np.ndarray) -> tuple[float, float]:
        started, first = time.perf_counter(), None
        async for _ in decoder.answer(scan, f"{QUESTION} ({next(asked)})", Sampling(max_new_tokens=arguments.tokens)):
            first = first or time.perf_counter() - started
        return first, time.perf_counter() - started

    started = time.perf_counter()
    await decoder.start()
    found = {"start_s": time.perf_counter() - started, "new": [], "known": [], "together": []}
    try:
        for _ in range(2):  # warm-up, and known from here on
            await asyncio.gather(*map(ask, scans[:AT_ONCE]))
        for n in range(arguments.repeats):
            found["new"].append(await ask(scans[AT_ONCE + n]))
            found["known"].append(await ask(scans[n % AT_ONCE]))
            started = time.perf_counter()
            await asyncio.gather(*map(ask, scans[:AT_ONCE]))
            found["together"].append(AT_ONCE * arguments.tokens / (time.perf_counter() - started))
    finally:
        await decoder.stop()
    return found


def text(result: dict) -> str:
    """A Markdown table."""
    rows, least = [], result["floor"]
    for name, way in result["ways"].items():
        each = [1e3 * (total - first) / (result["tokens"] - 1) for first, total in way["new"] + way["known"]]
        rows.append(
            (
                name,
                f"{way['start_s']:.0f} s",
                *(f"{1e3 * median(first for first, _ in way[kind]):.0f} ms" for kind in ("new", "known")),
                f"{median(each):.1f} ms",
                f"{min(each):.1f} to {max(each):.1f} ms",
                f"{median(each) / 1e3 / least['per_token_s']:.1f}",
                f"{median(way['together']):.0f}",
                f"{min(way['together']):.0f} to {max(way['together']):.0f}",
                f"{least['tokens_per_s'] / median(way['together']):.1f}",
            )
        )
    failed = [f"{name}: {words}" for name, words in result["failures"].items()]
    return "\n\n".join(
        (
            table(
                (
                    "",
                    "start",
                    "first token, new scan",
                    "known scan",
                    "per token",
                    "spread",
                    "÷ floor",
                    f"tokens/s, {AT_ONCE} at once",
                    "spread",
                    "floor ÷",
                ),
                rows,
            ),
            f"Floor of a token {1e3 * least['per_token_s']:.1f} ms in {result['precision']}, memory "
            f"{result['rates']['memory'] / 1e9:.1f} GB/s.",
            *failed,
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, required=True, help="an exported model repository")
    parser.add_argument("--checkpoint", help="its checkpoint (default: what the manifest names)")
    parser.add_argument("--ways", type=several(), default=tuple(WAYS), help=f"default: {','.join(WAYS)}")
    parser.add_argument("--tokens", type=at_least(2), default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=at_least(0, float), default=TIMEOUT_S, help="seconds for a way (default: %(default)s)"
    )
    parser.add_argument("--floor-seconds", type=at_least(0, float), default=2.0, help="for each of the machine's rates")
    parser.add_argument("--json", type=Path, help="file for everything")
    parser.add_argument("--way-alone", choices=WAYS, help=argparse.SUPPRESS)  # in the process of its own
    return parser


if __name__ == "__main__":
    sys.exit(main())
