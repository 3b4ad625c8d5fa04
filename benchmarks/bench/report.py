"""report.html: one page without anything from elsewhere: figures, chance, the papers', groups, cases with pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from benchmarks.bench.pictures import PREDICTED, TRUE, picture
from benchmarks.bench.scoring import CHANCE, REFERENCE, SIDES, SOUND
from benchmarks.bench.summary import LOWER_IS_BETTER, MILLIMETRES, PLAIN
from training.data.sample import BrokenSample

# Published figures of reference metrics, shares: task -> metric -> paper -> value.
PAPERS = ("M3D-LaMed", "Med3DVLM")
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "retrieval": {"IR R@1 of 2000": (0.1910, 0.6100)},
    "report": {"METEOR": (0.1438, 0.3642)},
    "vqa-open": {"METEOR": (0.3358, 0.3676)},
    "vqa-closed": {"accuracy": (0.7578, 0.7995)},
}
# The figure that stands for a task, of those that the reference computes; the sound one is that of CASES_BY.
HEADLINES = {
    "report": "METEOR",
    "vqa-closed": "accuracy",
    "vqa-open": "METEOR",
    "rec": "IoU",
    "reg": "METEOR",
    "seg-semantic": "Dice",
    "seg-referring": "Dice",
}
# By what cases are called the worst: a sound metric.
CASES_BY = {
    "report": "ROUGE-L",
    "vqa-closed": "accuracy",
    "vqa-open": "ROUGE-L",
    "rec": "IoU",
    "reg": "ROUGE-L",
    "seg-semantic": "Dice",
    "seg-referring": "Dice",
}
SIDE_WORDS = {REFERENCE: "As the reference computes it", SOUND: "Sound"}
_CASES, _GROUP_METRICS, _TEXT = 3, 4, 600
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1a1f26}
h2{border-bottom:1px solid #d5dae0;margin-top:2.5rem}
table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem;border-bottom:1px solid #e5e8ec;text-align:left;vertical-align:top}
td.n{text-align:right}.gap{color:#8a5a00}.quiet{color:#5c6773}
.cases{display:flex;flex-wrap:wrap;gap:1rem}.case{width:22rem;font-size:13px}.case img{max-width:100%}
dt{font-weight:600}dd{margin:0 0 .3rem}
"""


def page(
    bench: dict, facts: dict, rows: dict[str, Sequence[dict]], predictions: Path, speed: dict | None = None
) -> str:
    """The page.

    Args:
        bench: as bench.json.
        facts: what the run was: date, hardware, model, settings, seconds: written as they are.
        rows: task -> scored rows.
        predictions: folder of the masks that the run kept.
        speed: as speed.json; None if eager PyTorch was not timed.
    """
    body = [
        "<h1>M3D-Bench</h1>",
        _facts(facts),
        _overview(bench["tasks"]),
        f"<p class=quiet>The figures of {' and '.join(PAPERS)} are published ones, of M3D-Data's own test sets.</p>",
        *(_task(task, bench["tasks"][task], rows[task], predictions) for task in bench["tasks"]),
    ]
    if speed is not None:
        body.append(_speed(speed))
    if bench.get("not_run"):
        body.append("<h2>Not run</h2>" + _table(("task", "why"), bench["not_run"].items()))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>M3D-Bench</title>"
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def written(metric: str, value: float | None) -> str:
    """A value with its unit: shares in per cent."""
    if value is None:
        return ""
    if metric in MILLIMETRES:
        return f"{value:.1f} mm"
    return f"{value:.2f}" if metric in PLAIN else f"{100 * value:.2f}"


def _facts(facts: dict) -> str:
    return _table(None, ((name, value) for name, value in facts.items()))


def _overview(tasks: dict[str, dict]) -> str:
    heads = ("task", "samples", "scans", "as the reference computes it", "sound", "not computed")
    rows = []
    for task, found in tasks.items():
        gaps = sum("gap" in figure for side in SIDES for figure in found[side].values())
        shown = (_headline(found[REFERENCE], HEADLINES.get(task)), _headline(found[SOUND], CASES_BY.get(task)))
        rows.append((f"<a href='#{task}'>{task}</a>", found["n"], found["scans"], *shown, gaps or ""))
    return _table(heads, rows, raw=(0,))


