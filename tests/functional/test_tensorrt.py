"""The GPU target without a GPU: engines of the published sizes are built ahead of time, and configurations fit them."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from benchmarks.make_checkpoint import config_of, write
from engine import contract
from engine.errors import InvalidInput, RepositoryError, Unavailable
from engine.manifest import TENSORRT_CONFIG, Manifest
from engine.models.checkpoint import bytes_read, read_config
from engine.models.clip import M3DClip
from engine.models.config import ClipConfig, LamedConfig, ViTConfig
from engine.models.lamed import Lamed
from engine.models.needs import needs, parts_of
from engine.server.server import Server, free_ports
from engine.server.triton import Triton
from export import graphs, tensorrt, typed_graph
from export.build_engines import export
from export.build_settings import BuildSettings
from tests.conftest import ROOT, copy_repository
from tests.functional.footprint import run_watched
from tests.tiny import volume, write_tiny_clip

pytestmark = pytest.mark.integration

ARCHITECTURES = ("8.0", "8.6", "8.9", "12.0")
BLOCKS, PROFILES = 12, 2
ONNX_DTYPES = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.INT64: "INT64"}

# --- engines of the published sizes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=contract.IMAGE_ENCODERS)
def full_size(request, tmp_path_factory):
    """The exported ONNX graph of one encoder: 32 x 256 x 256 voxels, 12 blocks, 768 wide; random weights."""
    vit = ViTConfig((32, 256, 256), (4, 16, 16))
    with torch.device("meta"):
        if request.param == "clip_image_encoder":
            model = M3DClip(ClipConfig(vision=vit, bert={"num_hidden_layers": 1}))
            graph = graphs.clip_graphs(model)[0]
        else:
            config = LamedConfig(vision=vit, segmentation=vit, family="lamed_llama", llm={"hidden_size": 4096})
            lamed = Lamed(config, with_llm=False)
            graph = graphs.lamed_graphs(lamed)[contract.IMAGE_ENCODERS.index(request.param)]
    graph.module.to_empty(device="cpu").eval()
    for parameter in graph.module.parameters():
        torch.nn.init.trunc_normal_(parameter, std=0.02)
    path = tmp_path_factory.mktemp(request.param) / request.param / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    graphs._export(graph, path, fused=False)
    del graph
    gc.collect()
    yield path
    for file in path.parent.iterdir():
        file.unlink()


@pytest.mark.slow(group="matrix")
@pytest.mark.parametrize("precision", typed_graph.PRECISIONS)
def test_a_full_size_encoder_builds_for_every_architecture(full_size, precision):
    exported = onnx.load(full_size)
    model = typed_graph.typed(exported, precision, dict.fromkeys(typed_graph.fp8_inputs(exported), 8.0))
    del exported
    typed = full_size.with_name("model.typed.onnx")
    typed_graph.save(model, typed)
    del model
    for architecture in ARCHITECTURES if precision != "fp8" else ("8.9", "12.0"):  # older ones have no fp8
        entry = tensorrt.build(typed, full_size.with_name("model.rtx.plan"), BuildSettings("rtx", architecture))
        assert entry["bindings"]["IMAGE"] == ["FP32", -1, 1, 32, 256, 256]
        assert entry["profiles"] == [[1, 1, 1], [1, 4, 4]] and entry["bytes"] > 80e6
        # Unfused scores alone are 0.2 GB a volume in fp32.
        one, four = (size / 1e6 for size in entry["context_bytes"])
        assert (400 < one < 650 and four < 2000) if precision == "fp32" else (25 < one < 45 and 90 < four < 140)
        assert entry["context_source"] == "build log"
        # In reduced precision every attention is one kernel; in fp32 TensorRT has none.
        assert entry["fused_attentions"] == (0 if precision == "fp32" else BLOCKS * PROFILES)
        assert (full_size.parent / tensorrt.REPORT).read_text().startswith("Layers:")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(checkpoint, scan): encoders and mask head, a language model of one layer of the published width."""
    folder = tmp_path_factory.mktemp("published")
    config = config_of("7b", num_hidden_layers=1, intermediate_size=256, vocab_size=600, max_position_embeddings=512)
    np.save(folder / "scan.npy", volume("scan"))
    yield write(folder / "checkpoint", config), folder / "scan.npy"
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "precision",
    ["fp16", *(pytest.param(one, marks=pytest.mark.slow(group="matrix")) for one in ("fp32", "bf16", "fp8"))],
)
def test_the_documented_command_builds_plans_of_the_published_size(published, tmp_path, precision):
    """From the checkpoint to a repository that the doctor knows, within the memory that was said."""
    (checkpoint, scan), repository = published, copy_repository(tmp_path)
    arguments = ["--checkpoint", checkpoint, "--target", "tensorrt", "--precision", precision]
    arguments += ["--builder", "rtx", "--compute-capability", "8.9", "--repository", repository]
    said, peak = run_watched(
        "export/build_engines.py", *arguments, *(["--calibration", scan] if precision == "fp8" else [])
    )
    size = bytes_read(checkpoint)
    needed = needs(parts_of(LamedConfig.from_dict(read_config(checkpoint))), size, "tensorrt", precision)
    print(f"{precision}: {said.splitlines()[-1]}, {peak / 1e9:.2f} GB of memory at most; {needed} were said")
    assert peak < 1.3 * size + 2e9 and 0.7 * needed.memory < peak < needed.memory
    manifest = Manifest.read(repository)
    for name in contract.IMAGE_ENCODERS[:2]:
        plan, memory = manifest.graphs[name]["plan"], manifest.gpu_memory[name]
        assert 0 < plan["max_error"] <= plan["bound"] and plan["compared"] == "typed graph on the CPU"
        assert plan["precision"] == precision and plan["bindings"]["IMAGE"] == ["FP32", -1, 1, 32, 256, 256]
        # In reduced precision every attention is one kernel; in fp32 TensorRT has none.
        assert plan["fused_attentions"] == (0 if precision == "fp32" else BLOCKS * PROFILES)
        weights = (repository / name / "1" / "model.rtx.plan").stat().st_size
        assert plan["bytes"] == memory["weights"] == weights > {"fp32": 350e6, "fp8": 100e6}.get(precision, 150e6)
        assert sum(memory["contexts"]) < (2.4e9 if precision == "fp32" else 0.18e9)
        for config in ("config.pbtxt", TENSORRT_CONFIG):
            assert refusals(read(repository / name / config), bindings(repository, manifest, name)) == []
    command = [sys.executable, "-m", "engine.cli", "doctor", "--target", "tensorrt", "--repository", repository]
    doctor = subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "1000"}, capture_output=True, text=True)
    assert f"{repository}: checkpoint for tensorrt" in doctor.stdout and "volumes of 32 x 256 x 256" in doctor.stdout
    assert "its plans were built by TensorRT for RTX" in doctor.stdout


