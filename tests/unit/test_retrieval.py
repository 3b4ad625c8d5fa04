import json

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from engine.errors import InvalidInput, RepositoryError, StudyNotFound
from engine.runtime import retrieval
from engine.runtime.retrieval import BATCH, Retriever
from engine.runtime.study_store import StudyStore
from tests.unit.fake_models import SIZE, FakeModels, manifest

HANDLE = "a" * 64


@pytest.fixture
def tokenizer(tmp_path):
    """A folder as the export writes it: words, [CLS] and [SEP] around them."""
    words = ["pad-me", "[UNK]", "[CLS]", "[SEP]", "lung", "nodule", "brain"]
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "pad-me"}}))
    return folder


@pytest.fixture
def models():
    return FakeModels()


@pytest.fixture
def retriever(tmp_path, tokenizer, models):
    with StudyStore(tmp_path / "store", 50_000_000) as store:
        store.add(HANDLE, {}, np.zeros((1, *SIZE), np.float32))
        yield Retriever(store, manifest(), tokenizer, models)


def test_scores_are_cosine_similarities_in_the_order_of_the_texts(retriever):
    scores = retriever.scores(HANDLE, ["lung", "lung nodule", "brain"])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [1, 0, 1])


def test_texts_are_cut_and_padded_as_the_reference_does(retriever, models):
    retriever.scores(HANDLE, ["lung", "lung nodule brain strange brain brain"])
    inputs = models.batches[-1][1]
    np.testing.assert_array_equal(inputs["INPUT_IDS"], [[2, 4, 3, 0, 0], [2, 4, 5, 6, 3]])
    np.testing.assert_array_equal(inputs["ATTENTION_MASK"], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert inputs["INPUT_IDS"].dtype == inputs["ATTENTION_MASK"].dtype == np.int64


def test_a_scan_is_embedded_once(retriever, models):
    retriever.scores(HANDLE, ["lung"])
    retriever.scores(HANDLE, ["brain"])
    assert models.calls == {"clip_image_encoder": 1, "clip_text_encoder": 2}


def test_many_texts_go_in_batches_that_the_encoder_takes(retriever, models):
    texts = ["lung"] * (2 * BATCH) + ["lung nodule"]
    np.testing.assert_array_equal(retriever.scores(HANDLE, texts), [1] * (2 * BATCH) + [0])
    batches = [inputs["INPUT_IDS"] for model, inputs in models.batches if model == "clip_text_encoder"]
    assert [len(batch) for batch in batches] == [BATCH, BATCH, 1]


def test_bad_texts_and_handles_are_refused_before_anything_runs(retriever, models, monkeypatch):
    monkeypatch.setattr(retrieval, "MAX_TEXTS", 3)
    for texts, cause in (
        ([], "0 texts"),
        (["lung"] * 4, "4 texts.*3"),
        (["lung", " \n"], "text 1 is empty"),
        (["x" * 20_001], "20001 characters.*20000"),
    ):
        with pytest.raises(InvalidInput, match=cause):
            retriever.scores(HANDLE, texts)
    with pytest.raises(StudyNotFound):
        retriever.scores("b" * 64, ["lung"])
    assert not models.calls


def test_an_export_that_cannot_rank_says_so(retriever, tokenizer, models, tmp_path):
    for settings, folder, cause in (
        (manifest(clip_text_length=None), tokenizer, "--clip-checkpoint"),
        (manifest(clip_image_size=(8, 8, 8)), tokenizer, "same size"),
        (manifest(), tmp_path, "export the repository again"),
    ):
        with pytest.raises(RepositoryError, match=cause):
            Retriever(retriever.store, settings, folder, models)
    (tokenizer / "tokenizer_config.json").write_text('{"pad_token": "[NONE]"}')
    with pytest.raises(RepositoryError, match="NONE"):
        Retriever(retriever.store, manifest(), tokenizer, models)
