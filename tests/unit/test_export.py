"""An export is complete, proven and repeatable, or it fails and leaves nothing that could be served."""

from __future__ import annotations

import json
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import contract
from engine.errors import CheckpointError, RepositoryError
from engine.manifest import FILE_NAME, LLM_FOLDER, Manifest
from engine.models import hub
from engine.models.segvol import WideLayerNorm
from engine.runtime.onnx_session import OnnxGraph
from export import graphs, llm, quantize
from export.build_engines import export, main
from tests import tiny
from tests.conftest import ROOT, copy_repository

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return tiny.write_tiny_lamed(folder / "lamed"), tiny.write_tiny_clip(folder / "clip")


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    repository = copy_repository(tmp_path_factory.mktemp("exported"))
    lamed, clip = checkpoints
    return repository, export(lamed, repository, clip_checkpoint=clip)


def test_a_whole_checkpoint_exports_every_graph_within_its_bound(exported):
    repository, manifest = exported
    assert set(manifest.graphs) == set(contract.GRAPHS)
    assert all(0 <= entry["max_error"] <= entry["bound"] for entry in manifest.graphs.values())
    assert set(manifest.models) == set(contract.MODELS)
    assert Manifest.read(repository) == manifest
    assert all((repository / path).stat().st_size == size for path, size in manifest.files.items())


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vision_encoder", tiny.VIT["num_layers"]),
        ("segmentation_encoder", tiny.VIT["num_layers"]),
        ("clip_image_encoder", tiny.VIT["num_layers"]),
        ("clip_text_encoder", 0),
        ("segmentation_head", 0),
    ],
)
def test_every_attention_of_the_image_encoders_is_one_operator(exported, name, blocks):
    repository, _ = exported
    nodes = onnx.load(repository / name / "1" / "model.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MultiHeadAttention" for node in nodes) == blocks
    assert blocks == 0 or not any(node.op_type == "Softmax" for node in nodes)


def test_the_text_graph_takes_texts_of_any_length_up_to_berts_positions(exported, checkpoints):
    from engine.models.checkpoint import load_clip

    repository, manifest = exported
    assert manifest.clip_text_length == 512
    model = contract.MODELS["clip_text_encoder"]
    run = OnnxGraph(repository / model.name / "1" / "model.onnx", model)
    graph = graphs.clip_graphs(load_clip(checkpoints[1])[0])[1]
    inputs = [graph.random_inputs(*shape) for shape in ((1, 2), (3, 3), (model.max_batch_size, 77), (2, 511), (1, 512))]
    unmasked = [(ids, torch.ones_like(mask)) for ids, mask in inputs]
    assert graphs.compare(graph, run, 1e-6, inputs + unmasked)["max_error"] > 0


@pytest.mark.parametrize("right_at", [0, 1])
def test_a_text_graph_that_is_right_at_one_length_alone_fails_the_export(checkpoints, right_at):
    from engine.models.checkpoint import load_clip

    graph = graphs.clip_graphs(load_clip(checkpoints[1])[0])[1]

    @torch.inference_mode()
    def run(inputs):
        ids, mask = (torch.from_numpy(inputs[name]) for name in ("INPUT_IDS", "ATTENTION_MASK"))
        return {"TEXT_EMBEDDING": graph.module(ids, mask).numpy() + 0.1 * (ids.shape[1] != graph.lengths[right_at])}

    with pytest.raises(graphs.ExportError, match="clip_text_encoder: the exported graph is off by 1"):
        graphs.compare(graph, run, graph.bound)


def test_fused_attention_computes_what_plain_onnx_does(checkpoints, tmp_path):
    from engine.models.checkpoint import load_lamed

    for graph in graphs.lamed_graphs(load_lamed(checkpoints[0])[0]):
        if graph.is_image_encoder:
            found = {}
            for fused in (True, False):
                graphs._export(graph, tmp_path / "model.onnx", fused)
                found[fused] = OnnxGraph(tmp_path / "model.onnx", contract.MODELS[graph.name])
            for batch in (1, 3):
                images = {"IMAGE": graph.random_inputs(batch)[0].numpy()}
                (one,), (other,) = (found[fused](images).values() for fused in (True, False))
                np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


def test_the_exported_language_model_answers_like_the_checkpoints(exported, checkpoints):
    from transformers import AutoModelForCausalLM

    from engine.models.checkpoint import load_lamed

    repository, _ = exported
    found = AutoModelForCausalLM.from_pretrained(repository / LLM_FOLDER).eval()
    expected, _ = load_lamed(checkpoints[0])
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, expected.llm(ids).logits)


def test_a_second_export_with_nothing_changed_does_nothing(exported, checkpoints, monkeypatch, capsys):
    repository, manifest = exported
    monkeypatch.setattr(graphs, "build", None)  # would fail if a graph were built
    assert export(checkpoints[0], repository, clip_checkpoint=checkpoints[1]) == manifest
    assert "nothing to do" in capsys.readouterr().out


