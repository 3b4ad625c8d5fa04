"""Presets make the volume their contract promises; masks and boxes come back into the scan's own space."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scipy.ndimage import center_of_mass
from scipy.spatial.transform import Rotation

from engine.errors import InvalidInput
from engine.scan import ARRAY_AFFINE, Scan
from engine.volume import PRESETS, prepare
from engine.volume.geometry import Geometry, canonical_axes
from engine.volume.resample import shrink, weights
from tests.boxes import boxes_to_model

SIZE = (16, 48, 48)


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (a.sum() + b.sum())


@st.composite
def geometries(draw):
    """Geometries of scans with any axis order, flips, oblique affine, anisotropic spacing and crop."""
    size = (16, 64, 64)
    shape = [draw(st.integers(20, 90)) for _ in range(3)]
    spacing = [draw(st.floats(0.4, 6)) for _ in range(3)]
    rotation = Rotation.from_euler("xyz", [draw(st.floats(-180, 180)) for _ in range(3)], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing * [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    axes, flips = canonical_axes(affine)
    crop = []
    for axis in axes:
        start, stop = draw(st.integers(0, shape[axis] // 4)), draw(st.integers(3 * shape[axis] // 4, shape[axis]))
        crop.append((start, stop))
    return Geometry(tuple(shape), tuple(map(tuple, affine.tolist())), axes, flips, tuple(crop), size)


@st.composite
def masks(draw, smallest):
    """(geometry, mask in the scan): a box or an ellipsoid of at least `smallest` model voxels in each direction."""
    geometry = draw(geometries())
    shape = "ellipsoid" if draw(st.booleans()) else "box"
    inside = []
    for axis in range(3):
        model_axis = geometry.axes.index(axis)
        start, stop = geometry.crop[model_axis]
        least = smallest * (stop - start) / geometry.image_size[model_axis]
        length = draw(st.floats(min(least, stop - start), stop - start))
        low = start + draw(st.floats(0, 1)) * (stop - start - length)
        centre = np.arange(geometry.scan_shape[axis]) + 0.5
        inside.append((centre - low - length / 2) / (length / 2))
    grid = np.meshgrid(*inside, indexing="ij")
    mask = sum(g**2 for g in grid) <= 1 if shape == "ellipsoid" else np.all([np.abs(g) <= 1 for g in grid], axis=0)
    # A thin ellipsoid may hold few of the scan's voxels: what counts is the extent of those that it does hold.
    for axis, filled in enumerate(mask.any(tuple({0, 1, 2} - {axis})) for axis in range(3)):
        model_axis = geometry.axes.index(axis)
        start, stop = geometry.crop[model_axis]
        assume(
            filled.any()
            and np.ptp(np.flatnonzero(filled)) + 1 >= smallest * (stop - start) / geometry.image_size[model_axis]
        )
    return geometry, mask


def there_and_back(geometry, mask):
    return geometry.mask_to_scan(geometry.mask_to_model(mask))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks(smallest=12))
def test_masks_of_12_model_voxels_survive_the_way_to_the_model_and_back(case):
    geometry, mask = case
    assert dice(mask, there_and_back(geometry, mask)) >= 0.9


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks(smallest=4))
def test_masks_of_4_model_voxels_survive_the_way_to_the_model_and_back(case):
    geometry, mask = case
    assert dice(mask, there_and_back(geometry, mask)) >= 0.75


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks(smallest=4))
def test_masks_stay_in_place_within_half_a_model_voxel(case):
    geometry, mask = case
    moved = np.subtract(center_of_mass(there_and_back(geometry, mask)), center_of_mass(mask))
    voxel = [(stop - start) / n for (start, stop), n in zip(geometry.crop, geometry.image_size)]
    assert (np.abs(moved[list(geometry.axes)]) <= 0.5 * np.array(voxel)).all()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(masks(smallest=4))
def test_a_mask_on_the_way_to_the_model_keeps_its_volume(case):
    geometry, mask = case
    np.testing.assert_allclose(geometry.mask_to_model(mask).mean(), geometry.view(mask).mean(), rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.data())
def test_boxes_come_back_as_they_were(geometry, data):
    size = np.array(geometry.image_size)
    first = np.array([data.draw(st.floats(0, n - 1)) for n in size])
    last = np.array([data.draw(st.floats(f, n - 1)) for f, n in zip(first, size)])
    box = np.concatenate([first / size, last / size])[None]
    np.testing.assert_allclose(boxes_to_model(geometry, geometry.boxes_to_scan(box)), box, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(geometries(), st.data())
def test_a_box_lands_where_the_mask_of_the_same_voxels_lands(geometry, data):
    first = [data.draw(st.integers(0, n - 4)) for n in geometry.image_size]
    last = [data.draw(st.integers(f + 3, n - 1)) for f, n in zip(first, geometry.image_size)]
    volume = np.zeros(geometry.image_size, np.float32)
    volume[tuple(slice(start, end + 1) for start, end in zip(first, last))] = 1
    mask = geometry.mask_to_scan(volume)
    box = np.concatenate([first, last]) / np.tile(geometry.image_size, 2)  # as the reference's data writes boxes
    edges = geometry.boxes_to_scan(box).reshape(2, 3)
    assume((edges[1] - edges[0] >= 2).all())  # thinner ones may fall between two voxels of a coarser scan
    found = np.array([[i.min(), i.max() + 1] for i in np.nonzero(mask)]).T
    assert (np.abs(found - edges) <= 1).all()


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**32 - 1))
def test_mask_to_scan_equals_the_obvious_dense_computation(geometry, seed):
    random = np.random.default_rng(seed)
    volume = np.zeros(geometry.image_size, np.float32)
    low = [random.integers(0, n - 2) for n in volume.shape]
    high = [random.integers(start + 1, n) for start, n in zip(low, volume.shape)]
    part = tuple(map(slice, low, high))
    volume[part] = random.random(volume[part].shape, np.float32)
    d, h, w = [weights(n, stop - start) for n, (start, stop) in zip(geometry.image_size, geometry.crop)]
    dense = np.einsum("dhw,ad,bh,cw->abc", volume.astype(float), d, h, w, optimize=True)
    expected = np.zeros(geometry.scan_shape, bool)
    geometry.view(expected)[:] = dense > 0.5
    disagree = expected != geometry.mask_to_scan(volume)
    near = np.zeros(geometry.scan_shape, bool)
    geometry.view(near)[:] = np.abs(dense - 0.5) < 1e-5
    assert not (disagree & ~near).any()


def test_nothing_is_marked_outside_the_crop_and_everything_inside_by_a_full_mask():
    geometry = Geometry(
        (10, 12, 14),
        tuple(map(tuple, np.eye(4).tolist())),
        (2, 1, 0),
        (False, True, True),
        ((3, 9), (2, 12), (0, 7)),
        (4, 8, 8),
    )
    expected = np.zeros((10, 12, 14), bool)
    expected[0:7, 2:12, 3:9] = True
    np.testing.assert_array_equal(geometry.mask_to_scan(np.ones((4, 8, 8), np.float32)), expected)
    assert not geometry.mask_to_scan(np.zeros((4, 8, 8), np.float32)).any()


def test_a_mask_of_another_shape_is_refused():
    geometry = prepare(phantom(), SIZE, "ct").geometry
    with pytest.raises(InvalidInput, match="model volume"):
        geometry.mask_to_scan(np.zeros((3, 3, 3)))
    with pytest.raises(InvalidInput, match="the scan has"):
        geometry.mask_to_model(np.zeros((3, 3, 3), bool))


def test_geometry_survives_json():
    geometry = prepare(phantom(), SIZE, "ct").geometry
    assert Geometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_shrinking_by_whole_factors_is_the_mean_of_blocks():
    volume = np.random.default_rng(0).integers(-1000, 1000, (12, 20, 18)).astype(np.int16)
    small = shrink(volume, [weights(12, 4), weights(20, 5), weights(18, 9)])
    blocks = volume.reshape(4, 3, 5, 4, 9, 2).mean((1, 3, 5))
    np.testing.assert_allclose(small, blocks, atol=1e-2)


@pytest.mark.parametrize("size", [(7, 9, 11), (40, 50, 60), (12, 50, 9)])
def test_linear_resizing_is_that_of_torch(size):
    import torch

    volume = np.random.default_rng(0).random((12, 20, 18), np.float32)
    ours = shrink(volume, [weights(a, b, "input") for a, b in zip(volume.shape, size)])
    theirs = torch.nn.functional.interpolate(torch.from_numpy(volume)[None, None], size, mode="trilinear")[0, 0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_shrink_does_not_care_how_the_volume_lies_in_memory(monkeypatch):
    monkeypatch.setattr("engine.volume.resample.SLAB_BYTES", 1000)
    volume = np.random.default_rng(0).random((12, 20, 18), np.float32)
    matrices = [weights(12, 5), weights(20, 30), weights(18, 4, "input")]
    expected = np.einsum("dhw,ad,bh,cw->abc", volume, *matrices)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        view = np.ascontiguousarray(volume.transpose(order)).transpose(np.argsort(order))
        np.testing.assert_allclose(shrink(view, matrices), expected, atol=1e-5)
        np.testing.assert_allclose(shrink(view[::-1].copy()[::-1], matrices), expected, atol=1e-5)


# --- presets ---------------------------------------------------------------------------------------------------------


def phantom(noise=0.0):
    """A body of water (0 HU) with a lung, a bone and dust in air; axes right, back, up (RAS would be front)."""
    i, j, k = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 50), np.linspace(-1, 1, 40), indexing="ij")
    hu = np.full(i.shape, -1024, np.int16)
    hu[(i / 0.7) ** 2 + (j / 0.5) ** 2 <= 1] = 0
    hu[((i - 0.3) / 0.2) ** 2 + (j / 0.3) ** 2 + (k / 0.5) ** 2 <= 1] = -850
    hu[(i / 0.1) ** 2 + ((j - 0.3) / 0.1) ** 2 <= 1] = 1500
    hu[2:4, 2:4, 2:4] = 200
    hu = (hu + np.random.default_rng(0).normal(0, noise, hu.shape)).astype(np.int16) if noise else hu
    return Scan(hu, np.array([[1.5, 0, 0, -40], [0, -2, 0, 30], [0, 0, 3, 9], [0, 0, 0, 1.0]]), "nifti")


def reoriented(scan, codes):
    import nibabel as nib

    image = nib.Nifti1Image(scan.array, scan.affine)
    start, end = nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt(codes)
    image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    return Scan(np.asarray(image.dataobj), image.affine, scan.kind)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
@pytest.mark.parametrize("preset", ["ct", "mr", "m3d-cap"])
def test_the_same_scan_stored_in_another_orientation_gives_the_same_volume(preset, codes):
    scan = phantom(noise=20)
    other = reoriented(scan, codes)
    assert other.orientation == codes
    np.testing.assert_allclose(prepare(other, SIZE, preset).image, prepare(scan, SIZE, preset).image, atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_a_mask_comes_back_in_the_orientation_the_scan_is_stored_in(codes):
    scan = reoriented(phantom(), codes)
    for preset in ("ct", "mr", "m3d-cap", "m3d-seg", "m3d-refseg"):
        geometry = prepare(scan, SIZE, preset).geometry
        mask = np.abs(scan.array - 1500.0) < 100
        assert dice(mask, there_and_back(geometry, mask)) > 0.85
        assert geometry.affine == tuple(map(tuple, scan.affine.tolist()))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_the_crop_lies_where_an_off_centre_body_is(codes):
    array = np.full((40, 50, 60), -1000, np.int16)
    array[5:20, 11:45, 2:33] = 40
    scan = reoriented(Scan(array, np.eye(4), "nifti"), codes)
    mask = prepare(scan, SIZE, "ct").geometry.mask_to_scan(np.ones(SIZE, np.float32))
    np.testing.assert_array_equal(mask, scan.array == 40)


def test_model_axes_run_up_back_and_left():
    world = np.zeros((20, 20, 20), np.float32)
    for axis in range(3):  # RAS
        world += (10.0**axis) * np.arange(20).reshape([-1 if a == axis else 1 for a in range(3)])
    scan = Scan(world, np.eye(4), "nifti")
    image = prepare(scan, (20, 20, 20), "mr").image[0]
    middle = image[10, 10, 10]
    assert image[14, 10, 10] > middle  # further up: larger
    assert image[10, 14, 10] < middle  # further back: smaller y
    assert image[10, 10, 19] < image[10, 10, 0]  # further left: smaller x


def test_ct_scales_the_documented_window_and_crops_to_the_body():
    prepared = prepare(phantom(), SIZE, "ct")
    image = prepared.image
    assert image.shape == (1, *SIZE) and image.dtype == np.float32 and image.flags.c_contiguous
    assert image[0, 8, 40, 10] == pytest.approx(0.5, abs=1e-6)  # water
    assert image[0, 8, 20, 14] == pytest.approx(0.075, abs=1e-3)  # lung, -850 HU, on the patient's right
    assert image[0, 8, 38, 24] == 1  # bone, above the window, behind the middle
    body = np.argwhere(phantom().array[..., 20] > -500)
    assert prepared.geometry.crop == ((0, 40), *[(int(body[:, a].min()), int(body[:, a].max()) + 1) for a in (1, 0)])


def test_ct_of_nothing_but_air_keeps_the_whole_scan():
    air = Scan(np.random.default_rng(0).integers(-1024, -900, (20, 20, 20)).astype(np.int16), np.eye(4), "nifti")
    assert prepare(air, SIZE, "ct").geometry.crop == ((0, 20),) * 3


def test_a_crop_on_a_coarse_grid_loses_nothing_of_the_body(monkeypatch):
    monkeypatch.setattr("engine.volume.presets._COARSE", 12)
    geometry = prepare(phantom(), SIZE, "ct").geometry
    body = phantom().array > -500
    body[:5, :5, :5] = False
    assert np.array_equal(body & there_and_back(geometry, np.ones(body.shape, bool)), body)


def test_small_structures_survive_a_coarser_grid_in_ct():
    array = np.zeros((64, 64, 320), np.int16)
    array[:, :, ::10] = 3000  # one slice in ten, at a tenth of the resolution; clipped to 1000 HU before averaging
    image = prepare(Scan(array, np.eye(4), "nifti"), (32, 64, 64), "ct").image
    np.testing.assert_allclose(image, 0.55, atol=1e-3)


def test_mr_does_not_depend_on_the_scale_of_intensities():
    scan = phantom(noise=20)
    scaled = Scan(scan.array * np.float32(0.37) + 500, scan.affine, "nifti")
    one, other = prepare(scan, SIZE, "mr"), prepare(scaled, SIZE, "mr")
    np.testing.assert_allclose(one.image, other.image, atol=2e-3)
    assert one.geometry.crop == other.geometry.crop
    assert one.image.min() == 0 and one.image.max() == 1


def test_mr_takes_a_label_image_of_two_values():
    array = np.zeros((20, 20, 20), np.uint8)
    array[5:15, 5:15, 5:15] = 1
    image = prepare(Scan(array, np.eye(4), "nifti"), SIZE, "mr").image
    assert image.max() == 1 and np.isfinite(image).all()


@pytest.mark.filterwarnings("error")
def test_mr_takes_large_values_of_which_the_coarse_grid_sees_one():
    array = np.full((200, 20, 20), 1e25, np.float32)
    array[1] = 2e25
    image = prepare(Scan(array, ARRAY_AFFINE, "nifti"), SIZE, "mr").image
    assert image.max() == 1 and np.isfinite(image).all()


def monai_reference(image_dhw, size):
    import monai.transforms as mtf

    image = mtf.CropForeground(allow_smaller=True)(image_dhw[None].astype(np.float32))
    return np.asarray(mtf.Resize(spatial_size=list(size), mode="bilinear")(image))


def test_m3d_cap_is_what_the_reference_does():
    random = np.random.default_rng(0)
    slices = np.zeros((40, 60, 70), np.uint8)  # as PNG slices stacked by a viewer
    slices[3:35, 5:50, 11:66] = random.integers(0, 256, (32, 45, 55))
    scaled = slices / np.float32(255)
    scaled = (scaled - scaled.min()) / np.clip(scaled.max() - scaled.min(), 1e-8, None)
    prepared = prepare(Scan(slices, ARRAY_AFFINE, "npy"), SIZE, "m3d-cap")
    np.testing.assert_allclose(prepared.image, monai_reference(scaled, SIZE), atol=1e-4)
    assert prepared.geometry.crop == ((3, 35), (5, 50), (11, 66))


def test_m3d_seg_is_what_the_reference_does():
    nifti = phantom(noise=150).array.astype(np.float32)  # i, j, k
    bright = nifti[nifti > nifti.mean()]
    low, high = np.percentile(bright, [0.05, 99.95])
    image = np.swapaxes((np.clip(nifti, low, high) - bright.mean()) / bright.std(), -1, -3)
    image = image - image.min()
    image = image / image.max()
    prepared = prepare(phantom(noise=150), SIZE, "m3d-seg")
    np.testing.assert_allclose(prepared.image, monai_reference(image, SIZE), atol=1e-4)


@pytest.mark.parametrize("low, high", [(0, 1), (2**24, 2**24 + 2)])  # between the latter float32 has no mean
def test_m3d_seg_refuses_a_scan_of_two_values(low, high):
    array = np.full((20, 20, 20), low, np.float32)
    array[2:] = high
    with pytest.raises(InvalidInput, match="no contrast"):
        prepare(Scan(array, np.eye(4), "nifti"), SIZE, "m3d-seg")


def test_m3d_refseg_is_what_the_reference_does():
    import monai.transforms as mtf

    nifti = phantom(noise=150).array.astype(np.float32)  # i, j, k
    scale = mtf.ScaleIntensityRangePercentiles(lower=0.5, upper=99.5, b_min=0, b_max=1, clip=True)
    image = np.asarray(scale(nifti.transpose(2, 0, 1)))
    prepared = prepare(phantom(noise=150), SIZE, "m3d-refseg")
    np.testing.assert_allclose(prepared.image, monai_reference(image, SIZE), atol=1e-4)


def test_m3d_refseg_refuses_a_scan_that_is_almost_all_one_value():
    array = np.zeros((20, 20, 20), np.uint8)
    array[5, 5, 5] = 1
    with pytest.raises(InvalidInput, match="no contrast"):
        prepare(Scan(array, np.eye(4), "nifti"), SIZE, "m3d-refseg")


def test_raw_passes_a_model_volume_untouched():
    volume = np.random.default_rng(0).random(SIZE, np.float32)
    prepared = prepare(Scan(volume, ARRAY_AFFINE, "npy"), SIZE)
    assert prepared.preset == "raw"
    np.testing.assert_array_equal(prepared.image[0], volume)
    mask = volume > 0.5
    np.testing.assert_array_equal(prepared.geometry.mask_to_scan(mask.astype(np.float32)), mask)


@pytest.mark.parametrize(
    "volume, message",
    [(np.zeros((16, 48, 47), np.float32), "model's size"), (np.full(SIZE, 255, np.float32), "from 0 to 1")],
)
def test_raw_refuses_what_is_not_a_model_volume(volume, message):
    volume[0, 0, 0] = 1
    with pytest.raises(InvalidInput, match=message):
        prepare(Scan(volume, ARRAY_AFFINE, "npy"), SIZE, "raw")


@pytest.mark.parametrize(
    "modality, low, high, expected",
    [
        ("CT", 0, 100, "ct"),
        ("MR", -1000, 1000, "mr"),
        ("PT", 0, 9000, "mr"),
        (None, -1024, 1500, "ct"),
        (None, 0, 1500, "mr"),
        (None, -3, 4, "mr"),
    ],
)
def test_auto_says_which_preset_and_why(modality, low, high, expected):
    array = np.linspace(low, high, 27000).reshape(30, 30, 30).astype(np.float32)
    prepared = prepare(Scan(array, np.eye(4), "dicom" if modality else "nifti", modality), SIZE)
    assert prepared.preset == expected
    assert expected in prepared.reason and (modality or f"{low:g} to {high:g}") in prepared.reason


@pytest.mark.parametrize("preset", ["ct", "mr", "m3d-cap", "m3d-seg", "m3d-refseg"])
def test_large_scans_take_at_most_three_times_their_size_in_memory(preset):
    array = np.random.default_rng(0).integers(-1000, 1000, (200, 256, 256), dtype=np.int16).transpose(2, 1, 0)
    scan = Scan(array, np.eye(4), "nifti")
    tracemalloc.start()
    geometry = prepare(scan, (32, 128, 128), preset).geometry
    mask = geometry.mask_to_scan(np.ones((32, 128, 128), np.float32))
    geometry.mask_to_model(mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * array.nbytes


def test_an_unknown_preset_is_refused_with_the_list_of_presets():
    with pytest.raises(InvalidInput, match="m3d-seg"):
        prepare(phantom(), SIZE, "xray")


def test_a_refusal_echoes_little_of_a_preset():
    with pytest.raises(InvalidInput, match="no preset .xxx.*xxx\\.\\.\\.: choose") as refusal:
        prepare(phantom(), SIZE, "x" * (1 << 20))
    assert len(str(refusal.value)) < 250


def test_every_preset_has_a_documented_contract():
    assert {"auto", "ct", "mr", "m3d-cap", "m3d-seg", "m3d-refseg", "raw"} == set(PRESETS)
    assert all(len(preset.doc) > 80 for preset in PRESETS.values())
