"""Precision written into the graph: what is reduced, what stays in fp32, and that the CPU shows what a GPU rounds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import weights
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from engine.models.config import LamedConfig, ViTConfig
from engine.models.lamed import Lamed
from export import graphs, plans, typed_graph
from export.typed_graph import FP32_PARTS, GraphError, module_of
from tests import tiny

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT16}
VOLUME = tiny.volume()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The ONNX file of a small vision encoder: two blocks and the projector."""
    config = LamedConfig(
        vision=ViTConfig(tiny.IMAGE_SIZE, tiny.PATCH_SIZE, **tiny.VIT),
        segmentation=None,
        family="lamed_llama",
        llm={"hidden_size": 128},
    )
    model = Lamed(config, with_llm=False).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.fill(shapes, "typed").items()})
    path = tmp_path_factory.mktemp("typed") / "model.onnx"
    graphs._export(graphs.lamed_graphs(model)[0], path, fused=False)
    return path


@pytest.fixture(scope="module")
def amax(exported):
    return plans.calibrate(exported, [VOLUME])


@pytest.fixture(scope="module")
def expected(exported):
    return ReferenceEvaluator(onnx.load(exported)).run(None, {"IMAGE": VOLUME[None]})[0]


def error(found, expected) -> float:
    return float(np.sqrt(np.mean((found - expected) ** 2)) / np.sqrt(np.mean(expected**2)))


def on_cpu(model):
    return plans.on_cpu(model)({"IMAGE": VOLUME[None]})["VISUAL_TOKENS"]


def types(model) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def producers(model) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def is_cast(node: onnx.NodeProto | None, to: int) -> bool:
    return node is not None and node.op_type == "Cast" and node.attribute[0].i == to


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_products_are_reduced_and_norms_softmax_and_residuals_are_not(exported, amax, precision):
    model = typed_graph.typed(onnx.load(exported), precision, amax)
    onnx.checker.check_model(model, full_check=True)
    found, producer = types(model), producers(model)
    for node in model.graph.node:
        kind = found[node.input[0]]
        if node.op_type == "MatMul":
            if cast_up := [producer[name] for name in node.input if is_cast(producer.get(name), TensorProto.FLOAT)]:
                (kind,) = {found[cast.input[0]] for cast in cast_up}
            assert kind == (TensorProto.FLOAT if "patch_embedding" in module_of(node) else LOW[precision]), node.name
        elif (
            node.op_type in ("LayerNormalization", "Softmax", "AveragePool")
            or node.op_type == "Add"
            and module_of(node).endswith(("blocks.0", "blocks.1"))
        ):
            assert kind == TensorProto.FLOAT, node.name
    assert {found["IMAGE"], found["VISUAL_TOKENS"]} == {TensorProto.FLOAT}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_sums_of_fp16_are_asked_for_in_fp32(exported, amax, precision):
    """By casts around a product, as TensorRT reads them. bf16 has no other sums, quantised products have their own."""
    model = typed_graph.typed(onnx.load(exported), precision, amax)
    found, producer = types(model), producers(model)
    widened = 0
    for node in model.graph.node:
        if node.op_type != "MatMul" or "patch_embedding" in module_of(node):
            continue
        casts = [is_cast(producer.get(name), TensorProto.FLOAT) for name in node.input]
        quantised = any(name.endswith("_dequantised") for name in node.input)
        assert casts == [precision != "bf16" and not quantised] * 2, node.name
        if casts[0]:
            readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
            assert {found[producer[name].input[0]] for name in node.input} == {TensorProto.FLOAT16}
            assert [is_cast(reader, TensorProto.FLOAT16) for reader in readers] == [True]
            widened += 1
    # Two blocks: two products of attention and four with weights in each; the projector has two.
    assert widened == {"fp16": 14, "bf16": 0, "fp8": 6}[precision]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 1.5e-2), ("fp8", 5e-2)])
def test_a_typed_graph_computes_what_the_graph_does_up_to_its_rounding(exported, amax, expected, precision, bound):
    found = error(on_cpu(typed_graph.typed(onnx.load(exported), precision, amax)), expected)
    assert found < bound and (precision == "fp32" or found > bound / 100)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_the_rounding_on_a_cpu_is_that_of_the_onnx_reference_evaluator(exported, amax, expected, precision):
    model = typed_graph.typed(onnx.load(exported), precision, amax)
    reference = ReferenceEvaluator(model).run(None, {"IMAGE": VOLUME[None]})[0]
    of_evaluator, of_ours = error(reference, expected), error(on_cpu(model), expected)
    assert 0.7 < of_ours / of_evaluator < 1.4
    # Sums in another order flip some last bits; skipped roundings would leave the whole error as the difference.
    assert error(on_cpu(model), reference) < of_evaluator


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_stays_in_fp32_is_worth_it(exported, expected, precision):
    model = onnx.load(exported)
    kept, reduced = (typed_graph.typed(model, precision, fp32_parts=parts) for parts in (FP32_PARTS, frozenset()))
    assert error(on_cpu(reduced), expected) > 1.05 * error(on_cpu(kept), expected)


def test_keys_reach_their_product_by_one_transposition(exported):
    before, after = onnx.load(exported), typed_graph.plain_attention(onnx.load(exported))
    assert len(after.graph.node) < len(before.graph.node)
    producer = {output: node for node in after.graph.node for output in node.output}
    for node in after.graph.node:
        if node.op_type == "Softmax":
            keys = producer[producer[producer[node.input[0]].input[1]].input[0]]
            assert keys.op_type == "Transpose" and list(keys.attribute[0].ints) == [0, 1, 3, 2]
    assert sum(node.op_type == "Softmax" for node in after.graph.node) == 2


def test_fp8_weights_are_quantised_per_column_and_activations_by_calibration(exported, amax):
    model = typed_graph.typed(onnx.load(exported), "fp8", amax)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantised = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantised) == len(amax) == 8 and min(amax.values()) > 0
    for node in quantised:
        assert tensors[node.input[1]] == pytest.approx(amax[node.input[0].removesuffix("_float16")] / 448, rel=1e-3)
    sources = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(exported).graph.initializer}
    names = [name.removesuffix("_fp8") for name in tensors if name.endswith("_fp8")]
    assert len(names) == 8
    for name in names:
        restored = tensors[f"{name}_fp8"].astype(np.float32) * tensors[f"{name}_scale"].astype(np.float32)
        assert np.abs(restored - sources[name]).max() < 0.04 * np.abs(sources[name]).max()


def test_a_node_names_the_module_it_came_from(exported):
    modules = {module_of(node) for node in onnx.load(exported).graph.node}
    assert {"vision_tower.vision_tower.blocks.1.attn.qkv", "mm_projector.projector.2"} <= modules
    assert module_of(onnx.helper.make_node("Add", ["a", "b"], ["c"])) == ""


def test_declared_shapes_become_free_but_for_axes_of_one(exported):
    model = typed_graph.free_shapes(onnx.load(exported))
    (image,) = model.graph.input
    assert [dim.dim_value for dim in image.type.tensor_type.shape.dim] == [0, 1, 0, 0, 0]
    assert ReferenceEvaluator(model).run(None, {"IMAGE": VOLUME[None]})[0].shape == (1, 8, 128)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("fp4",), "fp4"), (("fp8",), "calibration"), (("fp8", {"layer_norm": 1.0}), "largest magnitude")],
)
def test_an_impossible_precision_is_refused(exported, arguments, words):
    with pytest.raises(GraphError, match=words):
        typed_graph.typed(onnx.load(exported), *arguments)
