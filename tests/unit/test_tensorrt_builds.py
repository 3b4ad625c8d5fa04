"""What TensorRT is asked for, and what of its answers is recorded: with a stand-in, since it needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import onnx
import pytest

from engine.errors import InvalidInput
from export import plans, tensorrt
from export.build_settings import BuildSettings

LAYERS = "Layers:\nName: _gemm_mha_v2_myl0_4, LayerType: kgen\nName: node_MatMul_83_myl0_5, LayerType: gemm\n"
CONTEXTS = [40, 126]


class Logger:
    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)


@pytest.fixture
def graph(tmp_path):
    """A graph with one input IMAGE and one output, which a stand-in for TensorRT does not look into."""
    path = tmp_path / "vision_encoder" / "1" / "model.typed.onnx"
    path.parent.mkdir(parents=True)
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("IMAGE", "OUT")
    ]
    nodes = [onnx.helper.make_node("Identity", ["IMAGE"], ["OUT"])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:])), path)
    return path


@pytest.fixture
def api(monkeypatch):
    """A stand-in for TensorRT's module: it builds 9 bytes, and loads them as an engine of two profiles."""
    api = MagicMock(__version__="11.4.0.106", ILogger=Logger)
    builder = api.Builder.return_value
    network = builder.create_network.return_value
    network.num_inputs = network.num_outputs = 1
    for tensor, name in ((network.get_input.return_value, "IMAGE"), (network.get_output.return_value, "OUT")):
        tensor.configure_mock(name=name, shape=(-1, 4))
        tensor.dtype.name = "FLOAT"
    config = builder.create_builder_config.return_value
    config.add_optimization_profile.return_value = 0
    builder.build_serialized_network.return_value = b"nine byte"
    engine = api.Runtime.return_value.deserialize_cuda_engine.return_value
    engine.num_optimization_profiles = len(CONTEXTS)
    engine.get_device_memory_size_for_profile_v2.side_effect = CONTEXTS.__getitem__
    engine.create_engine_inspector.return_value.get_engine_information.return_value = LAYERS
    monkeypatch.setattr(tensorrt, "bindings_module", lambda builder: api)
    return api


def test_layers_and_memory_are_what_the_engine_says_once_it_is_loaded(api, graph):
    plan = graph.with_name("model.plan")
    entry = tensorrt.build(graph, plan, BuildSettings())
    assert plan.read_bytes() == b"nine byte" and plan.with_name(tensorrt.REPORT).read_text() == LAYERS
    assert (entry["context_bytes"], entry["context_source"], entry["fused_attentions"]) == (CONTEXTS, "engine", 1)
    api.Runtime.return_value.deserialize_cuda_engine.assert_called_once_with(b"nine byte")


def test_a_plan_in_fp32_is_built_without_tf32(api, graph):
    tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings())
    config = api.Builder.return_value.create_builder_config.return_value
    config.clear_flag.assert_called_once_with(api.BuilderFlag.TF32)


def test_a_plan_with_a_runtime_of_its_own_in_it_may_be_loaded(api, graph):
    """TensorRT refuses version compatible plans otherwise."""
    tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings(version_compatible=True))
    assert api.Runtime.return_value.engine_host_code_allowed is True
    flags = [call.args[0] for call in api.Builder.return_value.create_builder_config.return_value.set_flag.mock_calls]
    assert flags == [api.BuilderFlag.VERSION_COMPATIBLE]


def test_a_stripped_plan_takes_other_weights_than_those_it_was_built_with(api, graph):
    """STRIP_PLAN alone implies REFIT_IDENTICAL, whose behaviour with other weights TensorRT leaves undefined."""
    tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings(strip_weights=True))
    flags = [call.args[0] for call in api.Builder.return_value.create_builder_config.return_value.set_flag.mock_calls]
    assert flags == [api.BuilderFlag.STRIP_PLAN, api.BuilderFlag.REFIT]


def test_a_stripped_plan_of_one_checkpoint_is_refitted_with_the_weights_of_another(api, graph, tmp_path, monkeypatch):
    """The second is not built. TensorRT leaves refitted weights out of a plan, unless it is asked for them."""
    monkeypatch.setenv("M3D_CACHE", str(tmp_path / "cache"))
    settings, engine = BuildSettings(strip_weights=True), api.Runtime.return_value.deserialize_cuda_engine.return_value
    engine.serialize_with_config.return_value = b"with weights"
    plan = graph.with_name("model.plan")
    for _ in range(2):
        plan.unlink(missing_ok=True)
        entry = plans._stripped_and_refitted(graph, plan, settings, "key")
        assert plan.read_bytes() == b"with weights" and plan.with_name(tensorrt.REPORT).read_text() == LAYERS
        assert (entry["structure_sha256"], entry["bytes"], entry["context_bytes"]) == ("key", 12, CONTEXTS)
    assert api.Builder.return_value.build_serialized_network.call_count == 1
    assert (tmp_path / "cache" / "plans" / "key" / tensorrt.STRIPPED_PLAN).read_bytes() == b"nine byte"
    api.Refitter.assert_called_with(engine, api.OnnxParserRefitter.call_args.args[1])
    assert api.OnnxParserRefitter.return_value.refit_from_file.call_args_list == [call(str(graph))] * 2
    assert api.Refitter.return_value.refit_cuda_engine.call_count == 2
    (cleared,) = engine.create_serialization_config.return_value.clear_flag.call_args.args
    assert cleared is api.SerializationFlag.EXCLUDE_WEIGHTS


