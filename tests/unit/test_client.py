"""The client against a server that says what a test wants: streams, cancellation, deadlines, errors, evictions."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import weakref
from contextlib import nullcontext

import grpc
import nibabel
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from engine import contract, errors
from engine.api import EngineInfo, ModelInfo
from engine.client import AsyncM3DClient, M3DClient, Study, wire
from engine.sampling import Sampling
from engine.scan import pack_scan
from engine.source import Source
from tests.awaited import Awaited
from tests.unit.fake_triton import ANSWER, EMBEDDING, HANDLE, MODEL
from tests.unit.test_dicom import JPEG_LS, encoded
from tests.unit.test_scan import series
from tests.unit.test_source import without_decoder, written

VOLUME = np.linspace(0, 1, 60, dtype=np.float32).reshape(1, 3, 4, 5)
PATIENCE_S = 60


@pytest.fixture(params=[M3DClient, Awaited], ids=["M3DClient", "AsyncM3DClient"])
def client(request, triton):
    client = request.param(triton.url, timeout=PATIENCE_S)
    yield client
    client.end() if isinstance(client, Awaited) else client.close()


@pytest.fixture
def study(client):
    return client.upload(VOLUME)


# --- requests --------------------------------------------------------------------------------------------------------
def test_a_file_is_sent_as_it_is(tmp_path, client, triton):
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((4, 5, 6)), np.eye(4)), path)
    study = client.upload(path, preset="mr")
    sent = triton.uploads[0]
    assert sent["VOLUME"].tobytes() == path.read_bytes()
    assert sent["PRESET"].tolist() == [b"mr"]
    assert study.handle == HANDLE and study.info.preset == "ct"


def test_an_array_is_sent_with_its_affine(client, triton):
    affine = np.diag([1.0, 2, 3, 1])
    client.upload(VOLUME[0], affine)
    np.testing.assert_array_equal(triton.uploads[0]["AFFINE"], affine)


def test_a_scan_is_let_go_once_it_is_sent(client, triton, monkeypatch):
    """It may be as large as the client's memory allows, and the server works on it for seconds."""
    triton.may_answer.clear()

    kept = []

    def let_go():
        kept.pop()
        if not kept:
            triton.may_answer.set()

    def watched(*arguments, request_of=wire.request_of):
        request = request_of(*arguments)
        kept.append(None)
        weakref.finalize(request, let_go)
        return request

    monkeypatch.setattr(wire, "request_of", watched)
    monkeypatch.setattr(wire, "PART_BYTES", 100)
    assert client.upload(VOLUME).handle == HANDLE


