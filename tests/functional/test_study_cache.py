"""What is known about a scan is computed once: Triton's own per-model statistics say what ran."""

from __future__ import annotations

import io
import shutil
import stat
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from engine import contract
from engine.client import Study, wire
from engine.client.connection import Connection
from engine.errors import DeadlineExceeded, InvalidInput, StudyNotFound
from engine.manifest import Manifest
from engine.runtime.study_store import StudyStore, content_digest
from tests.locks import waiting_for
from tests.tiny import IMAGE_SIZE, QUESTION

pytestmark = pytest.mark.integration

ENCODERS = ("vision_encoder", "segmentation_encoder", "clip_image_encoder")
WORKED_ON = 4  # scans at a time, as in table study of model_repository/settings.toml


@pytest.fixture(scope="module")
def statistics(server):
    """statistics(): how many inferences each model has run."""
    triton = InferenceServerClient(server.url)
    yield lambda: {
        name: triton.get_inference_statistics(name).model_stats[0].inference_count for name in contract.MODELS
    }
    triton.close()


@pytest.fixture(scope="module")
def triton(server):
    """Requests without the client library."""
    connection = Connection(server.url)
    yield connection
    connection.close()


def new_scan(seed: int) -> np.ndarray:
    """A scan at the model's size that no other test sends."""
    return np.random.default_rng([20, seed]).random((1, *IMAGE_SIZE), np.float32)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def ran(before: dict, after: dict, models=ENCODERS) -> dict:
    """Which of `models` ran in between, and how often."""
    return {name: after[name] - before[name] for name in models if after[name] != before[name]}


def at_the_same_time(count: int, work) -> list:
    """work(0), work(1), ... on a thread each; their results."""
    results, barrier = [None] * count, threading.Barrier(count)

    def one(i):
        barrier.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def chat(triton: Connection, study: Study) -> dict[str, np.ndarray]:
    """The whole answer to QUESTION, by the ensemble."""
    return next(triton.stream("m3d_chat", {contract.STUDY_IN: study.handle, contract.QUESTION: QUESTION}, 60))


def folder_in(server, study: Study) -> Path:
    """Where the server keeps the study, in its own shared memory."""
    (folder,) = Path(f"/proc/{server.supervisor_pid}/root/dev/shm").glob(f"m3d-studies-*/{study.handle}")
    return folder


@pytest.fixture(scope="module")
def folder_of(server):
    return partial(folder_in, server)


