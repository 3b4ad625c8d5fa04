"""What a result of latency.py says: ratios against the targets, tables, pictures. All of it from the raw samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.cpu_roofline import Rates, Stage
from benchmarks.timings import ratios, rest, summary


@dataclass(frozen=True)
class Target:
    """A bound of a value of `ratios`, or of the result's other figures."""

    name: str
    words: str
    limit: float | None = None  # None: no bound, but it belongs beside one
    at_least: bool = False

    def met(self, value: float) -> bool | None:
        if self.limit is None:
            return None
        # What is less than nothing was not measured rightly, such as an overhead when the parts overlap.
        return value >= self.limit if self.at_least else 0 <= value <= self.limit


TARGETS = (
    Target("cold_e2e", "new scan, end to end, ÷ baseline fp32", 0.5),
    Target("cold_e2e_equal_precision", "new scan, end to end, ÷ baseline at equal precision", 0.8),
    Target("followup_ttft", "follow-up, time to first token, ÷ baseline fp32", 0.05),
    Target("followup_ttft_equal_precision", "the same at equal precision"),
    Target("throughput_c8", "8 chats about known scans, tokens/s, ÷ baseline fp32", 4.0, at_least=True),
    Target("throughput_c8_equal_precision", "the same at equal precision", 4.0, at_least=True),
    Target("segment_warm", "mask of a known scan, ÷ baseline fp32", 0.5),
    Target("segment_warm_equal_precision", "the same at equal precision"),
    Target("rank_warm", "texts ranked for a known scan, ÷ baseline fp32"),
    Target("rank_warm_equal_precision", "the same at equal precision"),
    Target("overhead_cold", "serving overhead of a new scan, share", 0.03),
    Target("overhead_followup_s", "serving overhead of a follow-up, s", 0.01),
    Target("interference", "follow-up's first token during an upload ÷ during matrix products on all cores", 1.1),
    Target("wire_per_mask", "mask on the wire ÷ as many floats", 1 / 30),
    Target("wire_per_study", "a scan, two answers and a mask on the wire ÷ the scan and the mask", 1.01),
    Target("prepare_large_s", "preprocessing of a large CT, s", 3.0),
    Target("prepare_large_memory", "its extra memory ÷ the scan", 3.0),
    Target("start_s", "server start to ready (meant for the demo checkpoint), s", 60.0),
    Target("memory", "server's memory ÷ (1.5 × exported files + 6 GB)", 1.0),
)


STOLEN_SHARE = 0.01  # of the cores, from which on it is said
COMPARED_CONCURRENCY = 8  # clients, of the throughput that is compared
# The part that a request has only if the study store does not hold what it needs.
COMPUTED = {
    "cold": "vision_encoder",
    "follow_up": "vision_encoder",
    "upload_again": "prepare",
    "segment": "segmentation_encoder",
    "segment_again": "segmentation_encoder",
    "rank": "clip_image_encoder",
    "rank_again": "clip_image_encoder",
}
# The client says beforehand that it will want a mask: its encoder runs beside the answer, and its head needs both.
_BESIDE, _AFTER = "segmentation_encoder", "segmentation_head"