@pytest.mark.parametrize("size", [1, 99, 100, 101, 300, 368, 1 << 20])
def test_a_large_scan_is_sent_in_parts_that_make_the_file(client, triton, monkeypatch, size):
    monkeypatch.setattr(wire, "PART_BYTES", size)
    affine = np.diag([1.0, 2, 3, 1])
    file, _ = pack_scan(VOLUME[0], affine)
    assert client.upload(VOLUME[0], affine, "mr").handle == HANDLE
    (whole,) = triton.uploads
    assert whole["VOLUME"].tobytes() == file and whole["PRESET"] == [b"mr"]
    np.testing.assert_array_equal(whole["AFFINE"], affine)
    assert [part["VOLUME"].size for part in triton.parts[:-1]] == [size] * (-(-len(file) // size) - 1)
    if size >= len(file):
        assert "UPLOAD" not in whole and "UPLOAD_RANGE" not in whole
    else:
        assert [part["UPLOAD_RANGE"].tolist() for part in triton.parts] == [
            [start, len(file)] for start in range(0, len(file), size)
        ]
        assert len({part["UPLOAD"].item() for part in triton.parts}) == 1


def test_no_two_uploads_have_one_name(client, triton, monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 200)
    for _ in range(3):
        client.upload(VOLUME)
    assert len({upload["UPLOAD"].item() for upload in triton.uploads}) == 3


def test_an_upload_ends_with_the_first_part_that_is_refused(client, triton, monkeypatch):
    monkeypatch.setattr(wire, "PART_BYTES", 1)
    triton.refused_part = 3
    triton.may_answer.clear()
    with pytest.raises(errors.InvalidInput, match="this part is refused"):
        client.upload(VOLUME)
    assert triton.cancelled.wait(PATIENCE_S) and not triton.uploads


def test_a_question_carries_handle_and_sampling(client, triton, study):
    client.ask(study, "What is this?", temperature=0.5, seed=3)
    _, sent = triton.asked[0]
    assert sent["STUDY"].tolist() == [HANDLE.encode()] and sent["QUESTION"].tolist() == [b"What is this?"]
    assert Sampling.from_json(sent["SAMPLING"][0]) == Sampling(temperature=0.5, seed=3)


def test_a_conversation_carries_what_was_said_before_its_last_question(client, triton, study):
    turns = [("user", "A scan\u00e9?"), ("assistant", "Yes."), ("user", "What is this?")]
    client.ask(study, messages=turns)
    client.ask(study, messages=turns[-1:])
    (_, talked), (_, alone) = triton.asked
    assert talked["QUESTION"].tolist() == [b"What is this?"] == alone["QUESTION"].tolist()
    assert json.loads(talked["HISTORY"][0]) == [list(turn) for turn in turns[:-1]]
    assert "HISTORY" not in alone


def test_a_conversation_of_too_many_bytes_is_refused_before_it_is_sent(client, triton, study):
    most = contract.HISTORY.max_bytes - len(json.dumps([["user", "a"], ["assistant", ""]]))
    for length, is_sent in ((most, True), (most + 1, False)):
        with nullcontext() if is_sent else pytest.raises(errors.InvalidInput, match="history has 1,048,577 bytes, at"):
            client.ask(study, messages=[("user", "a"), ("assistant", "b" * length), ("user", "What is this?")])
    assert len(triton.asked) == 1


def test_a_scan_may_stand_for_its_study(client, triton):
    assert client.ask(VOLUME, "What is this?").text == "".join(ANSWER)
    assert len(triton.uploads) == 1


@pytest.mark.parametrize("question", ["", "  \n", None, 3])
def test_an_empty_question_is_refused_before_it_is_sent(client, triton, study, question):
    with pytest.raises(errors.InvalidInput, match="question (is empty: give|must be) a text"):
        client.ask(study, question)
    assert not triton.asked


def test_unusable_sampling_is_refused_before_it_is_sent(client, triton, study):
    with pytest.raises(errors.InvalidInput, match="temperature"):
        client.stream(study, "What?", temperature=9)
    assert not triton.asked


@pytest.mark.parametrize("texts", ["one text", [], ["a", " "], ["a", 3]])
def test_texts_that_cannot_be_ranked_are_refused(client, study, texts):
    with pytest.raises(errors.InvalidInput, match="texts"):
        client.rank(study, texts)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), "long"])
def test_an_unusable_timeout_is_refused(client, study, timeout):
    with pytest.raises(errors.InvalidInput, match="timeout"):
        client.ask(study, "What?", timeout=timeout)


@pytest.mark.parametrize("sizes", [(0,), (1, 127), (128, 0, 16383), (16384, 3, 1 << 21), (1, (5 << 20) + 3)])
def test_a_request_is_sent_as_protobuf_would_write_it(sizes):
    contents = [bytes([n + 1]) * size for n, size in enumerate(sizes)]
    in_pieces = [content if n % 2 else (content[:2], memoryview(content)[2:]) for n, content in enumerate(contents)]
    request = wire.request_of(
        "study", {contract.Tensor(f"T{n}", "UINT8", (-1,), ""): content for n, content in enumerate(in_pieces)}
    )
    whole = service_pb2.ModelInferRequest.FromString(request.serialized())
    assert whole.model_name == "study" and [i.name for i in whole.inputs] == [f"T{n}" for n in range(len(sizes))]
    assert list(whole.raw_input_contents) == contents and request.ByteSize() == whole.ByteSize()


# --- answers ---------------------------------------------------------------------------------------------------------
def test_a_stream_gives_the_pieces_and_then_the_whole(client, study):
    stream = client.stream(study, "What is this?")
    assert stream.answer is None
    assert tuple(stream) == ANSWER
    assert stream.answer.text == "".join(ANSWER)
    assert stream.answer.token_ids == (0, 1, 2, 3)
    assert stream.answer.finish_reason == "stop"
    assert stream.answer.boxes.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert stream.answer.timings.prompt_tokens == 3
    assert next(stream, None) is None


