"""Every configuration of the repository says what engine.contract says, and the ensembles' wiring fits together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from engine.contract import CHAT_MODELS, GRAPHS, IMAGE_ENCODERS, MODELS, RETRIEVE_MODELS, SEGMENT_MODELS, TEXT, Model
from engine.runtime.settings import Settings
from engine.server import repository
from tests.conftest import ROOT

REPOSITORY = ROOT / "model_repository"
CONFIGS = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.pbtxt"))
# Inputs that a model can do without, but not as a step.
NEEDED_IN_AN_ENSEMBLE = {"retrieval": {"STUDY", "TEXTS"}}
ENSEMBLES = [model.name for model in MODELS.values() if model.ensemble]


def read(path) -> ModelConfig:
    return text_format.Parse((REPOSITORY / path).read_text(), ModelConfig())


def parameters(path) -> dict[str, str]:
    return {name: value.string_value for name, value in read(path).parameters.items()}


def signature(tensors) -> dict:
    return {t.name: ("STRING" if t.dtype == "BYTES" else t.dtype, t.dims) for t in tensors}


def configured(tensors) -> dict:
    return {t.name: (DataType.Name(t.data_type).removeprefix("TYPE_"), tuple(t.dims)) for t in tensors}


def differences(config: ModelConfig, model: Model) -> list[str]:
    """What a configuration says otherwise than the contract."""
    pairs = {
        "name": (config.name, model.name),
        "max_batch_size": (config.max_batch_size, model.max_batch_size),
        "inputs": (configured(config.input), signature(model.inputs)),
        "outputs": (configured(config.output), signature(model.outputs)),
        "optional": ({t.name for t in config.input if t.optional}, {t.name for t in model.inputs if t.optional}),
        "ensemble": (config.platform == "ensemble", model.ensemble),
        # An ensemble is decoupled by the parts it has.
        "decoupled": (config.model_transaction_policy.decoupled, model.decoupled and not model.ensemble),
    }
    return [f"{what}: {found} instead of {promised}" for what, (found, promised) in pairs.items() if found != promised]


def faults(ensemble: ModelConfig) -> list[str]:
    """What is wrong with an ensemble's wiring; its own inputs and outputs are taken as they are."""
    found = []
    types = configured(ensemble.input)
    behind_decoupled = dict.fromkeys(types, False)
    used = set()
    for step in ensemble.ensemble_scheduling.step:
        model = MODELS.get(step.model_name)
        if model is None or model.ensemble:
            found.append(f"{step.model_name} is not a part")
            continue
        inputs, outputs = signature(model.inputs), signature(model.outputs)
        required = {t.name for t in model.inputs if not t.optional} | NEEDED_IN_AN_ENSEMBLE.get(model.name, set())
        if missing := required - set(step.input_map):
            found.append(f"{model.name} needs {missing}")
        sources = set()
        for name, tensor in step.input_map.items():
            if tensor not in types:
                found.append(f"{model.name} reads {tensor}, which nobody has written before")
            elif inputs.get(name) != types[tensor]:
                found.append(f"{model.name} takes {name} as {inputs.get(name)}, {tensor} is {types[tensor]}")
            sources.add(behind_decoupled.get(tensor))
            used.add(tensor)
        if len(sources) > 1:
            found.append(f"{model.name} mixes inputs from before and behind a decoupled model")
        for name, tensor in step.output_map.items():
            if tensor in types:
                found.append(f"{tensor} is written twice")
            if name not in outputs:
                found.append(f"{model.name} has no output {name}")
            types[tensor] = outputs.get(name)
            behind_decoupled[tensor] = model.decoupled or True in sources
    for name, wanted in configured(ensemble.output).items():
        if types.get(name) != wanted:
            found.append(f"output {name} is {wanted}, written as {types.get(name)}")
        used.add(name)
    if len({behind_decoupled.get(t.name) for t in ensemble.output}) > 1:
        found.append("the outputs mix tensors from before and behind a decoupled model")
    return found + [f"{tensor} is not used" for tensor in set(types) - used]


def test_every_model_of_the_contract_is_in_the_repository_and_no_other():
    assert {path.parts[0] for path in CONFIGS} == set(MODELS) == {p.name for p in REPOSITORY.iterdir() if p.is_dir()}
    assert all((REPOSITORY / name / "config.pbtxt").is_file() for name in MODELS)


def test_the_tracked_configurations_are_what_the_contract_writes(tmp_path):
    repository.write(tmp_path)
    for path in {*CONFIGS, *(path.relative_to(tmp_path) for path in tmp_path.rglob("*.pbtxt"))}:
        tracked, written = (folder / path for folder in (REPOSITORY, tmp_path))
        assert tracked.is_file() and written.is_file() and tracked.read_text() == written.read_text(), (
            f"{path} is not current: run `python -m engine.server.repository`"
        )


def test_configurations_that_the_contract_does_not_have_any_more_are_removed(tmp_path):
    old = tmp_path / "decoder" / "configs" / "cpu.pbtxt"
    old.parent.mkdir(parents=True)
    old.write_text("")
    repository.write(tmp_path)
    assert not old.exists() and (tmp_path / "vision_encoder" / "configs" / "cpu.pbtxt").is_file()


def test_a_new_answer_tensor_reaches_the_ensembles_by_the_contract_alone(monkeypatch):
    """Of a tensor in the decoder's outputs and an ensemble's, the whole way is written."""
    added = replace(TEXT, name="ADDED")
    for name in ("decoder", "m3d_segment"):
        model = replace(MODELS[name], outputs=(*MODELS[name].outputs, added))
        monkeypatch.setitem(repository.MODELS, name, model)
    (text,) = repository.configurations(MODELS["m3d_segment"]).values()
    ensemble = text_format.Parse(text, ModelConfig())
    assert faults(ensemble) == [] and "ADDED" in configured(ensemble.output)


