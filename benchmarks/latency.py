"""How fast is it, against what a user would do today, and against what the machine can do at all?

    python benchmarks/latency.py --checkpoint DIR                     # exports, serves, measures
    python benchmarks/latency.py --repository DIR --checkpoint DIR    # the same, and keeps the exported repository
    python benchmarks/latency.py --server localhost:8001 ...          # measures a server that runs

In one run: the server; the baseline (the same weights in eager PyTorch with transformers' `generate`, one request at a
time, in fp32 and bf16), which takes its turn after the server in every round; and the floor (the machine's measured
matrix rate and memory bandwidth, and each stage's FLOPs and bytes). Leave the machine alone meanwhile. A section that
fails leaves the others standing (exit status 1). What was measured so far is in OUT.json.part until all is there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import command, cpu_roofline, load, machine, preprocessing, report, scans, triton_trace  # noqa: E402
from benchmarks.baseline import Baseline  # noqa: E402
from benchmarks.command import at_least, say, several  # noqa: E402
from benchmarks.served import ENCODERS, Served  # noqa: E402
from benchmarks.timings import Timing  # noqa: E402
from engine.api import ModelInfo, Study  # noqa: E402
from engine.cli import console  # noqa: E402
from engine.errors import InvalidInput, M3DError  # noqa: E402
from engine.manifest import FILE_NAME as MANIFEST  # noqa: E402
from engine.manifest import Manifest  # noqa: E402
from engine.models.checkpoint import open_lamed, resolve, sha256  # noqa: E402
from engine.runtime.onnx_session import chosen_precision  # noqa: E402
from engine.server import Server, free_ports  # noqa: E402

QUESTIONS = (
    "What does this scan show?",
    "Is there a pleural effusion?",
    "Which organs are visible in this scan?",
    "Is the heart enlarged?",
    "Are there any fractures?",
    "Describe the liver.",
    "Is there a mass?",
    "What is the orientation of this scan?",
)
QUESTIONS_A_CLIENT = 2
OFFLINE_QUESTIONS = 16
TRACE = "trace.json"
TRACED = ("cold", "follow_up", "segment", "segment_again")
SHORT_TOKENS = 8  # of answers whose first token alone is of interest
SEGMENT_QUESTION = "Please segment the left lung: [SEG]"
TEXTS = ("a chest CT with a pleural effusion", "an abdominal CT without findings", "a brain MRI")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return console.run(lambda: _measure_and_tell(arguments), command.SIGNALS)


def _measure_and_tell(arguments: argparse.Namespace) -> int:
    try:
        result = measure(arguments)
    except BaseException:
        if arguments.json and _unfinished(arguments.json).exists():
            say(f"what was measured before: {_unfinished(arguments.json)}")
        raise
    print("\n" + report.text(result))
    if arguments.json:
        say(f"everything: {arguments.json}")
    if arguments.plots:
        for path in report.plots(result, arguments.plots):
            say(f"picture: {path}")
    for name, words in result["failures"].items():
        print(f"not measured, {name}: {words}", file=sys.stderr)
    return int(bool(result["failures"]))


def measure(arguments: argparse.Namespace) -> dict:
    """Everything that `--json` writes; raw samples, and what report.py makes of them."""
    base = scans.read(arguments.scan) if arguments.scan else scans.phantom()
    _check(arguments)
    if not (arguments.checkpoint and (arguments.repository or not arguments.server)):
        say("without --checkpoint there is no baseline, and without the served --repository beside it no floor")
    scan = {"shape": list(base.array.shape), "dtype": str(base.array.dtype), "bytes": base.array.nbytes}
    conditions = {
        **machine.conditions(),
        "command": shlex.join(sys.argv),
        "scan": scan,
        "tokens": arguments.tokens,
        "segment_tokens": arguments.segment_tokens,
        "segment_question": arguments.segment_question,
        "repeats": arguments.repeats,
        "warm_up": arguments.warm_up,
    }
    result = {"conditions": conditions, "samples": {}, "warm_up": {}, "failures": {}, "seconds": {}, "stolen_s": {}}
    section = Sections(result, arguments.json and _unfinished(arguments.json))
    with section("the machine's rates"):
        rates_before = cpu_roofline.measure(seconds=arguments.floor_seconds)
    with section("preprocessing of a large CT", needed=False):
        result["preprocessing"] = preprocessing.measure(arguments.large_ct)
    with tempfile.TemporaryDirectory() as folder, machine.PeakMemory() as peak:
        with _serving(arguments, Path(folder)) as server:
            result |= server
            baselines = _baselines(arguments)
            with contextlib.closing(Served(server["url"])) as served:
                result["graph_precision"] = _graph_precision(served, server["manifest"])
                run = Run(arguments, served, baselines, base, result)
                with section("one at a time"):
                    run.one_at_a_time()
                with section("bytes on the wire", needed=False):
                    run.wire()
                with section("clients at the same time", needed=False):
                    run.closed_loop()
                with section("a follow-up during uploads", needed=False):
                    run.interference()
                with section("arrivals at random", needed=False):
                    run.open_loop()
                if server["supervisor_pid"]:
                    result["server_memory_bytes"] = machine.memory_of(server["supervisor_pid"])
        with section("Triton's trace", needed=False):  # which it writes when it ends
            result["trace"] = _traced(result, Path(folder) / TRACE)
    result["peak_memory_bytes"] = peak.bytes
    with section("the machine's rates again"):
        rates_after = cpu_roofline.measure(seconds=arguments.floor_seconds)
        rates = rates_before.or_better(rates_after)
        result |= {"rates": asdict(rates), "rates_measured": [asdict(rates_before), asdict(rates_after)]}
    with section("the report"):
        floors = _floors(arguments, result)
        result["stages"] = report.stages(result, floors, rates)
        result["ratios"] = report.ratios_of(result)
        result["least"] = report.least(result, floors, rates)
        result["targets"] = report.targets(result)
    if arguments.json:
        _unfinished(arguments.json).replace(arguments.json)
    return result


def _check(arguments: argparse.Namespace) -> None:
    """Raises M3DError for what cannot work, before anything is measured."""
    if not (arguments.checkpoint or arguments.repository or arguments.server):
        raise InvalidInput("name what to measure: --checkpoint, --repository or --server")
    if arguments.json and arguments.json.exists() and not arguments.json.is_file():
        raise InvalidInput(f"{arguments.json} is no file: give one for --json")
    try:
        for folder in filter(None, (arguments.json and arguments.json.parent, arguments.plots)):
            folder.mkdir(parents=True, exist_ok=True)
        if arguments.json:
            part = _unfinished(arguments.json)
            earlier = part.exists()  # of a run that was interrupted: stays until there is more
            part.open("a").close()
            if not earlier:
                part.unlink()
    except FileExistsError as error:
        raise InvalidInput(f"{error.filename} is a file: results need a folder there") from None
    except OSError as error:
        raise InvalidInput(f"no results can be written to {error.filename}: {error.strerror}") from None
    if arguments.checkpoint:
        open_lamed(arguments.checkpoint)
    if arguments.clip_checkpoint:
        resolve(arguments.clip_checkpoint)
    if arguments.repository and (arguments.server or not arguments.checkpoint):
        Manifest.read(arguments.repository)
    if arguments.server:
        with contextlib.closing(Served(arguments.server)) as served:
            served.serves("m3d_chat")


def _check_model(served: ModelInfo, arguments: argparse.Namespace) -> None:
    """Raises InvalidInput if a server that runs says that it serves another model than what is named beside it."""
    if arguments.repository and served.manifest_sha256 != Manifest.read(arguments.repository).identity:
        raise InvalidInput(
            f"the server serves another export than {arguments.repository}: name the --repository that it "
            "serves, or start it anew if that has changed"
        )
    if arguments.checkpoint:
        _, _, folder = open_lamed(arguments.checkpoint)
        if served.checkpoint_sha256 != sha256(folder):
            raise InvalidInput(
                f"the server serves another checkpoint ({served.checkpoint}) than "
                f"{arguments.checkpoint}: its baseline and floors would be another model's"
            )


def _unfinished(path: Path) -> Path:
    """Where results are until they are whole: an earlier file of that name is not lost to a run that fails."""
    return path.with_name(f"{path.name}.part")


class Sections:
    """The parts of a run: says that one begins, keeps how long it took and what other virtual machines took meanwhile,
    and writes what there is so far to `file`.

    What a section that is not `needed` raises is kept under `failures`, and the run goes on without it.
    """

    def __init__(self, result: dict, file: Path | None):
        self.result = result
        self.file = file

    @contextlib.contextmanager
    def __call__(self, name: str, needed: bool = True) -> Iterator[None]:
        say(name)
        started, stolen = time.perf_counter(), machine.stolen_s()
        try:
            yield
        except InvalidInput:  # a mistake in the command, which would fail the others, too
            raise
        except Exception as error:
            if needed:
                raise
            traceback.print_exc()
            self.result["failures"][name] = f"{type(error).__name__}: {error}"
        finally:
            self.result["seconds"][name] = time.perf_counter() - started
            self.result["stolen_s"][name] = machine.stolen_s() - stolen
            if self.file:
                self.file.write_text(json.dumps(self.result, indent=1, default=str) + "\n")


# --- the sides -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _serving(arguments: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """{"url", "manifest", "start_s", "supervisor_pid"}; the last two of a server that is started here, else None.

    Its trace is written to `folder`. Of an export that is made here also "export_s" and "export_peak_bytes".
    """
    if arguments.server:
        manifest = asdict(Manifest.read(arguments.repository)) if arguments.repository else None
        yield {"url": arguments.server, "manifest": manifest, "start_s": None, "supervisor_pid": None}
        return
    repository = arguments.repository or folder / "model_repository"
    made = _export(arguments, repository) if arguments.checkpoint else {}
    say("the server starts")
    started = time.perf_counter()
    with Server(repository, **free_ports(), trace=folder / TRACE, on_progress=say) as server:
        yield {
            **made,
            "url": server.url,
            "manifest": asdict(Manifest.read(repository)),
            "start_s": time.perf_counter() - started,
            "supervisor_pid": server.supervisor_pid,
        }


def _export(arguments: argparse.Namespace, repository: Path) -> dict[str, float]:
    """Export into `repository`, in a process of its own, whose memory is known and given back.

    Where the repository holds what would be exported, nothing is done, and nothing is returned.
    """
    if not repository.exists():
        ignore = shutil.ignore_patterns("*.onnx*", "llm", "tokenizer", "manifest.json", "__pycache__")
        shutil.copytree(ROOT / "model_repository", repository, ignore=ignore)
    before = _written(repository / MANIFEST)
    clip = ["--clip-checkpoint", arguments.clip_checkpoint] if arguments.clip_checkpoint else []
    started = time.perf_counter()
    with subprocess.Popen(
        [
            sys.executable,
            ROOT / "export" / "build_engines.py",
            "--checkpoint",
            arguments.checkpoint,
            *clip,
            "--precision",
            arguments.precision,
            "--repository",
            repository,
        ]
    ) as process:
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise M3DError("the export failed; its words stand above")
    if _written(repository / MANIFEST) == before:
        return {}
    return {"export_s": time.perf_counter() - started, "export_peak_bytes": usage.ru_maxrss * 1024}


def _baselines(arguments: argparse.Namespace) -> dict[str, Baseline]:
    """By the names that the results use."""
    if not arguments.checkpoint or not arguments.baseline:
        return {}
    say(f"the baseline loads, {' and '.join(arguments.baseline)}")
    return {
        f"baseline {precision}": Baseline(arguments.checkpoint, precision, arguments.clip_checkpoint)
        for precision in arguments.baseline
    }


# --- what is measured ------------------------------------------------------------------------------------------------
class Run:
    """The measurements, in the order in which they run; each adds to `result`."""

    def __init__(self, arguments: argparse.Namespace, served: Served, baselines: dict, base, result: dict):
        self.repeats, self.tokens = arguments.repeats, arguments.tokens
        self.segmenting = arguments.segment_question, arguments.segment_tokens
        self.arguments, self.served, self.baselines, self.base, self.result = (
            arguments,
            served,
            baselines,
            base,
            result,
        )
        self.fresh = scans.different(base)
        self.studies: list[Study] = []
        # No question twice, so that no answer's prefill is cached as a whole.
        self.questions = (f"{QUESTIONS[n % len(QUESTIONS)]} ({n})" for n in itertools.count())

    def one_at_a_time(self) -> None:
        """Rounds of a new scan, a follow-up, masks and rankings by the server, then the same by each baseline."""
        segments, ranks = self.served.serves("m3d_segment"), self.served.serves("m3d_retrieve")
        for number in range(-self.arguments.warm_up, self.repeats):
            self.kept = self.result["samples" if number >= 0 else "warm_up"]
            say(f"round {number + 1} of {self.repeats}" if number >= 0 else "warm-up")
            scan, question = next(self.fresh), next(self.questions)
            cold, study = self.served.cold(scan, question, self.tokens)
            if self.arguments.server and number == -self.arguments.warm_up:
                _check_model(study.info.model, self.arguments)
            self._keep("served", "cold", cold)
            self.served.upload(next(self.fresh))  # somebody else's: a server that keeps one study only shows it now
            self._keep("served", "follow_up", self.served.follow_up(study, next(self.questions), self.tokens))
            if segments:
                self._segment(study)
            self._keep("served", "upload_again", self.served.upload_again(scan))
            if ranks:
                self._keep("served", "rank", self.served.rank(study, TEXTS))
                self._keep("served", "rank_again", self.served.rank(study, TEXTS))
            for name, baseline in self.baselines.items():
                self._keep(name, "cold", baseline.ask(scan, question, self.tokens))
                if segments:
                    self._keep(name, "segment", baseline.segment(scan, *self.segmenting)[0])
                if ranks and baseline.clip:
                    self._keep(name, "rank", baseline.rank(scan, TEXTS)[0])
            self.studies = [study]

    def wire(self) -> None:
        """Bytes of one scan, an answer, a follow-up and a mask."""
        question = self.segmenting[0] if self.served.serves("m3d_segment") else None
        self.result["wire"] = self.served.on_the_wire(next(self.fresh), self.questions, question, SHORT_TOKENS)

    def closed_loop(self) -> None:
        """Clients with a known scan of their own each, one question after the other."""
        while len(self.studies) < max(self.arguments.concurrency, default=1):
            self.studies.append(self.served.cold(next(self.fresh), next(self.questions), 1)[1])
        self.result["closed_loop"] = []
        for number, concurrency in itertools.product(range(self.repeats), self.arguments.concurrency):
            say(f"{concurrency} at a time, round {number + 1} of {self.repeats}")
            asked = [next(self.questions) for _ in range(QUESTIONS_A_CLIENT)]
            seconds, samples = self.served.chats(self.studies, asked, self.tokens, concurrency)
            row = {
                "concurrency": concurrency,
                "tokens_per_s": sum(s.tokens for s in samples) / seconds,
                "samples": [s.to_dict() for s in samples],
                "baselines": {},
            }
            if concurrency == report.COMPARED_CONCURRENCY:
                for name, baseline in self.baselines.items():
                    one = baseline.ask(self.base, next(self.questions), self.tokens)
                    row["baselines"][name] = one.tokens / one.total_s
            self.result["closed_loop"].append(row)

    def interference(self) -> None:
        """Short follow-ups alone, while somebody uploads a scan, and while as many threads just multiply matrices."""
        left, right = torch.randn(2048, 768), torch.randn(768, 3072)
        self.kept = self.result["samples"]

        def products(until: float) -> None:
            while time.perf_counter() < until:
                left @ right

        for _ in range(self.repeats):
            started = time.perf_counter()
            scan = next(self.fresh)
            self._during("during_upload", partial(self.served.upload, scan))
            took = time.perf_counter() - started
            self._during("during_products", lambda took=took: products(time.perf_counter() + took))
            self._during("alone", lambda: None)

    def open_loop(self) -> None:
        """LoadGen's scenarios: questions about known scans."""
        limits = load.Limits(self.arguments.ttft_limit, self.arguments.tpot_limit)
        self.result["limits"], self.result["open_loop"] = asdict(limits), []
        plan = [("SingleStream", None), ("Offline", None), *(("Server", rate) for rate in self.arguments.rates)]
        lock = threading.Lock()

        def ask(index: int) -> Iterator[int]:
            with lock:
                question = next(self.questions)
            return self.served.pieces(self.studies[index % len(self.studies)], question, self.tokens)

        for scenario, rate in plan if self.arguments.seconds else ():
            say(scenario + (f", {rate:g} questions/s" if rate else ""))
            done = load.run(
                scenario,
                ask,
                max(OFFLINE_QUESTIONS, len(self.studies)),
                rate=rate,
                seconds=self.arguments.seconds,
                limits=limits,
            )
            self.result["open_loop"].append({**asdict(done), "samples": [s.to_dict() for s in done.samples]})

    def _segment(self, study: Study) -> None:
        first, found = self.served.segment(study, *self.segmenting)
        if found.mask is None:
            raise InvalidInput(
                f"no mask to measure: {self.segmenting[0]!r} was answered by {found.answer.text!r}; "
                "give a --segment-question whose answer has a [SEG]"
            )
        self._keep("served", "segment", first)
        self._keep("served", "segment_again", self.served.segment(study, *self.segmenting)[0])

    def _during(self, kind: str, work) -> None:
        for sample in self.served.during(work, self.studies[0], self.questions, SHORT_TOKENS):
            self._keep("served", kind, sample)

    def _keep(self, side: str, kind: str, sample: Timing) -> None:
        self.kept.setdefault(side, {}).setdefault(kind, []).append(sample.to_dict())