def values_of(result: dict) -> dict[str, list[float]]:
    """The values of what TARGETS name, as far as it was measured: of each pair or repeat, or the only one."""
    served, found = result["samples"]["served"], {}
    cold, again = served["cold"], served["follow_up"]
    equal = f"baseline {result['manifest']['precision']}" if result["manifest"] else None
    for name, suffix in (("baseline fp32", ""), (equal, "_equal_precision")):
        theirs = result["samples"].get(name)
        if theirs:
            found[f"cold_e2e{suffix}"] = ratios(_all(cold, "total_s"), _all(theirs["cold"], "total_s"))
            found[f"followup_ttft{suffix}"] = ratios(_all(again, "first_s"), _all(theirs["cold"], "first_s"))
            for kind in ("segment", "rank"):
                if kind in theirs:
                    found[f"{kind}_warm{suffix}"] = ratios(_all(served[kind], "total_s"), _all(theirs[kind], "total_s"))
        rows = [row for row in result.get("closed_loop", ()) if name in row["baselines"]]
        if rows:
            found[f"throughput_c8{suffix}"] = [row["tokens_per_s"] / row["baselines"][name] for row in rows]
    found["overhead_cold"] = [rest(s) / s["total_s"] for s in cold]
    found["overhead_followup_s"] = [rest(s) for s in again]
    if "during_products" in served:  # as many as there was time for: no pairs
        found["interference"] = [
            median(_all(served["during_upload"], "first_s")) / median(_all(served["during_products"], "first_s"))
        ]
    if "mask" in (wire := result.get("wire", {})):
        found["wire_per_mask"] = [wire["mask"] / wire["logits"]]
        found["wire_per_study"] = [
            (wire["upload"] + wire["answer"] + wire["follow_up"] + wire["segment"]) / (wire["scan"] + wire["mask"])
        ]
    if large := result.get("preprocessing"):
        found["prepare_large_s"] = large["seconds"]
        found["prepare_large_memory"] = [large["extra_bytes"] / large["scan_bytes"]]
    if result["start_s"]:
        found["start_s"] = [result["start_s"]]
        exported = sum(result["manifest"]["files"].values())
        found["memory"] = [result["server_memory_bytes"] / (1.5 * exported + 6e9)]
    return found


def ratios_of(result: dict) -> dict[str, float]:
    """The medians of values_of."""
    return {name: median(values) for name, values in values_of(result).items()}


def least(result: dict, floors: dict[str, Stage], rates: Rates) -> dict[str, float]:
    """The best value of those targets that compare with the baseline which this machine's floor allows.

    Each stage takes its floor, in the precision in which the machine is fastest, and nothing else takes any time.
    """
    if not floors:
        return {}
    seconds = {name: min(stage.at(p).seconds(rates) for p in ("fp32", "bf16")) for name, stage in floors.items()}
    # What is shared by answers that are decoded together is the reading of the weights.
    together = max(COMPARED_CONCURRENCY * floors["decode"].flops / max(rates.matmul.values()), seconds["decode"])
    scan = result["conditions"]["scan"]["bytes"]
    tokens = median(_all(result["samples"]["served"]["cold"], "tokens"))  # an answer may end before it has all it may
    sent = scan / rates.wire + scan / rates.memory
    found, manifest = {}, result["manifest"]
    for name, suffix in (("baseline fp32", ""), (f"baseline {manifest['precision']}", "_equal_precision")):
        theirs = result["samples"].get(name)
        if not theirs:
            continue
        cold, first = (median(_all(theirs["cold"], what)) for what in ("total_s", "first_s"))
        found[f"cold_e2e{suffix}"] = (
            sent + seconds["vision_encoder"] + seconds["prefill"] + (tokens - 1) * seconds["decode"]
        ) / cold
        found[f"followup_ttft{suffix}"] = seconds["decode"] / first
        if rows := [row["baselines"][name] for row in result.get("closed_loop", ()) if name in row["baselines"]]:
            found[f"throughput_c8{suffix}"] = COMPARED_CONCURRENCY / together / median(rows)
        if "segment" in theirs and "segmentation_encoder" in seconds:
            answer = result["samples"]["served"]["segment"][0]["tokens"] * seconds["decode"]
            # Encoding and decoding may run beside each other, but share the machine.
            found[f"segment_warm{suffix}"] = (
                seconds["segmentation_encoder"] + seconds["segmentation_head"] + answer
            ) / median(_all(theirs["segment"], "total_s"))
    return found