def _headline(figures: dict[str, dict], metric: str | None) -> str:
    """The figure of a metric; where the task has none, of recall at 1 in the largest pool."""
    if metric is None:
        recalls = (name for name, figure in figures.items() if "R@1 " in name and "gap" not in figure)
        metric = max(recalls, key=lambda name: int(name.split()[-1]), default=None)
    if metric not in figures:
        return ""
    return f"{metric} {written(metric, figures[metric]['value'])}"


def _task(task: str, found: dict, rows: Sequence[dict], predictions: Path) -> str:
    parts = [f"<h2 id='{task}'>{task}</h2>", f"<p>{found['n']} samples of {found['scans']} scans. "]
    if found["no_interval"]:
        parts.append(f"No intervals: {escape(found['no_interval'])}. ")
    parts.append(f"Shares are in per cent. Chance: {escape(CHANCE[task])}.</p>")
    if left_out := _left_out(found):
        parts.append(f"<p class=gap>{escape(left_out)}</p>")
    parts += [_figures(task, found), _answers(rows), _groups(task, found)]
    if task in CASES_BY:
        parts.append(_cases(task, rows, predictions))
    return "".join(parts)


def _left_out(found: dict) -> str:
    """Which samples are in no figure of a task; "" if all are."""
    said = {"have broken or missing files (preflight.json)": found["broken"], "have no answer": found["missing"]}
    counted = [f"{count} {why}" for why, count in said.items() if count]
    total = found["n"] + found["broken"] + found["missing"]
    return f"Of {total} samples {' and '.join(counted)}: they are in no figure." if counted else ""


def _speed(speed: dict) -> str:
    """The same samples by both sides."""
    ways = {f"engine, {speed['concurrency']} at a time": speed["engine"]}
    ways[f"eager PyTorch, {speed['precision']}, one at a time"] = speed["eager"]
    rows = []
    for name, way in ways.items():
        parts = "; ".join(f"{part} {seconds / speed['n']:.2f}" for part, seconds in way["parts"].items())
        rows.append((name, f"{way['seconds']:.1f}", f"{way['seconds'] / speed['n']:.2f}", parts))
    heads = ("", "seconds", "a sample", "where a sample's seconds go, those it waits for others included")
    return (
        f"<h2 id=speed>Speed</h2><p>{speed['n']} samples of {speed['scans']} images that neither side knew: eager "
        f"PyTorch takes <b>{speed['ratio']:.1f} times</b> as long. It is the reference's way: each sample from the "
        f"file on, one after the other.</p>{_table(heads, rows)}"
    )


def _figures(task: str, found: dict) -> str:
    return "".join(f"<h3>{SIDE_WORDS[side]}</h3>{_side(task, side, found)}" for side in SIDES)


def _side(task: str, side: str, found: dict) -> str:
    papers = PAPERS if side == REFERENCE else ()
    rows = []
    for metric, figure in found[side].items():
        if "gap" in figure:
            gap = f"<span class=gap>not computed: {escape(figure['gap'])}</span>"
            rows.append((escape(metric), gap, *[""] * (3 + len(papers))))
            continue
        ends = [written(metric, figure[end]) for end in ("low", "high")]
        published = PUBLISHED.get(task, {}).get(metric, (None,) * len(papers))
        rows.append(
            (
                escape(metric) + (" (lower is better)" if metric in LOWER_IS_BETTER else ""),
                written(metric, figure["value"]),
                " to ".join(ends) if all(ends) else "",
                figure["n"],
                written(metric, found["chance"][side].get(metric)),
                *(written(metric, value) for value in published[: len(papers)]),
            )
        )
    return _table(("metric", "value", "95 %", "n", "chance", *papers), rows, raw=(0, 1))


