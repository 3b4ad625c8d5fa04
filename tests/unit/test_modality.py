"""One rule decides whether values are Hounsfield units: for preprocessing, pictures and measurements alike."""

from __future__ import annotations

import numpy as np
import pytest

from engine import picture
from engine.scan import ARRAY_AFFINE, Scan
from engine.volume import prepare
from engine.volume.modality import modality_of
from engine.volume.views import counts, sampled

SHAPE = (48, 48, 40)
SIZE = (8, 32, 32)
_I, _J, _K = np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij")
BODY = (_I / 0.8) ** 2 + (_J / 0.6) ** 2 < 1
CORE = (_I / 0.6) ** 2 + (_J / 0.45) ** 2 < 1
BONE = (_I / 0.15) ** 2 + ((_J - 0.3) / 0.15) ** 2 < 1
LUNG = ((np.abs(_I) - 0.3) / 0.2) ** 2 + (_J / 0.3) ** 2 + (_K / 0.8) ** 2 < 1


def random():
    return np.random.default_rng(0)


def ct(noise=20.0, air=-1000.0, fat=-100.0, lung=None, dtype=np.int16):
    """Air, a rim of fat, muscle and bone, perhaps lungs, in Hounsfield units."""
    values = np.full(SHAPE, air)
    values[BODY], values[CORE] = fat, 50
    values[BONE] = random().uniform(200, 1300, SHAPE)[BONE]
    if lung is not None:
        values[LUNG] = lung
    return (values + random().normal(0, noise, SHAPE)).round().astype(dtype)


def mr(peak=3060.0, dtype=np.float32):
    """Background noise near 0 and tissues up to `peak`."""
    values = np.abs(random().normal(0, peak / 100, SHAPE))
    values[BODY] = random().normal(peak * 0.3, peak / 20, SHAPE)[BODY]
    values[CORE] = random().normal(peak * 0.6, peak / 10, SHAPE)[CORE]
    return np.clip(values, 0, peak).astype(dtype)


def some(values, share, value):
    """`share` of the voxels, at random, become `value`."""
    changed = values.copy()
    changed[random().random(SHAPE) < share] = value
    return changed


def outside(values, value):
    """What a scanner or a tool puts outside a round field of view."""
    changed = values.copy()
    changed[_I**2 + _J**2 > 0.95] = value
    return changed


