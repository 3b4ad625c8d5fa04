"""Our PyTorch modules compute what the reference computed, to the tolerances of tests/fixtures/README.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import write_checkpoint

from engine.models.checkpoint import load_clip, load_lamed

pytestmark = pytest.mark.integration

FEATURES, STEP_LOGITS, CLIP, VOXELS = 2e-5, 5e-5, 1e-6, 3


@pytest.fixture(scope="module")
def lamed(dev_small):
    return load_lamed(dev_small.folder)


@pytest.fixture(scope="module")
def answer(dev_small, lamed):
    model, _ = lamed
    return model.generate(
        dev_small.volume,
        torch.tensor([dev_small.spec["input_ids"]]),
        1,
        max_new_tokens=dev_small.spec["generate"]["max_new_tokens"],
    )


def assert_same_tokens(found_BNE: torch.Tensor, expected: dict, name: str) -> None:
    x = found_BNE[0].numpy()
    n, c = x.shape
    np.testing.assert_allclose(x[:4, :16], expected[f"{name}_first"], atol=FEATURES, rtol=0)
    np.testing.assert_allclose(
        x[:: max(1, n // 16), :: max(1, c // 16)], expected[f"{name}_grid"], atol=FEATURES, rtol=0
    )
    np.testing.assert_allclose(
        [x.astype(np.float64).mean(), x.astype(np.float64).std(ddof=1)],
        expected[f"{name}_mean_std"],
        atol=FEATURES,
        rtol=0,
    )


@torch.inference_mode()
def test_vision_features_visual_tokens_and_segmentation_features_match_the_reference(dev_small, lamed):
    model, _ = lamed
    assert_same_tokens(model.vision_tower(dev_small.volume), dev_small.expected, "vision")
    assert_same_tokens(model.encode_images(dev_small.volume), dev_small.expected, "proj")
    assert_same_tokens(model.seg_module.image_encoder(dev_small.volume), dev_small.expected, "seg_image")


def test_greedy_tokens_step_logits_and_states_match_the_reference(dev_small, lamed, answer):
    ids, states, _ = answer
    model, _ = lamed
    assert ids.tolist() == dev_small.expected["output_ids"].tolist()
    np.testing.assert_allclose(states, dev_small.expected["step_hidden"], atol=FEATURES, rtol=0)
    with torch.inference_mode():
        np.testing.assert_allclose(
            model.llm.lm_head(states), dev_small.expected["step_logits"], atol=STEP_LOGITS, rtol=0
        )


@torch.inference_mode()
def test_mask_logits_match_the_reference(dev_small, lamed, answer):
    model, _ = lamed
    _, states, logits = answer
    expected = dev_small.expected
    prompt = model.seg_projector(states[dev_small.spec["seg_positions"]].mean(dim=0, keepdim=True))
    np.testing.assert_allclose(prompt, expected["seg_prompt"], atol=FEATURES, rtol=0)
    low_res = model.seg_module.decode_low_res(model.seg_module.encode(dev_small.volume), prompt)[0, 0]
    np.testing.assert_allclose(low_res[::2, ::4, ::4], expected["seg_low_res"], atol=FEATURES, rtol=0)
    mask = logits[0, 0].numpy()
    np.testing.assert_allclose(mask[::4, ::16, ::16], expected["seg_logits"], atol=FEATURES, rtol=0)
    np.testing.assert_allclose(mask[mask.shape[0] // 2, ::2, ::2], expected["seg_logits_mid"], atol=FEATURES, rtol=0)
    assert abs(int((mask > 0).sum()) - int(expected["seg_positive"])) <= VOXELS


def test_the_prompt_is_tokenised_as_the_reference_tokenises_it(dev_small, lamed):
    prompt = lamed[0].config.prompt(lamed[1])
    assert prompt.input_ids(write_checkpoint.question(dev_small.spec)) == dev_small.spec["input_ids"]


@torch.inference_mode()
def test_clip_features_and_logits_match_the_reference(dev_clip):
    model, _ = load_clip(dev_clip.folder)
    ids, mask = torch.tensor(dev_clip.spec["input_ids"]), torch.tensor(dev_clip.spec["attention_mask"])
    image, text = model.encode_image(dev_clip.volume), model.encode_text(ids, mask)
    found = {
        "image_cls": image[:, 0, :32],
        "text_cls": text[:, 0, :32],
        "text_all": text[:, :, :: text.shape[2] // 32],
        "logits_per_image": model.logits_per_image(dev_clip.volume, ids, mask),
        "logit_scale": model.logit_scale,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, dev_clip.expected[name], atol=CLIP, rtol=0, err_msg=name)
    n, width = image.shape[1:]
    np.testing.assert_allclose(
        image[:, :: max(1, n // 16), :: max(1, width // 16)], dev_clip.expected["image_grid"], atol=CLIP, rtol=0
    )