def targets(result: dict) -> list[dict]:
    """{"name", "words", "limit", "value", "values", "met", "least", "verdict"} of every target that was measured.

    values: those whose median is the value. least: the best value that the machine's floor allows, None where there is
    none. verdict: met, missed, or ruled out by the floor; nothing without a limit.
    """
    found, measured = [], values_of(result)
    for t in TARGETS:
        if t.name not in measured:
            continue
        value, best = median(measured[t.name]), result["least"].get(t.name)
        met = t.met(value)
        verdict = (
            ""
            if t.limit is None
            else "met"
            if met
            else "ruled out by the floor"
            if best is not None and not t.met(best)
            else "MISSED"
        )
        found.append(
            {
                "name": t.name,
                "words": t.words,
                "limit": t.limit,
                "at_least": t.at_least,
                "value": value,
                "values": measured[t.name],
                "met": met,
                "least": best,
                "verdict": verdict,
            }
        )
    return found


def stages(result: dict, floors: dict[str, Stage], rates: Rates) -> list[dict]:
    """{"stage", "measured_s", "floor_s", "bound"}: medians of what each stage took beside the least it could take."""
    served = result["samples"]["served"]
    scan = result["conditions"]["scan"]["bytes"]
    measured = {
        "transport": (median(_all(served["upload_again"], "total_s")), scan / rates.wire, "wire"),
        "prepare": (_part(served["cold"], "prepare"), scan / rates.memory, "memory"),
    }
    for name, stage in floors.items():
        samples = served.get("segment", []) if name.startswith("segmentation") else served["cold"]
        if not any(name in s["parts"] for s in samples):
            continue
        seconds = _decode_step(samples) if name == "decode" else _part(samples, name)
        if seconds is None:
            continue
        measured[name] = (seconds, stage.seconds(rates), f"{stage.bound(rates)}, {stage.precision}")
    return [
        {"stage": name, "measured_s": seconds, "floor_s": least, "bound": bound}
        for name, (seconds, least, bound) in measured.items()
    ]


# --- words -----------------------------------------------------------------------------------------------------------
def text(result: dict) -> str:
    """Markdown tables of everything."""
    return "\n\n".join(
        part
        for part in (
            _conditions(result),
            _resources(result),
            _one_at_a_time(result),
            _stages(result),
            _closed_loop(result),
            _open_loop(result),
            _targets(result),
        )
        if part
    )


def _conditions(result: dict) -> str:
    c, r = result["conditions"], result["rates"]
    rates = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in r["matmul"].items() if name != "fp16")
    slower = min(
        min(one["matmul"][name] / value for name, value in r["matmul"].items()) for one in result["rates_measured"]
    )
    precision = f"language model in {result['manifest']['precision']}; " if result["manifest"] else ""
    return (
        f"{c['date']}, {c['gpu'] or c['cpu']}, {c['cores']} cores, load before {c['load_average_before']:.1f}; "
        f"{precision}scan {' x '.join(map(str, c['scan']['shape']))} {c['scan']['dtype']}, {c['tokens']} tokens, "
        f"{c['repeats']} rounds. The machine: {rates}, memory {r['memory'] / 1e9:.1f} GB/s, "
        f"loopback {r['wire'] / 1e9:.2f} GB/s: the better of before and after, of which the other had {slower:.2f} of "
        "a matrix rate at the worst."
    )


def _resources(result: dict) -> str:
    """What export and server took, as far as they ran here."""
    words = []
    if "export_s" in result:
        words.append(f"export {result['export_s']:.0f} s and at most {result['export_peak_bytes'] / 1e9:.1f} GB")
    if result["start_s"]:
        words.append(
            f"server ready after {result['start_s']:.0f} s, {result['server_memory_bytes'] / 1e9:.1f} GB after the load"
        )
    if "peak_memory_bytes" in result:
        words.append(
            f"at most {result['peak_memory_bytes'] / 1e9:.1f} GB of the machine in use, the baseline's included"
        )
    words += _stolen(result)
    said = "; ".join(words)
    return f"{said[0].upper()}{said[1:]}." if words else ""


