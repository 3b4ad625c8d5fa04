"""The least times on paper: what each stage of a question takes at best on GPUs that one can rent.

    python benchmarks/roofline.py [--checkpoint DIR] [--precision bf16]

Without a checkpoint: the published M3D-LaMed on LLaMA-2-7B. Assumptions: the data sheets' dense matrix rates and memory
bandwidths (TF32 for fp32), reached in full; weights read once a stage (decode: once a token), activations never leave
the caches; norms, softmax, sampling, launches and transfers cost nothing. So no implementation is faster, and none gets
there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import at_least
from benchmarks.cpu_roofline import Rates, Stage, stages
from engine.errors import M3DError
from engine.models.config import LamedConfig

# NVIDIA's data sheets, dense: TF32 for fp32, bf16/fp16 tensor cores, bytes/s of the memory.
GPUS = {
    "L4": Rates({"fp32": 60e12, "bf16": 121e12, "fp16": 121e12}, 300e9),
    "A100 80GB SXM": Rates({"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}, 2039e9),
    "H100 SXM": Rates({"fp32": 495e12, "bf16": 989e12, "fp16": 989e12}, 3350e9),
    "H200 SXM": Rates({"fp32": 495e12, "bf16": 989e12, "fp16": 989e12}, 4800e9),
}


def table(found: dict[str, Stage], gpus: dict[str, Rates], tokens: int) -> str:
    """Markdown: a row a stage, a column a GPU, milliseconds and what decides."""
    lines = ["| stage | GFLOP | MB | " + " | ".join(gpus) + " |", "|---|---|---|" + "---|" * len(gpus)]
    for stage in found.values():
        cells = [f"{1e3 * stage.seconds(rates):.2f} ms, {stage.bound(rates)}" for rates in gpus.values()]
        lines.append(f"| {stage.name} | {stage.flops / 1e9:,.1f} | {stage.bytes / 1e6:,.0f} | {' | '.join(cells)} |")
    first = [sum(found[name].seconds(rates) for name in ("vision_encoder", "prefill")) for rates in gpus.values()]
    whole = [t + (tokens - 1) * found["decode"].seconds(rates) for t, rates in zip(first, gpus.values())]
    lines.append("| first token, new scan | | | " + " | ".join(f"{1e3 * t:.1f} ms" for t in first) + " |")
    lines.append(f"| {tokens} tokens, new scan | | | " + " | ".join(f"{1e3 * t:.0f} ms" for t in whole) + " |")
    return "\n".join(lines)


def main() -> int:
    from benchmarks.make_checkpoint import config_of
    from engine.models.checkpoint import read_config, resolve

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="M3D-LaMed: a folder or a Hugging Face id (default: the published 7B)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16", help="default: %(default)s")
    parser.add_argument("--question-tokens", type=at_least(0), default=16, help="default: %(default)s")
    parser.add_argument("--tokens", type=at_least(1), default=64, help="of the answer (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        values = read_config(resolve(arguments.checkpoint)) if arguments.checkpoint else config_of("7b")
    except M3DError as error:
        print(f"no floors: {error}", file=sys.stderr)
        return 1
    found = stages(
        LamedConfig.from_dict(values),
        llm=arguments.precision,
        graphs=arguments.precision,
        question_tokens=arguments.question_tokens,
        answer_tokens=arguments.tokens,
    )
    print(
        __doc__.strip().splitlines()[0],
        f"\n\n{arguments.checkpoint or 'published 7B'}, {arguments.precision}, "
        f"{arguments.question_tokens} tokens asked, {arguments.tokens} answered\n",
    )
    print(table(found, GPUS, arguments.tokens))
    print("\n" + __doc__.strip().partition("7B. ")[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