def test_asking_gives_what_streaming_gives(client, study):
    stream = client.stream(study, "What?")
    list(stream)
    asked = client.ask(study, "What?")
    assert (asked.text, asked.token_ids, asked.finish_reason) == (
        stream.answer.text,
        stream.answer.token_ids,
        stream.answer.finish_reason,
    )


def test_a_mask_comes_back_in_the_scans_shape_and_space(client, triton, study, tmp_path):
    triton.mask[1, 0, 2:4] = True
    found = client.segment(study, "Segment the liver.")
    np.testing.assert_array_equal(found.mask, triton.mask)
    saved = nibabel.load(found.save(tmp_path / "mask.nii.gz"))
    np.testing.assert_array_equal(np.asarray(saved.dataobj), triton.mask)
    np.testing.assert_array_equal(saved.affine, np.diag([1.0, 2, 3, 1]))
    assert found.logits is None


def test_an_answer_that_is_to_have_a_mask_is_decoded_where_it_can_be_cancelled(client, triton, study):
    """Triton does not cancel a running step of an ensemble."""
    triton.mask[:] = True
    client.segment(study, "Segment the liver.")
    assert [model for model, _ in triton.asked] == ["decoder", "segmentation"] and triton.hints == 1


def test_a_question_that_is_no_unicode_text_is_refused(client, study):
    with pytest.raises(errors.InvalidInput, match="question is not valid Unicode"):
        client.ask(study, "\ud800")


def test_no_seg_means_no_mask_and_saving_says_so(client, study, tmp_path):
    found = client.segment(study, "What is this?")
    assert found.mask is None
    with pytest.raises(errors.InvalidInput, match=r"no \[SEG\]"):
        found.save(tmp_path / "mask.nii.gz")


def test_a_ranking_lists_the_best_first(client, study):
    ranking = client.rank(study, ["a", "b", "c"])
    assert [text for text, _ in ranking.sorted()] == ["c", "b", "a"]
    assert ranking.scores.tolist() == [0, 0.5, 1]


def test_a_ranking_says_which_texts_were_cut(client, triton, study):
    triton.text_limit = 2
    ranking = client.rank(study, ["a b", "a b c", "a", "a b c d"])
    assert ranking.cut == (False, True, False, True) and ranking.text_limit == 2


def test_info_says_which_model_answers_and_what_it_serves(client):
    assert client.is_ready()
    assert client.info() == EngineInfo(ModelInfo(**MODEL), ("m3d_chat", "m3d_segment"), "1.2")


def test_what_is_told_of_a_study_is_typed(client, triton):
    triton.study_info["crop"] = [[0, 1], [2, 3], [4, 5]]
    info = client.upload(VOLUME).info
    assert info.shape == (3, 4, 5) and info.spacing_mm == (1, 2, 3) and info.orientation == "RAS"
    assert info.crop == ((0, 1), (2, 3), (4, 5)) and info.model == ModelInfo(**MODEL) and info.cached is False


@pytest.mark.parametrize("change", [lambda info: info.pop("reason"), lambda info: info.update(more=1)])
def test_a_server_that_tells_other_things_of_a_study_is_another_version(client, triton, change):
    change(triton.study_info)
    with pytest.raises(errors.Unavailable, match="another version.*(reason|more)"):
        client.upload(VOLUME)


def test_embeddings_are_those_of_the_server(client, study):
    np.testing.assert_array_equal(client.embed(study), EMBEDDING)
    found = client.embed_texts(["a", "b"])
    np.testing.assert_array_equal(found.embeddings, [EMBEDDING, EMBEDDING])
    assert found.texts == ("a", "b") and found.cut == (False, False) and found.text_limit == 512


def test_a_forgotten_study_is_not_sent_again(client, triton, study):
    client.forget(study)
    with pytest.raises(errors.StudyNotFound):
        client.ask(study, "What?")
    assert len(triton.uploads) == 1


def test_a_study_that_was_evicted_before_it_is_forgotten_is_not_sent_again_either(client, triton, study):
    triton.evicted = True
    for _ in range(2):
        with pytest.raises(errors.StudyNotFound):
            client.forget(study)
    with pytest.raises(errors.StudyNotFound):
        client.ask(study, "What?")
    assert len(triton.uploads) == 1