def _stolen(result: dict) -> list[str]:
    """How busy others kept the machine, which slows everything down by chance."""
    shares = {
        name: stolen / result["seconds"][name] / result["conditions"]["cores"]
        for name, stolen in result["stolen_s"].items()
    }
    if max(shares.values(), default=0) < STOLEN_SHARE:
        return []
    worst = max(shares, key=shares.get)
    return [f"other virtual machines took up to {100 * shares[worst]:.0f} % of the cores ({worst})"]


def _one_at_a_time(result: dict) -> str:
    rows, lengths = [], {side: median(_all(kinds["cold"], "tokens")) for side, kinds in result["samples"].items()}
    for side, kinds in result["samples"].items():
        for kind, samples in kinds.items():
            total = summary(_all(samples, "total_s"))
            first, each = _all(samples, "first_s"), _all(samples, "per_token_s")
            rows.append(
                (
                    side,
                    kind.replace("_", " "),
                    _cache(side, kind, samples),
                    len(samples),
                    _s(total["median"]),
                    f"{_s(total['min'])} to {_s(total['max'])}",
                    _s(total["p90"]),
                    _s(total["p99"]),
                    _s(median(first)) if first else "",
                    f"{1e3 * median(each):.1f} ms" if each else "",
                )
            )
    said = table(("side", "request", "caches", "n", "median", "spread", "p90", "p99", "first token", "per token"), rows)
    if len(set(lengths.values())) == 1:
        return said
    answers = ", ".join(f"{side} {tokens:g}" for side, tokens in lengths.items())
    return (
        f"{said}\n\nThe answers about a new scan differ in length (tokens: {answers}): ratios of their whole times "
        "are of different work."
    )


def _cache(side: str, kind: str, samples: list[dict]) -> str:
    """What was known before: whether the study's features, as far as its parts say, and how many rows of the prompt."""
    if side != "served":
        return "none"
    rows, said = median(s.get("cached_tokens", 0) for s in samples), []
    if kind in COMPUTED:
        misses = sum(COMPUTED[kind] in s["parts"] for s in samples)
        said.append("hit" if not misses else "miss" if misses == len(samples) else f"{misses} of {len(samples)} missed")
    if rows:
        said.append(f"{rows:.0f} of {samples[0]['prompt_tokens']} rows")
    return ", ".join(said)


def _stages(result: dict) -> str:
    rows = [
        (
            s["stage"].replace("_", " "),
            _s(s["measured_s"]),
            _s(s["floor_s"]),
            s["bound"],
            f"{s['measured_s'] / s['floor_s']:.1f}",
        )
        for s in result["stages"]
    ]
    return table(("stage", "measured", "floor", "floor by", "measured ÷ floor"), rows)


def _closed_loop(result: dict) -> str:
    rows = []
    for concurrency, group in _by_concurrency(result).items():
        rate = summary([row["tokens_per_s"] for row in group])
        samples = [s for row in group for s in row["samples"]]
        total, first = summary(_all(samples, "total_s")), summary(_all(samples, "first_s"))
        each = _all(samples, "per_token_s")
        rows.append(
            (
                concurrency,
                f"{rate['median']:.0f}",
                f"{rate['min']:.0f} to {rate['max']:.0f}",
                *(_s(total[p]) for p in ("median", "p90", "p99")),
                *(_s(first[p]) for p in ("median", "p90", "p99")),
                f"{1e3 * median(each):.1f} ms" if each else "",
            )
        )
    return table(
        ("clients", "tokens/s", "spread", "answer", "p90", "p99", "first token", "p90", "p99", "per token"), rows
    )


