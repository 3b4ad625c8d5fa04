import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models

from engine import contract
from engine.errors import InvalidInput, RepositoryError, StudyNotFound
from engine.models.checkpoint import load_clip, load_tokenizer
from engine.runtime import retrieval
from engine.runtime.retrieval import BATCH, RetrievalStep, Retriever
from engine.runtime.step import LocalInputs
from engine.runtime.study_store import StudyStore
from tests import tiny
from tests.tiny import words
from tests.unit.fake_models import SIZE, FakeModels, manifest

HANDLE = "a" * 64
POSITIONS = 512  # of the published BERT


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


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory):
    return tiny.write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pytorch(clip_checkpoint):
    """The checkpoint's M3D-CLIP in PyTorch as `infer` of a Retriever."""
    clip, _ = load_clip(clip_checkpoint)

    @torch.inference_mode()
    def infer(model: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = [torch.tensor(array) for array in inputs.values()]
        if model == "clip_image_encoder":
            return {"IMAGE_EMBEDDING": clip.encode_image(*tensors)[:, 0].numpy()}
        return {"TEXT_EMBEDDING": clip.encode_text(*tensors)[:, 0].numpy()}

    return infer


@pytest.fixture
def ranker(clip_checkpoint, pytorch, tmp_path):
    """A Retriever of a real checkpoint, with its tokenizer as the export writes it."""
    load_tokenizer(clip_checkpoint).save_pretrained(tmp_path / "exported")
    size = tiny.IMAGE_SIZE
    settings = manifest(
        clip_text_length=load_clip(clip_checkpoint)[0].config.text_length, clip_image_size=size, image_size=size
    )
    with StudyStore(tmp_path / "store", 50_000_000) as store:
        store.add(HANDLE, {}, tiny.volume())
        yield Retriever(store, settings, tmp_path / "exported", pytorch)


@pytest.mark.parametrize("padding", [False, "max_length"])
def test_scores_are_those_of_each_text_alone_at_512_tokens(ranker, clip_checkpoint, padding):
    texts = [words(count, count) for count in (1, 7, 126, 127, 200, 400, 510, 511, 900)]
    texts += ["W5 strange, w6", *(words(20, seed) for seed in range(BATCH))]
    scores, _ = ranker.rank(HANDLE, texts)
    np.testing.assert_allclose(scores, tiny.clip_scores(clip_checkpoint, texts, padding), atol=1e-6, rtol=0)
    assert np.ptp(scores) > 1e-3  # of texts that differ


def test_reports_that_share_their_first_128_tokens_get_different_scores(ranker):
    begun = words(127)
    (first, second), cut = ranker.rank(HANDLE, [f"{begun} {words(300, 1)}", f"{begun} {words(300, 2)}"])
    assert abs(first - second) > 1e-5 and not cut.any()


def test_a_text_of_more_than_512_tokens_is_cut_and_said_to_be(ranker):
    most = POSITIONS - 2
    texts = [words(most), words(most + 1), "w1", f"{words(most)} w1 w2", *["w2"] * BATCH, words(3000)]
    scores, cut = ranker.rank(HANDLE, texts)
    assert cut.dtype == bool and ranker.text_limit == POSITIONS
    assert np.flatnonzero(cut).tolist() == [1, 3, len(texts) - 1]
    assert scores[3] == pytest.approx(scores[0], abs=1e-6)  # what was cut has no part in it


def test_scores_are_cosine_similarities_in_the_order_of_the_texts(retriever):
    scores, _ = retriever.rank(HANDLE, ["lung", "lung nodule", "brain"])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [1, 0, 1])


def test_texts_are_cut_as_the_reference_does_and_padded_to_the_longest_of_their_batch(retriever, models):
    retriever.rank(HANDLE, ["lung", "lung nodule"])
    inputs = models.batches[-1][1]
    np.testing.assert_array_equal(inputs["INPUT_IDS"], [[2, 4, 3, 0], [2, 4, 5, 3]])
    np.testing.assert_array_equal(inputs["ATTENTION_MASK"], [[1, 1, 1, 0], [1, 1, 1, 1]])
    assert inputs["INPUT_IDS"].dtype == inputs["ATTENTION_MASK"].dtype == np.int64
    retriever.rank(HANDLE, ["lung", "lung nodule brain strange brain brain"])
    inputs = models.batches[-1][1]
    np.testing.assert_array_equal(inputs["INPUT_IDS"], [[2, 4, 3, 0, 0], [2, 4, 5, 6, 3]])
    np.testing.assert_array_equal(inputs["ATTENTION_MASK"], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_a_scan_is_embedded_once(retriever, models):
    retriever.rank(HANDLE, ["lung"])
    retriever.rank(HANDLE, ["brain"])
    assert models.calls == {"clip_image_encoder": 1, "clip_text_encoder": 2}


def test_many_texts_go_in_batches_that_the_encoder_takes(retriever, models):
    texts = ["lung"] * (2 * BATCH) + ["lung nodule"]
    np.testing.assert_array_equal(retriever.rank(HANDLE, texts)[0], [1] * (2 * BATCH) + [0])
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
            retriever.rank(HANDLE, texts)
    with pytest.raises(StudyNotFound):
        retriever.rank("b" * 64, ["lung"])
    assert not models.calls


def test_a_request_ranks_no_more_texts_than_take_a_minute(retriever):
    texts = ["lung"] * retrieval.MAX_TEXTS
    assert len(texts) == 256 and len(retriever.rank(HANDLE, texts)[0]) == 256
    with pytest.raises(InvalidInput, match="257 texts.*1 to 256.*send them in parts"):
        retriever.rank(HANDLE, [*texts, "lung"])


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


def outputs(retriever, **inputs):
    tensors = {"STUDY": contract.STUDY_IN, "TEXTS": contract.TEXTS}
    return RetrievalStep(retriever)(LocalInputs({tensors[name]: value for name, value in inputs.items()}))()


def test_a_scan_and_texts_are_compared_and_either_alone_is_embedded(retriever):
    texts = ["lung", "lung nodule"]
    both = outputs(retriever, STUDY=HANDLE, TEXTS=texts)
    scan, alone = outputs(retriever, STUDY=HANDLE), outputs(retriever, TEXTS=texts)
    np.testing.assert_array_equal(alone["TEXT_EMBEDDINGS"] @ scan["SCAN_EMBEDDING"], both["SCORES"])
    np.testing.assert_array_equal(both["SCORES"], [1, 0])
    assert not both["SCAN_EMBEDDING"].size and not both["TEXT_EMBEDDINGS"].size and not alone["SCORES"].size
    assert alone["TEXT_CUT"].tolist() == both["TEXT_CUT"].tolist() == [False, False]
    assert not scan["TEXT_CUT"].size and scan["TEXT_LIMIT"].tolist() == [5]


@pytest.mark.parametrize("inputs", [{"TEXTS": ["lung", " "]}, {"TEXTS": ["lung", " "], "STUDY": HANDLE}])
def test_bad_texts_are_refused_with_and_without_a_scan(retriever, models, inputs):
    with pytest.raises(InvalidInput, match="text 1 is empty"):
        outputs(retriever, **inputs)
    assert not models.calls
