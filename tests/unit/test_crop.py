"""A region of interest: what is accepted, where it lies, and what the model sees of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from engine.errors import InvalidInput
from engine.scan import Scan
from engine.volume import Crop, prepare
from tests.boxes import boxes_to_model
from tests.unit.test_modality import ct

SIZE = (8, 32, 32)
SHAPE = (48, 48, 40)
REGION = ((10, 30), (12, 40), (4, 36))
FLIPPED = np.array([[0, -2.0, 0, 30], [-1.5, 0, 0, 20], [0, 0, 4.0, -50], [0, 0, 0, 1]])


def oblique(spacing=(0.8, 1.5, 3.0), angles=(10, -25, 40)):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = (-30, 40, 7)
    return affine


def text_of(region, suffix=""):
    return ",".join(f"{start}:{stop}" for start, stop in region) + suffix


@pytest.mark.parametrize(
    "given",
    [
        "10:30,12:40,4:36",
        " 10:30, 12:40, 4:36 ",
        (10, 12, 4, 30, 40, 36),
        np.array([10, 12, 4, 30, 40, 36.0]),
        [[10, 30], [12, 40], [4, 36]],
        Crop((10, 12, 4), (30, 40, 36)),
        (10.4, 12.0, 4.9, 29.2, 39.5, 35.00001),  # as an answer's boxes are: outwards
    ],
    ids=str,
)
def test_a_crop_is_given_as_text_box_or_pairs(given):
    assert Crop.of(given).region(SHAPE, np.eye(4)) == REGION


@pytest.mark.parametrize(
    "given",
    [
        *("", "10:30", "10:30,12:40", "10:30,12:40,4:36,1:2", "10-30,12-40,4-36", ":,:,:", "a:b,c:d,e:f",
          "10:30,12:40,4:36cm"),
        *("10:10,12:40,4:36", "30:10,12:40,4:36", "nan:30,12:40,4:36", "0:inf,12:40,4:36", "-inf:9,1:4,4:36mm"),
        *("10.5:30,12:40,4:36", "1e400:30,12:40,4:36"),
        *([1, 2, 3], "xyz", 7, [[1, 2, 3], [4, 5, 6]], {}, [None] * 6, [0, 0, 0, 0, 1, 1], [np.nan] * 6),
    ],
    ids=str,
)  # fmt: skip
def test_a_crop_that_is_none_is_refused_with_the_syntax(given):
    with pytest.raises(InvalidInput, match="i0:i1,j0:j1,k0:k1|six numbers|whole numbers"):
        Crop.of(given)


@pytest.mark.parametrize(
    "crop",
    [
        lambda: Crop.of("x" * (1 << 20)),
        lambda: Crop.of(["x" * (1 << 20)]),
        lambda: Crop.of_numbers(np.arange(6), "x" * (1 << 20)),
    ],
    ids=["text", "list", "unit"],
)
def test_a_refusal_echoes_little_of_a_crop(crop):
    with pytest.raises(InvalidInput, match=r"xxx\.\.\.") as refusal:
        crop()
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    "given",
    ["10:49,12:40,4:36", "-1:30,12:40,4:36", "48:49,0:1,0:1", "0:1,0:1,1e300:1e301", (-0.5, 0, 0, 9, 9, 9)],
)
def test_a_crop_outside_the_scan_is_refused_with_the_scans_extent(given):
    with pytest.raises(InvalidInput, match="0:48,0:48,0:40"):
        Crop.of(given).region(SHAPE, np.eye(4))


@pytest.mark.parametrize(
    "given",
    ["-0.6:10,0:10,0:10mm", "0:10,0:10,0:40mm", "500:510,0:10,0:10mm", "-1e300:1e300,0:10,0:10mm"],
)
def test_a_crop_in_mm_outside_the_scan_is_refused_with_the_scans_extent(given):
    with pytest.raises(InvalidInput, match=r"-0\.5:47\.5,-0\.5:47\.5,-0\.5:39\.5mm"):
        Crop.of(given).region(SHAPE, np.eye(4))


def test_a_crop_in_mm_that_holds_no_voxel_is_refused():
    with pytest.raises(InvalidInput, match="between the scan's voxels"):
        Crop.of("0.2:0.8,0:10,0:10mm").region(SHAPE, np.eye(4))


def test_a_crop_in_mm_lies_where_the_world_says():
    """x runs against j, y against i, in voxels of 1.5 x 2 x 4 mm."""
    x, y, z = (30 - 2 * 20, 30 - 2 * 10), (20 - 1.5 * 30, 20 - 1.5 * 12), (-50 + 4 * 5, -50 + 4 * 9)
    region = Crop.of(text_of((x, y, z), "mm")).region((40, 44, 20), FLIPPED)
    assert region == ((12, 31), (10, 21), (5, 10))  # centres on the box's faces are inside


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_crop_in_mm_holds_all_voxels_inside_and_few_others(data):
    angles = [data.draw(st.floats(-180, 180)) for _ in range(3)]
    affine, shape = oblique(angles=angles), (20, 24, 16)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    centre = grid[tuple(data.draw(st.integers(n // 3, 2 * n // 3)) for n in shape)]
    low, high = centre - data.draw(st.floats(0.5, 4)), centre + data.draw(st.floats(0.5, 4))
    region = Crop(tuple(low), tuple(high), "mm").region(shape, affine)
    inside = ((grid >= low) & (grid <= high)).all(-1)
    part = tuple(slice(*edges) for edges in region)
    assert inside[part].sum() == inside.sum() > 0
    corners = np.stack(np.meshgrid(*zip(low, high), indexing="ij"), -1).reshape(-1, 3)
    reach = np.linalg.solve(affine[:3, :3], (corners - affine[:3, 3]).T).T  # in voxels
    for (start, stop), least, most in zip(region, reach.min(0), reach.max(0)):
        assert least - 1e-6 <= start and stop - 1 <= most + 1e-6


def test_a_measured_box_in_mm_crops_to_the_box_in_voxels():
    from engine.results.measurements import measure

    mask = np.zeros((40, 44, 20), bool)
    mask[12:31, 10:21, 5:10] = True
    box = np.reshape(measure(mask, FLIPPED).bounding_box_ras_mm, (2, 3))
    assert Crop(*map(tuple, box.tolist()), "mm").region(mask.shape, FLIPPED) == ((12, 31), (10, 21), (5, 10))


# --- what the model sees ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("affine", [np.eye(4), FLIPPED, oblique()], ids=["RAS", "permuted", "oblique"])
@pytest.mark.parametrize("preset", ["ct", "mr", "m3d-cap", "m3d-seg", "m3d-refseg"])
def test_the_model_sees_what_it_would_see_of_the_region_alone(preset, affine):
    scan = Scan(ct(noise=30), affine, "nifti")
    part = tuple(slice(*edges) for edges in REGION)
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ [start for start, _ in REGION]
    alone = prepare(replace(scan, array=scan.array[part].copy(), affine=shifted), SIZE, preset)
    cropped = prepare(scan, SIZE, preset, Crop.of(text_of(REGION)))
    np.testing.assert_array_equal(cropped.image, alone.image)
    assert cropped.region == REGION and alone.region is None
    # Geometry of the whole scan, in which the same voxels are marked, and the same boxes lie.
    assert cropped.geometry.scan_shape == SHAPE
    np.testing.assert_array_equal(cropped.geometry.affine, affine)
    marked = np.random.default_rng(0).random(SIZE, np.float32)
    expected = np.zeros(SHAPE, bool)
    expected[part] = alone.geometry.mask_to_scan(marked)
    np.testing.assert_array_equal(cropped.geometry.mask_to_scan(marked), expected)
    box = np.array([[0.1, 0.2, 0.3, 0.5, 0.6, 0.7]])
    start = [start for start, _ in REGION]
    np.testing.assert_allclose(
        cropped.geometry.boxes_to_scan(box), alone.geometry.boxes_to_scan(box) + [*start, *start], atol=1e-9
    )
    np.testing.assert_allclose(boxes_to_model(cropped.geometry, cropped.geometry.boxes_to_scan(box)), box, atol=1e-9)


def test_a_crop_of_all_changes_nothing_but_what_is_said():
    scan = Scan(ct(), oblique(), "nifti")
    whole, cropped = prepare(scan, SIZE), prepare(scan, SIZE, crop=Crop.of(text_of([(0, n) for n in SHAPE])))
    np.testing.assert_array_equal(whole.image, cropped.image)
    assert whole.geometry == cropped.geometry
    assert "0:48,0:48,0:40" in cropped.reason and "0:48" not in whole.reason


def test_auto_decides_by_the_whole_scan():
    """Within the bone alone nothing looks like a CT."""
    scan = Scan(ct(), np.eye(4), "nifti")
    bone = "22:26,30:33,0:40"
    assert prepare(replace(scan, array=scan.array[22:26, 30:33]), SIZE).preset == "mr"
    assert prepare(scan, SIZE, crop=Crop.of(bone)).preset == "ct"


def test_a_region_of_one_value_is_refused():
    array = np.zeros(SHAPE, np.int16)
    array[20:] = 100
    with pytest.raises(InvalidInput, match="every voxel of the crop 0:10,0:48,0:40 is 7"):
        prepare(Scan(array, np.eye(4), "nifti", None, 7.0), SIZE, crop=Crop.of("0:10,0:48,0:40"))


def test_raw_takes_a_region_of_the_models_size():
    array = np.random.default_rng(0).random((20, 40, 40), np.float32)
    scan = Scan(array, np.eye(4), "npy")
    prepared = prepare(scan, SIZE, crop=Crop.of("5:13,4:36,8:40"))
    assert prepared.preset == "raw"
    np.testing.assert_array_equal(prepared.image[0], array[5:13, 4:36, 8:40])
