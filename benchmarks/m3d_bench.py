"""M3D-Bench: all eight tasks on what is served.

    python benchmarks/m3d_bench.py --data ROOT --server localhost:8001
    python benchmarks/m3d_bench.py --data ROOT --task rec,reg --repository model_repository
    python benchmarks/m3d_bench.py compare A/bench.json B/bench.json

ROOT has M3D-Data's published layout (training/data/README.md). In --out lie bench.json, report.html, preflight.json,
rows/ (what was answered: a run that was cut off goes on from there) and samples/ (the same with every metric). Without
--server and --repository the rows that --out has are scored again. See docs/m3d_bench.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench import compare, preflight, scoring
from benchmarks.bench.layouts import POOLS, fingerprint, looked_for, pool_of, samples_of
from benchmarks.bench.metrics import models
from benchmarks.bench.metrics.masks import NSD_MM
from benchmarks.bench.metrics.text import load_meteor
from benchmarks.bench.report import page
from benchmarks.bench.rows import RowStore, read_rows
from benchmarks.bench.runner import NEW_TOKENS, Run, run
from benchmarks.bench.samples import MASKED, TASKS
from benchmarks.bench.summary import summarise
from benchmarks.command import SIGNALS, at_least, say, several
from engine import M3DClient, M3DEngine
from engine.api import M3D
from engine.cli import console
from engine.errors import InvalidInput, M3DError, Unavailable, one_line, shortened
from training.data.reading import read_json

FORMAT = 1
# What a server must serve for a task; for the others m3d_chat.
_SERVED = {"retrieval": "m3d_retrieve", **dict.fromkeys(MASKED, "m3d_segment")}


def main(argv: list[str] | None = None) -> int:
    options = parsed(sys.argv[1:] if argv is None else argv)
    return console.run(lambda: options.body(options), SIGNALS)


def parsed(argv: list[str]) -> argparse.Namespace:
    """The options of a run, or of `compare`; body: what does it."""
    comparing = argv[:1] == ["compare"]
    options = _compare_parser().parse_args(argv[1:]) if comparing else _parser().parse_args(argv)
    options.body = _compare if comparing else _bench
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="data root, laid out as M3D-Data")
    parser.add_argument("--task", type=several(), default=("all",), help=f"all, or some of {', '.join(TASKS)}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="HOST:PORT", help="gRPC address of a running server")
    where.add_argument("--repository", type=Path, metavar="DIR", help="a model repository, run in this process")
    parser.add_argument("--out", type=Path, default=Path("out/m3d-bench"), help="folder of the results")
    parser.add_argument("--anew", action="store_true", help="delete rows of another model, other data or settings")
    parser.add_argument("--limit", type=at_least(1), help="samples of each task at most")
    parser.add_argument("--concurrency", type=at_least(1, most=256), default=8, help="samples in flight")
    parser.add_argument("--new-tokens", type=at_least(1), default=NEW_TOKENS, help="tokens of an answer at most")
    parser.add_argument(
        "--broken-share",
        type=at_least(0, float, 1),
        default=preflight.MOST_BROKEN,
        help="of a task's samples, how many may be broken, and how many may fail (default: %(default)s)",
    )
    parser.add_argument("--eager", metavar="CHECKPOINT", help="time eager PyTorch, one sample at a time, beside this")
    parser.add_argument("--eager-samples", type=at_least(1), default=40, help="samples that both are timed on")
    parser.add_argument("--nsd-mm", type=at_least(0, float), default=NSD_MM, help="tolerance of NSD, mm")
    parser.add_argument("--bertscore", type=Path, metavar="DIR", help="roberta-large, for BERTScore")
    parser.add_argument("--bertscore-layer", type=at_least(1), default=models.BERTSCORE_LAYER)
    parser.add_argument("--radgraph", type=Path, metavar="DIR", help="models of the package radgraph")
    parser.add_argument("--ratescore", type=Path, metavar="DIR", help="models of the package ratescore")
    parser.add_argument("--green", type=Path, metavar="DIR", help="model of the package green_score")
    parser.add_argument("--judge", metavar="URL", help="a server with OpenAI's protocol, for the LLM judge")
    parser.add_argument("--judge-model", default="judge", metavar="NAME", help="the judge's model there")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="m3d_bench.py compare", description="Which differences are beyond noise.")
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    return parser


def _compare(options: argparse.Namespace) -> int:
    print(compare.words(compare.compare(options.a, options.b), options.a, options.b))
    return 0


# --- a run -----------------------------------------------------------------------------------------------------------
def _bench(options: argparse.Namespace) -> int:
    checked, not_run = _preflight(options)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _answerer(options) as answerer:
        failed = {} if answerer is None else _ask_all(options, checked, not_run, answerer)
        seconds = time.monotonic() - started
        if answerer is not None and options.eager:
            _time(options, checked, answerer)
    scorers = _scorers(options, checked)
    bench = {"format": FORMAT, "model": None, "settings": None, "tasks": {}, "not_run": not_run}
    rows: dict[str, list[dict]] = {}
    for task in checked:
        header, found = _stored(options.out, task, checked[task])
        if not found:
            bench["not_run"][task] = "no sample was answered"
            continue
        made_with = {name: header[name] for name in _settings(options)}
        for name, now, what in (
            ("model", header["model"], "of another model"),
            ("settings", made_with, "made otherwise"),
        ):
            if bench[name] not in (None, now):
                raise InvalidInput(
                    f"{options.out}: the rows of {task} are {what} than those of {list(rows)} "
                    f"({shortened(now)} and {shortened(bench[name])}): score them one at a time, with --task"
                )
            bench[name] = now
        say(f"scoring {len(found)} rows of {task}")
        by = scorers(task, header, found)
        rows[task] = scoring.score(task, found, by)
        _write_samples(options.out, task, header, rows[task])
        gaps = scoring.gaps_of(task, rows[task], by)
        left_out = {"missing": len(checked[task].samples) - len(found), "broken": len(checked[task].broken)}
        bench["tasks"][task] = {**summarise(rows[task], gaps), **left_out}
    _write(options.out / "bench.json", bench)
    facts = _facts(options, bench, seconds if answerer is not None else None)
    text = page(bench, facts, rows, options.out / "predictions", _timed(options.out, bench["model"]))
    (options.out / "report.html").write_text(text, encoding="utf-8")
    say(f"{options.out / 'bench.json'} and {options.out / 'report.html'} are written")
    return _ended(failed)


def _preflight(options: argparse.Namespace) -> tuple[dict[str, preflight.Checked], dict[str, str]]:
    """(task -> its samples, task -> why it has none). A task that was named must have some."""
    everything = options.task == ("all",)
    checked, not_run = {}, {}
    for task in TASKS if everything else options.task:
        try:
            samples = samples_of(task, options.data, options.limit)
        except InvalidInput as error:
            if not everything or not options.data.is_dir():
                raise
            not_run[task] = str(error)
            say(f"{task}: not run: {error}")
            continue
        found = checked[task] = preflight.check(task, samples)
        say(f"{task}: {len(found.samples)} samples, {len(found.broken)} broken")
        if found.broken:
            print(found.words(), flush=True)
    if not checked:
        wanted = ", ".join(dict.fromkeys(map(looked_for, TASKS)))
        raise InvalidInput(f"{options.data} has data of no task; looked for were {wanted}")
    options.out.mkdir(parents=True, exist_ok=True)
    _write(
        options.out / "preflight.json",
        {
            task: {"samples": len(c.samples), "broken": [asdict(b) for b in c.broken], "causes": dict(c.causes)}
            for task, c in checked.items()
        },
    )
    for found in checked.values():
        found.refuse(options.broken_share)
    _need_libraries(checked)
    return checked, not_run


def _need_libraries(tasks: Collection[str]) -> None:
    """Raises Unavailable, before anything is asked, for a library that the scores of the tasks need."""
    needed = dict.fromkeys(("sacrebleu", "rouge_score", "nltk"), scoring.TEXT_TASKS)
    needed["monai"] = ("seg-semantic", "seg-referring")
    missing = [
        name for name, of in needed.items() if not set(of).isdisjoint(tasks) and importlib.util.find_spec(name) is None
    ]
    if missing:
        raise Unavailable(f"{', '.join(missing)} cannot be imported: pip install 'm3d-engine[bench]'")
    if not set(needed["monai"]).isdisjoint(tasks):
        # Imported here, on one thread: it parses its own source, which Python 3.11 cannot do on two threads at once.
        importlib.import_module("monai.metrics")


def _ask_all(
    options: argparse.Namespace, checked: dict[str, preflight.Checked], not_run: dict[str, str], answerer: M3D
) -> dict[str, list[str]]:
    """task -> what failed. Tasks that are not served move from `checked` to `not_run`, unless they were named."""
    info = answerer.info()
    for task in list(checked):
        if (model := _SERVED.get(task, "m3d_chat")) not in info.models:
            why = f"{model} is not served: export with --clip-checkpoint, or a checkpoint with [SEG]"
            if options.task != ("all",):
                raise Unavailable(f"{task} cannot be run: {why}")
            not_run[task] = why
            del checked[task]
    settings = Run(
        answerer,
        options.out / "predictions",
        options.concurrency,
        options.new_tokens,
        options.nsd_mm,
        options.broken_share,
    )
    with contextlib.ExitStack() as opened:
        stores = {}
        for task in checked:
            data = fingerprint(task, options.data)
            header = {"format": FORMAT, "task": task, "model": asdict(info.model), "data": data, **_settings(options)}
            store = RowStore(options.out / "rows" / f"{task}.jsonl", header, options.anew)
            stores[task] = opened.enter_context(store)
        return run({task: found.samples for task, found in checked.items()}, stores, settings)


def _time(options: argparse.Namespace, checked: dict[str, preflight.Checked], answerer: M3D) -> None:
    """Write speed.json: some of the samples once more, and by eager PyTorch in the export's precision if it has it."""
    from benchmarks.baseline import Baseline
    from benchmarks.bench import speed
    from benchmarks.machine import DTYPES

    samples = speed.chosen({task: found.samples for task, found in checked.items()}, options.eager_samples)
    if not samples:
        raise InvalidInput("--eager times answers, and retrieval has none: choose other tasks, too")
    model = answerer.info().model
    precision = model.precision if model.precision in DTYPES else "fp32"
    say(f"timing {len(samples)} samples, and eager PyTorch in {precision}")
    baseline = Baseline(options.eager, precision)
    found = speed.compared(answerer, baseline, samples, options.concurrency, options.new_tokens)
    _write(options.out / "speed.json", {"model": asdict(model), **found})
    say(f"eager PyTorch takes {found['ratio']} times as long")