def test_only_a_study_can_be_forgotten(client):
    with pytest.raises(errors.InvalidInput, match="a study.*not str"):
        client.forget(HANDLE)


# --- ends before the end ---------------------------------------------------------------------------------------------
def test_closing_a_stream_cancels_its_request(client, triton, study):
    triton.endless = True
    stream = client.stream(study, "What?")
    next(stream)
    stream.close()
    assert triton.cancelled.wait(PATIENCE_S)
    with pytest.raises(errors.Cancelled):
        next(stream)


def test_leaving_a_loop_over_a_stream_cancels_its_request(client, triton, study):
    triton.endless = True
    for _ in client.stream(study, "What?"):
        break
    gc.collect()
    assert triton.cancelled.wait(PATIENCE_S)


def test_leaving_a_with_block_cancels_its_request(client, triton, study):
    triton.endless = True
    with client.stream(study, "What?") as stream:
        next(stream)
    assert triton.cancelled.wait(PATIENCE_S)


def test_other_streams_go_on_when_one_is_closed(client, triton, study):
    kept = client.stream(study, "What?")
    first = next(kept)
    closed = client.stream(study, "What?")
    next(closed)
    closed.close()
    assert (first, *kept) == ANSWER


def test_a_deadline_ends_the_wait_and_the_request(client, triton, study):
    triton.silent = True
    with pytest.raises(errors.DeadlineExceeded, match="timeout"):
        client.ask(study, "What?", timeout=0.3)
    assert triton.cancelled.wait(PATIENCE_S)


def test_a_stream_that_nobody_reads_is_paused(client, triton, study):
    """Flow control stops the server: what it has handed over stays far below what it would send."""
    triton.endless = True
    stream = client.stream(study, "What?")
    next(stream)
    seen, paused = -1, threading.Event()
    while not paused.wait(0.5):
        if triton.sent == seen:
            paused.set()
        seen = triton.sent
    assert triton.sent < 10_000  # of 10 kB each
    for _ in range(triton.sent + 10):  # and reading lets it go on
        next(stream)
    stream.close()


def test_a_stream_that_ends_without_its_last_piece_is_an_error(client, triton, study):
    triton.unfinished = True
    with pytest.raises(errors.Unavailable, match="before the answer was complete"):
        list(client.stream(study, "What?"))
    with pytest.raises(errors.Unavailable, match="before the answer was complete"):
        client.ask(study, "What?")


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part_bytes", [100, 1000])
def test_an_upload_that_ends_without_its_last_response_is_an_error(client, triton, monkeypatch, part_bytes):
    monkeypatch.setattr(wire, "PART_BYTES", part_bytes)
    triton.unfinished = True
    with pytest.raises(errors.Unavailable, match="closed the stream after [03] of [14] responses"):
        client.upload(VOLUME)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("INVALID_ARGUMENT: the question has 900 tokens", errors.InvalidInput),
        ("in ensemble 'm3d_chat', RESOURCE_EXHAUSTED: the store is full", errors.ResourceExhausted),
        ("Request for unknown model: 'm3d_chat' is not found", errors.Unavailable),
        ("inference failed", errors.M3DError),
    ],
)
def test_an_error_in_a_stream_is_raised_as_its_class(client, triton, study, message, kind):
    triton.stream_error = message
    with pytest.raises(errors.M3DError) as raised:
        next(client.stream(study, "What?"))
    assert type(raised.value) is kind
    assert message.rpartition(": ")[2] in str(raised.value)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT: not an image", errors.InvalidInput),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'AFFINE'", errors.InvalidInput),
        (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: the decoder restarts", errors.Unavailable),
        (grpc.StatusCode.INTERNAL, "oops", errors.M3DError),
    ],
)
def test_an_error_of_a_plain_request_is_raised_as_its_class(client, triton, study, status, message, kind):
    triton.plain_error = (status, message)
    with pytest.raises(errors.M3DError) as raised:
        client.rank(study, ["a liver"])
    assert type(raised.value) is kind
    assert message.rpartition(": ")[2] in str(raised.value)


