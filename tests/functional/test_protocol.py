"""Whoever answers, answers the same: `M3DEngine` in this process, `M3DClient` and `AsyncM3DClient` over gRPC.

The three hold one repository, so that what they say can be compared bit by bit.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import signal
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from engine import AsyncM3DClient, M3DClient, M3DEngine, contract
from engine.api import M3D, Message, Study
from engine.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    RepositoryError,
    ResourceExhausted,
    StudyNotFound,
    Unavailable,
)
from engine.manifest import Manifest
from engine.runtime.server_folder import PREFIX, SHARED_MEMORY
from engine.scan import scan_pieces
from engine.scan.nifti import geometry_header
from engine.seg_states import MAX_SEGMENTS
from engine.server import supervisor
from tests.awaited import Awaited
from tests.functional.footprint import Footprint
from tests.functional.test_client import BATCH, LONG, PATIENCE_S, WAITING, Reader
from tests.tiny import QUESTION, words
from tests.unit.test_scan import saved, series

pytestmark = pytest.mark.integration

SOME_SEG = 24  # tokens of an answer that has several [SEG], not too many
IMPLEMENTATIONS = ("M3DEngine", "M3DClient", "AsyncM3DClient")


@pytest.fixture(scope="module")
def engine(repository):
    with M3DEngine(repository, timeout=300) as engine:
        yield engine


@pytest.fixture(scope="module")
def study_of_engine(engine, scans):
    return engine.upload(scans[0])


@pytest.fixture(scope="module")
def awaited(server):
    awaited = Awaited(server.url, timeout=300)
    yield awaited
    awaited.end()


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def m3d(request) -> M3D:
    names = {"M3DEngine": "engine", "M3DClient": "client", "AsyncM3DClient": "awaited"}
    return request.getfixturevalue(names[request.param])


@pytest.fixture(scope="module")
def study(m3d, scans) -> Study:
    return m3d.upload(scans[0])


def scan(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, (20, 30, 24)).astype(np.int16)


GRID = np.array([[-1.0, 0, 0, 10], [0, 0, 2, 20], [0, -3, 0, 30], [0, 0, 0, 1]])


# --- the same answers ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", ["client", "awaited"])
def test_answers_masks_and_embeddings_are_equal_bit_by_bit(request, engine, other, scans):
    other = request.getfixturevalue(other)
    for of in (scans[0], scans[1]):
        ours, theirs = engine.upload(of), other.upload(of)
        for question, most in ((QUESTION, 48), (words(20, 3), 24)):
            found, expected = (
                m3d.segment(study, question, return_logits=True, max_new_tokens=most)
                for m3d, study in ((engine, ours), (other, theirs))
            )
            asked = engine.ask(ours, question, max_new_tokens=most)
            assert asked.token_ids == found.answer.token_ids == expected.answer.token_ids
            assert asked.text == found.answer.text == expected.answer.text
            assert found.answer.finish_reason == expected.answer.finish_reason
            np.testing.assert_array_equal(found.answer.boxes, expected.answer.boxes)
            assert (found.mask is None) == (expected.mask is None)
            np.testing.assert_array_equal(found.mask, expected.mask)
            np.testing.assert_array_equal(found.logits, expected.logits)
            np.testing.assert_array_equal(found.affine, expected.affine)
        np.testing.assert_array_equal(engine.embed(ours), other.embed(theirs))
        texts = [words(count, count) for count in (3, 40, 600)]
        np.testing.assert_array_equal(engine.rank(ours, texts).scores, other.rank(theirs, texts).scores)
        ours, theirs = engine.embed_texts(texts), other.embed_texts(texts)
        np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)
        assert (ours.cut, ours.text_limit) == (theirs.cut, theirs.text_limit) == ((False, False, True), 512)


@pytest.mark.parametrize("other", ["client", "awaited"])
def test_segments_are_equal_bit_by_bit(request, engine, other, scans):
    other = request.getfixturevalue(other)
    for of in (scans[0], scan(1)):
        ours, theirs = (segmented(m3d, m3d.upload(of)) for m3d in (engine, other))
        assert len(ours.segments) == len(theirs.segments) > 1
        for found, expected in zip(ours.segments, theirs.segments):
            np.testing.assert_array_equal(found.mask, expected.mask)
            np.testing.assert_array_equal(found.logits, expected.logits)
            assert (found.score, found.words, found.span) == (expected.score, expected.words, expected.span)


def test_an_answer_to_the_first_question_holds_a_mask(engine, scans):
    """Else the comparison above would compare nothing."""
    assert engine.segment(engine.upload(scans[0]), QUESTION, max_new_tokens=48).mask.any()


def test_seeded_samples_are_equal(engine, client, scans):
    settings = {"temperature": 0.8, "top_k": 50, "seed": 7, "max_new_tokens": 24}
    assert (
        engine.ask(engine.upload(scans[0]), QUESTION, **settings).token_ids
        == client.ask(client.upload(scans[0]), QUESTION, **settings).token_ids
    )


# --- segments --------------------------------------------------------------------------------------------------------
def segmented(m3d, study, merge="each"):
    return m3d.segment(study, QUESTION, return_logits=True, merge=merge, max_new_tokens=SOME_SEG)


def test_each_seg_has_a_mask_of_its_own_and_the_mask_is_their_union(m3d, study):
    found = segmented(m3d, study)
    assert 1 < len(found.segments) == found.answer.text.count("[SEG]") and found.logits is None
    np.testing.assert_array_equal(found.mask, np.any([each.mask for each in found.segments], axis=0))
    for each in found.segments:
        # The study has the model's size, so that nothing is resampled.
        probabilities = 1 / (1 + np.exp(-each.logits.astype(float)))
        assert (each.mask == (probabilities > 0.5))[abs(probabilities - 0.5) > 1e-6].all()
        assert each.score == (pytest.approx(probabilities[each.mask].mean(), abs=1e-6) if each.mask.any() else None)
        assert each.measurements.voxel_count == each.mask.sum()
        np.testing.assert_array_equal(each.affine, found.affine)
    assert len({each.logits.tobytes() for each in found.segments}) > 1


def test_a_segment_says_which_words_led_to_it(m3d, study):
    found = segmented(m3d, study)
    text, before = found.answer.text, 0
    for each in found.segments:
        seg = text.index("[SEG]", before)
        assert text[slice(*each.span)] == each.words == text[before:seg].strip()
        before = seg + len("[SEG]")


def test_one_mask_of_all_seg_is_what_a_segmentation_has_unless_it_is_told_otherwise(m3d, study):
    found, plain = segmented(m3d, study, "reference"), m3d.segment(study, QUESTION, max_new_tokens=SOME_SEG)
    np.testing.assert_array_equal(found.mask, plain.mask)
    (one,) = plain.segments
    assert one.mask is plain.mask and one.words == plain.answer.text[: plain.answer.text.rindex("[SEG]")].strip()
    assert found.logits is found.segments[0].logits and found.logits.shape == study.info.shape


def test_an_answer_with_one_seg_has_one_mask_either_way(m3d, study):
    ids = m3d.ask(study, QUESTION, max_new_tokens=SOME_SEG).token_ids
    most = 1 + next(n for n in range(len(ids)) if m3d.ask(study, QUESTION, max_new_tokens=n + 1).text.count("[SEG]"))
    each, reference = (
        m3d.segment(study, QUESTION, True, merge=merge, max_new_tokens=most) for merge in ("each", "reference")
    )
    assert len(each.segments) == 1
    np.testing.assert_array_equal(each.mask, reference.mask)
    np.testing.assert_array_equal(each.segments[0].logits, reference.logits)
    assert (
        each.segments[0].score == reference.segments[0].score and each.segments[0].words == reference.segments[0].words
    )


def test_an_answer_has_a_bounded_number_of_masks(m3d, study):
    settings = {"max_new_tokens": 300, "temperature": 0.01, "top_k": 2, "seed": 1}
    assert m3d.ask(study, QUESTION, **settings).text.count("[SEG]") > MAX_SEGMENTS
    with pytest.raises(InvalidInput, match=f"at most {MAX_SEGMENTS} masks.*'reference'"):
        m3d.segment(study, QUESTION, merge="each", **settings)
    assert len(m3d.segment(study, QUESTION, **settings).segments) == 1


def test_the_ensemble_draws_as_the_client_does(client, scans):
    study = client.upload(scans[0])
    inputs = {
        contract.STUDY_IN: study.handle,
        contract.QUESTION: QUESTION,
        contract.SAMPLING: json.dumps({"max_new_tokens": SOME_SEG}),
        contract.RETURN_LOGITS: True,
    }
    for merge in (None, "reference", "each"):
        found = segmented(client, study, merge or "reference")
        drawn = client._transport.stream("m3d_segment", inputs | {contract.MERGE: merge}, 300).read()
        assert drawn.text("TEXT") == found.answer.text and len(drawn["SEG_SPANS"]) == found.answer.text.count("[SEG]")
        np.testing.assert_array_equal(drawn["MASK"], np.packbits(found.mask))
        np.testing.assert_array_equal(drawn["LOGITS"], np.concatenate([each.logits for each in found.segments]))
        bits = [np.packbits(each.mask) for each in found.segments] if merge == "each" else np.zeros((0, 0), np.uint8)
        np.testing.assert_array_equal(drawn["SEGMENT_MASKS"], bits)
        assert drawn["SEGMENT_SCORES"].tolist() == [each.score for each in found.segments]
    with pytest.raises(InvalidInput, match="reference, each"):
        client._transport.stream("m3d_segment", inputs | {contract.MERGE: "all"}, 300).read()


# --- provenance ------------------------------------------------------------------------------------------------------
NAME, UID = "MARKED^NAME", "1.2.826.0.1.3680043.8.498.77777"


def test_the_place_of_a_nifti_comes_back_with_the_mask_and_its_texts_do_not(m3d, tmp_path):
    texts = {"descrip": NAME, "aux_file": NAME, "intent_name": NAME, "db_name": NAME, "data_type": NAME[:10]}
    affine = np.array([[-0.9, 0.1, 0.2, 12], [0.1, 1.4, -0.3, -80], [0.1, 0.2, 2.9, 7], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(scan(6), affine)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1, strip_shears=True)
    for name, text in texts.items():
        image.header[name] = text
    path = tmp_path / "scan.nii"
    nibabel.save(image, path)
    assert NAME.encode() in path.read_bytes()
    found = segmented(m3d, m3d.upload(path))
    given = nibabel.Nifti1Header(path.read_bytes()[:348], check=False)
    assert NAME[:10].encode() not in found.header and found.header == geometry_header(given)
    for mask in (found, *found.segments):
        saved = nibabel.load(mask.save(tmp_path / "mask.nii.gz"))
        np.testing.assert_array_equal(np.asarray(saved.dataobj), mask.mask)
        for name in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"):
            np.testing.assert_array_equal(saved.header[name], given[name])


def dicom_folder(folder: Path, **fields) -> Path:
    slices = series(9, shape=(24, 20), SeriesInstanceUID=f"{UID}.2", StudyInstanceUID=f"{UID}.1", **fields)
    for index, dataset in enumerate(slices):
        dataset.PatientName, dataset.FrameOfReferenceUID, dataset.SOPInstanceUID = NAME, f"{UID}.3", f"{UID}.4.{index}"
        (folder / f"{NAME} {index}.dcm").write_bytes(saved(dataset))
    return folder


def test_a_mask_of_a_dicom_series_says_which_image_each_of_its_slices_lies_on(m3d, tmp_path):
    found = segmented(m3d, m3d.upload(dicom_folder(tmp_path)))
    reference = found.source.series()
    assert (reference.study_uid, reference.series_uid, reference.frame_of_reference_uid) == (
        f"{UID}.1",
        f"{UID}.2",
        f"{UID}.3",
    )
    assert len(reference.slices) == found.mask.shape[2] == 9
    for k, each in enumerate(reference.slices):
        image = pydicom.dcmread(each.file)
        assert (each.sop_class_uid, each.sop_instance_uid) == (image.SOPClassUID, image.SOPInstanceUID)
        assert found.mask[:, :, k].T.shape == (image.Rows, image.Columns)
        position = (found.affine @ [0, 0, k, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(position, image.ImagePositionPatient, atol=1e-6)


def test_no_name_and_no_uid_of_a_patient_is_kept_or_told(m3d, engine, server, tmp_path):
    """In what is stored, what is logged, and what is answered; with an upload that fails, too."""
    folder = dicom_folder(tmp_path)
    study = m3d.upload(folder)
    assert all(text.encode() in scan_bytes(folder) for text in (NAME, UID))  # what was uploaded has them
    answers = [study.info, segmented(m3d, study).header, m3d.ask(study, QUESTION, max_new_tokens=4), m3d.info()]
    with pytest.raises(InvalidInput):
        m3d.upload(dicom_folder(tmp_path, Modality="MR", PixelSpacing=[0, 0]))
    kept = [path for place in kept_by(server) for path in place.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in kept] + [server.log.read_bytes()]
    assert any(b'"orientation"' in content for content in contents)  # the studies are looked at
    for text in (NAME, UID, NAME.replace("^", " ")):
        assert not any(text.encode() in content for content in contents)
        assert not any(text in repr(answer) for answer in answers) and not any(text in str(path) for path in kept)


def scan_bytes(folder: Path) -> bytes:
    return b"".join(scan_pieces(folder)[0])


def kept_by(server) -> list[Path]:
    """The folders of the engine and the server: their studies, and what the server's parts tell each other."""
    of_server = Path(f"/proc/{server.supervisor_pid}/root{SHARED_MEMORY}")
    studies = [*SHARED_MEMORY.glob(f"{PREFIX}-{os.getpid()}-*"), *of_server.glob(f"{PREFIX}-*")]
    assert len(studies) >= 2
    return [*studies, Path(os.fsdecode(Footprint(server.supervisor_pid).run_folder))]