def _floors(arguments: argparse.Namespace, result: dict) -> dict[str, cpu_roofline.Stage]:
    """The stages' floors by name; none without the checkpoint's geometry."""
    if not (arguments.checkpoint and result["manifest"]):
        return {}
    config, _, _ = open_lamed(arguments.checkpoint)
    asked = result["samples"]["served"]["cold"][0]["prompt_tokens"] - 1 - config.num_visual_tokens
    found = cpu_roofline.stages(
        config,
        llm=result["manifest"]["precision"],
        graphs="fp32",
        question_tokens=asked,
        answer_tokens=arguments.tokens,
    )
    return found | {
        name: found[name].at(precision) for name, precision in result["graph_precision"].items() if name in found
    }


def _graph_precision(served: Served, manifest: dict | None) -> dict[str, str]:
    """What the encoders compute in, by their names: fp32 unless configuration or plan say otherwise."""
    found = {}
    for name in ENCODERS if manifest else ():
        configured = served.parameter(name, "precision")
        planned = manifest["graphs"].get(name, {}).get("plan", {}).get("precision", "fp32")
        # There is no rate of fp8 products: fp16's stands for it.
        found[name] = (
            chosen_precision(configured, manifest["precision"]) if configured else {"fp8": "fp16"}.get(planned, planned)
        )
    return found


