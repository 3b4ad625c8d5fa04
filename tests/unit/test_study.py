import io
import threading

import nibabel
import numpy as np
import pytest

from engine.errors import InvalidInput, StudyNotFound, Unavailable
from engine.runtime import study
from engine.runtime.study import ScanRequest, Studies, segmentation_features
from engine.runtime.study_store import StudyStore
from engine.scan import read_scan
from engine.scan.limits import Limits
from engine.volume import Crop, prepare
from engine.volume.geometry import Geometry
from tests.locks import waiting_for
from tests.unit.fake_models import SIZE, FakeModels, manifest


@pytest.fixture
def store(tmp_path):
    with StudyStore(tmp_path / "store", 50_000_000) as store:
        yield store


@pytest.fixture
def models():
    return FakeModels()


@pytest.fixture
def studies(store, models):
    return Studies(store, manifest(), models)


def bytes_of(array) -> np.ndarray:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def volume(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, *SIZE), np.float32)


def upload(data, affine=None, preset=None) -> ScanRequest:
    return ScanRequest(data, affine, preset, None)


def by_handle(handle) -> ScanRequest:
    return ScanRequest(None, None, None, handle)


def test_a_scan_is_prepared_and_encoded_once_however_often_it_comes(studies, store, models):
    handle, info = studies.open(upload(bytes_of(volume())))
    again, info_again = studies.open(upload(bytes_of(volume())))
    by, info_by = studies.open(by_handle(handle))
    assert handle == again == by
    assert models.calls == {"vision_encoder": 1}
    assert [i.cached for i in (info, info_again, info_by)] == [False, True, True]
    np.testing.assert_array_equal(store.get(handle, "image"), volume())
    np.testing.assert_array_equal(store.get(handle, "visual_tokens"), models.tokens(volume()))
    assert models.batches[0][1]["IMAGE"].shape == (1, 1, *SIZE)


def test_the_client_hears_preset_reason_shape_spacing_orientation_time_and_model(studies):
    image = nibabel.Nifti1Image(
        np.random.default_rng(0).integers(0, 900, (20, 30, 10)).astype(np.int16), np.diag([-2, 1.5, 4, 1])
    )
    _, info = studies.open(upload(np.frombuffer(image.to_bytes(), np.uint8), preset="mr"))
    assert info.reason and info.prepare_s > 0
    assert (info.preset, info.orientation, info.cached, info.crop) == ("mr", "LAS", False, None)
    assert (info.shape, info.spacing_mm) == ([20, 30, 10], [2, 1.5, 4])
    assert info.model == studies.manifest.model and info.model.manifest_sha256 == studies.manifest.identity


def test_scans_presets_affines_and_models_do_not_share_a_study(store, models):
    studies = Studies(store, manifest(), models)
    data = bytes_of(volume()[0])
    handles = {
        studies.open(upload(data))[0],
        studies.open(upload(bytes_of(volume(1)[0])))[0],
        studies.open(upload(data, preset="m3d-cap"))[0],
        studies.open(upload(data, affine=np.diag([1.0, 1, 2, 1])))[0],
        Studies(store, manifest(checkpoint_sha256="1"), models).open(upload(data))[0],
    }
    assert len(handles) == 5 == models.calls["vision_encoder"]


def test_the_model_sees_the_crop_only_and_the_client_hears_which(studies, store):
    scan = np.random.default_rng(0).integers(0, 900, (20, 30, 16)).astype(np.int16)
    data, affine = bytes_of(scan), np.diag([-2, 1.5, 4, 1])
    handle, info = studies.open(ScanRequest(data, affine, "mr", None, None, Crop.of("2:18,5:25,3:11")))
    again, _ = studies.open(ScanRequest(data, affine, "mr", None, None, Crop.of((2, 5, 3, 18, 25, 11))))
    assert handle == again
    assert info.crop == [[2, 18], [5, 25], [3, 11]] and "2:18,5:25,3:11" in info.reason
    assert info.shape == [20, 30, 16] and info.spacing_mm == [2, 1.5, 4]
    _, alone = studies.open(ScanRequest(bytes_of(scan[2:18, 5:25, 3:11]), affine, "mr", None))
    assert alone.crop is None
    image = prepare(read_scan(bytes_of(scan[2:18, 5:25, 3:11]), affine=affine), SIZE, "mr").image
    np.testing.assert_array_equal(store.get(handle, "image"), image)
    geometry = Geometry.from_dict(store.info(handle)["geometry"])
    assert geometry.scan_shape == (20, 30, 16)
    np.testing.assert_array_equal(geometry.affine, affine)