@pytest.mark.parametrize(
    "step", ["OnnxParserRefitter.return_value.refit_from_file", "Refitter.return_value.refit_cuda_engine"]
)
def test_weights_that_do_not_fit_a_stripped_plan_fail(api, graph, step):
    api.configure_mock(**{f"{step}.return_value": False})
    stripped, plan = graph.with_name("stripped"), graph.with_name("model.plan")
    stripped.write_bytes(b"nine byte")
    with pytest.raises(tensorrt.BuildError, match="vision_encoder: the weights do not fit the stripped plan"):
        tensorrt.refit(stripped, graph, plan, "tensorrt")
    assert not plan.exists()


def test_a_stripped_plan_is_known_by_all_but_the_weights(api, graph):
    def with_weights(values, folder=None):
        model = onnx.load(graph)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, "weights"))
        if folder is not None:  # as they come from files
            onnx.external_data_helper.set_external_data(model.graph.initializer[0], str(folder))
        return model

    weights, settings = np.zeros((4, 4), np.float16), BuildSettings(strip_weights=True)
    key = tensorrt.structure_key(with_weights(weights), settings)
    assert tensorrt.structure_key(with_weights(weights + 1), settings) == key
    others = [with_weights(weights[:2]), with_weights(weights.astype(np.float32)), onnx.load(graph)]
    assert key not in [tensorrt.structure_key(other, settings) for other in others]
    in_files = [tensorrt.structure_key(with_weights(weights, name), settings) for name in ("one", "other")]
    assert in_files[0] == in_files[1]
    assert tensorrt.structure_key(with_weights(weights), BuildSettings(strip_weights=True, batches=(1,))) != key
    api.__version__ = "11.5.0.1"
    assert tensorrt.structure_key(with_weights(weights), settings) != key


def test_a_plan_for_all_gpus_since_ampere_is_asked_for(api, graph):
    config = api.Builder.return_value.create_builder_config.return_value
    tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings())
    assert config.hardware_compatibility_level is not api.HardwareCompatibilityLevel.AMPERE_PLUS
    entry = tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings(hardware_compatible=True))
    assert config.hardware_compatibility_level is api.HardwareCompatibilityLevel.AMPERE_PLUS
    assert entry["hardware_compatible"]


def test_kernel_times_that_one_build_measured_are_given_to_the_next(api, graph, tmp_path):
    config = api.Builder.return_value.create_builder_config.return_value
    config.get_timing_cache.return_value.serialize.side_effect = [b"once", b"twice"]
    settings = BuildSettings(timing_cache=tmp_path / "times" / "l4.cache")
    for _ in range(2):
        tensorrt.build(graph, graph.with_name("model.plan"), settings)
    assert config.create_timing_cache.call_args_list == [call(b""), call(b"once")]  # nothing makes an empty one
    config.set_timing_cache.assert_called_with(config.create_timing_cache.return_value, ignore_mismatch=False)
    assert settings.timing_cache.read_bytes() == b"twice"


@pytest.mark.parametrize("broken", [{"create_timing_cache": None}, {"set_timing_cache": False}])
def test_kernel_times_of_another_gpu_or_a_file_that_has_none_are_refused(api, graph, tmp_path, broken):
    file = tmp_path / "l4.cache"
    file.write_bytes(b"of an A10G")
    config = api.Builder.return_value.create_builder_config.return_value
    config.configure_mock(**{f"{name}.return_value": value for name, value in broken.items()})
    with pytest.raises(InvalidInput, match=rf"{file} is no timing cache, or that of another GPU"):
        tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings(timing_cache=file))
    assert file.read_bytes() == b"of an A10G"


def test_profiles_are_for_one_volume_and_for_a_whole_batch(api, graph):
    entry = tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings())
    profile = api.Builder.return_value.create_optimization_profile.return_value
    asked = [call.args for call in profile.set_shape.mock_calls]
    assert asked == [("IMAGE", (1, 4), (1, 4), (1, 4)), ("IMAGE", (1, 4), (4, 4), (4, 4))]
    assert entry["profiles"] == [[1, 1, 1], [1, 4, 4]]