def test_a_tensor_is_its_name():
    assert TEXT == "TEXT" and {TEXT: 1}["TEXT"] == 1 and f"{TEXT}" == "TEXT" and hash(TEXT) == hash("TEXT")


def test_models_are_grouped_by_what_a_checkpoint_can_do():
    groups = (*CHAT_MODELS, *SEGMENT_MODELS, *RETRIEVE_MODELS)
    assert sorted(groups) == sorted(MODELS) and set(GRAPHS) < set(MODELS)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_configuration_says_what_the_contract_says(path):
    assert differences(read(path), MODELS[path.parts[0]]) == []


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_change_of_any_name_type_dimension_or_flag_in_a_configuration_is_noticed(path):
    model, config = MODELS[path.parts[0]], read(path)

    def noticed(change) -> bool:
        changed = ModelConfig()
        changed.CopyFrom(config)
        change(changed)
        return bool(differences(changed, model))

    for kind in ("input", "output"):
        for position, tensor in enumerate(getattr(config, kind)):

            def of(changed):
                return getattr(changed, kind)[position]

            assert noticed(lambda changed: setattr(of(changed), "name", tensor.name + "_")), tensor.name
            assert noticed(lambda changed: setattr(of(changed), "data_type", tensor.data_type % 13 + 1)), tensor.name
            assert noticed(lambda changed: of(changed).dims.append(1)), tensor.name
            for axis, size in enumerate(tensor.dims):
                assert noticed(lambda changed: of(changed).dims.__setitem__(axis, size + 2)), tensor.name
            if kind == "input":
                assert noticed(lambda changed: setattr(of(changed), "optional", not tensor.optional)), tensor.name
        assert noticed(lambda changed: getattr(changed, kind).pop())
    assert noticed(lambda changed: setattr(changed, "name", "another"))
    assert noticed(lambda changed: setattr(changed, "max_batch_size", config.max_batch_size + 1))
    decoupled = config.model_transaction_policy.decoupled
    assert noticed(lambda changed: setattr(changed.model_transaction_policy, "decoupled", not decoupled))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_is_completely_and_consistently_wired(name):
    assert faults(read(f"{name}/config.pbtxt")) == []


@pytest.mark.parametrize("name", ENSEMBLES)
def test_a_wrong_wire_in_an_ensemble_is_noticed(name):
    ensemble = read(f"{name}/config.pbtxt")
    for position, step in enumerate(ensemble.ensemble_scheduling.step):
        for kind in ("input_map", "output_map"):
            for key in getattr(step, kind):
                for change in ("drop", "elsewhere", "other key"):
                    changed = ModelConfig()
                    changed.CopyFrom(ensemble)
                    wires = getattr(changed.ensemble_scheduling.step[position], kind)
                    if change == "elsewhere":
                        wires[key] = "elsewhere"
                    else:
                        value = wires.pop(key)
                        if change == "other key":
                            wires[key + "_"] = value
                    assert faults(changed), (step.model_name, kind, key, change)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_has_a_version_that_git_carries(name):
    # Triton loads no model without a version folder, and git keeps no empty one.
    assert any((REPOSITORY / name / "1").iterdir())


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_runs_in_a_compiled_backend_on_a_gpu_and_in_python_on_a_cpu(name):
    gpu, cpu = read(f"{name}/config.pbtxt"), read(f"{name}/configs/cpu.pbtxt")
    assert gpu.backend in ("tensorrt", "onnxruntime") and cpu.backend == "python"
    assert gpu.default_model_filename == {"tensorrt": "model.plan", "onnxruntime": "model.onnx"}[gpu.backend]
    assert gpu.HasField("dynamic_batching") and gpu.instance_group[0].kind == gpu.instance_group[0].KIND_GPU
    assert cpu.instance_group[0].kind == cpu.instance_group[0].KIND_CPU


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_no_configuration_has_cuda_graphs(path):
    """With them Triton's TensorRT backend has returned results of earlier requests, which here are another patient's.

    triton-inference-server/server#8550 was open in July 2026. What they gain is below a millisecond for a scan.
    """
    assert not read(path).optimization.cuda.graphs


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_no_request_waits_for_others_to_make_a_batch(path):
    batching = read(path).dynamic_batching
    assert not batching.preferred_batch_size and batching.max_queue_delay_microseconds == 0


@pytest.mark.parametrize(
    ("name", "caller"),
    [("vision_encoder", "study"), ("segmentation_encoder", "study"), ("segmentation_head", "segmentation")],
)
def test_a_batch_is_no_larger_than_what_its_caller_sends_at_a_time(name, caller):
    """Memory goes with the largest batch, used or not."""
    assert MODELS[name].max_batch_size == getattr(Settings(), caller).threads


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_each_profile_of_a_plan_takes_its_own_memory(name):
    assert parameters(f"{name}/config.pbtxt")["execution_context_allocation_strategy"] == "ON_PROFILE_CHANGE"


@pytest.mark.parametrize("name", sorted(set(GRAPHS) - set(IMAGE_ENCODERS)))
def test_onnx_runtime_computes_in_fp32_on_a_gpu_and_takes_no_more_memory_than_it_needs(name):
    """tests/unit/test_tf32.py says what TF32 would cost. The names are those of Triton's backend."""
    (accelerator,) = read(f"{name}/config.pbtxt").optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    found = parameters(f"{name}/config.pbtxt")
    assert (found["arena_extend_strategy"], found["enable_mem_pattern"]) == ("1", "0")
    assert found["cudnn_conv_algo_search"] == "1"
