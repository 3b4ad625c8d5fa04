"""Writes the configurations of a model repository, `config.pbtxt` and `configs/cpu.pbtxt`, from engine.contract.

    python -m engine.server.repository [FOLDER]

The files in model_repository/ are tracked, and a test says whether they are current. What users set is not in them, see
`engine.runtime.settings`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.contract import GRAPHS, IMAGE_ENCODERS, MODELS, STUDY, STUDY_HANDLE, Model, Tensor

CPU_CONFIG = Path("configs") / "cpu.pbtxt"  # of a graph, for `--model-config-name cpu`
_WRITTEN = "# Written by `python -m engine.server.repository` from engine/contract.py; settings: ../settings.toml\n"
# One process: the parts of an upload meet in its memory, and vLLM batches the answers. Its threads work side by side.
_ON_CPU = "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
_QUEUE = """\
# No request waits for others: those that come while the GPU is busy go together.
dynamic_batching {
  # Beyond this, and after a minute of waiting, requests are refused; `study` and `segmentation` have limits in front.
  default_queue_policy {
    max_queue_size: 256
    timeout_action: REJECT
    default_timeout_microseconds: 60000000
    allow_timeout_override: true
  }
}
"""
_TENSORRT = f"""\
# The plan's two profiles: for one volume, and for up to four. No CUDA graphs: with them Triton's TensorRT backend has
# returned results of earlier requests (triton-inference-server/server#8550, open in July 2026).
instance_group [ {{ kind: KIND_GPU count: 1 profile: [ "0", "1" ] }} ]
# Each profile's execution context takes the memory of that profile; by default each takes that of the largest.
parameters {{ key: "execution_context_allocation_strategy" value {{ string_value: "ON_PROFILE_CHANGE" }} }}
{_QUEUE}"""
_ONNX_RUNTIME = f"""\
instance_group [ {{ kind: KIND_GPU count: 1 }} ]
# fp32 means fp32: ONNX Runtime's default on a GPU is TF32, which keeps 11 bits of what it multiplies.
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator [ {{ name: "cuda" parameters {{ key: "use_tf32" value: "0" }} }} ]
  }}
}}
# These are not beside use_tf32, because the backend overwrites them there with defaults.
# The default tries every algorithm of a convolution again for each new size of a batch; 1 is HEURISTIC.
parameters {{ key: "cudnn_conv_algo_search" value {{ string_value: "1" }} }}
# The default doubles the arena whenever it is too small; 1 is kSameAsRequested.
parameters {{ key: "arena_extend_strategy" value {{ string_value: "1" }} }}
# With memory patterns the arena keeps what the first run took beside what every other run takes, almost twice as much.
parameters {{ key: "enable_mem_pattern" value {{ string_value: "0" }} }}
{_QUEUE}"""


def configurations(model: Model) -> dict[Path, str]:
    """The text of each configuration of a model, by its path in the model's folder."""
    if model.steps:
        return {Path("config.pbtxt"): _head(model, 'platform: "ensemble"') + _ensemble(model)}
    if model.name not in GRAPHS:
        return {Path("config.pbtxt"): _head(model, 'backend: "python"') + _ON_CPU}
    if model.name in IMAGE_ENCODERS:
        backend, rest = 'backend: "tensorrt"\ndefault_model_filename: "model.plan"', _TENSORRT
    else:
        backend, rest = 'backend: "onnxruntime"\ndefault_model_filename: "model.onnx"', _ONNX_RUNTIME
    return {
        Path("config.pbtxt"): _head(model, backend) + rest,
        CPU_CONFIG: _head(model, 'backend: "python"') + _ON_CPU,
    }


def write(repository: Path) -> None:
    """Write the configurations of all models of the contract into `repository`."""
    for model in MODELS.values():
        (repository / model.name / CPU_CONFIG).unlink(missing_ok=True)  # earlier versions had others
        for path, text in configurations(model).items():
            (repository / model.name / path).parent.mkdir(parents=True, exist_ok=True)
            (repository / model.name / path).write_text(text)


def _head(model: Model, backend: str) -> str:
    decoupled = "model_transaction_policy { decoupled: true }\n" if model.decoupled and not model.steps else ""
    return (
        f'{_WRITTEN}# {model.doc}\nname: "{model.name}"\n{backend}\nmax_batch_size: {model.max_batch_size}\n{decoupled}'
        f"input [\n{_tensors(model.inputs, True)}\n]\noutput [\n{_tensors(model.outputs, False)}\n]\n"
    )


def _tensors(tensors: Iterable[Tensor], are_inputs: bool) -> str:
    return ",\n".join(
        f'  {{ name: "{tensor}" data_type: TYPE_{"STRING" if tensor.dtype == "BYTES" else tensor.dtype} '
        f"dims: [ {', '.join(map(str, tensor.dims))} ]{' optional: true' if are_inputs and tensor.optional else ''} }}"
        for tensor in tensors
    )


def _ensemble(model: Model) -> str:
    return "ensemble_scheduling {\n  step [\n" + ",\n".join(_steps(model)) + "\n  ]\n}\n"


def _steps(model: Model) -> Iterator[str]:
    """An ensemble's tensors share one name space: what a step writes is called as the ensemble's output that it
    becomes, and otherwise, in lower case, if a later step reads it. The last STUDY is the output STUDY_HANDLE."""
    steps = [MODELS[name] for name in model.steps]
    last_study = max(number for number, step in enumerate(steps) if STUDY in step.outputs)
    names = {tensor: str(tensor) for tensor in model.inputs}
    for number, step in enumerate(steps):
        maps = [("input_map", tensor, names[tensor]) for tensor in step.inputs if tensor in names]
        for tensor in step.outputs:
            output = STUDY_HANDLE if tensor == STUDY and number == last_study else tensor
            if output in model.outputs or any(tensor in later.inputs for later in steps[number + 1 :]):
                names[tensor] = str(output) if output in model.outputs else tensor.lower()
                maps.append(("output_map", tensor, names[tensor]))
        lines = [f'      {kind} {{ key: "{key}" value: "{value}" }}' for kind, key, value in maps]
        yield "\n".join(["    {", f'      model_name: "{step.name}"', "      model_version: -1", *lines, "    }"])


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "model_repository")
    if not folder.is_dir():
        sys.exit(f"{folder} is no folder: name a model repository, or run this where model_repository/ is")
    write(folder)