def test_a_checkpoint_on_the_hub_is_located_once_and_its_commit_recorded(
    exported, checkpoints, tmp_path, monkeypatch, capsys
):
    commits, asked, locate = ("a" * 40, "b" * 40), [], hub.locate
    sources = ("owner/lamed@v1", "owner/clip/sub")
    places = {source: hub.Located(*place, source) for source, *place in zip(sources, checkpoints, commits)}
    monkeypatch.setattr(
        hub, "locate", lambda source, *say: asked.append(source) or places.get(source) or locate(source)
    )
    repository, before = shutil.copytree(exported[0], tmp_path / "repository"), exported[1]
    values = {name: getattr(before, name) for name in Manifest.__annotations__ if "checkpoint" not in name}
    for name in ("target", "precision", "models", "graphs", "versions", "plans", "files", "format"):
        del values[name]
    monkeypatch.setattr("export.build_engines._export_lamed", lambda *_: (values, before.graphs))
    monkeypatch.setattr("export.build_engines._export_clip", lambda *_: (values, before.graphs))
    found = export(sources[0], repository, clip_checkpoint=sources[1], force=True)
    assert (found.checkpoint, found.clip_checkpoint) == sources
    assert (found.checkpoint_commit, found.clip_checkpoint_commit) == commits
    assert Manifest.read(repository) == found
    assert [source for source in asked if source in sources] == list(sources)
    said = capsys.readouterr().out
    assert all(f"{source}, commit {commit}" in said for source, commit in zip(sources, commits))
    assert (before.checkpoint_commit, before.clip_checkpoint_commit) == (None, None)  # local folders


def test_a_changed_checkpoint_precision_or_lost_file_exports_again(exported, checkpoints, tmp_path, monkeypatch):
    repository, _ = exported

    class Again(Exception):
        pass

    def again(*_):
        raise Again

    monkeypatch.setattr("export.build_engines._export_lamed", again)
    lamed, clip = checkpoints
    changed = shutil.copytree(lamed, tmp_path / "changed")
    (changed / "added_tokens.json").write_text("{}")
    lost = shutil.copytree(repository, tmp_path / "lost")
    (lost / "vision_encoder" / "1" / "model.onnx").unlink()
    for arguments in (
        dict(checkpoint=changed),
        dict(checkpoint=lamed, precision="bf16"),
        dict(checkpoint=lamed, repository=lost),
        dict(checkpoint=lamed, force=True),
    ):
        target = arguments.pop("repository", None) or shutil.copytree(repository, tmp_path / "repo", dirs_exist_ok=True)
        with pytest.raises(Again):
            export(repository=target, clip_checkpoint=clip, **arguments)
        with pytest.raises(RepositoryError, match="never exported"):  # broken off: nothing to serve
            Manifest.read(target)


def test_a_calibration_file_that_is_no_scan_is_named_and_leaves_what_was_exported(
    exported, checkpoints, tmp_path, capsys, monkeypatch
):
    repository = shutil.copytree(exported[0], tmp_path / "repository")
    (tmp_path / "notes.md").write_text("# no scan")
    before = {path: path.stat().st_size for path in repository.rglob("*")}
    monkeypatch.setattr(quantize, "check", lambda *_: None)  # its environment is not needed for this
    arguments = ["--checkpoint", str(checkpoints[0]), "--repository", str(repository), "--llm-quantization", "fp8"]
    assert main([*arguments, "--calibration", str(tmp_path / "notes.md")]) == 2
    said = capsys.readouterr().err
    assert f"--calibration {tmp_path / 'notes.md'}: " in said and f"{repository} is as it was before" in said
    assert {path: path.stat().st_size for path in repository.rglob("*")} == before


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(28, "No space left on device"), 1, "No space left on device")],
)
def test_an_export_that_breaks_off_says_what_it_leaves(
    checkpoints, tmp_path, monkeypatch, capsys, error, status, words
):
    exporting = graphs._export

    def broken_off(graph, target, fused):
        exporting(graph, target, fused)
        raise error

    monkeypatch.setattr(graphs, "_export", broken_off)
    repository = copy_repository(tmp_path)
    assert main(["--checkpoint", str(checkpoints[0]), "--repository", str(repository)]) == status
    said = capsys.readouterr().err
    assert words in said and f"{repository} holds no whole export now" in said


def test_a_graph_that_is_off_fails_the_export_and_leaves_no_manifest(checkpoints, tmp_path, monkeypatch, capsys):
    exporting = graphs._export

    def off_by_a_little(graph, target, fused):
        exporting(graph, target, fused)
        with torch.no_grad():
            graph.module.model.mm_projector.projector[-1].bias.add_(0.01)

    monkeypatch.setattr(graphs, "_export", off_by_a_little)
    repository = copy_repository(tmp_path)
    assert main(["--checkpoint", str(checkpoints[0]), "--repository", str(repository)]) == 1
    assert "vision_encoder: the exported graph is off by" in capsys.readouterr().err
    assert not (repository / FILE_NAME).exists()