# --- studies ---------------------------------------------------------------------------------------------------------
def test_a_study_says_how_its_scan_was_prepared(m3d, repository):
    first, again = (m3d.upload(scan(1), GRID, "ct") for _ in range(2))
    assert first.handle == again.handle and len(first.handle) == 64 and again.info.cached
    info = first.info
    assert (info.preset, info.shape, info.orientation, info.crop) == ("ct", (20, 30, 24), "LIA", None)
    assert info.spacing_mm == pytest.approx((1, 3, 2)) and info.reason and info.prepare_s > 0
    assert info.model == Manifest.read(repository).model


def test_a_crop_is_a_study_of_its_own_and_its_mask_is_the_whole_scans(m3d):
    whole, part = m3d.upload(scan(1), GRID, "ct"), m3d.upload(scan(1), GRID, "ct", crop="2:18,5:25,3:20")
    assert part.handle != whole.handle and part.info.crop == ((2, 18), (5, 25), (3, 20))
    found = m3d.segment(part, QUESTION, max_new_tokens=48)
    assert found.mask is None or found.mask.shape == (20, 30, 24)


def test_a_file_and_its_bytes_are_one_study(m3d, tmp_path):
    path = tmp_path / "scan.npy"
    np.save(path, scan(2))
    assert m3d.upload(path).handle == m3d.upload(path.read_bytes()).handle