def _answers(rows: Sequence[dict]) -> str:
    """How long answers are, how many are none, and what they took."""
    said = []
    if any("prediction" in row for row in rows):
        lengths = sorted(len(row["prediction"].split()) for row in rows)
        said.append(f"words of an answer: median {median(lengths):g}, {lengths[0]} to {lengths[-1]}")
        said.append(f"cut off at the limit: {sum(row.get('finish_reason') == 'length' for row in rows)}")
        refusals = {
            "empty answers": sum(not row["prediction"].strip() for row in rows),
            "answers that name no choice": _count(rows, "unparseable", 1.0),
            "answers without a box": _count(rows, "box given", 0.0),
            "answers without a mask": _count(rows, "mask found", 0.0),
        }
        said += [f"{name}: {count}" for name, count in refusals.items() if count]
    uploads = [row["times"]["upload_s"] for row in rows if row["times"]["upload_s"]]
    said.append(f"seconds of an answer: median {median(row['times']['answer_s'] for row in rows):.2f}")
    if first := [row["times"]["first_token_s"] for row in rows if "first_token_s" in row["times"]]:
        said.append(f"until its first token: {median(first):.2f}")
    if uploads:
        said.append(f"of an upload: {median(uploads):.2f}")
    return f"<p class=quiet>{escape('; '.join(said))}.</p>"


def _count(rows: Sequence[dict], metric: str, score: float) -> int:
    return sum(row["scores"][SOUND].get(metric) == score for row in rows)


def _groups(task: str, found: dict) -> str:
    parts = []
    for kind, named in found["groups"].items():
        columns = [
            (side, m) for side in (SOUND, REFERENCE) for m in found[side] if any(m in g[side] for g in named.values())
        ][:_GROUP_METRICS]
        rows = [
            (
                escape(name),
                max((figure["n"] for side in SIDES for figure in group[side].values()), default=0),
                *(written(m, group[side][m]["value"]) if m in group[side] else "" for side, m in columns),
            )
            for name, group in named.items()
        ]
        heads = (kind, "n", *(f"{m} ({side})" for side, m in columns))
        parts.append(f"<details><summary>by {escape(kind)}</summary>{_table(heads, rows, raw=(0,))}</details>")
    return "".join(parts)


def _cases(task: str, rows: Sequence[dict], predictions: Path) -> str:
    metric = CASES_BY[task]
    ranked = sorted(
        (row for row in rows if row["scores"][SOUND].get(metric) is not None),
        key=lambda row: (row["scores"][SOUND][metric], row["key"]),
    )
    worst = ranked[:_CASES]
    middle = max(len(worst), (len(ranked) - _CASES) // 2)
    parts = []
    for words, chosen in (("Worst", worst), ("Median", ranked[middle : middle + _CASES])):
        if chosen:
            shown = "".join(_case(row, metric, predictions) for row in chosen)
            parts.append(f"<h3>{words} by {escape(metric)}</h3><div class=cases>{shown}</div>")
    return "".join(parts)


def _case(row: dict, metric: str, predictions: Path) -> str:
    try:
        data = base64.b64encode(picture(row, predictions)).decode()
        shown = f"<img alt='' src='data:image/png;base64,{data}'>"
        if row.get("mask") or row.get("box") or row.get("predicted_box"):
            shown += f"<div><b style='color:{TRUE}'>true</b> <b style='color:{PREDICTED}'>predicted</b></div>"
    except BrokenSample as error:
        shown = f"<p class=gap>no picture: {escape(str(error))}</p>"
    said = (
        ("", row["key"]),
        (metric, written(metric, row["scores"][SOUND][metric])),
        ("asked", row["question"]),
        ("right", row["answer"]),
        ("answered", row["prediction"]),
    )
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_short(text))}</dd>" for name, text in said)
    return f"<div class=case>{shown}<dl>{listed}</dl></div>"


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 4] + " ..."


def _table(heads: Sequence[str] | None, rows, raw: Sequence[int] = ()) -> str:
    """A table; cells of the columns `raw` are HTML already."""
    head = "" if heads is None else f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in heads)}</tr>"
    return f"<table>{head}{''.join(_line(row, raw) for row in rows)}</table>"


def _line(row: Sequence[object], raw: Sequence[int]) -> str:
    return f"<tr>{''.join(_cell(number, value, raw) for number, value in enumerate(row))}</tr>"


def _cell(number: int, value: object, raw: Sequence[int]) -> str:
    text = str(value) if number in raw else escape(str(value))
    return f"<td class=n>{text}</td>" if isinstance(value, (int, float)) else f"<td>{text}</td>"
