import numpy as np
import pytest

from engine.errors import InvalidInput, StudyNotFound
from engine.runtime.segmentation import NO_MASK, Segmenter
from engine.runtime.study_store import StudyStore
from engine.scan import Scan
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