def _timed(out: Path, model: dict | None) -> dict | None:
    """speed.json of this model, or None."""
    path = out / "speed.json"
    found = read_json(path) if path.is_file() else None
    return found if found is not None and found["model"] == model else None


def _settings(options: argparse.Namespace) -> dict:
    """What rows depend on beside the model: rows made with others are not mixed."""
    return {"new_tokens": options.new_tokens, "nsd_mm": options.nsd_mm}


@contextlib.contextmanager
def _answerer(options: argparse.Namespace) -> Iterator[M3D | None]:
    if options.server:
        with M3DClient(options.server) as client:
            yield client
    elif options.repository:
        with M3DEngine(options.repository) as engine:
            yield engine
    else:
        yield None


# --- scores ----------------------------------------------------------------------------------------------------------
def _scorers(
    options: argparse.Namespace, checked: dict[str, preflight.Checked]
) -> Callable[[str, dict, list[dict]], scoring.Scorers]:
    """(task, header of its rows, rows) -> what scores them. Scores of models are kept in scores/, as they take long."""
    gaps: dict[str, str] = {}
    meteor = None
    if any(task in scoring.TEXT_TASKS for task in checked):
        try:
            meteor = load_meteor()
        except Unavailable as error:
            gaps["METEOR"] = f"WordNet cannot be had: {error}"
    loaded: dict[str, tuple[str, models.Scorer]] = {}
    for metric, (where, load) in _models(options).items():
        if where is None:
            continue
        try:
            loaded[metric] = str(where), load()
        except M3DError as error:
            gaps[metric] = str(error)
            say(f"{metric}: not computed: {error}")
    splits, pairs = {}, 0
    if "retrieval" in checked:
        pairs = len(checked["retrieval"].samples) + len(checked["retrieval"].broken)
        splits = {size: keys for size in POOLS if (keys := pool_of(options.data, size))}

    def of(task: str, header: dict, rows: list[dict]) -> scoring.Scorers:
        found, failed = {}, {}
        for metric, (where, scorer) in loaded.items():
            if task not in scoring.MODEL_METRICS[metric][1]:
                continue
            try:
                found[metric] = _kept_scores(options.out, metric, where, scorer, header, rows, options.anew)
            except Unavailable as error:
                failed[metric] = str(error)
                say(f"{metric} of {task}: not computed: {error}")
        return scoring.Scorers(meteor, found, {**gaps, **failed}, splits, pairs)

    return of