def _open_loop(result: dict) -> str:
    rows = []
    for run in result.get("open_loop", ()):
        first, each = _first_and_each(run)
        rows.append(
            (
                run["scenario"],
                f"{run['rate']:g}/s" if run["rate"] else "",
                len(run["samples"]),
                *(_s(first[p]) for p in ("median", "p90", "p99")),
                *(f"{1e3 * each[p]:.0f} ms" if each else "" for p in ("median", "p90", "p99")),
                run["verdict"],
                _verdict(run, result["limits"]),
            )
        )
    if not rows:
        return ""
    head = (
        "LoadGen scenario",
        "rate",
        "answers",
        "first token",
        "p90",
        "p99",
        "per token",
        "p90",
        "p99",
        "LoadGen says",
        "within limits",
    )
    return table(head, rows) + (
        f"\n\nLimits: first token p99 {1e3 * result['limits']['ttft_s']:.0f} ms, per token p99 "
        f"{1e3 * result['limits']['tpot_s']:.0f} ms (MLPerf's for an 8B model: 500 and 30)."
    )


def _verdict(run: dict, limits: dict) -> str:
    """Of the Server scenario only: the others have no limits."""
    if run["scenario"] != "Server":
        return ""
    first, each = _first_and_each(run)
    return "yes" if first["p99"] <= limits["ttft_s"] and (not each or each["p99"] <= limits["tpot_s"]) else "no"


def _first_and_each(run: dict) -> tuple[dict, dict | None]:
    """Summaries of the time to the first token and per token; None for the latter if no answer has two."""
    each = _all(run["samples"], "per_token_s")
    return summary(_all(run["samples"], "first_s")), summary(each) if each else None


def _targets(result: dict) -> str:
    rows = [
        (
            t["words"],
            "" if t["limit"] is None else f"{'≥' if t['at_least'] else '≤'} {t['limit']:.3g}",
            f"{t['value']:.3g}",
            f"{min(t['values']):.3g} to {max(t['values']):.3g}" if len(t["values"]) > 1 else "",
            "" if t["least"] is None else f"{t['least']:.3g}",
            t["verdict"],
        )
        for t in result["targets"]
    ]
    return table(("target", "wanted", "measured", "spread", "floor", ""), rows)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """Markdown; nothing without rows."""
    lines = [head, ("---",) * len(head), *rows] if rows else []
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{0 if seconds >= 0.01 else 2}f} ms"