def test_a_scan_may_stand_for_its_study(m3d, study, scans):
    asked = m3d.ask(scans[0], QUESTION, max_new_tokens=8)
    assert asked.token_ids == m3d.ask(study, QUESTION, max_new_tokens=8).token_ids


def test_a_handle_stands_for_its_study(m3d, study):
    asked = m3d.ask(Study(study.handle), QUESTION, max_new_tokens=8)
    assert asked.token_ids == m3d.ask(study, QUESTION, max_new_tokens=8).token_ids


def test_a_forgotten_study_is_gone_for_all_and_is_not_sent_again(m3d):
    study = m3d.upload(scan(3))
    bare = Study(study.handle)
    m3d.forget(study)
    for gone in (study, bare):
        for use in (m3d.forget, m3d.embed, lambda of: m3d.ask(of, QUESTION), lambda of: m3d.segment(of, QUESTION)):
            with pytest.raises(StudyNotFound):
                use(gone)
    assert not m3d.upload(scan(3)).info.cached


def test_a_study_that_is_not_held_any_more_is_sent_again_from_where_it_came(m3d):
    study = m3d.upload(scan(4))
    m3d.forget(Study(study.handle))  # as if it had been evicted
    assert m3d.ask(study, QUESTION, max_new_tokens=4).token_ids
    assert m3d.upload(scan(4)).info.cached