def _traced(result: dict, path: Path) -> dict[str, dict]:
    """By kind of request a sample with `spans`, what Triton's trace says; empty without a trace.

    Of those that the trace has with the most models, the one of median time: now and then it lacks a part of one.
    """
    spans = triton_trace.read(path)
    found = {}
    for kind in TRACED if spans else ():
        samples = sorted(result["samples"]["served"].get(kind, ()), key=lambda sample: sample["total_s"])
        traced = [{**s, "spans": triton_trace.within(spans, s["started"], s["total_s"])} for s in samples]
        models = [len({span["model"] for span in s["spans"]}) for s in traced]
        whole = [s for s, count in zip(traced, models) if count == max(models)]
        if whole:
            found[kind] = whole[len(whole) // 2]
    return found


def _written(path: Path) -> int | None:
    """When a file was written last, ns; None if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else None


def _precision(text: str) -> str:
    if text not in machine.DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(machine.DTYPES)}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = console.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--checkpoint",
        help="M3D-LaMed, a folder or a Hugging Face id: exported and served, unless "
        "--repository or --server says otherwise, and run by the baseline",
    )
    what.add_argument("--clip-checkpoint", help="M3D-CLIP, to measure retrieval, too")
    what.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default=machine.precisions()[-1],
        help="of the language model in the export (default on this machine: %(default)s)",
    )
    what.add_argument(
        "--repository",
        type=Path,
        help="an exported model repository; with --checkpoint it is made, or "
        "brought up to date (default: one that is removed at the end)",
    )
    what.add_argument("--server", help="gRPC address of a running server; baseline and floors are this machine's")
    what.add_argument(
        "--baseline",
        type=several(_precision),
        default=machine.precisions(),
        help="precisions of eager PyTorch to compare with, empty for none (default: fp32, and bf16 "
        "where the processor multiplies it)",
    )
    what.add_argument("--scan", type=Path, help="a scan file (default: a made CT of 512 x 512 x 64)")
    what.add_argument(
        "--segment-question",
        default=SEGMENT_QUESTION,
        help="its answer must have a [SEG]; the default does it with checkpoints of make_checkpoint.py",
    )
    how = parser.add_argument_group("how much")
    how.add_argument("--tokens", type=at_least(2), default=64, help="of an answer (default: %(default)s)")
    how.add_argument(
        "--segment-tokens", type=at_least(1), default=8, help="of an answer with a mask (default: %(default)s)"
    )
    how.add_argument("--repeats", type=at_least(1), default=5, help="rounds (default: %(default)s)")
    how.add_argument("--warm-up", type=at_least(0), default=1, help="rounds that do not count (default: %(default)s)")
    how.add_argument("--concurrency", type=several(at_least(1)), default=(1, 2, 4, 8, 16), help="default: 1,2,4,8,16")
    how.add_argument(
        "--rates",
        type=several(at_least(1e-3, float, 1000)),
        default=(0.5, 1.0, 2.0),
        help="questions/s that arrive at random (default: 0.5,1,2)",
    )
    how.add_argument(
        "--seconds", type=at_least(0, float), default=30.0, help="of a LoadGen run, 0: none (default: %(default)s)"
    )
    how.add_argument(
        "--ttft-limit",
        type=at_least(0, float),
        default=load.TTFT_LIMIT_S,
        help="seconds that the p99 of the time to the first token may be (default: MLPerf's %(default)s)",
    )
    how.add_argument(
        "--tpot-limit",
        type=at_least(0, float),
        default=load.TPOT_LIMIT_S,
        help="the same of the time per output token (default: MLPerf's %(default)s)",
    )
    how.add_argument(
        "--large-ct",
        type=preprocessing.shape_of,
        default=preprocessing.LARGE_CT,
        help="voxels of the CT whose preprocessing is measured (default: 512,512,400)",
    )
    how.add_argument("--floor-seconds", type=at_least(0, float), default=2.0, help="for each of the machine's rates")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, help="file for everything, raw samples included")
    out.add_argument("--plots", type=Path, help="folder for pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
