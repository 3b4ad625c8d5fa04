"""The modules against slow, obvious or independent computations of the same thing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from engine.models.config import LamedConfig, ViTConfig
from engine.models.lamed import Lamed
from engine.models.projector import SpatialPoolingProjector
from engine.models.segvol import RandomPositionEncoding
from engine.models.vit3d import ViT3D
from tests import tiny

SMALL = ViTConfig((8, 32, 48), (4, 16, 16), hidden_size=48, mlp_dim=96, num_layers=2, num_heads=4)


@torch.inference_mode()
def test_the_vit_equals_monais():
    from monai.networks.nets import ViT

    torch.manual_seed(0)
    ours = ViT3D(SMALL, cls_token=False).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = ViT(
        in_channels=1,
        img_size=SMALL.image_size,
        patch_size=SMALL.patch_size,
        hidden_size=48,
        mlp_dim=96,
        num_layers=2,
        num_heads=4,
        proj_type="perceptron",
        classification=False,
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all("norm_cross_attn" in key for key in missing)
    image = torch.rand(2, 1, *SMALL.image_size)
    torch.testing.assert_close(ours(image), theirs(image)[0], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_pooling_averages_neighbouring_patches():
    config = LamedConfig.from_dict({**tiny.LAMED, "seg_token_id": 7})
    projector = SpatialPoolingProjector(config)
    x = torch.randn(1, 64, 64)  # a 4 x 4 x 4 grid of width 64
    grid = x.view(4, 4, 4, 64)
    first = grid[:2, :2, 2:].mean(dim=(0, 1, 2))  # token 1: the next pair along W
    torch.testing.assert_close(projector(x)[0, 1], projector.projector(first), atol=1e-5, rtol=0)


def test_the_position_encoding_stacks_h_d_w():
    encoding = RandomPositionEncoding((2, 3, 4), 6)
    matrix = encoding.positional_encoding_gaussian_matrix
    d, h, w = 1, 2, 3
    where = torch.tensor([(h + 0.5) / 3, (d + 0.5) / 2, (w + 0.5) / 4]) * 2 - 1
    angle = 2 * math.pi * where @ matrix
    torch.testing.assert_close(encoding()[0, (d * 3 + h) * 4 + w], torch.cat([angle.sin(), angle.cos()]))


@torch.inference_mode()
def test_several_seg_tokens_are_averaged_into_one_prompt_and_none_gives_no_mask():
    torch.manual_seed(0)
    config = LamedConfig.from_dict({**tiny.LAMED, "seg_token_id": 7})
    model = Lamed(config).eval()
    image, ids = torch.rand(1, 1, *tiny.IMAGE_SIZE), torch.tensor([[1, *[315] * 8, 20]])
    said, states, _ = model.generate(image, ids, 1, max_new_tokens=4)
    object.__setattr__(config, "seg_token_id", int(said[0]))
    said, states, logits = model.generate(image, ids, 1, max_new_tokens=4)
    mean = states[said == int(said[0])].mean(dim=0, keepdim=True)
    torch.testing.assert_close(logits, model.segment(model.seg_module.encode(image), mean))
    assert logits.shape == (1, 1, *tiny.IMAGE_SIZE)
    object.__setattr__(config, "seg_token_id", 9999)
    assert model.generate(image, ids, 1, max_new_tokens=4)[2] is None


@torch.inference_mode()
def test_an_answer_that_ends_at_once_is_empty_and_has_no_mask():
    torch.manual_seed(0)
    model = Lamed(LamedConfig.from_dict({**tiny.LAMED, "seg_token_id": 7})).eval()
    image, ids = torch.rand(1, 1, *tiny.IMAGE_SIZE), torch.tensor([[1, *[315] * 8, 20]])
    said, _, _ = model.generate(image, ids, 1, max_new_tokens=4)
    ended, _, logits = model.generate(image, ids, 1, max_new_tokens=4, eos_token_id=int(said[0]))
    assert ended.tolist() == [int(said[0])] and logits is None


@pytest.mark.parametrize("values", [{"image_size": (8, 32, 40)}, {"num_heads": 5}, {"patch_size": (4, 16)}])
def test_impossible_vit_sizes_are_refused(values):
    from engine.errors import CheckpointError

    with pytest.raises(CheckpointError):
        ViTConfig(**{"image_size": (8, 32, 48), "patch_size": (4, 16, 16), "hidden_size": 48, **values})


def test_masks_are_interpolated_without_aligned_corners():
    config = LamedConfig.from_dict({**tiny.LAMED, "seg_token_id": 7})
    model = Lamed(config).eval()
    features, prompt = torch.randn(1, 64, 4, 4, 4), torch.randn(1, 64)
    with torch.inference_mode():
        low = model.seg_module.decode_low_res(features, prompt)
        expected = F.interpolate(low, size=tiny.IMAGE_SIZE, mode="trilinear", align_corners=False)
        torch.testing.assert_close(model.seg_module.decode(features, prompt), expected)