def _models(options: argparse.Namespace) -> dict[str, tuple[object, Callable[[], models.Scorer]]]:
    """metric -> (where its model lies, or None; what loads it)."""
    judge = f"{options.judge} {options.judge_model}" if options.judge else None
    return {
        "BERTScore": (options.bertscore, lambda: models.load_bertscore(options.bertscore, options.bertscore_layer)),
        "RadGraph-F1": (options.radgraph, lambda: models.load_radgraph(options.radgraph)),
        "RaTEScore": (options.ratescore, lambda: models.load_ratescore(options.ratescore)),
        "GREEN": (options.green, lambda: models.load_green(options.green)),
        "LLM judge": (judge, lambda: models.load_judge(options.judge, options.judge_model)),
    }


def _kept_scores(
    out: Path, metric: str, where: str, scorer: models.Scorer, header: dict, rows: list[dict], anew: bool
) -> dict[str, float]:
    """key -> score; those that were computed before, by the same model of the same rows, are not computed again.

    Raises:
        Unavailable: if the model fails. What it scored before is kept.
        InvalidInput: if the kept scores are another run's.
    """
    task, name = header["task"], metric.lower().replace(" ", "-")
    with RowStore(
        out / "scores" / f"{task}.{name}.jsonl", {"metric": metric, "by": where, "rows": header}, anew
    ) as store:
        left = [row for row in rows if row["key"] not in store]
        if left:
            say(f"{metric} of {len(left)} rows of {task}")
        for start in range(0, len(left), 32):
            batch = left[start : start + 32]
            try:
                scores = scorer([row["prediction"] for row in batch], [row["answer"] for row in batch])
                scores = models.checked_scores(scores, len(batch), metric)
            except M3DError as error:
                raise Unavailable(f"it failed after {len(store)} of {len(rows)} samples: {error}") from error
            except Exception as error:  # of a package or a model that is not ours; the answers are not lost for it
                cause = f"{type(error).__name__}: {one_line(error)}"
                raise Unavailable(f"it failed after {len(store)} of {len(rows)} samples: {cause}") from error
            for row, score in zip(batch, scores):
                store.append({"key": row["key"], "score": score})
        return {row["key"]: row["score"] for row in store.rows}


