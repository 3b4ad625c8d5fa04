"""What holds on this GPU, in one command: the first thing to run where one is at hand.

    python deploy/gpu_check.py --out out/gpu-check

It runs what the machine has. With PyTorch for CUDA and transformers alone it compares the PyTorch modules with the
recorded reference and measures them against the roofline; vLLM, ONNX, TensorRT and Triton add their steps. Each step
runs in a process of its own, and OUT/gpu-check.json and OUT/gpu-check.md are written anew with every row. Ends with
status 0 if every step that ran has passed and all that need PyTorch alone have run. deploy/README.md says more.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a script, from any folder
    sys.path[0] = str(ROOT)

from deploy.checks import runner  # noqa: E402
from deploy.checks.context import DEMO, Context  # noqa: E402
from deploy.checks.report import NOT_RUN, PASSED, Report  # noqa: E402
from deploy.checks.steps import STEPS, Step  # noqa: E402

BUDGET_S = 480
NO_GPU = "PyTorch finds no GPU: --device cpu --tiny tries the steps themselves, at small sizes"
NOT_KNOWN = "the step machine has not passed"


def main(argv: list[str] | None = None) -> int:
    """Run the check. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    steps = [step for step in STEPS if step.name in arguments.steps]
    conditions = {
        "command": shlex.join(["gpu_check.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": arguments.device,
        "sizes": "tiny" if arguments.tiny else "published",
    }
    report = Report(arguments.out.resolve(), steps, conditions)
    context = Context(
        device=arguments.device,
        tiny=arguments.tiny,
        work=str(report.folder / "work"),
        checkpoint=arguments.checkpoint,
        segment_question=arguments.segment_question,
        rates={},
    )
    started = time.monotonic()
    first = [step for step in steps if step.name == "machine"]
    runner.run(first, context, report, arguments.budget, what_serving_lacks)
    rest = steps[len(first) :]
    if arguments.device == "cuda" and first and report.fact("device") != "cuda":
        _run_none_of(rest, report)
    else:
        left = arguments.budget - (time.monotonic() - started)
        runner.run(rest, context, report, left, what_serving_lacks)
    return _told(report)


@functools.cache
def what_serving_lacks() -> list[str]:
    """What serving on a GPU, and building for it, needs and this machine lacks."""
    from engine.errors import M3DError

    lacks = []
    try:
        from engine import doctor

        # The repository is what this check builds.
        lacks += [
            f"no {finding.what}"
            for finding in doctor.examine(ROOT / "model_repository", "tensorrt")
            if finding.state == "missing" and finding.what not in ("repository", "fits this machine")
        ]
        from export.tensorrt import bindings_module

        bindings_module("tensorrt")
    except ImportError as error:
        lacks.append(f"no package {error.name}")
    except M3DError as error:
        lacks.append(str(error))
    return lacks


def _run_none_of(steps: list[Step], report: Report) -> None:
    """On a machine without a GPU, or where that is not known: say of each step why it is not run."""
    reason = NO_GPU if report.states["machine"] == PASSED else NOT_KNOWN
    print(f"this machine cannot run the GPU check: {reason}", file=sys.stderr)
    for step in steps:
        result = report.results[step.name]
        missing = step.missing(report.states, what_serving_lacks)
        result.state, result.why = NOT_RUN, "; ".join([reason, *missing])
        print(f"-- {step.name}: {'; '.join(missing) or 'nothing but a GPU is missing'}", file=sys.stderr)
    report.write()


def _told(report: Report) -> int:
    """Say what came out; the exit status."""
    passed = sum(state == PASSED for state in report.states.values())
    not_run = sum(state == NOT_RUN for state in report.states.values())
    print(
        f"{passed} of {len(report.states)} steps passed, {not_run} were not run; "
        f"{'all that ran holds' if report.ok else 'not everything holds'}: {report.folder / 'gpu-check.md'}"
    )
    return 0 if report.ok else 1


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - {step.name for step in STEPS}):
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: no such step; there are {', '.join(step.name for step in STEPS)}"
        )
    return names


def _checkpoint(text: str) -> str:
    """A folder as it is seen from here; what is none here may be one of the checkout, or an id of the hub."""
    return str(Path(text).resolve()) if Path(text).is_dir() else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu-check"), help="folder of report and builds (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        metavar="SECONDS",
        help="after which no further step begins; one that is expected to outlast them does not begin either "
        "(default: %(default)s; all steps take about 20 minutes)",
    )
    parser.add_argument(
        "--steps",
        type=_names,
        default=[step.name for step in STEPS],
        metavar="NAME,NAME",
        help=f"those to run (default: all): {', '.join(step.name for step in STEPS)}",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the steps themselves")
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        default=DEMO,
        help="M3D-LaMed that is served: a folder or a Hugging Face id (default: the demo's)",
    )
    parser.add_argument(
        "--segment-question",
        default="Please segment the left thalamus.",
        help="which the checkpoint answers by a mask (default: one of the demo's)",
    )
    return parser


if __name__ == "__main__":
    # As Ctrl-C does: the step that runs is ended, and the report says so.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