CTS = {
    "body": ct(),
    "chest": ct(lung=-850),
    "without noise": ct(noise=0),
    "noisy": ct(noise=150),
    "head to foot in float": ct(dtype=np.float32),
    "padded with -1024": outside(ct(), -1024),
    "padded with -2000": outside(ct(), -2000),
    "padded with -3024": outside(ct(), -3024),
    "padded with -32768": outside(ct(), -32768),
    "clipped to -1024": np.maximum(ct(noise=60), -1024),
    "clipped to a lung window": np.clip(ct(lung=-850), -1350, 150),
    "metal": some(ct(), 0.005, 20000),
    "streaks of metal": some(ct(), 0.005, -1800),
    "foot": np.where(CORE & ~BONE, random().uniform(150, 1500, SHAPE), ct()).astype(np.int16),
    "dry bone": np.where(BONE, ct(), np.minimum(ct(), -940)).astype(np.int16),
    "phantom of water": np.where(BODY, 0, -1000).astype(np.int16),
    "cone beam, 120 too high": ct(noise=60) + np.int16(120),
    "cone beam, 150 too low": ct(noise=60) - np.int16(150),
    "cropped inside the body": ct()[16:32, 14:34],
    "cropped inside the body, noisy": ct(noise=90)[16:32, 14:34],
    "cropped to fat and muscle": ct()[8:16, 20:26],
    "cropped to a soft tissue window": np.clip(ct(), -160, 240),
    "lung only": ct(lung=-850, noise=40)[28:36, 20:28, 14:26],
}
OTHERS = {
    "mr": mr(),
    "mr of 12 bits": mr(4095, np.uint16),
    "mr of small values": mr(300),
    "overshoot": some(mr(), 0.0001, -600),
    "overshoot of both signs": some(some(mr(), 0.0001, -1000), 0.001, 4000),
    "much overshoot": np.where(random().random(SHAPE) < 0.05, random().normal(-300, 300, SHAPE), mr()),
    "ringing": mr() + random().normal(0, 150, SHAPE),
    "ringing of small values": mr(300) + random().normal(0, 15, SHAPE),
    "one voxel": some(mr(), 0, 0) - 2000.0 * (np.arange(BODY.size).reshape(SHAPE) == 5),
    "phase": random().uniform(-4096, 4094, SHAPE),
    "phase of a masked body": np.where(BODY, random().uniform(-3142, 3142, SHAPE), 0),
    "phase in thousands": random().uniform(-1000, 1000, SHAPE),
    "phase in 1024ths": random().integers(-1024, 1024, SHAPE),
    "phase in degrees": random().uniform(-180, 180, SHAPE),
    "phase in radians": random().uniform(-np.pi, np.pi, SHAPE),
    "difference": random().normal(0, 100, SHAPE),
    "difference of large values": random().normal(0, 600, SHAPE),
    "difference, skewed": random().gamma(4, 50, SHAPE) - 200,
    "susceptibility": random().laplace(0, 40, SHAPE) + 30 * CORE,
    "real part": np.where(BODY, random().normal(0, 500, SHAPE), random().normal(0, 20, SHAPE)),
    "z scores": (mr() - mr().mean()) / mr().std(),
    "rotated and padded with -1000": outside(mr(), -1000),
    "rotated and padded with -1024": outside(mr(), -1024),
    "rotated and padded with -2000": outside(mr(), -2000),
    "pet in SUV": random().gamma(0.5, 1, SHAPE),
    "pet in Bq/mL": random().gamma(0.5, 4000, SHAPE) - 30,
    "mask": BODY.astype(np.uint8),
    "labels": BODY.astype(np.uint8) + 4 * CORE + 99 * BONE,
    "signed mask": np.where(BODY, 1, -1),
    "8 bits": np.clip((ct() + 160) / 400 * 255, 0, 255).astype(np.uint8),
    "ct from 0 to 1": np.clip((ct() + 1000.0) / 2000, 0, 1),
    "ct + 1024": np.clip(ct() + 1024, 0, 4095).astype(np.uint16),
    "ct + 1000, cropped": np.clip(ct()[16:32, 14:34] + 1000, 0, 4095).astype(np.uint16),
}


def scan_of(array, modality=None, offset=0.0):
    return Scan(np.asarray(array), np.eye(4), "dicom" if modality else "nifti", modality, offset)


@pytest.mark.parametrize("name", CTS)
def test_a_ct_is_taken_for_one(name):
    prepared = prepare(scan_of(CTS[name]), SIZE)
    assert prepared.preset == "ct", prepared.reason


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_ct_is_not_taken_for_one(name):
    prepared = prepare(scan_of(OTHERS[name]), SIZE)
    assert prepared.preset == "mr", prepared.reason


@pytest.mark.parametrize("values", [*CTS.values(), *OTHERS.values()], ids=[*CTS, *OTHERS])
def test_a_picture_is_windowed_by_the_same_rule(values):
    is_ct = prepare(scan_of(values), SIZE).preset == "ct"
    windows = (picture.LUNG, picture.SOFT_TISSUE, picture.BONE)
    assert (picture.window(values, None) in windows) == is_ct


@pytest.mark.parametrize("values", [ct(), ct(lung=-850), outside(ct(), -3024)], ids=["body", "chest", "padded"])
def test_a_clear_ct_is_no_guess(values):
    reason = prepare(scan_of(values), SIZE).reason
    assert "guess" not in reason and "air" in reason


@pytest.mark.parametrize("name", ["cropped inside the body", "cone beam, 150 too low", "lung only"])
def test_an_unclear_ct_is_said_to_be_a_guess_that_the_preset_overrules(name):
    reason = prepare(scan_of(CTS[name]), SIZE).reason
    assert "guess" in reason and "--preset" in reason