def test_a_checkpoint_without_segmentation_exports_chat_alone(checkpoints, tmp_path):
    chat = shutil.copytree(checkpoints[0], tmp_path / "chat")
    tensors = load_file(chat / "model.safetensors")
    kept = {key: value for key, value in tensors.items() if not key.startswith("model.seg_")}
    save_file(kept, chat / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps({**config, "segmentation_module": None}))
    manifest = export(chat, copy_repository(tmp_path))
    assert len(kept) < len(tensors)
    assert set(manifest.models) == set(contract.CHAT_MODELS) and manifest.seg_token_id is None


def test_shards_hold_every_tensor_once(checkpoints, tmp_path, monkeypatch):
    from engine.models.checkpoint import open_lamed
    from engine.models.weights import Weights

    monkeypatch.setattr(llm, "SHARD_BYTES", 200_000)
    config, weights, source = open_lamed(checkpoints[0])
    llm.write_llm(config, weights, source, tmp_path / "llm", "fp32", lambda text: None)
    sharded = Weights.open(tmp_path / "llm")
    assert len(list((tmp_path / "llm").glob("*.safetensors"))) > 1
    assert all(torch.equal(sharded[key], weights[key]) for key in sharded)
    assert set(sharded) == {key for key in weights if not key.startswith(tuple(llm.PARTS))}


@pytest.mark.parametrize("value, precision", [(float("nan"), "fp32"), (float("-inf"), "bf16"), (70000.0, "fp16")])
def test_a_language_model_with_values_that_are_not_finite_is_refused_by_key(checkpoints, tmp_path, value, precision):
    from engine.models.checkpoint import open_lamed

    config, weights, source = open_lamed(checkpoints[0])
    norm = weights["model.norm.weight"].clone()
    norm[3] = value
    weights = weights.joined({"model.norm.weight": norm})
    with pytest.raises(CheckpointError, match=rf"NaN or infinite in {precision}, in model\.norm\.weight: "):
        llm.write_llm(config, weights, source, tmp_path / "llm", precision, lambda text: None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_language_model_that_has_answered_or_was_compared_leaves_nothing_on_the_gpu(monkeypatch, tmp_path):
    loaded, gone = [], []

    class Model:
        device, dtype = torch.device("cpu"), torch.float32

        def __call__(self, inputs_embeds, logits_to_keep):
            return SimpleNamespace(logits=torch.eye(4)[None, :logits_to_keep])

        def get_input_embeddings(self):
            return torch.nn.Embedding(4, 8)

        def generate(self, **_):
            return SimpleNamespace(sequences=torch.tensor([[0, 1]]))

    def load(*_):
        model = Model()
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(quantize, "_load", load)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gone.append(loaded[-1]() is None))
    prompt = SimpleNamespace(around=lambda question: ([2], [3]), stop_ids=(2,))
    answered = quantize.answer(tmp_path, torch.float32, prompt, [torch.zeros(4, 8)], lambda text: None)
    _, agreement = quantize.compare(tmp_path, torch.float32, answered)
    # Each model was gone before PyTorch was asked for its memory.
    assert agreement == 1 and len(loaded) == 2 and gone == [True, True]


@pytest.mark.parametrize("text, words", [("[]", "is not a JSON object"), ("{", "is not JSON"), ("{}", "format None")])
def test_a_manifest_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(RepositoryError, match=words):
        Manifest.read(tmp_path)


def test_a_folder_that_is_no_model_repository_is_refused(checkpoints, tmp_path):
    with pytest.raises(RepositoryError, match=r"lacks config\.pbtxt"):
        export(checkpoints[0], tmp_path)


def test_errors_are_one_line_and_a_status(tmp_path, capsys):
    assert main(["--checkpoint", str(tmp_path / "nothing"), "--repository", str(ROOT / "model_repository")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("part", ["lamed", "clip"])
def test_a_checkpoint_that_does_not_load_leaves_the_export_that_is_there(part, exported, checkpoints, tmp_path):
    repository, manifest = exported
    broken = tmp_path / part
    shutil.copytree(checkpoints[part == "clip"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, broken / "model.safetensors")
    lamed, clip = (broken, checkpoints[1]) if part == "lamed" else (checkpoints[0], broken)
    with pytest.raises(CheckpointError, match="missing"):
        export(lamed, repository, clip_checkpoint=clip)
    assert Manifest.read(repository) == manifest
    assert all((repository / path).stat().st_size == size for path, size in manifest.files.items())


def test_the_wide_layer_norm_is_exact_in_onnx_runtime_at_the_published_size(tmp_path):
    shape = (192, 16, 32, 32)
    norm = WideLayerNorm(shape).eval()
    with torch.no_grad():
        norm.weight.normal_(1, 0.1, generator=torch.Generator().manual_seed(0))
    x = 5 + 3 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.functional.layer_norm(x.double(), shape, norm.weight.double(), norm.bias.double(), norm.eps)
    target = tmp_path / "norm.onnx"
    torch.onnx.export(norm, (x,), target, dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - plain.detach().numpy()).max() < 2e-6  # of 8; ONNX Runtime's own is off by 4e-4
