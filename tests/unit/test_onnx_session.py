import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engine.contract import MODELS
from engine.errors import InvalidInput, RepositoryError
from engine.processor import has_bf16
from engine.runtime import onnx_session
from engine.runtime.onnx_session import OnnxGraph, _options, chosen_precision

MODEL = MODELS["segmentation_head"]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def write_graph(
    path,
    features=("FEATURES", FLOAT, ["batch", 2, 3, 4, 4]),
    state=("SEG_STATE", FLOAT, ["batch", 6]),
    logits=("MASK_LOGITS", FLOAT, ["batch", 1, 3, 4, 4]),
    external=False,
):
    """MASK_LOGITS = sum of FEATURES over the channels + sum of SEG_STATE + a bias."""
    nodes = [
        helper.make_node("Cast", [features[0]], ["f"], to=FLOAT),
        helper.make_node("ReduceSum", ["f", "channel"], ["sum"], keepdims=1),
        helper.make_node("Cast", [state[0]], ["s"], to=FLOAT),
        helper.make_node("ReduceSum", ["s", "channel"], ["flat"], keepdims=1),
        helper.make_node("Reshape", ["flat", "shape"], ["term"]),
        helper.make_node("Add", ["sum", "term"], ["unbiased"]),
        helper.make_node("Add", ["unbiased", "bias"], ["y"]),
        helper.make_node("Cast", ["y"], [logits[0]], to=logits[1]),
    ]
    tensors = [
        helper.make_tensor("channel", INT64, [1], [1]),
        helper.make_tensor("shape", INT64, [5], [-1, 1, 1, 1, 1]),
        onnx.numpy_helper.from_array(np.full((1, 1, 3, 4, 4), 7, np.float32), "bias"),
    ]
    infos = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in (features, state, logits)]
    graph = helper.make_graph(nodes, "head", infos[:2], infos[2:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


@pytest.fixture
def graph(tmp_path):
    return OnnxGraph(write_graph(tmp_path / "model.onnx"), MODEL, threads=1)


def inputs(batch=2):
    rng = np.random.default_rng(0)
    return {"FEATURES": rng.random((batch, 2, 3, 4, 4), np.float32), "SEG_STATE": rng.random((batch, 6), np.float32)}


def expected(batch):
    return batch["FEATURES"].sum(1, keepdims=True) + batch["SEG_STATE"].sum(1).reshape(-1, 1, 1, 1, 1) + 7


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_is_a_function_of_named_batches(graph, batch):
    outputs = graph(inputs(batch))
    assert list(outputs) == ["MASK_LOGITS"]
    np.testing.assert_allclose(outputs["MASK_LOGITS"], expected(inputs(batch)), rtol=1e-6)


def test_a_memory_map_that_cannot_be_written_is_read_as_it_is(graph, tmp_path):
    np.save(tmp_path / "features.npy", inputs()["FEATURES"])
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    outputs = graph({**inputs(), "FEATURES": mapped})
    np.testing.assert_allclose(outputs["MASK_LOGITS"], expected(inputs()), rtol=1e-6)


def test_weights_may_lie_beside_the_graph(tmp_path):
    graph = OnnxGraph(write_graph(tmp_path / "model.onnx", external=True), MODEL, threads=1)
    assert (tmp_path / "weights.bin").stat().st_size
    np.testing.assert_allclose(graph(inputs())["MASK_LOGITS"], expected(inputs()), rtol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"features": ("IMAGE", FLOAT, ["batch", 2, 3, 4, 4])},
        {"logits": ("LOGITS", FLOAT, ["batch", 1, 3, 4, 4])},
        {"state": ("SEG_STATE", INT64, ["batch", 6])},
        {"logits": ("MASK_LOGITS", TensorProto.DOUBLE, ["batch", 1, 3, 4, 4])},
        {"state": ("SEG_STATE", FLOAT, ["batch", 3, 2])},
        {"features": ("FEATURES", FLOAT, ["batch", 2, 3, 16])},
    ],
    ids=str,
)
def test_a_graph_that_is_not_what_the_contract_promises_is_refused(tmp_path, other):
    path = write_graph(tmp_path / "model.onnx", **other)
    with pytest.raises(RepositoryError, match="segmentation_head.*export the repository again"):
        OnnxGraph(path, MODEL, threads=1)