def test_crops_do_not_share_a_study(studies, models):
    scan, affine = np.random.default_rng(0).integers(0, 900, (20, 30, 16)).astype(np.int16), np.eye(4)
    crops = [None, *map(Crop.of, ("0:20,0:30,0:16", "0:10,0:30,0:16", "0:10,0:30,0:16mm", "0:10,0:29,0:16"))]
    requests = [ScanRequest(bytes_of(scan), affine, "mr", None, None, crop) for crop in crops]
    with pytest.raises(InvalidInput, match="not within"):
        studies.open(requests[3])  # 16 mm are half a voxel too many
    handles = {studies.open(request)[0] for n, request in enumerate(requests) if n != 3}
    assert len(handles) == 4 == models.calls["vision_encoder"]


def test_a_crop_that_cannot_be_used_leaves_nothing_in_the_store(studies, store, models):
    with pytest.raises(InvalidInput, match="not within the scan"):
        studies.open(ScanRequest(bytes_of(volume()), None, None, None, None, Crop.of("0:1000,0:2,0:2")))
    assert store.used_bytes == 0 and not models.calls


def test_uploads_of_one_scan_at_the_same_time_prepare_and_encode_it_once(studies, store, models, monkeypatch):
    started, go, prepared = threading.Event(), threading.Event(), []

    def slow(*args):
        prepared.append(args)
        started.set()
        assert go.wait(30)
        return prepare(*args)

    monkeypatch.setattr(study, "prepare", slow)
    opened = []

    def open_it():
        opened.append(studies.open(upload(bytes_of(volume()))))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    while waiting_for(store) < 3:
        assert len(prepared) == 1
    go.set()
    for thread in threads:
        thread.join()
    assert len({handle for handle, _ in opened}) == 1 and len(opened) == 4
    assert len(prepared) == 1 and models.calls == {"vision_encoder": 1}


def test_a_request_names_its_scan_once(studies):
    with pytest.raises(InvalidInput, match="neither"):
        ScanRequest(None, None, None, None)
    with pytest.raises(InvalidInput, match="both"):
        ScanRequest(bytes_of(volume()), None, None, "0" * 64)
    for companion in (
        {"affine": np.eye(4), "preset": None},
        {"affine": None, "preset": "ct"},
        {"affine": None, "preset": None, "crop": Crop.of("0:1,0:1,0:1")},
    ):
        with pytest.raises(InvalidInput, match="belong to VOLUME"):
            ScanRequest(None, handle="0" * 64, **companion)


def test_an_unknown_handle_says_so_and_runs_nothing(studies, models):
    for use in (studies.is_ready, lambda handle: studies.open(by_handle(handle)), studies.encode_for_segmentation):
        with pytest.raises(StudyNotFound, match="upload"):
            use("0" * 64)
    assert not models.calls


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x1f\x8b truncated"])
def test_a_scan_that_cannot_be_read_leaves_nothing_in_the_store(studies, store, models, data):
    with pytest.raises(InvalidInput):
        studies.open(upload(np.frombuffer(data, np.uint8)))
    assert store.used_bytes == 0 and not models.calls


def test_the_limits_are_those_of_the_settings(store, models):
    studies = Studies(store, manifest(), models, Limits(max_voxels=10))
    with pytest.raises(InvalidInput, match="10"):
        studies.open(upload(bytes_of(volume())))


def test_after_a_failed_encoding_the_next_request_encodes_again(studies, models):
    tokens, models.tokens = models.tokens, lambda image: np.full((8, 6), np.nan, np.float32)
    with pytest.raises(Unavailable, match="not finite"):
        studies.open(upload(bytes_of(volume())))
    models.tokens = tokens
    handle, info = studies.open(upload(bytes_of(volume())))
    assert studies.is_ready(handle) and info.cached
    assert models.calls == {"vision_encoder": 2}


def test_segmentation_features_are_encoded_once_and_only_when_asked_for(studies, store, models):
    handle, _ = studies.open(upload(bytes_of(volume())))
    assert "segmentation_encoder" not in models.calls
    features = studies.encode_for_segmentation(handle)
    np.testing.assert_array_equal(segmentation_features(store, models, handle), features)
    assert models.calls["segmentation_encoder"] == 1
