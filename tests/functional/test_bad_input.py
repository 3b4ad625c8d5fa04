"""Each kind of bad input gets an error with its cause; the server stays up, and the next request works."""

from __future__ import annotations

import gzip
import io
import json
import zipfile

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from engine import contract
from engine.client.connection import Connection
from engine.errors import CheckpointError, InvalidInput, M3DError, StudyNotFound, Unavailable
from export.build_engines import export
from tests.conftest import copy_repository
from tests.tiny import QUESTION

pytestmark = pytest.mark.integration

PATIENCE_S = 120


# --- scans that nobody should send -----------------------------------------------------------------------------------
def values(*shape: int, dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 500, shape or (20, 21, 22)).astype(dtype)


def nifti(array: np.ndarray, zipped: bool = True) -> bytes:
    data = nibabel.Nifti1Image(array, np.diag([1.0, 2, 3, 1])).to_bytes()
    return gzip.compress(data, 1) if zipped else data


def with_value(value: float) -> bytes:
    array = values(dtype=np.float32)
    array[3, 4, 5] = value
    return nifti(array)


def promising(*shape: int) -> bytes:
    """A NIfTI header for `shape`, followed by a few voxels."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(shape)
    header["sform_code"], header["vox_offset"] = 1, 352
    header["srow_x"], header["srow_y"], header["srow_z"] = np.eye(4)[:3]
    header["magic"] = b"n+1"
    return header.binaryblock + b"\0" * 4 + bytes(range(256))


def dicom(series: str, position: float) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    one.SeriesInstanceUID, one.Modality = series, "CT"
    one.ImagePositionPatient, one.ImageOrientationPatient = [0, 0, position], [1, 0, 0, 0, 1, 0]
    one.PixelSpacing, one.Rows, one.Columns = [1, 1], 16, 16
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.PixelData = values(16, 16).tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, one, enforce_file_format=True)
    return buffer.getvalue()


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def mixed_series() -> bytes:
    first, second = generate_uid(), generate_uid()
    return zipped(a=dicom(first, 0), b=dicom(first, 2), c=dicom(second, 4), d=dicom(second, 6))


def bomb() -> bytes:
    """3 GB of zeros in 3 MB: over the limit of 2 GiB, whatever the member claims to be."""
    buffer = io.BytesIO()
    zeros = bytes(1 << 24)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("slice.dcm", "w", force_zip64=True) as member:
            for _ in range(3 * 64):
                member.write(zeros)
    return buffer.getvalue()


SCANS = {
    "not an image": (lambda: b"%PDF-1.7 a report, not a scan", ["not an image"]),
    "an empty file": (lambda: b"", ["empty"]),
    "truncated gzip": (lambda: nifti(values())[:-2000], ["truncated"]),
    "a header promising more voxels than there are": (lambda: promising(100, 100, 100), ["promises", "1,000,000"]),
    "2D": (lambda: nifti(values(20, 21)), ["2 axes"]),
    "4D": (lambda: nifti(values(20, 21, 22, 3)), ["4 axes"]),
    "NaN": (lambda: with_value(np.nan), ["1 voxels", "NaN"]),
    "infinity": (lambda: with_value(np.inf), ["1 voxels", "infinite"]),
    "zeros": (lambda: nifti(values() * 0), ["every voxel", "0"]),
    "a constant": (lambda: nifti(values() * 0 + 7), ["every voxel", "7"]),
    "over the size limit": (lambda: promising(1024, 1024, 1024), ["1,073,741,824", "max_voxels", "536,870,912"]),
    "a zip bomb": (bomb, ["max_bytes", "2,147,483,648"]),
    "mixed DICOM series": (mixed_series, ["series", "2"]),
}


@pytest.fixture(scope="module")
def connection(server):
    """Requests as a client of another kind sends them: nothing is checked before the server."""
    connection = Connection(server.url)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def study(client, scans):
    return client.upload(scans[0])


@pytest.fixture(scope="module")
def expected(client, study):
    return client.ask(study, QUESTION, max_new_tokens=8)


@pytest.fixture
def works_afterwards(client, study, expected, server):
    yield
    assert server.is_ready()
    assert client.ask(study, QUESTION, max_new_tokens=8).token_ids == expected.token_ids


@pytest.mark.usefixtures("works_afterwards")
@pytest.mark.parametrize("name", SCANS)
def test_a_bad_scan_is_refused_with_its_cause(client, connection, tmp_path, name):
    make, words = SCANS[name]
    (tmp_path / "scan").write_bytes(make())
    with pytest.raises(InvalidInput) as uploading:
        client.upload(tmp_path / "scan")
    inputs = {contract.VOLUME: (tmp_path / "scan").read_bytes(), contract.QUESTION: QUESTION}
    with pytest.raises(InvalidInput) as asking:
        list(connection.stream("m3d_chat", inputs, PATIENCE_S))
    for word in words:
        assert word in str(uploading.value)
        assert word in str(asking.value)
    for inside in ("Traceback", ".py", "in ensemble"):
        assert inside not in str(uploading.value) + str(asking.value)


QUESTIONS = {
    "an empty question": ({contract.QUESTION: ""}, InvalidInput, ["question", "empty"]),
    "a blank question": ({contract.QUESTION: " \n"}, InvalidInput, ["question", "empty"]),
    "a question over the context": ({contract.QUESTION: "w7 " * 600}, InvalidInput, ["600", "512"]),
    "a temperature out of range": ({contract.SAMPLING: '{"temperature": 9}'}, InvalidInput, ["temperature", "9", "2"]),
    "a top_p out of range": ({contract.SAMPLING: '{"top_p": 0}'}, InvalidInput, ["top_p", "0"]),
    "too many new tokens": ({contract.SAMPLING: '{"max_new_tokens": 5000}'}, InvalidInput, ["max_new_tokens", "5000"]),
    "an unknown setting": ({contract.SAMPLING: '{"beams": 4}'}, InvalidInput, ["beams", "temperature"]),
    "sampling that is not JSON": ({contract.SAMPLING: "hot"}, InvalidInput, ["SAMPLING", "JSON"]),
    "an unknown handle": ({contract.STUDY_IN: "0" * 64}, StudyNotFound, ["0" * 12]),
    "a handle that is a path": ({contract.STUDY_IN: "../../etc/passwd"}, StudyNotFound, []),
}


@pytest.mark.usefixtures("works_afterwards")
@pytest.mark.parametrize("model", ["m3d_chat", "m3d_segment", "decoder"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_bad_question_is_refused_with_its_cause(connection, study, model, name):
    changed, kind, words = QUESTIONS[name]
    inputs = {contract.STUDY_IN: study.handle, contract.QUESTION: QUESTION, **changed}
    with pytest.raises(M3DError) as refused:
        list(connection.stream(model, inputs, PATIENCE_S))
    assert type(refused.value) is kind
    for word in words:
        assert word in str(refused.value)


PARTS = {
    "the middle of no upload": ({"UPLOAD_RANGE": (10, 20)}, Unavailable, "upload the scan again"),
    "more than the whole": ({"UPLOAD_RANGE": (0, 4)}, InvalidInput, "no part of a file of 4"),
    "a part before the file": ({"UPLOAD_RANGE": (-1, 9)}, InvalidInput, "no part of a file"),
    "a scan over the limit": ({"UPLOAD_RANGE": (0, 1 << 40)}, InvalidInput, "crop"),
    "nothing": ({"UPLOAD_RANGE": (0, 4), "VOLUME": None}, InvalidInput, "VOLUME"),
    "bytes without a place": ({}, InvalidInput, "UPLOAD_RANGE"),
    "a place of three numbers": ({"UPLOAD_RANGE": (0, 5, 5)}, InvalidInput, "UPLOAD_RANGE"),
    "no image": ({"UPLOAD_RANGE": (0, 5)}, InvalidInput, "not an image"),
    "a study, too": ({"UPLOAD_RANGE": (0, 5), "STUDY_IN": "0" * 64}, InvalidInput, "both"),
    "a place of no upload": ({"UPLOAD": None, "UPLOAD_RANGE": (0, 5)}, InvalidInput, "UPLOAD"),
    "an affine before the last part": ({"UPLOAD_RANGE": (0, 6), "AFFINE_IN": np.eye(4)}, InvalidInput, "AFFINE.*last"),
    "a preset before the last part": ({"UPLOAD_RANGE": (0, 6), "PRESET": "auto"}, InvalidInput, "PRESET.*last"),
    "a study before the last part": ({"UPLOAD_RANGE": (0, 6), "STUDY_IN": "0" * 64}, InvalidInput, "STUDY.*last"),
    "a hint before the last part": ({"UPLOAD_RANGE": (0, 6), "SEGMENT_HINT": True}, InvalidInput, "SEGMENT_HINT.*last"),
    "a part that is too large": (
        {"UPLOAD_RANGE": (0, 1 << 25), "VOLUME": bytes((16 << 20) + 1)},
        InvalidInput,
        "more parts",
    ),
    "a name that is too long": ({"UPLOAD": "x" * 65, "UPLOAD_RANGE": (0, 5)}, InvalidInput, "64 characters"),
}


@pytest.mark.usefixtures("works_afterwards")
@pytest.mark.parametrize("name", PARTS)
def test_a_bad_part_of_a_scan_is_refused_with_its_cause(connection, name):
    inputs, kind, cause = PARTS[name]
    inputs = {
        getattr(contract, tensor): value for tensor, value in {"UPLOAD": "x", "VOLUME": b"12345", **inputs}.items()
    }
    with pytest.raises(M3DError, match=cause) as refused:
        connection.infer("study", inputs, PATIENCE_S)
    assert type(refused.value) is kind


@pytest.mark.usefixtures("works_afterwards")
def test_an_unknown_preset_is_refused_with_the_known_ones(client, scans):
    with pytest.raises(InvalidInput, match="xray.*m3d-cap"):
        client.upload(scans[0], preset="xray")


@pytest.mark.usefixtures("works_afterwards")
def test_an_affine_that_cannot_be_one_is_refused(connection):
    buffer = io.BytesIO()
    np.save(buffer, values())
    with pytest.raises(InvalidInput, match="affine"):
        inputs = {contract.VOLUME: buffer.getvalue(), contract.AFFINE_IN: np.zeros((4, 4))}
        connection.infer("study", inputs, PATIENCE_S)


@pytest.mark.usefixtures("works_afterwards")
def test_a_good_request_after_a_bad_one_on_the_same_connection_is_answered(connection, study, expected):
    with pytest.raises(InvalidInput):
        connection.infer("study", {contract.VOLUME: b"nothing"}, PATIENCE_S)
    inputs = {contract.STUDY_IN: study.handle, contract.QUESTION: QUESTION, contract.SAMPLING: '{"max_new_tokens": 8}'}
    (answer,) = connection.stream("m3d_chat", inputs, PATIENCE_S)
    assert answer.text("TEXT") == expected.text


def test_a_checkpoint_of_another_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="(?i)bert"):
        export(str(tmp_path / "bert"), copy_repository(tmp_path), precision="fp32")