def test_a_missing_or_damaged_graph_names_itself_and_the_way_out(tmp_path):
    with pytest.raises(RepositoryError, match="segmentation_head.*missing.*build_engines.py"):
        OnnxGraph(tmp_path / "model.onnx", MODEL)
    (tmp_path / "model.onnx").write_bytes(b"half a graph")
    with pytest.raises(RepositoryError, match="(?s)segmentation_head.*cannot read.*build_engines.py"):
        OnnxGraph(tmp_path / "model.onnx", MODEL)


@pytest.mark.parametrize(
    "change",
    [
        {"SEG_STATE": np.zeros((2, 7), np.float32)},
        {"SEG_STATE": np.zeros((2, 6), np.float64)},
        {"SEG_STATE": np.zeros(6, np.float32)},
        {"FEATURES": np.zeros((2, 2, 3, 4, 5), np.float32)},
        {"FEATURES": np.zeros((0, 2, 3, 4, 4), np.float32)},
    ],
    ids=lambda change: str({name: (array.dtype, array.shape) for name, array in change.items()}),
)
def test_an_input_of_the_wrong_shape_or_type_is_the_callers_mistake(graph, change):
    name = next(iter(change))
    with pytest.raises(InvalidInput, match=f"segmentation_head: {name} must be FP32 any x "):
        graph({**inputs(), **change})
    np.testing.assert_allclose(graph(inputs())["MASK_LOGITS"], expected(inputs()), rtol=1e-6)


def test_waiting_threads_do_not_spin_and_memory_is_given_back():
    options = _options(2)
    assert options.intra_op_num_threads == 2
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"
    assert not options.enable_cpu_mem_arena