# --- answers ---------------------------------------------------------------------------------------------------------
def test_a_stream_gives_the_pieces_and_then_the_whole(m3d, study):
    asked = m3d.ask(study, QUESTION, max_new_tokens=48)
    with m3d.stream(study, QUESTION, max_new_tokens=48) as stream:
        assert stream.answer is None
        pieces = list(stream)
    assert len(pieces) > 1 and "".join(pieces) == asked.text == stream.answer.text
    assert stream.answer.token_ids == asked.token_ids and stream.answer.finish_reason == asked.finish_reason
    with pytest.raises(StopIteration):
        next(stream)


def test_an_answer_says_what_it_cost(m3d, study):
    m3d.ask(study, QUESTION, max_new_tokens=1)
    timings = m3d.ask(study, QUESTION, max_new_tokens=8).timings
    assert timings.answer_tokens == 8 and timings.prompt_tokens > 8 and timings.cached_tokens >= 0
    assert 0 < timings.first_token_s <= timings.last_token_s <= timings.total_s
    assert 0 < timings.first_text_s <= timings.total_s


def test_sampling_settings_reach_the_language_model(m3d, study):
    assert m3d.ask(study, QUESTION, max_new_tokens=3).finish_reason == "length"
    whole = m3d.ask(study, QUESTION, max_new_tokens=24)
    stop = whole.text.split()[2]
    stopped = m3d.ask(study, QUESTION, max_new_tokens=24, stop=stop)
    assert stopped.finish_reason == "stop" and stop not in stopped.text and whole.text.startswith(stopped.text)


