"""What the GPU check asks of a machine, in order. This module imports the standard library alone."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEAST_LIMIT_S = 240
TORCH = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Step:
    """One step. Its rows are dictionaries; a row whose `ok` is False fails the step, one without `ok` informs.

    name: on the command line and in the report.
    module: the file under ROOT whose generator `function` yields the rows; imported in the step's own process alone.
    tells: the question that the rows answer.
    seconds: expected on one H200.
    findings: numbers of the GPU audit's findings that the step decides (deploy/README.md lists them).
    packages, programs: without which the step is not run.
    after: a step that must have passed before.
    basic: a machine with PyTorch and a GPU runs it; the check passes only if it ran.
    serves: it needs all that serving on a GPU needs, as `m3d doctor --target tensorrt` says.
    """

    name: str
    module: str
    function: str
    tells: str
    seconds: int
    findings: tuple[int, ...] = ()
    packages: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    after: str | None = None
    basic: bool = False
    serves: bool = False

    @property
    def limit(self) -> int:
        """Seconds after which the step is ended."""
        return max(LEAST_LIMIT_S, 3 * self.seconds)

    def missing(self, states: Mapping[str, str], serving: Callable[[], list[str]]) -> list[str]:
        """Why the step cannot run.

        Args:
            states: of the steps before it, by name. serving: what serving on a GPU needs and this machine lacks.

        Returns:
            What is missing, each in a few words; empty if nothing is.
        """
        found = [f"no package {name}" for name in self.packages if not has_package(name)]
        found += [f"no program {name}" for name in self.programs if shutil.which(name) is None]
        if self.after is not None and states.get(self.after) != "passed":
            found.append(f"the step {self.after} has not passed")
        return found + (serving() if self.serves else [])


# The cheap and certain ones first, then by what is least known: a run that is cut short still tells most.
STEPS = (
    Step(
        "machine",
        "deploy/checks/machine.py",
        "facts",
        "what this machine is, and whether PyTorch sees its GPU",
        10,
        findings=(3, 7, 8),
        basic=True,
    ),
    Step(
        "reference",
        "deploy/checks/reference.py",
        "compare",
        "whether the PyTorch modules compute what the reference computed, in each precision",
        20,
        findings=(5,),
        packages=TORCH,
        basic=True,
    ),
    Step(
        "roofline",
        "deploy/checks/roofline.py",
        "measure",
        "how fast this GPU copies, reads and multiplies at best",
        15,
        packages=("torch",),
        basic=True,
    ),
    Step(
        "encoders",
        "deploy/checks/encoders.py",
        "measure",
        "encoders and mask head at the published size: time and memory against the roofline, volumes not mixed up",
        30,
        findings=(2,),
        packages=TORCH,
        basic=True,
    ),
    Step(
        "language-model",
        "deploy/checks/language_model.py",
        "measure",
        "prefill and decode of a 7B, for 1, 8 and 64 questions: time and memory against the roofline",
        30,
        packages=TORCH,
        basic=True,
    ),
    Step(
        "decoder",
        "deploy/checks/decoder.py",
        "start",
        "whether vLLM's engine starts, answers like the reference and hands out the right [SEG] states",
        85,
        findings=(1, 3, 5, 10, 12),
        packages=(*TORCH, "vllm"),
    ),
    Step(
        "plans",
        "deploy/checks/plans.py",
        "build_served",
        "whether TensorRT builds plans here, and how far they are from PyTorch",
        60,
        findings=(13,),
        serves=True,
    ),
    Step(
        "served",
        "deploy/checks/served.py",
        "serve",
        "Triton: different volumes in a row and at the same time, masks, latency of 1, 8 and 64 clients, memory",
        90,
        findings=(2, 4, 6, 11, 14),
        after="plans",
        serves=True,
    ),
    Step(
        "fixtures",
        "deploy/checks/served.py",
        "fixtures",
        "whether export and server answer and segment like the reference, in fp32",
        100,
        findings=(5,),
        packages=("pytest",),
        serves=True,
    ),
    Step(
        "onnxruntime",
        "deploy/checks/onnx_graphs.py",
        "compare",
        "whether the exported graphs compute what the reference computed, on a GPU with and without TF32",
        40,
        findings=(5,),
        packages=(*TORCH, "onnxruntime", "onnx", "onnxscript"),
    ),
    Step(
        "precisions",
        "deploy/checks/plans.py",
        "build_others",
        "how far plans in fp32, bf16 and fp8 are from PyTorch",
        200,
        findings=(13,),
        serves=True,
    ),
    Step(
        "benchmark",
        "deploy/checks/served.py",
        "benchmark",
        "benchmarks/latency.py against the running server, without baselines beside it",
        300,
        findings=(11,),
        packages=("mlperf_loadgen",),
        after="plans",
        serves=True,
    ),
)


def has_package(name: str) -> bool:
    """Whether a package can be imported here."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