@pytest.mark.skipif(not has_bf16(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("batch", [1, 3])
def test_bf16_is_the_same_function_a_little_coarser(tmp_path, batch):
    graph = OnnxGraph(write_graph(tmp_path / "model.onnx", external=True), MODEL, threads=1, precision="bf16")
    for _ in range(2):  # a second run must not change what the first returned
        outputs = graph(inputs(batch))["MASK_LOGITS"]
        np.testing.assert_allclose(outputs, expected(inputs(batch)), rtol=2e-2)
    other = {name: array + 1 for name, array in inputs(batch).items()}
    kept = outputs.copy()
    graph(other)
    np.testing.assert_array_equal(outputs, kept)


def _products(path, weights, turned):
    """MASK_LOGITS = sum over the channels of FEATURES @ weights, + SEG_STATE's first value; factors transposed if
    `turned`."""
    a, b = ("xt", "wt") if turned else ("FEATURES", "w")
    nodes = [
        helper.make_node("Transpose", ["FEATURES"], ["x"], perm=[0, 1, 2, 4, 3]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[0, 1, 2, 4, 3]),
        helper.make_node("Transpose", ["turned"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", [a, b], ["product"]),
        helper.make_node("ReduceSum", ["product", "channel"], ["sum"], keepdims=1),
        helper.make_node("Slice", ["SEG_STATE", "zero", "one", "one"], ["first"]),
        helper.make_node("Reshape", ["first", "shape"], ["term"]),
        helper.make_node("Add", ["sum", "term"], ["MASK_LOGITS"]),
    ]
    tensors = [
        helper.make_tensor("channel", INT64, [1], [1]),
        helper.make_tensor("shape", INT64, [5], [-1, 1, 1, 1, 1]),
        helper.make_tensor("zero", INT64, [1], [0]),
        helper.make_tensor("one", INT64, [1], [1]),
        onnx.numpy_helper.from_array(weights, "w"),
        onnx.numpy_helper.from_array(weights.T.copy(), "turned"),
    ]
    infos = [
        helper.make_tensor_value_info(name, FLOAT, shape)
        for name, shape in (
            ("FEATURES", ["batch", 2, 3, 4, 4]),
            ("SEG_STATE", ["batch", 6]),
            ("MASK_LOGITS", ["batch", 1, 3, 4, 4]),
        )
    ]
    graph = helper.make_graph(nodes, "head", infos[:2], infos[2:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.skipif(not has_bf16(), reason="this processor does not multiply bf16")
@pytest.mark.parametrize("turned", [False, True])
def test_weights_that_bf16_does_not_hold_lose_next_to_nothing(tmp_path, monkeypatch, turned):
    """Columns of weights nearly cancel: rounded once, they would leave nothing of the difference."""
    from engine.runtime.cpu import openvino_session

    monkeypatch.setattr(openvino_session, "_EMBEDDING", 0)  # of the graph's one product none shall stay in fp32
    monkeypatch.setattr(openvino_session, "_BLOCK", 0)
    rng = np.random.default_rng(0)
    half = 1 + rng.random((2, 4), np.float32)
    weights = np.concatenate([half, -half * np.float32(1 + 2**-10)])
    given = {"FEATURES": np.ones((1, 2, 3, 4, 4), np.float32), "SEG_STATE": np.zeros((1, 6), np.float32)}
    graph = OnnxGraph(_products(tmp_path / "model.onnx", weights, turned), MODEL, threads=1, precision="bf16")
    exact = (given["FEATURES"] @ weights).sum(1, keepdims=True)
    assert np.abs(exact).max() < 0.01
    np.testing.assert_allclose(graph(given)["MASK_LOGITS"], exact, rtol=2e-2)


@pytest.mark.skipif(not has_bf16(), reason="this processor does not multiply bf16")
def test_signals_are_handled_after_bf16_graphs_are_gone(tmp_path):
    write_graph(tmp_path / "model.onnx")
    code = f"""if True:
        import gc, signal, subprocess, sys
        from engine.contract import MODELS
        from engine.runtime.onnx_session import OnnxGraph
        graphs = [OnnxGraph({str(tmp_path / "model.onnx")!r}, MODELS["segmentation_head"], precision="bf16")
                  for _ in range(2)]
        while graphs:
            graphs.pop(0)
            gc.collect()
        signal.signal(signal.SIGCHLD, lambda number, frame: print("child ended"))
        subprocess.run([sys.executable, "-c", ""], check=True)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "child ended\n"), done.stderr


@pytest.mark.skipif(not has_bf16(), reason="this processor does not multiply bf16")
def test_the_contract_holds_in_bf16_too(tmp_path):
    with pytest.raises(RepositoryError, match="segmentation_head.*export the repository again"):
        OnnxGraph(
            write_graph(tmp_path / "model.onnx", logits=("LOGITS", FLOAT, ["batch", 1, 3, 4, 4])),
            MODEL,
            precision="bf16",
        )
    (tmp_path / "model.onnx").write_bytes(b"half a graph")
    with pytest.raises(RepositoryError, match="(?s)segmentation_head: OpenVINO cannot read.*build_engines.py"):
        OnnxGraph(tmp_path / "model.onnx", MODEL, precision="bf16")


def test_auto_takes_bf16_where_export_and_processor_have_it(monkeypatch):
    for native, wanted, of_export, chosen in (
        (True, "auto", "bf16", "bf16"),
        (True, "auto", "fp32", "fp32"),
        (True, "auto", "fp16", "fp32"),
        (False, "auto", "bf16", "fp32"),
        (True, "fp32", "bf16", "fp32"),
        (True, "bf16", "fp32", "bf16"),
    ):
        monkeypatch.setattr(onnx_session, "multiplies_bf16", lambda: native)
        assert chosen_precision(wanted, of_export) == chosen


def test_bf16_on_a_processor_without_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_session, "multiplies_bf16", lambda: False)
    with pytest.raises(RepositoryError, match="take fp32 or auto"):
        OnnxGraph(write_graph(tmp_path / "model.onnx"), MODEL, precision="bf16")