# --- conversations ---------------------------------------------------------------------------------------------------
TURNS = [("system", "w3"), ("user", "w4 w5"), ("assistant", "w6"), ("user", QUESTION)]


def test_a_model_for_single_questions_gets_the_last_one_and_its_answer_says_so(m3d, study):
    """The published families were trained on single questions; others are in test_language_models.py."""
    asked = m3d.ask(study, QUESTION, max_new_tokens=48)
    assert asked.history_used is None
    for turns in (TURNS, [Message(*turn) for turn in TURNS], [dict(zip(("role", "content"), turn)) for turn in TURNS]):
        answer = m3d.ask(study, messages=turns, max_new_tokens=48)
        assert answer.history_used is False and answer.token_ids == asked.token_ids
    with m3d.stream(study, messages=TURNS, max_new_tokens=48) as stream:
        assert "".join(stream) == asked.text and stream.answer.history_used is False
    found, expected = (
        m3d.segment(study, **of, max_new_tokens=48) for of in ({"messages": TURNS}, {"question": QUESTION})
    )
    assert found.answer.history_used is False and expected.answer.history_used is None
    np.testing.assert_array_equal(found.mask, expected.mask)


def test_a_conversation_of_one_question_is_the_question(m3d, study):
    answer = m3d.ask(study, messages=[Message("user", QUESTION)], max_new_tokens=8)
    assert answer.history_used is None and answer.token_ids == m3d.ask(study, QUESTION, max_new_tokens=8).token_ids


# --- likelihoods and constraints -------------------------------------------------------------------------------------
CHOICES = ["w5", "w6 w7", "w6 w9 w9"]


@pytest.mark.parametrize("other", ["client", "awaited"])
def test_log_probabilities_and_likelihoods_are_equal(request, engine, other, scans):
    """To what the order of the batch may change; ids are equal to the last."""
    other, settings = request.getfixturevalue(other), {"logprobs": 3, "choices": CHOICES, "max_new_tokens": 24}
    ours, theirs = (m3d.ask(m3d.upload(scans[0]), QUESTION, **settings) for m3d in (engine, other))
    assert ours.token_ids == theirs.token_ids and len(ours.logprobs) == 24
    for mine, your in zip(ours.logprobs, theirs.logprobs):
        assert (mine.token_id, mine.text) == (your.token_id, your.text)
        assert mine.logprob == pytest.approx(your.logprob, abs=1e-5)
        assert [each.token_id for each in mine.top] == [each.token_id for each in your.top]
    assert ours.choices == pytest.approx(theirs.choices, abs=1e-4) and list(ours.choices) == CHOICES


