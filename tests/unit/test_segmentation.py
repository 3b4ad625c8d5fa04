import re

import numpy as np
import pytest

from engine.errors import InvalidInput, StudyNotFound
from engine.runtime.segmentation import NO_MASK, Segmenter
from engine.runtime.study_store import StudyStore
from engine.scan import Scan
from engine.seg_states import MAX_SEGMENTS, checked_merge, most_segments, prompts, spans_of_words
from engine.volume import prepare
from tests.unit.fake_models import SIZE, WIDTH, FakeModels

HANDLE = "a" * 64
AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 4.0, 3], [0, 0, 0, 1]])


@pytest.fixture
def models():
    return FakeModels()


@pytest.fixture
def scan():
    array = np.random.default_rng(0).random((21, 18, 12)).astype(np.float32)
    array[4:16, 5:14, 3:9] += 5
    return array


@pytest.fixture
def segmenter(tmp_path, models, scan):
    prepared = prepare(Scan(scan, AFFINE, "nifti"), SIZE, "mr")
    with StudyStore(tmp_path / "store", 50_000_000) as store:
        store.add(HANDLE, {"geometry": prepared.geometry.to_dict(), "header": ""}, prepared.image)
        yield Segmenter(store, models)


def states(*firsts) -> np.ndarray:
    return np.array([[first] + [0] * (WIDTH - 1) for first in firsts], np.float32)


def test_a_mask_comes_back_in_the_shape_and_affine_of_the_scan(segmenter, scan):
    mask = segmenter.mask(HANDLE, states(0.5))
    assert mask.shape == scan.shape and mask.packed.dtype == np.uint8
    np.testing.assert_array_equal(mask.affine, AFFINE)
    drawn = np.unpackbits(mask.packed, count=scan.size).reshape(scan.shape).astype(bool)
    block = np.zeros(scan.shape, bool)
    block[4:16, 5:14, 3:9] = True
    assert 2 * (drawn & block).sum() / (drawn.sum() + block.sum()) > 0.75


def test_several_states_are_averaged_into_one_prompt(segmenter, models):
    several = segmenter.mask(HANDLE, states(0.1, 0.5, 0.9))
    one = segmenter.mask(HANDLE, states(0.5))
    np.testing.assert_array_equal(several.packed, one.packed)
    prompts = [inputs["SEG_STATE"] for model, inputs in models.batches if model == "segmentation_head"]
    assert [prompt.shape for prompt in prompts] == [(1, WIDTH)] * 2


def test_features_are_encoded_for_the_first_mask_only(segmenter, models):
    for _ in range(3):
        segmenter.mask(HANDLE, states(0.5))
    assert models.calls == {"segmentation_encoder": 1, "segmentation_head": 3}


def test_logits_come_in_model_space_and_only_if_asked_for(segmenter):
    assert segmenter.mask(HANDLE, states(0.5)).logits.shape == (0, 0, 0)
    logits = segmenter.mask(HANDLE, states(0.5), return_logits=True).logits
    np.testing.assert_allclose(logits, 1000 * (segmenter.store.get(HANDLE, "image")[0] - 0.5), rtol=1e-5)