def test_a_closed_port_is_a_clear_error_at_once():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with M3DClient(f"127.0.0.1:{port}") as client:
        assert not client.is_ready()
        with pytest.raises(errors.Unavailable, match=f"127.0.0.1:{port}.*m3d serve"):
            client.ask(Study(HANDLE), "What?")


def test_a_server_that_goes_away_mid_stream_is_a_clear_error(client, triton, study):
    triton.endless = True
    stream = client.stream(study, "What?")
    next(stream)
    triton.stop()
    with pytest.raises(errors.Unavailable, match="went away"):
        list(stream)


def test_closing_the_client_ends_its_streams(client, triton, study):
    triton.endless = True
    stream = client.stream(study, "What?")
    next(stream)
    client.close()
    with pytest.raises(errors.Cancelled):
        list(stream)


def test_a_closed_client_says_so(triton):
    client = M3DClient(triton.url)
    client.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        client.ask(Study(HANDLE), "What?")


# --- a region of interest --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("crop", "box", "unit"),
    [
        ("0:2,1:3,0:4", [0, 1, 0, 2, 3, 4], b"voxels"),
        ([0, 1, 0, 2, 3, 4], [0, 1, 0, 2, 3, 4], b"voxels"),
        ("-1.5:2,1:3.5,-4:-2mm", [-1.5, 1, -4, 2, 3.5, -2], b"mm"),
    ],
)
@pytest.mark.parametrize("part_bytes", [100, 1 << 20], ids=["in parts", "at once"])
def test_a_crop_comes_with_the_last_part(client, triton, monkeypatch, crop, box, unit, part_bytes):
    monkeypatch.setattr(wire, "PART_BYTES", part_bytes)
    client.upload(VOLUME, crop=crop)
    (sent,) = triton.uploads
    assert sent["CROP"].tolist() == box and sent["CROP_UNIT"].tolist() == [unit]
    assert all("CROP" not in part and "CROP_UNIT" not in part for part in triton.parts[:-1])


def test_without_a_crop_none_is_sent(client, triton, study):
    assert not {"CROP", "CROP_UNIT"} & set(triton.uploads[0])


@pytest.mark.parametrize("crop", ["0:2,1:3", "2:0,1:3,0:4", "0:nan,1:3,0:4", [1, 2, 3], ""])
def test_an_unusable_crop_is_refused_before_anything_is_sent(client, triton, crop):
    with pytest.raises(errors.InvalidInput, match="crop"):
        client.upload(VOLUME, crop=crop)
    assert not triton.parts


def test_an_evicted_study_is_sent_again_with_its_crop(client, triton):
    study = client.upload(VOLUME[0], np.eye(4), "mr", crop="0:2,1:3,0:4")
    triton.evicted = True
    client.ask(study, "What?")
    first, again = triton.uploads
    assert again.keys() == first.keys()
    for name in first:
        np.testing.assert_array_equal(again[name], first[name])


# --- measurements ----------------------------------------------------------------------------------------------------
@pytest.fixture
def segmented(client, triton):
    """segmented(of) -> the segmentation of a scan or study, with some of the mask set."""
    triton.mask = np.zeros((3, 4, 5), bool)
    triton.mask[1, 0, 2:4] = True
    return lambda of: client.segment(of, "Segment it.")


def test_a_mask_comes_with_measurements_of_its_scan(segmented):
    found = segmented(VOLUME).measurements
    assert found.voxel_count == 2 and found.volume_ml == pytest.approx(2 * 6 / 1000)  # the server's grid: 1 x 2 x 3 mm
    assert found.bounding_box_voxels == (1, 0, 2, 2, 1, 4)
    values = VOLUME[0, 1, 0, 2:4]
    assert found.intensity_mean == pytest.approx(values.mean()) and found.intensity_max == values.max()
    assert found.intensity_unit == "HU"  # the server chose ct