def test_an_answer_has_what_was_asked_for_and_stays_the_same(m3d, study):
    plain = m3d.ask(study, QUESTION, max_new_tokens=24)
    assert plain.logprobs == () and plain.choices == {}
    asked = m3d.ask(study, QUESTION, max_new_tokens=24, logprobs=2, choices=CHOICES)
    assert asked.token_ids == plain.token_ids and asked.text == plain.text
    assert [token.token_id for token in asked.logprobs] == list(plain.token_ids)
    for token in asked.logprobs:  # greedy
        assert len(token.top) == 2 and token.top[0].token_id == token.token_id
        assert 0 >= token.logprob == token.top[0].logprob >= token.top[1].logprob
    assert all(value < 0 for value in asked.choices.values())
    with m3d.stream(study, QUESTION, max_new_tokens=24, logprobs=0, choices="w5") as stream:
        assert "".join(stream) == plain.text
    assert [(token.token_id, token.top) for token in stream.answer.logprobs] == [(id_, ()) for id_ in plain.token_ids]
    assert stream.answer.choices == pytest.approx({"w5": asked.choices["w5"]}, abs=1e-4)
    found = m3d.segment(study, QUESTION, max_new_tokens=24, choices="w5")
    assert found.answer.choices == pytest.approx(stream.answer.choices, abs=1e-4)


def test_an_answer_may_be_held_to_choices(m3d, study):
    held = m3d.ask(study, QUESTION, max_new_tokens=24, choices=CHOICES, only_choices=True)
    assert held.text in CHOICES and held.finish_reason == "stop"


def test_an_answer_that_cannot_be_held_to_a_schema_is_refused(m3d, study):
    """The tiny vocabulary has no brace; test_language_models.py has one that does."""
    with pytest.raises(InvalidInput, match="cannot be held to its json_schema"):
        m3d.ask(study, QUESTION, max_new_tokens=24, json_schema={"type": "object"})
    assert m3d.ask(study, QUESTION, max_new_tokens=1).token_ids


def test_scores_are_those_of_the_embeddings(m3d, study):
    texts = [words(count, count) for count in (3, 40)]
    scan, embedded = m3d.embed(study), m3d.embed_texts(texts).embeddings
    assert scan.dtype == np.float32 and np.linalg.norm(scan) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(embedded @ scan, m3d.rank(study, texts).scores, atol=1e-6)


def test_it_says_what_it_is(m3d, repository):
    assert m3d.is_ready()
    info = m3d.info()
    assert info == Manifest.read(repository).info
    assert info.models == ("m3d_chat", "m3d_segment", "m3d_retrieve")


