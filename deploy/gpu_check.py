"""What holds on this GPU, in one command: build, compare with PyTorch, serve, answer like the reference, measure.

    python deploy/gpu_check.py --checkpoint training/demo --out out/gpu-check

It needs the environment of the image in deploy/ and this checkout: deploy/README.md has the command that has both.
Writes OUT/report.md and OUT/report.json after every step. Ends with status 1 if a step failed, or if something that
serving on a GPU needs is missing; then it says what, and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a script, from any folder
    sys.path[0] = str(ROOT)

from engine import doctor, gpu  # noqa: E402
from engine.errors import M3DError  # noqa: E402

PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
SERVED = "fp16"
SCANS = ("brain-mr", "spine-ct")


class Failed(Exception):
    """A step that did not do what it should."""


@dataclass
class Report:
    """What was found, step by step; written anew after each one."""

    folder: Path
    machine: list[str] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)

    def run(self, name: str, step: Callable[[], dict]) -> None:
        """Run a step; what goes wrong in it is part of the report, and the next one runs all the same."""
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        try:
            result = {"ok": True, **step()}
        except (Failed, M3DError, OSError, subprocess.SubprocessError) as error:
            result = {"ok": False, "error": str(error)}
            print(f"   failed: {error}", flush=True)
        self.steps.append({"name": name, "seconds": round(time.perf_counter() - started, 1), **result})
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "report.json").write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")
        lines = [
            "# GPU check",
            "",
            *(f"- {line}" for line in self.machine),
            "",
            "| step | result | seconds |",
            "|---|---|---|",
        ]
        for step in self.steps:
            words = {key: value for key, value in step.items() if key not in ("name", "seconds", "ok", "plans")}
            lines.append(
                f"| {step['name']} | {'ok' if step['ok'] else 'FAILED'}"
                f"{': ' + json.dumps(words, default=str) if words else ''} | {step['seconds']} |"
            )
        plans = [(step["name"], name, plan) for step in self.steps for name, plan in step.get("plans", {}).items()]
        if plans:
            lines += [
                "",
                "| export | plan | compared | max error | mean error | fused attentions | MB |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {step} | {name} | {p['compared']} | {p['max_error']:.1e} | {p['mean_error']:.1e} | "
                f"{p['fused_attentions']} | {p['bytes'] / 1e6:,.0f} |"
                for step, name, p in plans
            ]
        (self.folder / "report.md").write_text("\n".join(lines) + "\n")

    @property
    def ok(self) -> bool:
        return bool(self.steps) and all(step["ok"] for step in self.steps)


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    report = Report(arguments.out.resolve())
    missing = what_is_missing()
    if missing:
        report.machine = [f"missing: {words}" for words in missing]
        report.write()
        print("this machine cannot run the GPU check; missing are", *missing, sep="\n- ", file=sys.stderr)
        print("deploy/README.md has the command that runs it in the image of deploy/", file=sys.stderr)
        return 1
    report.machine = [
        f"{g.name}, compute capability {g.compute_capability}, driver {g.driver}" for g in gpu.find_gpus()
    ]
    report.machine.append(f"TensorRT {gpu.tensorrt_version()}, CUDA {gpu.cuda_version()}")
    scans = _scans(report)
    for precision in PRECISIONS:
        report.run(f"build {precision}", partial(build, arguments.checkpoint, report.folder, precision, scans))
    report.run("fixtures through the server", lambda: fixtures(report.folder))
    report.run("latency", lambda: latency(arguments.checkpoint, arguments.segment_question, report.folder))
    print(f"{'everything holds' if report.ok else 'not everything holds'}: {report.folder / 'report.md'}")
    return 0 if report.ok else 1


def what_is_missing() -> list[str]:
    """What serving on a GPU, and building for it, needs and this machine lacks, with the way to get it."""
    from engine.errors import Unavailable
    from export.tensorrt import bindings_module

    # The repository is what this check builds.
    found = doctor.examine(ROOT / "model_repository", "tensorrt")
    missing = [
        f"{f.what}: {f.detail}"
        for f in found
        if f.state == "missing" and f.what not in ("repository", "fits this machine")
    ]
    try:
        bindings_module("tensorrt")
    except Unavailable as error:
        missing.append(f"TensorRT's Python bindings: {error}")
    return missing


def build(checkpoint: str, folder: Path, precision: str, scans: list[Path]) -> dict:
    """Export for this GPU; every plan is compared with PyTorch on it, and the export fails beyond its bound."""
    from engine.manifest import Manifest

    repository = _repository(folder, precision)
    command = [
        "export/build_engines.py",
        "--checkpoint",
        checkpoint,
        "--target",
        "tensorrt",
        "--precision",
        precision,
        "--repository",
        repository,
        "--timing-cache",
        folder / "timing.cache",
        "--force",
    ]
    _python(command + (["--calibration", *scans] if scans else []))
    plans = {name: entry["plan"] for name, entry in Manifest.read(repository).graphs.items() if "plan" in entry}
    unproven = [name for name, plan in plans.items() if plan["compared"] != "plan on the GPU"]
    if unproven:
        raise Failed(f"{', '.join(unproven)} did not run on the GPU: PyTorch with CUDA is missing")
    return {"plans": plans}


def fixtures(folder: Path) -> dict:
    """The recorded reference through export and the running server, by the test that does it on a CPU."""
    log = folder / "fixtures.log"
    with log.open("w") as stream:
        # The checkout may be read-only: pytest keeps no cache in it.
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/functional/test_exactness.py"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "M3D_TEST_TARGET": "tensorrt"}, stdout=stream, stderr=stream
        )
    if done.returncode:
        raise Failed(f"see {log}")
    return {"log": str(log)}


def latency(checkpoint: str, segment_question: str, folder: Path) -> dict:
    """Serve what was built, and measure it by benchmarks/latency.py."""
    from engine.server import Server, free_ports

    repository, result = folder / SERVED / "model_repository", folder / "latency.json"
    with Server(repository, target="tensorrt", **free_ports(), log=folder / "triton.log") as server:
        _python(
            [
                "benchmarks/latency.py",
                "--server",
                server.url,
                "--checkpoint",
                checkpoint,
                "--repository",
                repository,
                "--json",
                result,
                "--segment-question",
                segment_question,
            ]
        )
    return {"file": str(result)}


def _scans(report: Report) -> list[Path]:
    """Real scans to calibrate and compare on; without them fp8 is not built, and the report says so."""
    from engine.samples import write_sample

    paths: list[Path] = []

    def write() -> dict:
        paths.extend(write_sample(name, report.folder / "scans") for name in SCANS)
        return {}

    report.run("sample scans", write)
    return paths


def _repository(folder: Path, precision: str) -> Path:
    target = folder / precision / "model_repository"
    shutil.rmtree(target, ignore_errors=True)
    tracked = shutil.ignore_patterns(
        "*.onnx*", "*.plan", "layers.txt", "tensorrt.pbtxt", "llm", "tokenizer", "manifest.json", "__pycache__"
    )
    return shutil.copytree(ROOT / "model_repository", target, ignore=tracked)


def _python(command: list) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
    if done.returncode:
        raise Failed(f"{command[0]} ended with status {done.returncode}; its words are above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default="training/demo", help="M3D-LaMed: a folder or a Hugging Face id (default: the demo's)"
    )
    parser.add_argument(
        "--segment-question",
        default="Please segment the left thalamus.",
        help="for the latency; the checkpoint's answer must have a [SEG] (default: one of the demo's)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu-check"), help="folder of report and builds (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