def test_a_state_that_asks_for_nothing_gives_a_mask_without_a_voxel(segmenter, scan):
    mask = segmenter.mask(HANDLE, states(2))
    assert mask.shape == scan.shape and not mask.packed.any()
    assert len(mask.packed) == -(-scan.size // 8) and len(NO_MASK.packed) == 0


def test_bad_requests_are_refused(segmenter, models):
    with pytest.raises(StudyNotFound):
        segmenter.mask("b" * 64, states(0.5))
    with pytest.raises(InvalidInput, match="finite"):
        segmenter.mask(HANDLE, states(np.nan))
    assert not models.calls


# --- one mask for each [SEG] -----------------------------------------------------------------------------------------
def unpacked(bits, scan) -> np.ndarray:
    return np.unpackbits(bits, count=scan.size).reshape(scan.shape).astype(bool)


def test_each_state_draws_its_own_mask_and_the_mask_is_their_union(segmenter, scan):
    each = segmenter.mask(HANDLE, states(0.6, 0.5, 2.0), True, "each")
    alone = [segmenter.mask(HANDLE, states(first), True) for first in (0.6, 0.5, 2.0)]
    assert each.segments.shape == (3, -(-scan.size // 8))
    for index, one in enumerate(alone):
        np.testing.assert_array_equal(each.segments[index], one.packed)
        np.testing.assert_array_equal(each.scores[index], one.scores[0])
    np.testing.assert_array_equal(each.logits, np.concatenate([one.logits for one in alone]))
    union = unpacked(each.packed, scan)
    np.testing.assert_array_equal(union, np.any([unpacked(one.packed, scan) for one in alone], axis=0))
    assert not unpacked(each.segments[2], scan).any() and union.any()


def test_one_state_draws_the_same_mask_either_way(segmenter):
    each, reference = (segmenter.mask(HANDLE, states(0.5), True, merge) for merge in ("each", "reference"))
    for name in ("packed", "scores", "logits", "affine"):
        np.testing.assert_array_equal(getattr(each, name), getattr(reference, name))
    assert len(each.segments) == 1 and reference.segments.shape == (0, 0)


def test_the_head_never_runs_with_more_masks_than_it_may_have_at_a_time(segmenter, models):
    segmenter.mask(HANDLE, states(*np.linspace(0.1, 0.9, 5)), merge="each")
    batches = [inputs for model, inputs in models.batches if model == "segmentation_head"]
    assert [len(inputs["SEG_STATE"]) for inputs in batches] == [2, 2, 1]
    assert [len(inputs["FEATURES"]) for inputs in batches] == [2, 2, 1]
    prompts = np.concatenate([inputs["SEG_STATE"] for inputs in batches])
    np.testing.assert_array_equal(prompts, states(*np.linspace(0.1, 0.9, 5)))


def test_a_score_is_the_mean_probability_of_what_is_marked(segmenter):
    logits = segmenter.mask(HANDLE, states(0.4995), True).logits.astype(float)
    score = segmenter.mask(HANDLE, states(0.4995)).scores[0]
    assert score == pytest.approx((1 / (1 + np.exp(-logits[logits > 0]))).mean(), abs=1e-6) and 0.5 < score <= 1
    assert np.isnan(segmenter.mask(HANDLE, states(2)).scores).all()  # nothing is marked


def test_more_masks_than_an_answer_may_have_are_refused_with_the_ways_out(segmenter, models):
    most = np.zeros((MAX_SEGMENTS + 1, WIDTH), np.float32)
    with pytest.raises(InvalidInput, match=f"{MAX_SEGMENTS + 1} .SEG.*at most {MAX_SEGMENTS}.*merge 'reference'"):
        segmenter.mask(HANDLE, most, merge="each")
    assert not models.calls
    assert len(segmenter.mask(HANDLE, most[1:], merge="each").segments) == MAX_SEGMENTS
    assert len(segmenter.mask(HANDLE, most).scores) == 1


@pytest.mark.parametrize(("voxels", "most"), [(1, 16), (1 << 27, 16), ((1 << 27) + 1, 15), (1 << 29, 4), (1 << 40, 1)])
def test_masks_of_a_large_scan_are_fewer(voxels, most):
    assert most_segments(voxels) == most
    assert len(prompts(np.zeros((most, 2)), "each", voxels)) == most
    with pytest.raises(InvalidInput, match=f"at most {most} masks"):
        prompts(np.zeros((most + 1, 2)), "each", voxels)


@pytest.mark.parametrize("merge", ["all", "", 3, "EACH"])
def test_an_unknown_merge_is_refused_with_those_there_are(merge):
    with pytest.raises(InvalidInput, match="reference, each"):
        checked_merge(merge)


# --- the words of a [SEG] --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "each"),
    [
        ("The liver is [SEG] and the spleen is [SEG].", ["The liver is", "and the spleen is"]),
        (" It is [SEG].  The left kidney: [SEG]", ["It is", "The left kidney"]),
        ("[SEG] liver, [SEG][SEG] spleen", ["", "liver", ""]),
        ("Sure, it is [SEG].", ["Sure, it is"]),
        ("[SEG]", [""]),
        ("None.", []),
    ],
)
def test_the_words_of_a_seg_token_are_those_that_lead_to_it(text, each):
    spans = [found.span() for found in re.finditer(r"\[SEG\]", text)]
    found = spans_of_words(text, spans, "each")
    assert [text[start:end] for start, end in found] == each
    merged = [text[start:end] for start, end in spans_of_words(text, spans, "reference")]
    assert merged == ([text[: spans[-1][0]].strip(" .,:")] if spans else [])
