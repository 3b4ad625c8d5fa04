"""The language model with quantised weights: made by the real llm-compressor, measured, and held to a bound."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine.errors import InvalidInput
from engine.manifest import FILE_NAME, LLM_FOLDER, Manifest
from engine.models.checkpoint import load_tokenizer
from engine.prompt import Prompt
from engine.prompt.plain import PlainLayout
from export import quantize
from export.build_engines import QUANTIZATIONS, export
from export.graphs import ExportError
from tests.conftest import copy_repository
from tests.tiny import NUM_VISUAL_TOKENS, volume, write_tiny_lamed

needs_llm_compressor = pytest.mark.slow(group="quantization")
pytestmark = pytest.mark.integration

LOOSE = quantize.Bound(perplexity_ratio=10.0, agreement=0.1)  # random weights lose more than trained ones


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    np.save(folder / "scan.npy", volume("scan"))
    return write_tiny_lamed(folder / "lamed")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """The language model in bf16, as it is exported."""
    repository = copy_repository(tmp_path_factory.mktemp("plain"))
    return repository, export(str(checkpoint), repository, precision="bf16")


@pytest.fixture
def questions(monkeypatch, tmp_path):
    """Words that the tiny model's tokenizer knows."""
    path = tmp_path / "questions.txt"
    path.write_text("w3 w4 w5\nw6 w7\nw8\nw9 w10 w11 w12\n")
    monkeypatch.setattr(quantize, "QUESTIONS", path)


@needs_llm_compressor
@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_a_quantised_language_model_is_smaller_and_nearly_as_sure_of_its_answers(
    scheme, exported, questions, monkeypatch, tmp_path
):
    repository, manifest = exported
    folder = tmp_path / "llm"
    before = {file.name: file.read_bytes() for file in (repository / LLM_FOLDER).iterdir()}
    folder.mkdir()
    for name, data in before.items():
        (folder / name).write_bytes(data)
    monkeypatch.setitem(quantize.BOUNDS, scheme, LOOSE)
    prompt = Prompt(PlainLayout(load_tokenizer(folder)), NUM_VISUAL_TOKENS, manifest.context_length)
    visual = [
        torch.randn(NUM_VISUAL_TOKENS, manifest.llm_width, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    ]
    found = quantize.quantize(folder, scheme, torch.bfloat16, prompt, visual, lambda text: None)
    assert found["scheme"] == scheme and found["tokens"] > 4
    # Random weights: by chance one token in 320 would stay.
    assert found["agreement"] > 0.25 and found["perplexity"] < 3 * found["perplexity_before"]
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (folder / "model.safetensors").stat().st_size < len(before["model.safetensors"])
    assert load_tokenizer(folder).get_vocab() == prompt.tokenizer.get_vocab()
    assert not list(tmp_path.glob("*prompts*")) and not list(tmp_path.glob("*.quantized"))
    # What was measured is what lies there.
    answered = quantize.answer(repository / LLM_FOLDER, torch.bfloat16, prompt, visual, print)[::2]
    assert quantize.compare(folder, torch.bfloat16, answered) == (found["perplexity"], found["agreement"])


@needs_llm_compressor
def test_the_model_itself_agrees_with_its_own_answers(exported, questions):
    repository, manifest = exported
    prompt = Prompt(PlainLayout(load_tokenizer(repository / LLM_FOLDER)), NUM_VISUAL_TOKENS, manifest.context_length)
    answered = quantize.answer(
        repository / LLM_FOLDER, torch.float32, prompt, [torch.randn(NUM_VISUAL_TOKENS, manifest.llm_width)], print
    )
    assert len(answered) == 4
    perplexity, agreement = quantize.compare(repository / LLM_FOLDER, torch.float32, answered)
    assert agreement == 1 and 1 < perplexity < manifest.vocab_size


@needs_llm_compressor
def test_an_export_says_how_its_language_model_was_quantised_and_repeats_nothing(
    checkpoint, questions, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(quantize.BOUNDS, "gptq", LOOSE)
    repository, scan = copy_repository(tmp_path), checkpoint.parent / "scan.npy"
    manifest = export(str(checkpoint), repository, precision="bf16", quantization="gptq", calibration=[scan])
    assert manifest.quantization["scheme"] == "gptq" and len(manifest.quantization["calibration"]) == 1
    assert manifest.quantization["bound"] == [LOOSE.perplexity_ratio, LOOSE.agreement]
    assert Manifest.read(repository) == manifest
    assert "quantization_config" in json.loads((repository / LLM_FOLDER / "config.json").read_text())
    capsys.readouterr()
    assert export(str(checkpoint), repository, precision="bf16", quantization="gptq", calibration=[scan]) == manifest
    assert "nothing to do" in capsys.readouterr().out
    assert export(str(checkpoint), repository, precision="bf16").quantization == {}


@needs_llm_compressor
def test_a_loss_beyond_the_bound_fails_the_export(checkpoint, questions, monkeypatch, tmp_path):
    monkeypatch.setitem(quantize.BOUNDS, "gptq", quantize.Bound(perplexity_ratio=0.5, agreement=0.0))
    repository = copy_repository(tmp_path)
    with pytest.raises(ExportError, match=r"loses too much in gptq.*0.5 allowed"):
        export(
            str(checkpoint),
            repository,
            precision="bf16",
            quantization="gptq",
            calibration=[checkpoint.parent / "scan.npy"],
        )
    assert not (repository / FILE_NAME).exists()


@needs_llm_compressor
def test_llm_compressors_own_words_are_shown_when_it_fails(exported, tmp_path):
    answered = [quantize.Answered(torch.zeros(4, 8), torch.zeros(1, dtype=torch.long))]
    with pytest.raises(ExportError, match="llm-compressor failed"):
        quantize.compress(tmp_path / "nothing", "gptq", answered, tmp_path / "target")


@pytest.mark.parametrize(
    ("scheme", "calibration", "words"),
    [
        ("int3", ["x.npy"], "known: fp8, awq, gptq"),
        ("fp8", [], "--calibration SCAN"),
        ("awq", ["x.npy"], "make quantizing"),
    ],
)
def test_what_cannot_be_quantised_is_refused_before_anything_is_exported(
    checkpoint, scheme, calibration, words, monkeypatch, tmp_path
):
    monkeypatch.setattr(quantize, "PYTHON", tmp_path / "bin" / "python")
    repository = copy_repository(tmp_path)
    with pytest.raises(InvalidInput, match=words):
        export(str(checkpoint), repository, quantization=scheme, calibration=calibration)
    assert not list(repository.glob("*/1/llm"))


def test_the_command_line_offers_what_has_a_bound():
    assert set(QUANTIZATIONS) == set(quantize.BOUNDS)