def test_a_second_question_runs_neither_preprocessing_nor_the_vision_encoder(client, triton, statistics, folder_of):
    before = statistics()
    study = client.upload(new_scan(0))
    uploaded = statistics()
    assert ran(before, uploaded) == {"vision_encoder": 1}
    assert not study.info.cached
    image = folder_of(study) / "image.npy"
    prepared = image.stat()
    first, second = (chat(triton, study)["TOKEN_IDS"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert ran(uploaded, statistics(), (*ENCODERS, "study", "decoder")) == {"study": 2, "decoder": 2}
    assert image.stat().st_mtime_ns == prepared.st_mtime_ns and image.stat().st_ino == prepared.st_ino
    assert tuple(first) == client.ask(study, QUESTION).token_ids


def test_the_same_scan_sent_again_is_recognised(client, statistics, triton):
    study = client.upload(new_scan(1))
    before = statistics()
    again = client.upload(new_scan(1))
    assert again.handle == study.handle and again.info.cached
    inputs = {contract.VOLUME: npy(new_scan(1)), contract.QUESTION: QUESTION}
    answer = next(triton.stream("m3d_chat", inputs, 60))
    assert answer.text("STUDY_HANDLE") == study.handle
    assert ran(before, statistics()) == {}


def test_a_scan_sent_in_parts_is_the_study_that_it_is_at_once(client, triton, statistics, monkeypatch):
    at_once = triton.infer("study", {contract.VOLUME: npy(new_scan(20))}, 60).text("STUDY")
    before = statistics()
    monkeypatch.setattr(wire, "PART_BYTES", 1000)
    studies = at_the_same_time(8, lambda i: client.upload(new_scan(20 + i % 2)))
    assert {study.handle for study in studies[::2]} == {at_once}
    assert len({study.handle for study in studies[1::2]} - {at_once}) == 1
    assert ran(before, statistics()) == {"vision_encoder": 1}


def test_a_scan_uploaded_by_many_at_the_same_time_is_encoded_once(client, statistics):
    before = statistics()
    studies = at_the_same_time(8, lambda i: client.upload(new_scan(2)))
    assert len({study.handle for study in studies}) == 1
    assert sum(not study.info.cached for study in studies) == 1
    assert ran(before, statistics()) == {"vision_encoder": 1}


@contextmanager
def occupied(server, client, seeds, known: Study):
    """While the server works on cold scans, which end with this; the threads that upload them. `known` is another."""
    cold = [npy(new_scan(seed)) for seed in seeds]
    model = Manifest.read(server.repository).identity
    uploads = [threading.Thread(target=client.upload, args=(np.load(io.BytesIO(data)),)) for data in cold]
    with StudyStore(folder_in(server, known).parent) as store, ExitStack() as held:
        for data in cold:  # as if they took very long to prepare
            held.enter_context(store.lock(store.handle_of(content_digest(data), None, "auto", model), "image"))
        for upload in uploads:
            upload.start()
        while waiting_for(store) < WORKED_ON:
            client.ask(known, QUESTION)
        yield uploads
    for upload in uploads:
        upload.join()


def test_cold_scans_do_not_hold_up_a_question_about_another_scan(client, triton, server):
    study = client.upload(new_scan(3))
    alone = chat(triton, study)["TOKEN_IDS"]
    with occupied(server, client, range(100, 100 + 2 * WORKED_ON), study) as uploads:
        np.testing.assert_array_equal(chat(triton, study)["TOKEN_IDS"], alone)
        assert all(upload.is_alive() for upload in uploads)


@pytest.mark.parametrize("part_bytes", [1000, wire.PART_BYTES], ids=["in parts", "at once"])
def test_a_scan_that_nobody_waits_for_any_more_is_not_encoded(client, server, statistics, monkeypatch, part_bytes):
    monkeypatch.setattr(wire, "PART_BYTES", part_bytes)
    study = client.upload(new_scan(4))
    before = statistics()
    with occupied(server, client, range(part_bytes, part_bytes + WORKED_ON), study):
        with pytest.raises(DeadlineExceeded):
            client.upload(new_scan(1 + part_bytes + WORKED_ON), timeout=2)  # its turn has not come
    client.upload(new_scan(2 + part_bytes + WORKED_ON))  # comes behind it
    assert ran(before, statistics()) == {"vision_encoder": WORKED_ON + 1}


def test_two_scans_asked_the_same_question_in_turns_are_not_mixed_up(client):
    studies = [client.upload(new_scan(seed)) for seed in (4, 5)]
    alone = [client.ask(study, QUESTION, max_new_tokens=24).token_ids for study in studies]
    assert alone[0] != alone[1]
    together = at_the_same_time(8, lambda i: client.ask(studies[i % 2], QUESTION, max_new_tokens=24).token_ids)
    assert together == alone * 4


@pytest.mark.parametrize("handle", ["0" * 64, "../../../etc/passwd", "not a handle"])
def test_an_unknown_handle_is_an_error_at_once(triton, statistics, handle):
    before = statistics()
    named = {contract.STUDY_IN: handle}
    with pytest.raises(StudyNotFound, match="upload the scan again"):
        triton.infer("study", named, 60)
    for model in ("m3d_chat", "m3d_segment"):
        with pytest.raises(StudyNotFound, match="upload the scan again"):
            next(triton.stream(model, named | {contract.QUESTION: QUESTION}, 60))
    with pytest.raises(StudyNotFound, match="upload the scan again"):
        triton.infer("m3d_retrieve", named | {contract.TEXTS: ["w1"]}, 60)
    assert ran(before, statistics(), (*ENCODERS, "decoder", "segmentation", "retrieval")) == {}


def test_an_evicted_study_is_not_found_by_handle_and_sent_again_by_the_client(client, triton, statistics, folder_of):
    study = client.upload(new_scan(6))
    expected = client.ask(study, QUESTION, max_new_tokens=4)
    shutil.rmtree(folder_of(study))
    with pytest.raises(StudyNotFound):
        triton.infer("study", {contract.STUDY_IN: study.handle}, 60)
    before = statistics()
    assert client.ask(study, QUESTION, max_new_tokens=4).token_ids == expected.token_ids
    assert ran(before, statistics()) == {"vision_encoder": 1}


REGION = ((4, 36), (3, 41), (2, 18))
CROP = ",".join(f"{start}:{stop}" for start, stop in REGION)
GRID = np.array([[0, -2.0, 0, 30], [-1.5, 0, 0.1, 20], [0, 0, 4.0, -50], [0, 0, 0, 1]])


def larger_scan(seed: int) -> np.ndarray:
    return np.random.default_rng([21, seed]).integers(0, 900, (40, 44, 20)).astype(np.int16)


@pytest.mark.parametrize("part_bytes", [1000, wire.PART_BYTES], ids=["in parts", "at once"])
def test_of_a_cropped_scan_the_model_sees_the_region_and_answers_lie_in_the_whole(client, monkeypatch, part_bytes):
    monkeypatch.setattr(wire, "PART_BYTES", part_bytes)
    scan, part = larger_scan(part_bytes), tuple(slice(*edges) for edges in REGION)
    shifted = GRID.copy()
    shifted[:3, 3] += GRID[:3, :3] @ [start for start, _ in REGION]
    cropped, alone = client.upload(scan, GRID, crop=CROP), client.upload(scan[part], shifted)
    whole = client.upload(scan, GRID)
    assert len({study.handle for study in (cropped, alone, whole)}) == 3
    assert cropped.info.crop == tuple(tuple(edges) for edges in REGION) and whole.info.crop is None
    assert cropped.info.shape == scan.shape and CROP in cropped.info.reason
    found, expected = (client.segment(study, QUESTION, max_new_tokens=24) for study in (cropped, alone))
    assert found.answer.token_ids == expected.answer.token_ids
    placed = np.zeros(scan.shape, bool)
    placed[part] = expected.mask
    assert placed.any()
    np.testing.assert_array_equal(found.mask, placed)
    np.testing.assert_allclose(found.affine, GRID)
    start = [start for start, _ in REGION]
    np.testing.assert_allclose(found.answer.boxes, expected.answer.boxes + [*start, *start])
    np.testing.assert_allclose(client.rank(cropped, ["w1 w2"]).scores, client.rank(alone, ["w1 w2"]).scores, atol=1e-6)
    measured, by_hand = found.measurements, expected.measurements
    assert measured.voxel_count == by_hand.voxel_count
    np.testing.assert_allclose(measured.centroid_ras_mm, by_hand.centroid_ras_mm)
    np.testing.assert_allclose(measured.bounding_box_ras_mm, by_hand.bounding_box_ras_mm)
    assert measured.intensity_mean == pytest.approx(scan[found.mask].mean())


def test_a_crop_in_mm_is_the_region_where_the_world_says(client):
    """x runs against j, y against i."""
    scan = larger_scan(1)
    corner = GRID @ [10, 12, 5, 1], GRID @ [19, 29, 9, 1]
    low, high = np.min(corner, 0)[:3] - 0.1, np.max(corner, 0)[:3] + 0.1
    crop = ",".join(f"{a}:{b}" for a, b in zip(low, high)) + "mm"
    assert client.upload(scan, GRID, crop=crop).info.crop == ((10, 20), (12, 30), (5, 10))


def test_the_ensembles_take_a_crop(client, triton):
    scan = larger_scan(2)
    handle = client.upload(scan, GRID, crop=CROP).handle
    box = [start for start, _ in REGION] + [stop for _, stop in REGION]
    sent = {contract.VOLUME: npy(scan), contract.AFFINE_IN: GRID, contract.PRESET: "auto", contract.CROP: box}
    asked = {contract.QUESTION: QUESTION}
    for model in ("m3d_chat", "m3d_segment"):
        assert next(triton.stream(model, sent | asked, 60)).text("STUDY_HANDLE") == handle
    ranked = triton.infer("m3d_retrieve", sent | {contract.CROP_UNIT: "voxels", contract.TEXTS: ["w1"]}, 60)
    assert ranked.text("STUDY_HANDLE") == handle


def test_an_evicted_cropped_study_is_sent_again_with_its_crop(client, folder_of):
    study = client.upload(larger_scan(3), GRID, crop=CROP)
    expected = client.segment(study, QUESTION, max_new_tokens=24)
    shutil.rmtree(folder_of(study))
    found = client.segment(study, QUESTION, max_new_tokens=24)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.answer.token_ids == expected.answer.token_ids


def test_only_the_servers_user_can_read_studies(client, folder_of):
    folder = folder_of(client.upload(new_scan(7)))
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_chatting_never_encodes_for_segmentation_and_a_hint_does_it_once(client, triton, statistics, folder_of):
    before = statistics()
    study = client.upload(new_scan(8))
    client.ask(study, QUESTION, max_new_tokens=4)
    assert ran(before, statistics()) == {"vision_encoder": 1}
    hinted = statistics()
    triton.infer("study", {contract.STUDY_IN: study.handle, contract.SEGMENT_HINT: True}, 60)
    # Whatever comes first, the early encoding or the mask, the other one finds its result.
    states = np.ones((1, int(_llm_width(folder_of(study)))), np.float32)
    masks = [
        triton.infer("segmentation", {contract.STUDY: study.handle, contract.SEG_STATES: states}, 60)["MASK"]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*masks)
    assert ran(hinted, statistics(), (*ENCODERS, "segmentation_head")) == {
        "segmentation_encoder": 1,
        "segmentation_head": 2,
    }


def _llm_width(folder: Path) -> int:
    return np.load(folder / "visual_tokens.npy", mmap_mode="r").shape[1]


def test_an_answer_without_a_seg_token_draws_no_mask_and_runs_no_head(client, triton, statistics, folder_of):
    study = client.upload(new_scan(9))
    before = statistics()
    states = np.zeros((0, _llm_width(folder_of(study))), np.float32)
    outputs = triton.infer("segmentation", {contract.STUDY: study.handle, contract.SEG_STATES: states}, 60)
    assert outputs["MASK"].size == outputs["LOGITS"].size == 0 and not outputs["MASK_SHAPE"].any()
    assert ran(before, statistics(), (*ENCODERS, "segmentation_head")) == {}


def test_logits_come_only_if_asked_for_and_agree_with_the_mask(client, triton, folder_of):
    study = client.upload(new_scan(10))
    states = np.random.default_rng(0).normal(size=(2, _llm_width(folder_of(study)))).astype(np.float32)
    inputs = {contract.STUDY: study.handle, contract.SEG_STATES: states}
    assert triton.infer("segmentation", inputs, 60)["LOGITS"].size == 0
    outputs = triton.infer("segmentation", inputs | {contract.RETURN_LOGITS: True}, 60)
    assert outputs["LOGITS"].shape == tuple(outputs["MASK_SHAPE"]) == IMAGE_SIZE
    mask = np.unpackbits(outputs["MASK"]).reshape(IMAGE_SIZE).astype(bool)
    np.testing.assert_array_equal(mask, outputs["LOGITS"] > 0)


def test_ranking_embeds_a_scan_once(client, statistics):
    study = client.upload(new_scan(11))
    before = statistics()
    texts = ["w7 w8", "w9 w10 w11", "w7 w8", *(f"w{i}" for i in range(100))]
    scores = np.asarray(client.rank(study, texts).scores)
    assert len(scores) == len(texts) and (np.abs(scores) <= 1).all() and scores[0] == pytest.approx(scores[2], abs=1e-6)
    np.testing.assert_allclose(client.rank(study, texts[:3]).scores, scores[:3], atol=1e-6)
    assert ran(before, statistics(), (*ENCODERS, "clip_text_encoder")) == {
        "clip_image_encoder": 1,
        "clip_text_encoder": len(texts) + 3,
    }


@pytest.mark.parametrize(
    "inputs, cause",
    [
        ({}, "neither"),
        ({contract.VOLUME: npy(new_scan(12)), contract.STUDY_IN: "0" * 64}, "both"),
        ({contract.VOLUME: b"not an image at all"}, "not an image"),
        ({contract.VOLUME: b""}, "empty|neither"),
        ({contract.VOLUME: npy(np.full(IMAGE_SIZE, np.nan, np.float32))}, "NaN"),
        ({contract.VOLUME: npy(new_scan(12)), contract.PRESET: "no-such-preset"}, "auto, ct"),
        ({contract.VOLUME: npy(new_scan(12)), contract.AFFINE_IN: np.zeros((4, 4))}, "affine"),
        ({contract.VOLUME: npy(new_scan(12)), contract.CROP: [0, 0, 0, 9999, 1, 1]}, "not within the scan"),
        ({contract.VOLUME: npy(new_scan(12)), contract.CROP: [0, 0, 0, np.nan, 1, 1]}, "not finite"),
        ({contract.VOLUME: npy(new_scan(12)), contract.CROP: [1, 0, 0, 1, 1, 1]}, "empty or inverted"),
        (
            {contract.VOLUME: npy(new_scan(12)), contract.CROP: [0] * 3 + [1] * 3, contract.CROP_UNIT: "cm"},
            "voxels or mm",
        ),
        ({contract.VOLUME: npy(new_scan(12)), contract.CROP_UNIT: "mm"}, "without a CROP"),
        ({contract.STUDY_IN: "0" * 64, contract.CROP: [0] * 3 + [1] * 3}, "belong to VOLUME"),
    ],
    ids=[
        *(
            "no scan",
            "two scans",
            "text",
            "nothing",
            "nan",
            "preset",
            "affine",
            "crop outside",
            "crop of nan",
            "empty crop",
        ),
        *("unit of crop", "unit without crop", "crop of a handle"),
    ],
)
def test_a_bad_scan_is_refused_with_its_cause_and_the_next_request_works(client, triton, inputs, cause):
    with pytest.raises(InvalidInput, match=cause):
        triton.infer("study", inputs, 60)
    assert client.upload(new_scan(13)).info.preset == "raw"