@pytest.mark.parametrize("values", list(OTHERS.values()), ids=list(OTHERS))
def test_mr_is_a_guess_where_no_header_says_it(values):
    reason = prepare(scan_of(values), SIZE).reason
    assert "guess" in reason and "--preset" in reason


@pytest.mark.parametrize("name", ["ct + 1024", "ct + 1000, cropped"])
def test_a_ct_without_its_intercept_is_named_with_the_way_out(name):
    assert "subtract 1024" in prepare(scan_of(OTHERS[name]), SIZE).reason
    dicom = prepare(scan_of(OTHERS[name], "CT"), SIZE)
    assert dicom.preset == "ct" and "subtract 1024" in dicom.reason


@pytest.mark.parametrize("name", ["mr", "mr of small values", "8 bits", "mask", "pet in SUV"])
def test_others_are_not_taken_for_a_ct_without_its_intercept(name):
    assert "subtract" not in prepare(scan_of(OTHERS[name]), SIZE).reason


@pytest.mark.parametrize(("modality", "preset"), [("CT", "ct"), ("MR", "mr"), ("PT", "mr"), ("NM", "mr")])
@pytest.mark.parametrize("values", [ct(), mr(), BODY.astype(np.uint8)], ids=["ct", "mr", "mask"])
def test_dicoms_modality_is_stronger_than_the_values(modality, preset, values):
    prepared = prepare(scan_of(values, modality), SIZE)
    assert prepared.preset == preset and f"modality is {modality}" in prepared.reason
    assert "guess" not in prepared.reason


def test_the_offset_belongs_to_the_values():
    """A file of values around 1e6 whose contrast is that of a CT: the array alone looks like Hounsfield units."""
    assert prepare(scan_of(ct(dtype=np.float32), offset=1e6), SIZE).preset == "mr"
    shifted = ct(dtype=np.float32) - 500
    assert prepare(scan_of(shifted, offset=500.0), SIZE).preset == "ct"
    np.testing.assert_allclose(
        prepare(scan_of(shifted, offset=500.0), SIZE, "ct").image, prepare(scan_of(ct()), SIZE, "ct").image, atol=1e-6
    )


def test_an_offset_does_not_make_a_model_volume():
    volume = np.random.default_rng(0).random(SIZE, np.float32)
    assert prepare(Scan(volume, ARRAY_AFFINE, "npy"), SIZE).preset == "raw"
    assert prepare(Scan(volume, ARRAY_AFFINE, "npy", None, 1e6), SIZE).preset == "mr"


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 6, 7), (4, 4, 4000), (4000, 4, 4), (512, 512, 9), (300, 300, 300)])
def test_a_sample_is_a_view_of_bounded_size_spread_over_the_scan(shape):
    array = np.broadcast_to(np.int16(0), shape)
    sample = sampled(array, 10_000)
    assert sample.base is not None and min(10_000, array.size) / 8 <= sample.size <= 10_000 * 1.3
    assert all(n == 1 or m > 1 for n, m in zip(shape, sample.shape))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
def test_planes_of_a_mask_are_counted_in_any_layout(monkeypatch, order, block):
    monkeypatch.setattr("engine.volume.views._BLOCK", block)
    mask = np.asarray(random().random((5, 6, 7)) < 0.3, order=order)
    for view in (mask, mask.transpose(1, 2, 0), mask[::-1, :, ::-1], mask[1:4, ::2], np.zeros((1, 1, 3), bool)):
        expected = [view.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
        assert [found.tolist() for found in counts(view)] == [count.tolist() for count in expected]


def test_deciding_takes_little_memory_of_any_layout():
    import tracemalloc

    array = np.zeros((256, 256, 400), np.int16).transpose(2, 0, 1)[::-1]
    array[:, 50:200, 50:200] = 1000
    tracemalloc.start()
    modality_of(array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000  # some copies of 2 million float64