def test_measurements_are_those_of_a_file(segmented, tmp_path):
    path = tmp_path / "scan.nii.gz"
    values = np.random.default_rng(0).random((3, 4, 5), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    found = segmented(path).measurements
    assert found.intensity_min == values[1, 0, 2:4].min()


def test_a_source_that_changed_is_not_measured(segmented, tmp_path):
    path, array = tmp_path / "scan.npy", VOLUME[0].copy()
    np.save(path, array)
    from_array, from_file, gone = segmented(array), segmented(path), segmented(path)
    array[0, 0, 0] += 1
    np.save(path, array)
    for found in (from_array, from_file):
        assert found.measurements.volume_ml > 0 and found.measurements.intensity_mean is None
        assert "has changed since it was sent" in found.measurements.intensity_missing
    path.unlink()
    assert gone.measurements.volume_ml > 0 and gone.measurements.intensity_mean is None
    assert "is gone" in gone.measurements.intensity_missing and str(tmp_path) not in gone.measurements.intensity_missing


def test_a_source_that_cannot_be_decoded_here_is_measured_without_intensities_and_says_so(
    segmented, tmp_path, monkeypatch
):
    without_decoder(monkeypatch, tmp_path)
    slices = [encoded(dataset, JPEG_LS) for dataset in series(5, shape=(4, 3))]
    found = segmented(written(tmp_path / "scan", slices))
    assert found.measurements.volume_ml > 0 and found.measurements.intensity_mean is None
    assert "pip install 'm3d-engine[dicom]'" in found.measurements.intensity_missing
    assert len(found.source.series().slices) == 5


def test_a_bare_handle_has_no_intensities(segmented):
    found = segmented(Study(HANDLE)).measurements
    assert found.volume_ml > 0 and found.intensity_mean is found.intensity_unit is None
    assert found.intensity_missing == "the study is known by its handle only"


def test_no_mask_has_no_measurements(client, study):
    assert client.segment(study, "What is this?").measurements is None


# --- evicted studies -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "request_of",
    [
        lambda client, study: client.ask(study, "What?").text,
        lambda client, study: "".join(client.stream(study, "What?")),
        lambda client, study: client.segment(study, "What?").answer.text,
        lambda client, study: client.rank(study, ["a", "b"]).texts,
    ],
    ids=["ask", "stream", "segment", "rank"],
)
def test_an_evicted_study_is_sent_again_without_the_caller_noticing(client, triton, study, request_of):
    expected = request_of(client, study)
    triton.evicted = True
    assert request_of(client, study) == expected
    assert len(triton.uploads) == 2
    assert triton.uploads[0]["VOLUME"].tobytes() == triton.uploads[1]["VOLUME"].tobytes()


def test_an_evicted_study_is_sent_again_once_only(client, triton, study):
    triton.stream_error = "NOT_FOUND: study is unknown"
    with pytest.raises(errors.StudyNotFound):
        client.ask(study, "What?")
    assert len(triton.uploads) == 2


def test_a_bare_handle_cannot_be_sent_again(client, triton):
    triton.evicted = True
    with pytest.raises(errors.StudyNotFound):
        client.ask(Study(HANDLE), "What?")


@pytest.mark.parametrize("segments", [False, True], ids=["ask", "segment"])
def test_a_server_that_was_started_anew_gets_the_study_once_and_knows_it_by_its_new_handle(client, triton, segments):
    triton.mask[:] = True
    study = client.upload(VOLUME)
    triton.evicted, triton.handle = True, "cd" * 32
    triton.study_info = {**triton.study_info, "prepare_s": 1.0}
    for _ in range(2):
        assert client.segment(study, "What?").mask.all() if segments else client.ask(study, "What?").text
    assert len(triton.uploads) == 2 and study.handle == triton.handle
    asked = [(model, inputs["STUDY"][0].decode()) for model, inputs in triton.asked]
    after = ["decoder", "segmentation"] if segments else ["decoder"]
    assert asked == [("decoder", HANDLE), *((model, triton.handle) for model in after * 2)]


def test_a_study_that_is_lost_between_answer_and_mask_has_its_new_handle_for_the_mask(client, triton, study):
    triton.mask[:] = True

    def start_anew():
        triton.evicted, triton.handle = True, "cd" * 32

    triton.on_answer = start_anew
    assert client.segment(study, "What?").mask.all()
    models = [(model, inputs["STUDY"][0].decode()) for model, inputs in triton.asked]
    assert models == [("decoder", HANDLE), ("segmentation", HANDLE), ("segmentation", "cd" * 32)]