# --- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("use", "kind", "words"),
    [
        (lambda m, s: m.upload(b"no scan"), InvalidInput, "."),
        (lambda m, s: m.upload(np.zeros((2, 2))), InvalidInput, "."),
        (lambda m, s: m.upload(scan(1), preset="pet"), InvalidInput, "pet"),
        (lambda m, s: m.upload(scan(1), preset=3), InvalidInput, "preset"),
        (lambda m, s: m.upload(scan(1), crop="0:2,1:3"), InvalidInput, "crop"),
        (lambda m, s: m.upload(scan(1), crop="0:200,1:3,0:4"), InvalidInput, "crop"),
        (lambda m, s: m.upload(scan(1), np.zeros((4, 4))), InvalidInput, "affine"),
        (lambda m, s: m.ask(s, " "), InvalidInput, "question is empty"),
        (lambda m, s: m.ask(s, "\ud800"), InvalidInput, "not valid Unicode"),
        (lambda m, s: m.ask(s, "w1 " * 600), InvalidInput, "question has"),
        (lambda m, s: m.ask(s, QUESTION, temperature=9), InvalidInput, "temperature"),
        (lambda m, s: m.ask(s, QUESTION, warmth=1), InvalidInput, "warmth"),
        (lambda m, s: m.ask(s, QUESTION, max_new_tokens=5000), InvalidInput, "max_new_tokens is 5000"),
        (lambda m, s: list(m.stream(s, "w1 " * 600)), InvalidInput, "question has"),
        (lambda m, s: m.segment(s, ""), InvalidInput, "question is empty"),
        (lambda m, s: m.segment(s, QUESTION, merge="all"), InvalidInput, "reference, each"),
        (lambda m, s: m.ask(s), InvalidInput, "question is empty"),
        (lambda m, s: m.ask(s, QUESTION, messages=TURNS), InvalidInput, "give one of them"),
        (lambda m, s: m.ask(s, messages=[]), InvalidInput, "roles of the turns are none"),
        (lambda m, s: m.ask(s, messages=QUESTION), InvalidInput, "messages must be a list of turns"),
        (lambda m, s: m.ask(s, messages=TURNS[:-1]), InvalidInput, "the last one user"),
        (lambda m, s: m.ask(s, messages=[("user", " ")]), InvalidInput, "question is empty"),
        (lambda m, s: m.ask(s, messages=[{"role": "user"}]), InvalidInput, "a role and a content"),
        (lambda m, s: m.ask(s, messages=[*TURNS[1:], ("assistant", 3)]), InvalidInput, "a role and a text"),
        (lambda m, s: m.ask(s, messages=TURNS[1:] * 200), InvalidInput, "600 turns given, at most 256"),
        (
            lambda m, s: m.ask(s, messages=[("user", "w1"), ("assistant", "w1 " * 400_000), ("user", "w1")]),
            InvalidInput,
            "history has .* bytes, at most",
        ),
        (lambda m, s: m.segment(s, messages=TURNS[:-1]), InvalidInput, "the last one user"),
        (lambda m, s: list(m.stream(s, messages=TURNS[:-1])), InvalidInput, "the last one user"),
        (lambda m, s: m.ask(s, QUESTION, logprobs=21), InvalidInput, "logprobs must be a whole number from 0 to 20"),
        (lambda m, s: m.ask(s, QUESTION, choices=["w1"] * 65), InvalidInput, "65 strings given, at most 64"),
        (lambda m, s: m.ask(s, QUESTION, choices=["w1", " w2"]), InvalidInput, "begins or ends with a space"),
        (lambda m, s: m.ask(s, QUESTION, choices=["w999", "w998"]), InvalidInput, "same tokens"),
        (lambda m, s: m.ask(s, QUESTION, only_choices=True), InvalidInput, "no choices: give some"),
        (lambda m, s: m.ask(s, QUESTION, json_schema={"type": "tree"}), InvalidInput, "type 'tree' is none of"),
        (lambda m, s: m.ask(s, QUESTION, json_schema="{"), InvalidInput, "not JSON"),
        (lambda m, s: m.rank(s, "one text"), InvalidInput, "texts"),
        (lambda m, s: m.rank(s, ["w1"] * 300), InvalidInput, "300 texts"),
        (lambda m, s: m.embed_texts(["w1", " "]), InvalidInput, "texts"),
        (lambda m, s: m.embed_texts(["x" * 30_000]), InvalidInput, "30000 characters"),
        (lambda m, s: m.ask(Study("0" * 64), QUESTION), StudyNotFound, "unknown study"),
        (lambda m, s: m.embed(Study("no handle")), StudyNotFound, "unknown study"),
        (lambda m, s: m.forget(Study("0" * 64)), StudyNotFound, "unknown study"),
        (lambda m, s: m.forget("0" * 64), InvalidInput, "a study"),
        (lambda m, s: m.ask(s, QUESTION, timeout=0), InvalidInput, "timeout"),
        (lambda m, s: m.ask(s, QUESTION, timeout="long"), InvalidInput, "timeout"),
    ],
)
def test_an_error_has_its_class_and_says_what_is_wrong(m3d, study, use, kind, words):
    with pytest.raises(kind, match=words) as raised:
        use(m3d, study)
    assert type(raised.value) is kind
    assert m3d.ask(study, QUESTION, max_new_tokens=1).token_ids


def test_a_deadline_ends_an_answer_and_the_next_one_comes(m3d, study):
    for use in (m3d.ask, m3d.segment, lambda *a, **s: list(m3d.stream(*a, **s))):
        with pytest.raises(DeadlineExceeded, match="timeout"):
            use(study, QUESTION, max_new_tokens=LONG, timeout=0.02)
    assert m3d.ask(study, QUESTION, max_new_tokens=2).token_ids


def test_a_deadline_ends_the_wait_for_a_scan(m3d):
    with pytest.raises(DeadlineExceeded):
        m3d.upload(scan(5), timeout=1e-4)
    assert m3d.upload(scan(5)).info.shape == (20, 30, 24)


# --- cancellation ----------------------------------------------------------------------------------------------------
def test_a_closed_stream_is_cancelled(m3d, study):
    stream = m3d.stream(study, QUESTION, max_new_tokens=LONG)
    next(stream)
    stream.close()
    with pytest.raises(Cancelled):
        next(stream)
    assert stream.answer is None