# --- pictures --------------------------------------------------------------------------------------------------------
def plots(result: dict, folder: Path) -> list[Path]:
    """Write load.png (latency against load), waterfall.png (where the time of requests goes, by Triton's statistics)
    and trace.png (when which model worked, by its trace); what was not measured is left out. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []

    def save(figure, name: str) -> None:
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)

    if loops := [
        plot for loop, plot in (("closed_loop", _plot_closed_loop), ("open_loop", _plot_open_loop)) if result.get(loop)
    ]:
        figure, axes = pyplot.subplots(
            1, len(loops), figsize=(5 * len(loops), 4), constrained_layout=True, squeeze=False
        )
        for plot, one in zip(loops, axes[0]):
            plot(one, result)
        save(figure, "load.png")
    figure, axes = pyplot.subplots(figsize=(10, 3.2), constrained_layout=True)
    _plot_waterfall(axes, result)
    save(figure, "waterfall.png")
    if traced := result.get("trace"):
        figure, axes = pyplot.subplots(
            len(traced), figsize=(10, 2.2 * len(traced)), constrained_layout=True, squeeze=False
        )
        for (kind, sample), one in zip(traced.items(), axes[:, 0]):
            _plot_trace(one, kind, sample)
        save(figure, "trace.png")
    pyplot.close("all")
    return written


def _plot_closed_loop(axes, result: dict) -> None:
    groups = _by_concurrency(result)
    _plot_times(axes, list(groups), [[s for row in group for s in row["samples"]] for group in groups.values()])
    axes.set(xlabel="clients", title="Known scans, closed loop")
    rates = axes.twinx()
    rates.plot(
        list(groups), [median(row["tokens_per_s"] for row in group) for group in groups.values()], "s--", color="grey"
    )
    rates.set_ylabel("tokens/s (grey)")
    rates.set_ylim(0, None)


def _plot_open_loop(axes, result: dict) -> None:
    runs = sorted((run for run in result.get("open_loop", ()) if run["rate"]), key=lambda run: run["rate"])
    _plot_times(axes, [run["rate"] for run in runs], [run["samples"] for run in runs])
    axes.set(xlabel="questions/s, Poisson", title="Known scans, open loop (LoadGen)")


def _plot_times(axes, loads: list[float], samples: list[list[dict]]) -> None:
    """Median and p99 of answers and first tokens against the load under which the samples were taken."""
    for what, label in (("total_s", "answer"), ("first_s", "first token")):
        found = [summary(_all(some, what)) for some in samples]
        (line,) = axes.plot(loads, [f["median"] for f in found], "o-", label=f"{label}, median")
        axes.plot(loads, [f["p99"] for f in found], ":", color=line.get_color(), label=f"{label}, p99")
    axes.set(ylabel="seconds", ylim=(0, None))
    axes.legend()


def _plot_waterfall(axes, result: dict) -> None:
    """Median seconds of each part of a request, one after the other; what no part explains comes last.

    What the server does beside the answer has a lane of its own, and what needs it waits for it.
    """
    served = result["samples"]["served"]
    kinds = [kind for kind in ("cold", "follow_up", "segment", "segment_again") if kind in served]
    names = list(dict.fromkeys(name for kind in kinds for s in served[kind] for name in s["parts"]))
    colours = {name: f"C{k}" for k, name in enumerate([*names, "everything else"])}
    for row, kind in enumerate(kinds):
        widths = {name: _part(served[kind], name) for name in names}
        beside = widths.pop(_BESIDE, 0.0)
        lane, height, end = (row - 0.2, 0.4, 0.0) if beside else (row, 0.8, 0.0)
        if beside:
            axes.barh(row + 0.2, beside, height, color=colours[_BESIDE])
        for name, width in widths.items():
            start = max(end, beside) if name == _AFTER else end
            axes.barh(lane, width, height, left=start, color=colours[name])
            end = start + width if width else end
        rest = median(_all(served[kind], "total_s")) - end
        axes.barh(lane, max(0, rest), height, left=end, color=colours["everything else"])
    axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title="Where the time of one request goes")
    axes.legend(
        handles=[axes.barh(0, 0, color=colour, label=name.replace("_", " ")) for name, colour in colours.items()],
        ncols=4,
        fontsize="small",
    )


def _plot_trace(axes, kind: str, sample: dict) -> None:
    """The steps of one request to Triton's models, from top to bottom as they began."""
    colours = {"read": "tab:grey", "queue": "tab:red", "compute": "tab:blue", "send": "tab:green"}
    rows = list(dict.fromkeys(span["model"] for span in sample["spans"]))
    for span in sample["spans"]:
        axes.barh(
            rows.index(span["model"]),
            span["end_s"] - span["start_s"],
            left=span["start_s"],
            color=colours[span["step"]],
        )
    axes.set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
    axes.axvline(sample["total_s"], color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=f"{kind.replace('_', ' ')}: {_s(sample['total_s'])}", xlim=(0, None))
    axes.legend(
        handles=[axes.barh(0, 0, color=colour, label=step) for step, colour in colours.items()],
        ncols=4,
        fontsize="small",
    )


# --- inside ----------------------------------------------------------------------------------------------------------
def _all(samples: list[dict], what: str) -> list[float]:
    return [s[what] for s in samples if s[what] is not None]


def _decode_step(samples: list[dict]) -> float | None:
    """Median time of a token after the first, as the server's clock has it; None if no answer has two."""
    steps = [s["parts"]["decode"] / (s["tokens"] - 1) for s in samples if s["tokens"] > 1]
    return median(steps) if steps else None


def _part(samples: list[dict], name: str) -> float:
    return median(s["parts"].get(name, 0.0) for s in samples)


def _by_concurrency(result: dict) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for row in result.get("closed_loop", ()):
        groups.setdefault(row["concurrency"], []).append(row)
    return dict(sorted(groups.items()))