# --- a whole repository ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def planned(fixture_checkpoint, tmp_path_factory):
    """A small checkpoint exported for target tensorrt by TensorRT-RTX, and its manifest."""
    folder = tmp_path_factory.mktemp("planned")
    np.save(folder / "scan.npy", volume("scan"))
    repository = copy_repository(folder)
    return repository, export(
        str(fixture_checkpoint),
        repository,
        clip_checkpoint=str(write_tiny_clip(folder / "clip")),
        target="tensorrt",
        precision="fp8",
        settings=BuildSettings("rtx", "8.9"),
        calibration=[folder / "scan.npy"],
    )


def bindings(repository: Path, manifest: Manifest, name: str) -> dict[str, tuple[str, list[int]]]:
    """Name -> (Triton's dtype, shape with -1 for free axes) of the plan, or of the ONNX graph."""
    if plan := manifest.graphs[name].get("plan"):
        return {tensor: (dtype, shape) for tensor, (dtype, *shape) in plan["bindings"].items()}
    graph = onnx.load(repository / name / "1" / "model.onnx", load_external_data=False).graph
    return {
        value.name: (
            ONNX_DTYPES[value.type.tensor_type.elem_type],
            [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }


def refusals(config: ModelConfig, found: dict[str, tuple[str, list[int]]]) -> list[str]:
    """Why Triton's backend would not load a model, as the sources of both backends have it (CompareDimsSupported)."""
    wrong = []
    configured = {
        t.name: (DataType.Name(t.data_type).removeprefix("TYPE_"), [-1, *t.dims])
        for t in (*config.input, *config.output)
    }
    if set(configured) != set(found):
        wrong.append(f"{sorted(configured)} instead of {sorted(found)}")
    for name in set(configured) & set(found):
        (dtype, dims), (actual, shape) = configured[name], found[name]
        if dtype != actual:
            wrong.append(f"{name} is {dtype} instead of {actual}")
        # TensorRT's backend lets a configuration leave open what the plan fixes, ONNX Runtime's does not.
        open_is_fine = config.backend == "tensorrt"
        if (
            len(dims) != len(shape)
            or shape[0] != -1
            or any(size not in (-1, dim) and not (dim == -1 and open_is_fine) for dim, size in zip(dims, shape))
        ):
            wrong.append(f"{name} is {dims} instead of {shape}")
    return wrong


def read(path: Path) -> ModelConfig:
    return text_format.Parse(path.read_text(), ModelConfig())


@pytest.mark.parametrize("config", ["config.pbtxt", str(TENSORRT_CONFIG)])
@pytest.mark.parametrize("name", contract.GRAPHS)
def test_the_backend_accepts_the_configuration_of_what_was_built_and_no_mutation_of_it(planned, name, config):
    repository, manifest = planned
    config, found = read(repository / name / config), bindings(repository, manifest, name)
    assert refusals(config, found) == []
    for kind in ("input", "output"):
        for position, tensor in enumerate(getattr(config, kind)):
            for change in (
                lambda t: setattr(t, "name", f"{t.name}_"),
                lambda t: t.dims.append(1),
                lambda t: setattr(t, "data_type", t.data_type % 13 + 1),
            ):
                mutated = ModelConfig()
                mutated.CopyFrom(config)
                change(getattr(mutated, kind)[position])
                assert refusals(mutated, found), tensor.name


def test_a_graph_with_fixed_axes_would_be_refused_by_the_onnx_runtime_backend(repository, planned):
    found = bindings(repository, Manifest.read(repository), "segmentation_head")  # as it is served on a CPU
    assert refusals(read(planned[0] / "segmentation_head" / "config.pbtxt"), found)


@pytest.mark.parametrize("name", contract.GRAPHS)
def test_the_warm_up_has_the_checkpoints_own_sizes(planned, name):
    repository, manifest = planned
    config, plain = read(repository / name / TENSORRT_CONFIG), read(repository / name / "config.pbtxt")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, config.max_batch_size]
    shapes = {
        "IMAGE": [1, *manifest.image_size],
        "SEG_STATE": [manifest.llm_width],
        "INPUT_IDS": [manifest.clip_text_length],
        "ATTENTION_MASK": [manifest.clip_text_length],
        "FEATURES": [64, *(n // p for n, p in zip(manifest.image_size, manifest.patch_size))],
    }
    for warmup in config.model_warmup:
        assert {name: list(given.dims) for name, given in warmup.inputs.items()} == {
            t.name: shapes[t.name] for t in config.input
        }
    del config.model_warmup[:]
    assert config == plain


@pytest.mark.parametrize("name", contract.IMAGE_ENCODERS)
def test_triton_uses_every_profile_of_a_plan_and_refuses_beyond_its_queue(planned, name):
    repository, manifest = planned
    config, plan = read(repository / name / "config.pbtxt"), manifest.graphs[name]["plan"]
    (group,) = config.instance_group
    assert list(group.profile) == [str(k) for k in range(len(plan["profiles"]))] and group.kind == group.KIND_GPU
    # Triton's backend takes the profile that fits a batch best, and wants its largest batch of one of them alone.
    assert config.max_batch_size == max(most for _, _, most in plan["profiles"])
    policy = config.dynamic_batching.default_queue_policy
    assert (
        policy.max_queue_size > 0 and policy.default_timeout_microseconds > 0 and policy.timeout_action == policy.REJECT
    )


def test_a_file_that_is_no_onnx_is_named(tmp_path):
    path = tmp_path / "vision_encoder" / "1" / "model.typed.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a graph")
    with pytest.raises(tensorrt.BuildError, match=f"{path} is no ONNX file"):
        tensorrt.build(path, path.with_name("model.rtx.plan"), BuildSettings("rtx", "8.9"))


def test_the_manifest_says_how_plans_were_built_and_how_exact_they_are(planned):
    repository, manifest = planned
    assert (manifest.target, manifest.precision, manifest.plans["precision"]) == ("tensorrt", "bf16", "fp8")
    for name in contract.IMAGE_ENCODERS:
        plan = manifest.graphs[name]["plan"]
        assert 0 < plan["max_error"] <= plan["bound"] and plan["compared"] == "typed graph on the CPU"
        assert sorted(p.name for p in (repository / name / "1").iterdir()) == [
            "layers.txt",
            "model.py",
            "model.rtx.plan",
        ]
    assert Manifest.read(repository) == manifest


@pytest.mark.parametrize("name", contract.GRAPHS)
def test_the_manifest_says_what_each_graph_takes_of_a_gpus_memory(planned, name):
    repository, manifest = planned
    memory, folder = manifest.gpu_memory[name], repository / name / "1"
    files = [file for file in folder.iterdir() if file.name.startswith(("model.rtx.plan", "model.onnx"))]
    assert memory["weights"] == sum(file.stat().st_size for file in files) > 0
    if name in contract.IMAGE_ENCODERS:
        one, four = memory["contexts"]
        assert 0 < one < four < 5 * one and memory["source"] == "build log"
        volume = 4 * np.prod(manifest.image_size)
        assert memory["bindings"] > contract.ENCODER_MAX_BATCH * volume
    else:
        assert len(memory["contexts"]) == 1 and memory["source"] == "graph"


def test_plans_that_were_built_to_check_are_not_served(planned):
    with pytest.raises((RepositoryError, Unavailable), match="TensorRT for RTX"):
        Server(planned[0], target="tensorrt", **free_ports())._check()


@pytest.mark.parametrize("name", contract.GRAPHS)
def test_the_real_triton_reads_a_gpu_configuration_and_misses_its_backend_alone(planned, name, tmp_path):
    triton = Triton.find("cpu")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / name).symlink_to(planned[0] / name)
    done = subprocess.run(
        [
            triton.binary,
            "--model-repository",
            tmp_path / "repository",
            "--model-config-name",
            "tensorrt",
            "--backend-directory",
            triton.assemble_backends(tmp_path),
            "--disable-auto-complete-config",
            "--allow-http",
            "false",
            "--grpc-port",
            str(free_ports()["grpc_port"]),
            "--allow-metrics",
            "false",
            "--exit-timeout-secs",
            "5",
        ],
        env=triton.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    backend = read(planned[0] / name / "config.pbtxt").backend
    assert f"unable to find backend library for backend '{backend}'" in done.stdout + done.stderr


# --- errors ----------------------------------------------------------------------------------------------------------
def test_a_node_that_tensorrt_does_not_know_is_named_with_its_module(tmp_path):
    node = onnx.helper.make_node("StringNormalizer", ["IMAGE"], ["OUT"], name="node_odd")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model.vision_tower.odd', 'odd']")
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("IMAGE", "OUT")
    ]
    graph = tmp_path / "odd_encoder" / "1" / "model.onnx"
    graph.parent.mkdir(parents=True)
    onnx.save(
        onnx.helper.make_model(
            onnx.helper.make_graph([node], "odd", values[:1], values[1:]),
            opset_imports=[onnx.helper.make_opsetid("", 20)],
            ir_version=10,
        ),
        graph,
    )
    with pytest.raises(tensorrt.BuildError, match=r"odd_encoder.*node_odd \(StringNormalizer\) of vision_tower\.odd"):
        tensorrt.build(graph, tmp_path / "model.rtx.plan", BuildSettings("rtx", "8.9"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"builder": "trt"}, "trt"),
        ({"builder": "rtx"}, "--compute-capability"),
        ({"builder": "rtx", "compute_capability": "9.9"}, "9.9"),
        ({"compute_capability": "8.9"}, "of this machine"),
        ({"builder": "rtx", "compute_capability": "8.9", "strip_weights": True}, "--strip-weights"),
        ({"version_compatible": True, "strip_weights": True}, "leave out --version-compatible or --strip-weights"),
        ({"batches": ()}, "1 volume or more"),
        ({"batches": (0, 4)}, "1 volume or more"),
        ({"workspace_gib": 0}, "above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(InvalidInput, match=words):
        BuildSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"builder": "rtx", "compute_capability": "8.6"}, "8.9 or later, not 8.6"),
        ({"hardware_compatible": True}, "--hardware-compatible"),
        ({"strip_weights": True}, "--strip-weights"),
    ],
)
def test_settings_that_do_not_go_with_fp8_are_refused(settings, words):
    given = BuildSettings(**settings)
    given.refuse("fp16")
    with pytest.raises(InvalidInput, match=words):
        given.refuse("fp8")


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": "cpu", "precision": "fp8"},
        {"target": "cpu", "settings": BuildSettings()},
        {"target": "tensorrt", "precision": "fp8", "settings": BuildSettings("rtx", "8.9")},  # no calibration
        {"target": "tensorrt", "precision": "fp8", "settings": BuildSettings("rtx", "8.6"), "calibration": ["x.npy"]},
    ],
)
def test_an_export_refuses_what_cannot_be_built_before_it_starts(fixture_checkpoint, tmp_path, arguments):
    repository = copy_repository(tmp_path)
    with pytest.raises(InvalidInput):
        export(str(fixture_checkpoint), repository, **arguments)
    assert not list(repository.glob("*/1/model.onnx"))