def test_closed_streams_free_their_places(m3d, study):
    """As many as there are places, and one more, which is refused; when they are closed, there is room."""
    with ExitStack() as stack:
        done = queue.SimpleQueue()
        for _ in range(BATCH + WAITING + 1):
            Reader(stack.enter_context(m3d.stream(study, QUESTION, max_new_tokens=LONG)), done)
        assert isinstance(done.get(timeout=PATIENCE_S).ended_by, ResourceExhausted)
    while True:
        try:
            assert m3d.ask(study, QUESTION, max_new_tokens=1).token_ids
            break
        except ResourceExhausted:
            continue


def test_a_cancelled_task_cancels_its_question(server, scans):
    async def ask_and_cancel():
        async with AsyncM3DClient(server.url) as client:
            study = await client.upload(scans[0])
            begun = asyncio.Event()

            async def read():
                async for _ in client.stream(study, QUESTION, max_new_tokens=LONG):
                    begun.set()

            reading = asyncio.create_task(read())
            asking = asyncio.create_task(client.ask(study, QUESTION, max_new_tokens=LONG))
            await asyncio.wait_for(begun.wait(), PATIENCE_S)
            for task in (reading, asking):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            return await client.ask(study, QUESTION, max_new_tokens=2)

    assert asyncio.run(ask_and_cancel()).token_ids


# --- the end ---------------------------------------------------------------------------------------------------------
def closes_and_leaves(m3d, scans) -> None:
    """A stream in work fails with Cancelled, later calls with Unavailable."""
    study = m3d.upload(scans[0])
    reader = Reader(m3d.stream(study, QUESTION, max_new_tokens=LONG))
    assert reader.begun.wait(PATIENCE_S)
    m3d.close()
    reader.join(PATIENCE_S)
    assert isinstance(reader.ended_by, Cancelled)
    assert not m3d.is_ready()
    for use in (lambda: m3d.ask(study, QUESTION), lambda: m3d.upload(scans[0]), m3d.info):
        with pytest.raises(Unavailable, match="closed"):
            use()
    m3d.close()


def test_a_closed_client_ends_what_is_in_work(server, scans):
    closes_and_leaves(M3DClient(server.url), scans)


def test_a_closed_asynchronous_client_ends_what_is_in_work(server, scans):
    awaited = Awaited(server.url)
    closes_and_leaves(awaited, scans)
    awaited.thread.close()


def test_a_closed_engine_ends_what_is_in_work_and_leaves_nothing(repository, scans, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = occupied()
    engine = M3DEngine(repository)
    assert len(occupied() - before) >= 2  # vLLM's process and the studies
    closes_and_leaves(engine, scans)
    assert occupied() <= before


def test_an_interrupt_that_reaches_vllms_process_too_does_not_end_it(engine, study_of_engine):
    """As Ctrl-C in a terminal does, by which an answer is interrupted."""
    (process,) = engine._transport._decoding[1].decoder.engine.process_ids
    os.kill(process, signal.SIGINT)
    assert engine.ask(study_of_engine, QUESTION, max_new_tokens=2).token_ids


def test_an_engine_without_a_language_model_does_the_rest_and_says_what_is_missing(light_repository, scans):
    with M3DEngine(light_repository) as engine:
        study = engine.upload(scans[0])
        assert engine.is_ready() and engine.info().models == ()
        for use in (lambda: engine.ask(study, QUESTION), lambda: engine.rank(study, ["w1"])):
            with pytest.raises(Unavailable, match="does not serve this"):
                use()


def test_a_repository_for_a_gpu_is_refused_with_the_ways_out(light_repository, tmp_path):
    folder = shutil.copytree(light_repository, tmp_path / "model_repository", symlinks=True)
    replace(Manifest.read(folder), target="tensorrt").write(folder)
    with pytest.raises(RepositoryError, match="target tensorrt.*--target cpu.*m3d serve --target tensorrt"):
        M3DEngine(folder)


def occupied() -> set[str]:
    """Processes that this one has started, folders of studies, and what lies in the folder for temporary files."""
    tracker = b"multiprocessing.resource_tracker"  # Python's, one for this process until it ends
    processes = [
        pid for pid in supervisor.descendants(os.getpid()) if tracker not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    folders = [*SHARED_MEMORY.glob(f"{PREFIX}-{os.getpid()}-*"), *Path(tempfile.gettempdir()).iterdir()]
    return {*map(str, processes), *map(str, folders)}