def test_a_source_that_changed_is_not_taken_for_the_evicted_study(client, triton):
    scan = VOLUME.copy()
    study = client.upload(scan)
    scan[0, 0, 0, 0] = 0.5
    triton.evicted = True
    with pytest.raises(errors.InvalidInput, match="is another: upload it again"):
        client.ask(study, "What?")
    assert study.handle == HANDLE


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {**MODEL, "manifest_sha256": "3"}},
        {"spacing_mm": [1, 2, 4]},
        {"orientation": "LPS"},
        {"shape": [1, 2, 3]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_model_or_space_is_not_taken_for_that_of_the_evicted_study(client, triton, changed):
    study = client.upload(VOLUME)
    triton.evicted, triton.handle, triton.study_info = True, "cd" * 32, triton.study_info | changed
    with pytest.raises(errors.InvalidInput, match="server's model, is another"):
        client.ask(study, "What?")
    assert study.handle == HANDLE


@pytest.mark.parametrize(
    "said",
    [
        "unexpected inference input 'PRESET' for model 'study'",
        "[request id: <id_unknown>] expected 4 inputs but got 3 inputs for model 'study'",
        "unexpected inference output 'TEXT_CUT' for model 'm3d_retrieve'",
    ],
)
def test_a_server_of_another_version_is_named_as_such(client, triton, study, said):
    triton.plain_error = (grpc.StatusCode.INVALID_ARGUMENT, said)
    with pytest.raises(errors.Unavailable, match="another version of m3d-engine.*same version on both sides"):
        client.rank(study, ["a report"])


def test_a_response_without_an_output_of_the_contract_is_another_versions():
    with pytest.raises(errors.Unavailable, match="another version.*TEXT_CUT"):
        wire.outputs_of(service_pb2.ModelInferResponse())["TEXT_CUT"]


def _asks(client, study):
    client.ask(study, "What?")


def _segments(client, study):
    client.segment(study, "What?")


def _streams(client, study):
    with client.stream(study, "What?") as stream:
        list(stream)


def _fails(client, study):
    with pytest.raises(errors.InvalidInput):
        client.ask(study, "What?")


@pytest.mark.parametrize("request_of_a_kind", [_asks, _segments, _streams, _fails], ids=lambda f: f.__name__)
def test_an_answer_is_read_to_the_streams_end(client, triton, study, request_of_a_kind):
    """Triton keeps the socket of a call that is cancelled between its last response and its end."""
    if request_of_a_kind is _fails:
        triton.stream_error = "INVALID_ARGUMENT: no"
    request_of_a_kind(client, study)
    assert triton.read_whole.acquire(timeout=PATIENCE_S)


# --- asyncio ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("closes", [False, True], ids=["its task is cancelled", "it is closed"])
def test_an_answer_that_is_awaited_ends_on_the_server_when(triton, closes):
    triton.endless = True

    async def ask():
        async with AsyncM3DClient(triton.url, timeout=PATIENCE_S) as client:
            stream = client.stream(await client.upload(VOLUME), "What?")
            await anext(stream)
            if closes:
                await stream.aclose()
                with pytest.raises(errors.Cancelled):
                    await anext(stream)
            else:
                task = asyncio.create_task(_all(stream))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await asyncio.to_thread(triton.cancelled.wait, PATIENCE_S)

    asyncio.run(ask())


async def _all(stream):
    return [text async for text in stream]


def test_a_question_whose_task_is_cancelled_ends_on_the_server(triton):
    triton.endless, begun = True, threading.Event()
    triton.on_answer = begun.set

    async def ask():
        async with AsyncM3DClient(triton.url, timeout=PATIENCE_S) as client:
            asking = asyncio.create_task(client.ask(VOLUME, "What?"))
            assert await asyncio.to_thread(begun.wait, PATIENCE_S)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await asyncio.to_thread(triton.cancelled.wait, PATIENCE_S)

    asyncio.run(ask())


def test_a_stream_that_was_closed_before_it_was_read_sends_nothing(triton):
    async def ask():
        async with AsyncM3DClient(triton.url, timeout=PATIENCE_S) as client:
            stream = client.stream(await client.upload(VOLUME), "What?")
            await stream.aclose()
            for _ in range(2):
                with pytest.raises(errors.Cancelled):
                    await anext(stream)

    asyncio.run(ask())
    assert not [model for model, _ in triton.asked if model == "decoder"]


def test_a_stream_that_could_not_be_begun_is_closed(triton, tmp_path):
    async def ask():
        async with AsyncM3DClient(triton.url, timeout=PATIENCE_S) as client:
            stream = client.stream(tmp_path / "nothing.nii.gz", "What?")
            with pytest.raises(errors.InvalidInput):
                await anext(stream)
            with pytest.raises(errors.Cancelled):
                await anext(stream)

    asyncio.run(ask())


def test_many_questions_are_awaited_at_the_same_time(triton):
    async def ask_all():
        async with AsyncM3DClient(triton.url, timeout=PATIENCE_S) as client:
            study = await client.upload(VOLUME)
            return await asyncio.gather(*(client.ask(study, f"What is {n}?") for n in range(8)))

    assert [answer.text for answer in asyncio.run(ask_all())] == ["".join(ANSWER)] * 8


# --- one mask for each [SEG] -----------------------------------------------------------------------------------------
@pytest.fixture
def of_two(client, triton):
    """of_two(of, **arguments) -> the segmentation by an answer with two [SEG], whose masks overlap."""
    triton.answer = ("The liver: ", "[SEG]", ", and the spleen", " is [SEG].")
    triton.segments = [np.zeros((3, 4, 5), bool) for _ in range(2)]
    triton.segments[0][1, 0, 2:4] = triton.segments[1][1, 0, 3:5] = True
    triton.mask = np.any(triton.segments, axis=0)
    return lambda of, **arguments: client.segment(of, "Segment both.", **arguments)


def test_each_seg_has_its_mask_its_score_and_the_words_that_lead_to_it(of_two, triton, tmp_path):
    found = of_two(VOLUME, merge="each")
    assert len(found.segments) == 2 and found.logits is None
    for segment, mask, words, score in zip(
        found.segments, triton.segments, ("The liver", "and the spleen is"), (0.9, 0.6)
    ):
        np.testing.assert_array_equal(segment.mask, mask)
        assert segment.words == words == found.answer.text[slice(*segment.span)]
        assert segment.score == pytest.approx(score) and segment.logits is None
        saved = nibabel.load(segment.save(tmp_path / "mask.nii.gz"))
        np.testing.assert_array_equal(np.asarray(saved.dataobj), mask)
        np.testing.assert_array_equal(saved.affine, found.affine)
    np.testing.assert_array_equal(found.mask, np.any(triton.segments, axis=0))


def test_one_mask_of_all_seg_is_one_segment(of_two, triton):
    found = of_two(VOLUME)
    (segment,) = found.segments
    assert segment.mask is found.mask and triton.asked[-1][1]["MERGE"].tolist() == [b"reference"]
    assert segment.words == "The liver: [SEG], and the spleen is" and segment.score == 0.75
    assert segment.measurements == found.measurements


def test_segments_are_measured_each_by_itself_with_one_reading_of_the_scan(of_two, monkeypatch):
    reads = []
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self: reads.append(self) or read(self))
    first, second = of_two(VOLUME, merge="each").segments
    assert not reads
    assert first.measurements.bounding_box_voxels == (1, 0, 2, 2, 1, 4)
    assert second.measurements.bounding_box_voxels == (1, 0, 3, 2, 1, 5)
    assert second.measurements.intensity_max == VOLUME[0, 1, 0, 3:5].max() and len(reads) == 1


def test_no_seg_means_no_segments(client, study):
    assert client.segment(study, "What is this?", merge="each").segments == ()


def test_masks_that_do_not_fit_the_answer_are_another_versions(of_two, triton):
    triton.segments.pop()
    with pytest.raises(errors.Unavailable, match="1 masks with 1 scores for 2 .SEG."):
        of_two(VOLUME, merge="each")


@pytest.mark.parametrize("merge", ["all", "", 3])
def test_an_unknown_merge_is_refused_at_once(client, triton, study, merge):
    asked = len(triton.asked)
    with pytest.raises(errors.InvalidInput, match="reference, each"):
        client.segment(study, "Segment it.", merge=merge)
    assert len(triton.asked) == asked


@pytest.mark.parametrize(("late", "kind"), [(True, errors.DeadlineExceeded), (False, errors.M3DError)])
def test_a_call_that_grpc_could_not_begin_before_its_deadline_exceeded_it(late, kind):
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), details="Internal error from Core"
    )
    assert type(wire.call_error("localhost:1", error, False, late)) is kind
