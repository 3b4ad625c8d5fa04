"""What TensorRT is asked for, and what of its answers is recorded: with a stand-in, since it needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import onnx
import pytest

from export import tensorrt
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


def test_profiles_are_for_one_volume_and_for_a_whole_batch(api, graph):
    entry = tensorrt.build(graph, graph.with_name("model.plan"), BuildSettings())
    profile = api.Builder.return_value.create_optimization_profile.return_value
    asked = [call.args for call in profile.set_shape.mock_calls]
    assert asked == [("IMAGE", (1, 4), (1, 4), (1, 4)), ("IMAGE", (1, 4), (4, 4), (4, 4))]
    assert entry["profiles"] == [[1, 1, 1], [1, 4, 4]]