# --- files -----------------------------------------------------------------------------------------------------------
def _stored(out: Path, task: str, checked: preflight.Checked) -> tuple[dict, list[dict]]:
    """(header, rows of the task's samples); ({}, []) if it has none yet."""
    path = out / "rows" / f"{task}.jsonl"
    if not path.is_file():
        return {}, []
    wanted = {sample.key for sample in checked.samples}
    header, rows = read_rows(path)
    return header, [row for row in rows if row["key"] in wanted]


def _write_samples(out: Path, task: str, header: dict, rows: list[dict]) -> None:
    path = out / compare.SAMPLES / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(line, allow_nan=False) for line in (header, *rows))
    _replace(path, "".join(f"{line}\n" for line in lines))


def _write(path: Path, value: dict) -> None:
    _replace(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """Written beside its place and renamed: a crash leaves no half of a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _facts(options: argparse.Namespace, bench: dict, seconds: float | None) -> dict:
    """What the report says about the run. What rows were made with, they say: when they are scored again (seconds is
    None), the options of this call, its date and its machine are not theirs."""
    from benchmarks.machine import conditions

    here = conditions()
    model, settings = bench["model"] or {}, bench["settings"]
    asked = seconds is not None
    facts = {
        "date" if asked else "scored": here["date"],
        "machine" if asked else "scored on": (
            f"{here['gpu'] or here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 1e9:.0f} GB"
        ),
        "answered by": f"server {options.server}" if options.server else str(options.repository or "an earlier run"),
        **{f"model: {name}": value for name, value in model.items()},
    }
    if asked:
        facts["in flight"] = options.concurrency
    if settings is not None:
        facts["tokens of an answer"] = f"at most {settings['new_tokens']}, greedy"
        facts["tolerance of NSD"] = f"{settings['nsd_mm']:g} mm"
    if asked:
        facts["this run took"] = f"{seconds:.0f} s"
    return facts


def _ended(failed: dict[str, list[str]]) -> int:
    """The exit status: 1 if a sample has no answer; a run with the same arguments asks for them again."""
    lines = [f"{task}: {line}" for task, found in failed.items() for line in found]
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
