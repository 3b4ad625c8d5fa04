"""The gateway as clients meet it: the published `openai` client, and requests that no client of good will makes.

Each test ends with the promise of `RunningGateway.stop`: nothing is in work and no file is kept any more.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile

import httpx
import nibabel as nib
import numpy as np
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.api import Segment
from engine.errors import DeadlineExceeded, InvalidInput, M3DError, ResourceExhausted, Unavailable
from engine.gateway import door, keys, protocol, studies
from engine.gateway.files import Content
from engine.gateway.refusal import Refusal
from engine.gateway.settings import GatewaySettings
from tests.conftest import ROOT
from tests.unit.fake_m3d import ANSWER, EMBEDDING, PATIENCE_S, FakeM3D, RunningGateway

SCAN = b"a scan's file"
MODEL = "m3d-lamed"


@pytest.fixture
def m3d():
    return FakeM3D()


@pytest.fixture
def key_file(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def key(key_file):
    return keys.add(key_file, "ward", ("ask", "upload", "admin"))


@pytest.fixture
def start(m3d, key, key_file, tmp_path):
    """start(**settings) -> a running gateway."""
    running = []

    def begin(with_keys=True, questions=False, **settings):
        opened = key_file if with_keys else None
        running.append(RunningGateway(m3d, tmp_path, opened, GatewaySettings(**settings), questions))
        return running[-1]

    yield begin
    for gateway in running:
        gateway.stop()


@pytest.fixture
def gateway(start):
    return start()


@pytest.fixture
def client(gateway, key):
    with openai.OpenAI(base_url=gateway.url, api_key=key, max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def http(gateway, key):
    with httpx.Client(base_url=gateway.root, headers=bearer(key), timeout=PATIENCE_S) as http:
        http.gateway = gateway
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def data_url(content: bytes, kind: str = "application/x-nifti") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(*parts, question: str = "Is the liver normal?") -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def file_part(**content) -> dict:
    return {"type": "file", "file": content}


def image_part(content: bytes, kind: str = "application/x-nifti") -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(content, kind)}}


INLINE = file_part(file_data=base64.b64encode(SCAN).decode(), filename="scan.nii.gz")


def picture(value: int, size=(5, 4), mode="L", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, kind)
    return buffer.getvalue()


# --- OpenAI's client -------------------------------------------------------------------------------------------------
def test_a_whole_answer_has_text_usage_and_what_the_scan_was_taken_for(client, m3d):
    completion = client.chat.completions.create(
        model=MODEL, messages=about(INLINE), max_tokens=9, temperature=0.5, seed=3, stop=["x"], top_p=0.9
    )
    assert completion.choices[0].message.content == "".join(ANSWER)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == 300 and completion.usage.completion_tokens == len(ANSWER)
    assert completion.usage.prompt_tokens_details.cached_tokens == 256
    assert completion.m3d["preset"] == "ct" and completion.m3d["reason"] == "it has negative values"
    assert completion.m3d["study"].startswith("study-") and completion.m3d["boxes"] == [[0, 1, 2, 3, 4, 5]]
    assert m3d.uploads == [(SCAN, "auto", None)]
    ((_, question, sampling),) = m3d.asked
    assert question == "Is the liver normal?"
    assert sampling == {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"]}


def test_a_stream_brings_the_text_in_pieces_and_the_usage_last(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=about(INLINE), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk.choices[0].delta.content for chunk in chunks[1:-2]] == list(ANSWER)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].m3d["preset"] == "ct"
    assert not chunks[-1].choices and chunks[-1].usage.total_tokens == 300 + len(ANSWER)
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_asynchronous_client_streams(gateway, key):
    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key=key, max_retries=0) as client:
            stream = await client.chat.completions.create(model=MODEL, messages=about(INLINE), stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(read()) == "".join(ANSWER)


def test_cancelling_a_task_of_the_asynchronous_client_cancels_the_answer(gateway, key, m3d):
    m3d.may_go_on.clear()

    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key=key, max_retries=0) as client:
            asking = asyncio.ensure_future(client.chat.completions.create(model=MODEL, messages=about(INLINE)))
            await asyncio.to_thread(m3d.waiting.acquire, timeout=PATIENCE_S)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(ask())
    assert ended(gateway)["outcome"] == "disconnected" and m3d.ended.is_set()


def test_text_arrives_before_the_answer_is_whole_and_closing_the_stream_cancels_it(client, m3d, gateway):
    m3d.may_go_on.clear()
    stream = client.chat.completions.create(model=MODEL, messages=about(INLINE), stream=True)
    texts = (chunk.choices[0].delta.content for chunk in stream)
    assert next(texts) == "" and next(texts) == ANSWER[0]
    assert not m3d.ended.is_set()
    stream.close()
    assert m3d.ended.wait(PATIENCE_S)
    assert ended(gateway)["outcome"] == "disconnected"


def ended(gateway, requests: int = 1) -> dict:
    """The last line of the audit, once so many requests have ended: it is written after the answer."""
    wait_until(lambda: len(gateway.audit()) == requests)
    return gateway.audit()[-1]


def wait_until(reached) -> None:
    """Poll: what is waited for happens in another thread, which has no event for it."""
    pause = threading.Event()
    for _ in range(PATIENCE_S * 100):
        if reached():
            return
        pause.wait(0.01)
    raise AssertionError("this did not happen")


@pytest.mark.parametrize("phase", ["may_upload", "may_answer", "may_go_on"])
@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_ends_its_request_in_each_phase(gateway, key, m3d, phase, streams):
    getattr(m3d, phase).clear()
    body = json.dumps({"model": MODEL, "messages": about(INLINE), "stream": streams}).encode()
    connection = raw(gateway, post("/v1/chat/completions", body, key))
    assert m3d.waiting.acquire(timeout=PATIENCE_S)
    connection.close()
    assert ended(gateway)["outcome"] == "disconnected"
    if phase != "may_upload":
        assert m3d.ended.is_set()


def post(path: str, body: bytes, key: str, *headers: str, length: int | None = None) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {key}",
        f"Content-Length: {len(body) if length is None else length}",
        *(headers or ("Content-Type: application/json",)),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def raw(gateway, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S)
    connection.sendall(sent)
    return connection


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_file_is_uploaded_listed_asked_about_and_deleted(client, m3d):
    file = client.files.create(file=("Jane Doe.nii.gz", SCAN), purpose="user_data")
    assert file.bytes == len(SCAN) and file.filename == "Jane Doe.nii.gz" and file.expires_at > file.created_at
    assert [each.id for each in client.files.list()] == [file.id] and client.files.retrieve(file.id).id == file.id
    for _ in range(2):
        answered = client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=file.id)))
        assert answered.choices[0].message.content == "".join(ANSWER)
    assert m3d.uploads == [(SCAN, "auto", None)]  # once
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.APIStatusError) as gone:
        client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=file.id)))
    assert gone.value.status_code == 410 and "upload it again" in gone.value.message


def test_an_inline_scan_that_comes_with_each_question_is_sent_once(client, m3d):
    for _ in range(3):
        client.chat.completions.create(model=MODEL, messages=about(INLINE))
    assert len(m3d.uploads) == 1 and len({handle for handle, *_ in m3d.asked}) == 1


def test_a_scan_with_another_preset_or_crop_is_another_study(client, m3d):
    for extra in ({}, {"preset": "ct"}, {"crop": "0:4,0:4,0:4"}):
        client.chat.completions.create(model=MODEL, messages=about(INLINE), extra_body=extra)
    assert m3d.uploads == [(SCAN, "auto", None), (SCAN, "ct", None), (SCAN, "auto", "0:4,0:4,0:4")]
    assert len({handle for handle, *_ in m3d.asked}) == 3


@pytest.mark.parametrize("again", [True, False], ids=["same server", "restarted server"])
def test_an_evicted_study_is_sent_again_from_its_file_or_from_the_request(client, m3d, http, again):
    file = client.files.create(file=SCAN, purpose="user_data")
    study = http.post("/v1/studies", json={"file_id": file.id}).json()["id"]
    client.chat.completions.create(model=MODEL, messages=about(INLINE))
    for part in (file_part(file_id=file.id), file_part(file_id=study), INLINE):
        m3d.held.clear()
        m3d.secret = m3d.secret if again else m3d.secret + b"x"
        answered = client.chat.completions.create(model=MODEL, messages=about(part))
        assert answered.choices[0].message.content == "".join(ANSWER)


def test_an_evicted_study_is_sent_again_from_the_file_that_is_asked_about(client, m3d):
    first, second = [client.files.create(file=SCAN, purpose="user_data") for _ in range(2)]
    for file in (first, second):
        client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=file.id)))
    client.files.delete(second.id)
    m3d.held.clear()
    answered = client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=first.id)))
    assert answered.choices[0].message.content == "".join(ANSWER)


def test_a_deleted_file_is_remembered_nowhere(client, gateway):
    file = client.files.create(file=SCAN, purpose="user_data")
    client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=file.id)))
    assert gateway.studies._by_origin
    client.files.delete(file.id)
    assert not gateway.studies._by_origin


def test_the_origins_of_studies_are_remembered_up_to_a_bound(client, gateway, monkeypatch):
    monkeypatch.setattr(studies, "REMEMBERED", 2)
    for _ in range(3):
        file = client.files.create(file=SCAN, purpose="user_data")
        client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=file.id)))
    assert len(gateway.studies._by_origin) == 2


def test_a_file_that_is_deleted_while_its_upload_waits_is_gone():
    with tempfile.TemporaryFile() as file:
        file.write(SCAN)
        content = Content(file)
        assert content.read() == SCAN
    with pytest.raises(Refusal) as refused:
        content.read()
    assert refused.value.status == 410


def answered_beside(ask) -> tuple[threading.Thread, list[httpx.Response]]:
    """What a request on a thread of its own is answered."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(ask()))
    thread.start()
    return thread, answers


def test_a_study_that_is_deleted_while_it_is_sent_again_is_not_kept(http, client, m3d):
    file = client.files.create(file=SCAN, purpose="user_data")
    study = http.post("/v1/studies", json={"file_id": file.id}).json()["id"]
    m3d.held.clear()
    m3d.may_upload.clear()
    thread, answers = answered_beside(lambda: http.post(f"/v1/studies/{study}/rank", json={"texts": ["a"]}))
    assert m3d.waiting.acquire(timeout=PATIENCE_S)
    assert http.delete(f"/v1/studies/{study}").status_code == 200
    m3d.may_upload.set()
    thread.join(PATIENCE_S)
    assert answers[0].status_code == 410 and not m3d.held


def test_a_study_that_is_deleted_during_a_question_is_not_sent_again(http, client, m3d):
    file = client.files.create(file=SCAN, purpose="user_data")
    study = http.post("/v1/studies", json={"file_id": file.id}).json()["id"]
    m3d.may_answer.clear()
    body = {"model": MODEL, "messages": about(file_part(file_id=study))}
    thread, answers = answered_beside(lambda: http.post("/v1/chat/completions", json=body))
    assert m3d.waiting.acquire(timeout=PATIENCE_S)
    assert http.delete(f"/v1/studies/{study}").status_code == 200
    m3d.may_answer.set()
    thread.join(PATIENCE_S)
    assert answers[0].status_code == 410 and not m3d.held and len(m3d.uploads) == 1


def test_a_scan_that_one_key_deletes_while_another_uploads_it_stays_for_the_other(gateway, http, key_file, m3d):
    other = bearer(keys.add(key_file, "other"))
    mine = http.post("/v1/studies", content=SCAN).json()["id"]
    m3d.may_forget.clear()
    deleting, deleted = answered_beside(lambda: http.delete(f"/v1/studies/{mine}"))
    assert m3d.waiting.acquire(timeout=PATIENCE_S)
    uploading, uploaded = answered_beside(
        lambda: httpx.post(f"{gateway.url}/studies", content=SCAN, headers=other, timeout=PATIENCE_S)
    )
    wait_until(lambda: len(m3d.uploads) == 2)  # the server has it still
    m3d.may_forget.set()
    deleting.join(PATIENCE_S)
    uploading.join(PATIENCE_S)
    assert deleted[0].status_code == 200
    theirs = uploaded[0].json()["id"]
    assert httpx.get(f"{gateway.url}/studies/{theirs}", headers=other).status_code == 200


def test_an_evicted_study_without_a_file_is_gone(client, http, m3d):
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    m3d.held.clear()
    with pytest.raises(openai.APIStatusError) as gone:
        client.chat.completions.create(model=MODEL, messages=about(file_part(file_id=study)))
    assert gone.value.status_code == 410 and "upload the scan again" in gone.value.message
    assert http.get(f"/v1/studies/{study}").status_code == 410


def test_a_file_is_not_kept_longer_than_its_time(start, key, m3d):
    gateway = start(file_hours=1)
    with openai.OpenAI(base_url=gateway.url, api_key=key, max_retries=0) as client:
        file = client.files.create(file=SCAN, purpose="user_data")
        now = gateway.files._clock()
        gateway.files._clock = lambda: now + 3601
        with pytest.raises(openai.APIStatusError) as gone:
            client.files.retrieve(file.id)
        assert gone.value.status_code == 410 and gateway.files.size == 0


def test_a_study_that_is_not_used_is_dropped_on_the_server(start, key, m3d):
    gateway = start(study_hours=1)
    httpx.post(f"{gateway.url}/studies", content=SCAN, headers=bearer(key))
    assert m3d.held
    now = gateway.studies._clock()
    gateway.studies._clock = lambda: now + 3601
    asyncio.run(gateway.studies.sweep())
    assert not m3d.held and gateway.studies.count == 0


def test_a_study_that_cannot_be_dropped_does_not_keep_the_others(start, key, m3d, monkeypatch):
    gateway = start(study_hours=1)
    for content in (b"first", b"second"):
        httpx.post(f"{gateway.url}/studies", content=content, headers=bearer(key))
    first, second = m3d.held
    forget = m3d.forget

    async def failing(study, *, timeout=None):
        if study.handle == first:
            raise Unavailable("no server answers")
        await forget(study, timeout=timeout)

    monkeypatch.setattr(m3d, "forget", failing)
    now = gateway.studies._clock()
    gateway.studies._clock = lambda: now + 3601
    with pytest.raises(Unavailable):
        asyncio.run(gateway.studies.sweep())
    assert list(m3d.held) == [first] and gateway.studies.count == 1


def test_a_list_of_pictures_is_a_scan_slice_by_slice_and_the_answer_says_what_is_a_guess(client, m3d):
    parts = []
    for number, value in enumerate((10, 20, 30)):
        parts += [image_part(picture(value), "image/png"), {"type": "text", "text": f"SLICE {number}"}]
    answered = client.chat.completions.create(model=MODEL, messages=about(*parts))
    volume = np.load(io.BytesIO(m3d.uploads[0][0]))
    assert volume.shape == (3, 4, 5) and volume.dtype == np.uint8 and volume[:, 0, 0].tolist() == [10, 20, 30]
    assert "guess" in answered.m3d["notes"][0] and m3d.asked[0][1] == "Is the liver normal?"


def test_of_coloured_pictures_the_first_channel_is_read_and_the_answer_says_so(client, m3d):
    parts = [image_part(picture((value, 7, 8), mode="RGB"), "image/png") for value in (10, 20)]
    answered = client.chat.completions.create(model=MODEL, messages=about(*parts))
    assert np.load(io.BytesIO(m3d.uploads[0][0]))[:, 0, 0].tolist() == [10, 20]
    assert "first channel" in answered.m3d["notes"][1]


def test_a_list_of_dicom_files_is_a_series(client, m3d):
    slices = [bytes(128) + b"DICM" + bytes([number]) for number in range(3)]
    client.chat.completions.create(
        model=MODEL, messages=about(*[image_part(each, "application/dicom") for each in slices])
    )
    with zipfile.ZipFile(io.BytesIO(m3d.uploads[0][0])) as archive:
        assert [archive.read(name) for name in sorted(archive.namelist())] == slices


@pytest.mark.parametrize("kind", ["application/x-nifti", "application/zip", "application/octet-stream", ""])
def test_a_volume_comes_as_a_data_url_of_any_type(client, m3d, kind):
    client.chat.completions.create(model=MODEL, messages=about(image_part(SCAN, kind)))
    assert m3d.uploads[0][0] == SCAN


def test_messages_are_the_turns_of_a_conversation_and_the_answer_says_if_they_were_not_read(client, m3d):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [INLINE]},  # some clients send a scan and its question as two
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A liver.", "refusal": None, "annotations": []},
        {"role": "user", "content": "Hm."},
        {"role": "user", "content": "Is it normal?"},
    ]
    answered = client.chat.completions.create(model=MODEL, messages=messages)
    assert m3d.turns == [
        ("system", "Be brief."),
        ("user", "What is it?"),
        ("assistant", "A liver."),
        ("user", "Hm.\nIs it normal?"),
    ]
    assert "earlier messages were not read" in answered.m3d["notes"][0]
    assert not client.chat.completions.create(model=MODEL, messages=about(INLINE)).m3d["notes"]


@pytest.mark.parametrize("streams", [True, False])
def test_log_probabilities_come_in_the_shape_of_openai(client, m3d, streams):
    settings = {"logprobs": True, "top_logprobs": 2, "stream": streams}
    answered = client.chat.completions.create(model=MODEL, messages=about(INLINE), **settings)
    if streams:
        found = [each for chunk in answered if (scored := chunk.choices[0].logprobs) for each in scored.content]
    else:
        found = answered.choices[0].logprobs.content
    assert m3d.asked[0][2] == {"logprobs": 2} and [each.token for each in found] == list(ANSWER)
    assert bytes(found[0].bytes).decode() == found[0].token and found[0].logprob == -0.5
    assert [(top.token, top.bytes, top.logprob) for top in found[0].top_logprobs] == [
        ("a", [97], -0.5),
        ("\ufffd", None, -9999.0),
    ]


def test_log_probabilities_come_if_they_are_asked_for(client, m3d):
    asked = client.chat.completions.create(model=MODEL, messages=about(INLINE), logprobs=True)
    assert m3d.asked[0][2] == {"logprobs": 0} and asked.choices[0].logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(model=MODEL, messages=about(INLINE)).choices[0].logprobs is None


def test_an_answer_is_held_to_a_schema_which_the_client_reads(client, m3d):
    class Finding(pydantic.BaseModel):
        organ: str
        is_normal: bool

    m3d.texts = ('{"organ": "liver", ', '"is_normal": true}')
    parsed = client.chat.completions.parse(model=MODEL, messages=about(INLINE), response_format=Finding)
    assert parsed.choices[0].message.parsed == Finding(organ="liver", is_normal=True)
    assert m3d.asked[0][2]["json_schema"]["properties"].keys() == {"organ", "is_normal"}


def test_choices_come_with_their_likelihoods(client, m3d):
    extra = {"choices": ["Yes.", "No."], "only_choices": True}
    answered = client.chat.completions.create(model=MODEL, messages=about(INLINE), extra_body=extra)
    assert m3d.asked[0][2] == extra and answered.m3d["choices"] == {"Yes.": -1.0, "No.": -2.0}


def test_models_are_those_that_are_served(client, gateway):
    assert [model.id for model in client.models.list()] == [MODEL, "m3d-clip"]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="gpt-5", messages=about(INLINE))
    assert raised.value.code == "model_not_found" and MODEL in raised.value.message


def test_texts_and_scans_are_embedded_in_the_order_given(client, m3d):
    file = client.files.create(file=SCAN, purpose="user_data")
    found = client.embeddings.create(model="m3d-clip", input=["short", file_part(file_id=file.id), "a long text"])
    np.testing.assert_array_equal(
        [each.embedding for each in found.data], [EMBEDDING[::-1], EMBEDDING, EMBEDDING[::-1]]
    )
    assert found.m3d["cut"] == [2]
    plain = client.embeddings.create(model="m3d-clip", input="short", encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, EMBEDDING[::-1], rtol=1e-6)


@pytest.mark.parametrize(
    "error, status, code",
    [
        (InvalidInput("the question is too long"), 400, "invalid_value"),
        (ResourceExhausted("too many"), 503, "overloaded"),
        (Unavailable("no server answers"), 503, "unavailable"),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded"),
        (M3DError("bad"), 500, "internal_error"),
        (ValueError("patient Jane Doe"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
def test_an_error_before_the_first_text_has_its_status(client, m3d, gateway, caplog, error, status, code, streams):
    m3d.error = error
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model=MODEL, messages=about(INLINE), stream=streams)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert ended(gateway)["outcome"] == code
    assert "Jane" not in raised.value.message + caplog.text + json.dumps(gateway.audit())
    assert m3d.ended.is_set()


@pytest.mark.parametrize("error", [Unavailable("the server went away"), ValueError("patient Jane Doe")])
def test_an_error_after_the_first_text_is_raised_by_the_client(client, m3d, gateway, caplog, error):
    m3d.late_error = error
    texts = []
    with pytest.raises(openai.APIError) as raised:
        for chunk in client.chat.completions.create(model=MODEL, messages=about(INLINE), stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", ANSWER[0]]
    assert "Jane" not in str(raised.value) + caplog.text
    assert ended(gateway)["outcome"] in ("unavailable", "internal_error") and m3d.ended.is_set()


@pytest.mark.parametrize(
    "extra, param, code",
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, None, "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, None, "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"extra_body": {"only_choices": True}}, None, "invalid_value"),
        ({"presence_penalty": 1.0}, "presence_penalty", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"extra_body": {"max_new_tokens": 4}}, "max_new_tokens", "unknown_parameter"),
        ({"temperature": 7}, None, "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"extra_body": {"preset": "xray"}}, None, "invalid_value"),
        ({"extra_body": {"temperature": "hot"}}, "temperature", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": about(INLINE, question=" ")}, None, "invalid_value"),
        ({"messages": about()}, "messages", "invalid_value"),
        ({"messages": about(INLINE, image_part(b"another"))}, "messages", "invalid_value"),
        ({"messages": about(image_part(picture(1), "image/png"))}, "messages", "invalid_value"),
        ({"messages": about(image_part(picture(1)), image_part(picture(1, (9, 9))))}, "messages", "invalid_value"),
        ({"messages": about(image_part(picture(1)), image_part(picture(2)[:40]))}, "messages", "invalid_value"),
        ({"messages": about(file_part(file_data="%%%"))}, "messages.0.content.0", "invalid_value"),
        ({"messages": about(file_part(file_data="data:x,abc"))}, "messages.0.content.0", "invalid_value"),
        ({"messages": about(file_part())}, "messages.0.content.0", "invalid_value"),
        ({"messages": [*about(INLINE), {"role": "assistant", "content": "x"}]}, "messages", "invalid_value"),
        ({"messages": about({"type": "input_audio", "input_audio": {}})}, None, "invalid_value"),
        (
            {"messages": about({"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}})},
            "messages.0.content.0",
            "invalid_value",
        ),
    ],
)
def test_what_is_not_answered_is_refused_by_name(client, m3d, extra, param, code):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": about(INLINE), **extra})
    assert raised.value.code == code and raised.value.type == "invalid_request_error"
    if param is not None:
        assert raised.value.param == param
    assert not m3d.asked and (not m3d.uploads or "preset" in str(extra))


def test_fields_that_ask_for_nothing_are_taken(client):
    client.chat.completions.create(
        model=MODEL, messages=about(INLINE), n=1, tools=[], logprobs=False, user="me", store=False,
        tool_choice="none", modalities=["text"], presence_penalty=0, response_format={"type": "text"}, logit_bias={},
    )  # fmt: skip


# --- the documented commands ------------------------------------------------------------------------------------------
DOCUMENT = (ROOT / "docs" / "gateway.md").read_text()


def test_the_documented_program_prints_the_answer(gateway, key, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    assert documented(gateway, key, tmp_path, [sys.executable, "-c", program]) == "".join(ANSWER)


def test_the_documented_curl_commands_are_answered(gateway, key, http, tmp_path):
    commands = documented_commands()
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    answers = [documented(gateway, key, tmp_path, ["sh", "-c", each], STUDY=study) for each in commands]
    expected = ("m3d-lamed", '"preset"', '"preset"', "measurements", '"score"', "data: [DONE]")
    assert len(answers) == len(expected)
    for answer, part in zip(answers, expected):
        assert part in answer and "error" not in answer


def documented_commands() -> list[str]:
    """Those with curl, about the study $STUDY."""
    (block,) = [block for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S) if "curl" in block]
    return re.sub(r"(?<!\\)\n(?=curl)", "\n\n", block).split("\n\n")[1:]


def documented(gateway, key: str, folder, command: list[str], scan: bytes = SCAN, **variables: str) -> str:
    """What a documented command prints, beside a scan."""
    (folder / "scan.nii.gz").write_bytes(scan)
    variables |= {"OPENAI_BASE_URL": gateway.url, "OPENAI_API_KEY": key, "PATH": os.environ["PATH"]}
    return subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE_S
    ).stdout


# --- our own routes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["body", "form", "file"])
def test_a_study_is_made_of_a_body_a_form_or_a_file(http, client, m3d, how):
    if how == "body":
        created = http.post("/v1/studies?preset=ct&crop=0:4,0:4,0:4", content=SCAN)
    elif how == "form":
        created = http.post("/v1/studies?preset=ct&crop=0:4,0:4,0:4", files={"file": ("x.nii", SCAN)})
    else:
        file = client.files.create(file=SCAN, purpose="user_data")
        created = http.post("/v1/studies", json={"file_id": file.id, "preset": "ct", "crop": "0:4,0:4,0:4"})
    study = created.json()
    assert created.status_code == 200 and m3d.uploads == [(SCAN, "ct", "0:4,0:4,0:4")]
    assert study["preset"] == "ct" and study["shape"] == [2, 3, 4] and study["orientation"] == "RAS"
    assert http.get(f"/v1/studies/{study['id']}").json() == study | {"id": study["id"]}
    assert http.delete(f"/v1/studies/{study['id']}").json()["deleted"] and not m3d.held
    assert http.get(f"/v1/studies/{study['id']}").status_code == 410


def test_a_study_that_could_not_be_deleted_can_be_deleted_again(http, m3d):
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    m3d.error = Unavailable("no server answers")
    assert http.delete(f"/v1/studies/{study}").status_code == 503
    m3d.error = None
    assert http.delete(f"/v1/studies/{study}").status_code == 200 and not m3d.held


def test_a_study_is_known_after_a_restart_of_the_gateway(start, key, m3d):
    first = start()
    study = httpx.post(f"{first.url}/studies", content=SCAN, headers=bearer(key)).json()
    second = start()
    assert httpx.get(f"{second.url}/studies/{study['id']}", headers=bearer(key)).json() == study


def test_a_mask_comes_as_nifti_with_its_measurements(http, client, m3d):
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    found = http.post(f"/v1/studies/{study}/segment", json={"question": "Segment the liver.", "max_tokens": 5}).json()
    assert found["answer"] == "[SEG]" and m3d.asked[0][1:] == ("Segment the liver.", {"max_new_tokens": 5})
    (segment,) = found["segments"]
    assert segment["measurements"]["voxel_count"] == 24 and segment["measurements"]["volume_ml"] == pytest.approx(0.144)
    content = client.files.content(segment["mask"]["id"]).content
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    assert mask.shape == (2, 3, 4) and np.asarray(mask.dataobj).all()
    np.testing.assert_array_equal(mask.affine, np.diag([1.0, 2, 3, 1]))


def test_each_seg_has_a_mask_and_measurements_of_its_own_if_that_is_asked_for(http, m3d):
    m3d.mask[0] = False
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    asked = {"question": "Segment the liver and the spleen.", "merge": "each"}
    first, second = http.post(f"/v1/studies/{study}/segment", json=asked).json()["segments"]
    assert (first["index"], first["words"], first["span"], first["score"]) == (0, "w0", [0, 2], 0.75)
    assert (second["index"], second["words"]) == (1, "w1") and first["mask"]["id"] != second["mask"]["id"]
    assert [each["measurements"]["voxel_count"] for each in (first, second)] == [12, 12]
    assert first["measurements"]["centroid_ras_mm"] != second["measurements"]["centroid_ras_mm"]


def test_an_answer_without_a_mask_has_no_segments(http, m3d):
    m3d.mask = None
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    assert http.post(f"/v1/studies/{study}/segment", json={"question": "?"}).json()["segments"] == []


def test_texts_are_ranked_best_first(http):
    study = http.post("/v1/studies", content=SCAN).json()["id"]
    ranked = http.post(f"/v1/studies/{study}/rank", json={"texts": ["a", "a long text", "c"]}).json()
    assert [(each["index"], each["cut"]) for each in ranked["data"]] == [(2, False), (1, True), (0, False)]


def test_an_uploaded_scan_is_not_given_out_again(http, client):
    file = client.files.create(file=SCAN, purpose="user_data")
    assert http.get(f"/v1/files/{file.id}/content").status_code == 403


def test_health_needs_no_key_and_tells_of_the_server(gateway, m3d):
    assert httpx.get(gateway.root).json()["api"] == "/v1"
    assert httpx.get(f"{gateway.root}/health/live").text == "live\n"
    assert httpx.get(f"{gateway.root}/health/ready").status_code == 200
    m3d.ready = False
    assert httpx.get(f"{gateway.root}/health/ready").status_code == 503


def test_the_description_of_the_routes_is_complete(http):
    described = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/files/{id}", "/v1/studies/{id}/segment"} <= set(described["paths"])
    posts = [methods["post"] for methods in described["paths"].values() if "post" in methods]
    assert len(posts) == 6 and all(post["requestBody"]["content"] for post in posts)
    assert all("422" not in post["responses"] and "default" in post["responses"] for post in posts)
    assert "application/json" in described["paths"]["/v1/studies"]["post"]["requestBody"]["content"]


def test_the_page_of_the_routes_has_all_that_it_needs(http):
    page = http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "SwaggerUIBundle({spec:" in page.text and "/v1/chat/completions" in page.text
    assert not re.search(r"<(script|link|img)[^>]* (src|href)=", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


# --- who may enter ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "headers, code",
    [
        ({}, "missing_api_key"),
        ({"authorization": "Basic abc"}, "missing_api_key"),
        ({"authorization": "Bearer m3d-wrong"}, "invalid_api_key"),
        ({"authorization": b"Bearer \xff\xfe"}, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/docs"])
def test_nobody_enters_without_a_key(gateway, headers, code, path):
    refused = httpx.get(gateway.root + path, headers=headers)
    assert refused.status_code == 401 and refused.json()["error"]["code"] == code
    assert refused.headers["www-authenticate"] == "Bearer"


def test_a_key_is_revoked_and_added_without_a_restart(gateway, key, key_file):
    keys.revoke(key_file, "ward")
    assert httpx.get(f"{gateway.url}/models", headers=bearer(key)).status_code == 401
    other = keys.add(key_file, "clinic")
    assert httpx.get(f"{gateway.url}/models", headers=bearer(other)).status_code == 200


def test_an_expired_key_is_refused_and_its_owner_is_told_why(gateway, key_file, monkeypatch):
    key = keys.add(key_file, "guest", days=1)
    created = keys.read(key_file).keys[-1].created
    monkeypatch.setattr(keys.time, "time", lambda: created + 86_401)
    refused = httpx.get(f"{gateway.url}/models", headers=bearer(key))
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "expired_api_key"


def test_a_damaged_keys_file_lets_nobody_in(gateway, key, key_file):
    key_file.write_text("{")
    refused = httpx.get(f"{gateway.url}/models", headers=bearer(key))
    assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "roles, allowed",
    [(("ask",), {"ask"}), (("upload",), {"upload"}), (("admin",), {"admin"}), (("ask", "upload"), {"ask", "upload"})],
)
def test_a_role_allows_its_own_routes_only(gateway, key_file, m3d, roles, allowed):
    headers = bearer(keys.add(key_file, "other", roles))
    found = {
        "ask": httpx.get(f"{gateway.url}/models", headers=headers),
        "upload": httpx.post(f"{gateway.url}/studies", headers=headers, content=SCAN),
        "admin": httpx.get(f"{gateway.root}/metrics", headers=headers),
    }
    assert {name for name, answer in found.items() if answer.status_code == 200} == allowed
    assert all(answer.status_code in (200, 403) for answer in found.values())
    chat = httpx.post(
        f"{gateway.url}/chat/completions", headers=headers, json={"model": MODEL, "messages": about(INLINE)}
    )
    assert (chat.status_code == 200) == ({"ask", "upload"} <= allowed)


def test_what_another_key_owns_is_unknown(gateway, client, http, key_file, m3d):
    file = client.files.create(file=SCAN, purpose="user_data")
    study = http.post("/v1/studies", json={"file_id": file.id}).json()["id"]
    other = bearer(keys.add(key_file, "other"))
    ways = [
        ("GET", f"/files/{file.id}", None),
        ("GET", f"/files/{file.id}/content", None),
        ("DELETE", f"/files/{file.id}", None),
        ("GET", f"/studies/{study}", None),
        ("DELETE", f"/studies/{study}", None),
        ("POST", f"/studies/{study}/segment", {"question": "?"}),
        ("POST", f"/studies/{study}/rank", {"texts": ["x"]}),
        ("POST", "/studies", {"file_id": file.id}),
        ("POST", "/chat/completions", {"model": MODEL, "messages": about(file_part(file_id=file.id))}),
        ("POST", "/chat/completions", {"model": MODEL, "messages": about(file_part(file_id=study))}),
        ("POST", "/embeddings", {"model": "m3d-clip", "input": [file_part(file_id=study)]}),
    ]
    for method, path, body in ways:
        answer = httpx.request(method, gateway.url + path, json=body, headers=other)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found", (method, path)
    assert httpx.get(f"{gateway.url}/files", headers=other).json()["data"] == []
    assert len(m3d.held) == 1 and not m3d.asked


def test_the_same_scan_has_another_id_for_each_key_and_one_cannot_delete_it_for_the_other(gateway, http, key_file, m3d):
    other = bearer(keys.add(key_file, "other"))
    mine = http.post("/v1/studies", content=SCAN).json()["id"]
    theirs = httpx.post(f"{gateway.url}/studies", content=SCAN, headers=other).json()["id"]
    assert mine != theirs and len(m3d.held) == 1
    assert http.delete(f"/v1/studies/{mine}").status_code == 200
    assert http.get(f"/v1/studies/{mine}").status_code == 410
    assert httpx.get(f"{gateway.url}/studies/{theirs}", headers=other).status_code == 200
    assert httpx.delete(f"{gateway.url}/studies/{theirs}", headers=other).status_code == 200 and not m3d.held


@pytest.mark.parametrize("place", ["?api_key={}", "?x={}", "/{}", "?KEY=1"])
def test_a_key_in_an_address_is_refused_and_written_nowhere(gateway, key, place, caplog):
    refused = httpx.get(f"{gateway.url}/models{place.format(key)}", headers=bearer(key))
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "key_in_url"
    assert key not in json.dumps(ended(gateway)) + caplog.text + refused.text


def test_pages_of_others_get_no_leave(http):
    preflight = http.options(
        "/v1/models", headers={"origin": "https://evil.example", "access-control-request-method": "GET"}
    )
    answer = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in (*preflight.headers, *answer.headers) if name.startswith("access-control")]
    assert preflight.status_code == 405 and preflight.headers["allow"] == "GET"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "["}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
    ],
)
def test_without_keys_only_this_machine_is_answered_and_no_page_of_others(start, headers, status):
    gateway = start(with_keys=False)
    assert httpx.get(f"{gateway.url}/models", headers=headers).status_code == status


# --- limits ----------------------------------------------------------------------------------------------------------
def test_a_key_makes_as_many_requests_a_minute_as_it_may(gateway, key_file):
    headers = bearer(keys.add(key_file, "other", rate_per_minute=2))
    answers = [httpx.get(f"{gateway.url}/models", headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded" and int(answers[-1].headers["retry-after"]) > 0


def test_a_key_has_as_many_requests_in_work_as_it_may_and_shuts_no_other_out(gateway, key, key_file, m3d):
    m3d.may_answer.clear()
    headers = bearer(keys.add(key_file, "other", concurrency=1))
    body = {"model": MODEL, "messages": about(INLINE)}
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{gateway.url}/chat/completions", json=body, headers=headers, timeout=PATIENCE_S)
        )
    )
    asking.start()
    assert m3d.waiting.acquire(timeout=PATIENCE_S)
    refused = httpx.get(f"{gateway.url}/models", headers=headers)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "concurrency_exceeded"
    assert httpx.get(f"{gateway.url}/models", headers=bearer(key)).status_code == 200
    m3d.may_answer.set()
    asking.join(PATIENCE_S)
    assert answers[0].status_code == 200
    assert httpx.get(f"{gateway.url}/models", headers=headers).status_code == 200


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("path", ["/studies", "/files"])
def test_an_upload_over_the_limit_is_refused_and_nothing_is_left(gateway, key_file, m3d, path, chunked):
    headers = bearer(keys.add(key_file, "other", max_upload_mb=1))
    content = bytes(1_200_000)
    if path == "/files":
        form = httpx.Request("POST", "http://x", files={"file": ("x", content)})
        headers |= {"content-type": form.headers["content-type"]}
        content = form.read()
    pieces = (content[i : i + 65_536] for i in range(0, len(content), 65_536))
    refused = httpx.post(f"{gateway.url}{path}", headers=headers, content=pieces if chunked else content)
    assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_large"
    assert not m3d.uploads and gateway.files.size == 0


@pytest.mark.parametrize("chunked", [True, False])
def test_a_json_body_over_the_limit_is_refused(start, key, m3d, chunked):
    gateway = start(max_json_mb=1)
    body = json.dumps({"model": MODEL, "messages": about(file_part(file_data="A" * 1_200_000))}).encode()
    headers = bearer(key) | {"content-type": "application/json"}
    content = iter([body]) if chunked else body
    refused = httpx.post(f"{gateway.url}/chat/completions", headers=headers, content=content)
    assert refused.status_code == 413 and not m3d.uploads


def test_large_json_bodies_have_a_bound_together(start, key, m3d):
    gateway = start(json_room_mb=1)
    m3d.may_answer.clear()
    body = json.dumps({"model": MODEL, "messages": about(file_part(file_data="A" * 600_000))}).encode()
    connection = raw(gateway, post("/v1/chat/completions", body, key))
    assert m3d.waiting.acquire(timeout=PATIENCE_S)
    headers = bearer(key) | {"content-type": "application/json"}
    refused = httpx.post(f"{gateway.url}/chat/completions", headers=headers, content=body)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
    connection.close()


def test_a_json_body_of_very_many_values_is_refused_before_it_is_read(gateway, key, m3d):
    body = json.dumps({"model": MODEL, "messages": about(INLINE), "metadata": {"a": [[]] * 60_000}}).encode()
    headers = bearer(key) | {"content-type": "application/json"}
    refused = httpx.post(f"{gateway.url}/chat/completions", headers=headers, content=body)
    assert refused.status_code == 413 and "commas" in refused.json()["error"]["message"] and not m3d.uploads


def test_pictures_take_room_by_what_they_are_decoded_to(start, key, m3d):
    gateway = start(json_room_mb=1)
    parts = [image_part(picture(value, (900, 900)), "image/png") for value in (1, 2)]  # a few kB
    body = {"model": MODEL, "messages": about(*parts)}
    refused = httpx.post(f"{gateway.url}/chat/completions", headers=bearer(key), json=body)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded" and not m3d.uploads


def test_kept_files_have_a_bound_and_one_key_has_half_of_it(start, key, key_file):
    gateway = start(files_mb=4)
    headers = bearer(key)

    def upload(headers) -> httpx.Response:
        return httpx.post(f"{gateway.url}/files", headers=headers, files={"file": ("x", bytes(900_000))})

    assert [upload(headers).status_code for _ in range(3)] == [200, 200, 429]
    others = [bearer(keys.add(key_file, f"other{i}")) for i in range(3)]
    assert [upload(other).status_code for other in others] == [200, 200, 503]
    assert httpx.get(f"{gateway.url}/files", headers=headers).json()["data"][0]["bytes"] == 900_000


def segmented(gateway, key: str, merge: str = "reference") -> httpx.Response:
    study = httpx.post(f"{gateway.url}/studies", content=SCAN, headers=bearer(key)).json()["id"]
    body = {"question": "Segment the liver.", "merge": merge}
    return httpx.post(f"{gateway.url}/studies/{study}/segment", json=body, headers=bearer(key))


def test_masks_take_no_room_of_files_and_the_oldest_of_the_key_give_way(start, key, key_file):
    gateway = start(max_files=4, max_masks=2)
    theirs = segmented(gateway, other := keys.add(key_file, "other")).json()["segments"][0]["mask"]["id"]
    mine = [segmented(gateway, key).json()["segments"][0]["mask"]["id"] for _ in range(3)]

    def found(id: str, key: str) -> int:
        return httpx.get(f"{gateway.url}/files/{id}/content", headers=bearer(key)).status_code

    assert [found(id, key) for id in mine] == [410, 200, 200] and found(theirs, other) == 200
    uploaded = [
        httpx.post(f"{gateway.url}/files", headers=bearer(each), files={"file": ("x", SCAN)}).status_code
        for each in (key, key, other, other)
    ]
    assert uploaded == [200] * 4


def test_the_masks_of_a_refused_answer_are_not_kept(start, key):
    gateway = start(max_masks=1)
    kept = segmented(gateway, key).json()["segments"][0]["mask"]["id"]
    refused = segmented(gateway, key, "each")
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "storage_exceeded"
    listed = httpx.get(f"{gateway.url}/files", headers=bearer(key)).json()["data"]
    assert [each["id"] for each in listed] == [kept]


def test_a_mask_is_on_disk_without_a_name_only(start, key, monkeypatch):
    def no_name(*_, **__):
        raise AssertionError("a mask has a name on disk")

    monkeypatch.setattr(Segment, "save", no_name)
    assert segmented(start(), key).status_code == 200


@pytest.mark.parametrize(
    "path, headers, content, status",
    [
        ("/chat/completions", {"content-type": "text/plain"}, b"{}", 415),
        ("/chat/completions", {}, b"{}", 415),
        ("/chat/completions", {"content-type": "application/json"}, b"{", 400),
        ("/chat/completions", {"content-type": "application/json"}, b"\xff", 400),
        ("/chat/completions", {"content-type": "application/json"}, b"[" * 100_000, 400),
        ("/chat/completions", {"content-type": "application/json"}, b"[]", 400),
        ("/chat/completions", {"content-type": "application/json"}, b"", 400),
        ("/files", {"content-type": "application/octet-stream"}, b"x", 415),
        ("/files", {"content-type": "multipart/form-data"}, b"x", 400),
        ("/files", {"content-type": "multipart/form-data; boundary=b"}, b"x", 400),
        ("/files", {"content-type": "multipart/form-data; boundary=b"}, b"--b--\r\n", 400),
        ("/studies", {"content-type": "application/x-www-form-urlencoded"}, b"file=x", 415),
        ("/studies", {"content-type": "application/json"}, b'{"file_id": "study-x"}', 404),
        ("/studies", {"content-type": "application/json"}, b'{"file": "x"}', 400),
        ("/studies", {}, b"", 400),
        (
            "/studies",
            {"content-type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="preset"\r\n\r\nct\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n--b--\r\n',
            400,
        ),
        ("/nothing", {"content-type": "application/json"}, b"{}", 404),
    ],
)
def test_a_body_that_is_none_is_refused_in_the_shape_of_openai(gateway, key, m3d, path, headers, content, status):
    refused = httpx.post(gateway.url + path, headers=bearer(key) | headers, content=content)
    assert refused.status_code == status, refused.text
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert not m3d.uploads and ended(gateway)["outcome"] == refused.json()["error"]["code"]


@pytest.mark.parametrize("path", ["/v1/studies", "/v1/files"])
def test_half_an_upload_leaves_nothing(gateway, key, m3d, path):
    boundary = "Content-Type: multipart/form-data; boundary=b"
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + bytes(2 << 20)
    connection = raw(gateway, post(path, body, key, boundary, length=len(body) * 2))
    wait_until(lambda: gateway.files.size)
    connection.close()
    assert ended(gateway)["outcome"] == "disconnected" and gateway.files.size == 0 and not m3d.uploads


@pytest.mark.parametrize(
    "shown, name",
    [("../../etc/passwd", "passwd"), ("C:\\scans\\a.nii", "a.nii"), ("a\nb\x7f.nii", "a_b_.nii"), ("..", "..")],
)
def test_the_name_of_a_file_is_no_path(http, shown, name):
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\nx\r\n--b--\r\n'
    content = body % shown.replace("\\", "\\\\").replace("\n", "%0A").encode()
    created = http.post("/v1/files", content=content, headers={"content-type": "multipart/form-data; boundary=b"})
    assert "/" not in created.json()["filename"] and "\\" not in created.json()["filename"]


def test_a_body_that_stops_is_given_up(gateway, key, monkeypatch):
    monkeypatch.setattr(door, "SILENCE_S", 0.05)
    monkeypatch.setattr(door, "DRAINED_S", 0.05)
    answer = received(raw(gateway, post("/v1/chat/completions", b"{", key, length=1000)))
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"body_too_slow"' in answer
    assert ended(gateway)["outcome"] == "body_too_slow"


def test_a_body_that_trickles_is_given_up(gateway, key, monkeypatch):
    monkeypatch.setattr(door, "SLOW_AFTER_S", 0.0)
    monkeypatch.setattr(door, "SLOW_BYTES_PER_S", 1e12)
    monkeypatch.setattr(door, "DRAINED_S", 0.05)
    answer = received(raw(gateway, post("/v1/studies", b"x", key, "Content-Type: application/dicom", length=1000)))
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_does_not_come_closes_the_connection(start, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    gateway = start()
    for sent in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nA:"):
        with pytest.raises(ConnectionResetError):
            assert received(raw(gateway, sent)) == b""
            raise ConnectionResetError


def test_line_ends_after_an_answer_do_not_hold_a_connection(start, monkeypatch):
    gateway = start()
    with raw(gateway, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        answer = b""
        while not answer.endswith(b"live\n"):
            answer += connection.recv(1 << 16)
        monkeypatch.setattr(protocol, "HEAD_S", 0.05)
        connection.sendall(b"\r\n")
        with pytest.raises(ConnectionResetError):
            assert connection.recv(1) == b""
            raise ConnectionResetError


def test_what_is_no_http_is_refused_in_the_shape_of_openai(gateway):
    for sent in (b"GET / HTTP/1.1\r\nContent-Length: =\r\n\r\n", b"\x16\x03\x01 TLS\r\n\r\n"):
        head, _, body = received(raw(gateway, sent)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["code"] == "invalid_http"


def test_an_endless_head_closes_the_connection(gateway):
    head = b"GET / HTTP/1.1\r\n" + b"".join(b"A%d: %s\r\n" % (i, b"x" * 1000) for i in range(200))
    try:
        assert received(raw(gateway, head)) == b""
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert httpx.get(f"{gateway.root}/health/live").status_code == 200


def test_a_flood_of_chunks_of_one_byte_is_taken_like_any_body(gateway, key, m3d):
    head = post("/v1/studies", b"", key, "Content-Type: application/dicom", "Transfer-Encoding: chunked")
    head = head.replace(b"Content-Length: 0\r\n", b"").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answer = received(raw(gateway, head + b"1\r\nx\r\n" * 600_000 + b"0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 200 ") and m3d.uploads[0][0] == b"x" * 600_000
    assert httpx.get(f"{gateway.root}/health/live").status_code == 200


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_reads_nothing_of_its_answer_is_given_up(gateway, key, m3d, monkeypatch, streams):
    monkeypatch.setattr(door, "STALLED_S", 0.05)
    monkeypatch.setattr(protocol, "CLOSING_S", 0.05)
    m3d.texts = tuple("x" * (1 << 20) for _ in range(64))
    body = json.dumps({"model": MODEL, "messages": about(INLINE), "stream": streams}).encode()
    with raw(gateway, post("/v1/chat/completions", body, key)):
        assert ended(gateway)["outcome"] == "disconnected" and m3d.ended.is_set()
        wait_until(lambda: not gateway.connections)


def test_a_long_answer_arrives_whole(client, m3d):
    m3d.texts = tuple(str(n) * 50_000 for n in range(10))
    completion = client.chat.completions.create(model=MODEL, messages=about(INLINE))
    assert completion.choices[0].message.content == "".join(m3d.texts)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
_CHAT = ("model", "messages", "max_tokens", "stop", "seed", "stream", "stream_options", "preset", "crop", "\ud800")
_FIELDS = {
    "/v1/chat/completions": _CHAT,
    "/v1/embeddings": ("model", "input", "encoding_format", "dimensions", "preset"),
    "/v1/studies": ("file_id", "preset", "crop"),
}


@given(st.sampled_from(sorted(_FIELDS)), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_a_field_makes_the_gateway_fail(http, path, data):
    body = {"model": MODEL, "messages": about(INLINE)} if "chat" in path else {"model": "m3d-clip", "input": "a"}
    body = {} if path == "/v1/studies" else body
    changes = data.draw(st.dictionaries(st.sampled_from(_FIELDS[path]), _VALUES, min_size=1, max_size=2))
    # Rates are not what is tried here.
    http.gateway.door._rates._left.clear()
    answer = http.post(path, content=json.dumps(body | changes).encode(), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text


# --- audit and metrics -----------------------------------------------------------------------------------------------
def test_an_access_is_one_line_without_contents(gateway, client, http, key, m3d):
    file = client.files.create(file=("Jane Doe.nii", b"Jane Doe"), purpose="user_data")
    client.chat.completions.create(
        model=MODEL, messages=about(file_part(file_id=file.id), question="Has Jane a tumour?"), user="Dr. Smith"
    )
    http.get("/v1/studies/Jane")
    ended(gateway, 3)
    uploaded, asked, missed = gateway.audit()
    assert uploaded["operation"] == "POST /v1/files" and uploaded["key"] == "ward" and uploaded["bytes_in"] > 8
    assert asked["study"].startswith("study-") and asked["outcome"] == "ok" and asked["status"] == 200
    assert asked["bytes_out"] > 0 and asked["seconds"] > 0
    assert missed["operation"] == "GET /v1/studies/{id}" and missed["outcome"] == "not_found"
    text = json.dumps(gateway.audit())
    assert not [word for word in ("Jane", "tumour", "normal", "Smith", key) if word in text]


def test_an_access_names_its_study_or_file_when_it_fails_too(client, http, gateway, m3d):
    file = client.files.create(file=SCAN, purpose="user_data")
    study = http.post("/v1/studies", json={"file_id": file.id}).json()["id"]
    client.embeddings.create(model="m3d-clip", input=[file_part(file_id=study)])
    m3d.error = Unavailable("no server answers")
    assert http.delete(f"/v1/studies/{study}").status_code == http.get(f"/v1/studies/{study}").status_code == 503
    client.files.delete(file.id)
    ended(gateway, 6)
    named = [(line["study"], line["file"]) for line in gateway.audit()]
    assert named == [(None, file.id), *[(study, None)] * 4, (None, file.id)]


def test_a_marked_patient_and_question_are_in_no_log_and_no_folder(
    start, key, m3d, tmp_path, monkeypatch, caplog, capfd
):
    temporary, mark = tmp_path / "tmp", "Zyx-Marked"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    caplog.set_level("DEBUG")
    shared = set(os.listdir("/dev/shm"))
    gateway = start()
    scan = (mark * 300_000).encode()  # so large that it is not in memory
    with openai.OpenAI(base_url=gateway.url, api_key=key, max_retries=0) as client:
        file = client.files.create(file=(f"{mark}.nii", scan), purpose="user_data", extra_headers={"x-patient": mark})
        parts = [file_part(file_id=file.id), image_part(scan[:1000])]
        for n, error in enumerate((None, InvalidInput(mark), ValueError(mark))):
            m3d.error = error
            part = parts[n % 2]
            try:
                client.chat.completions.create(model=MODEL, messages=about(part, question=mark), user=mark)
            except openai.APIStatusError as refused:
                assert error is not None and (mark in refused.message) == isinstance(error, InvalidInput)
        m3d.error = None
        study = httpx.post(f"{gateway.url}/studies?preset={mark}", content=scan, headers=bearer(key))
        assert study.status_code == 400
        assert httpx.get(f"{gateway.url}/studies/{mark}?{mark}={mark}", headers=bearer(key)).status_code == 404
    ended(gateway, 6)
    gateway.stop()
    m3d.uploads.clear()
    captured = capfd.readouterr()
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("openai", "http"))]
    assert mark not in json.dumps(gateway.audit()) + captured.out + captured.err + "".join(ours)
    assert list(temporary.iterdir()) == [] and set(os.listdir("/dev/shm")) <= shared


def test_questions_are_written_only_if_that_is_switched_on(start, key):
    gateway = start(questions=True)
    with openai.OpenAI(base_url=gateway.url, api_key=key) as client:
        client.chat.completions.create(model=MODEL, messages=about(INLINE, question="Is there a tumour?"))
    assert ended(gateway)["question"] == "Is there a tumour?"


def test_metrics_count_what_was_done_and_why_not(client, http, gateway):
    client.chat.completions.create(model=MODEL, messages=about(INLINE))
    client.chat.completions.create(model=MODEL, messages=about(INLINE))
    httpx.get(f"{gateway.url}/models")
    ended(gateway, 3)
    lines = http.get("/metrics").text.splitlines()
    for line in (
        'm3d_gateway_requests_total{operation="POST /v1/chat/completions",status="200"} 2.0',
        'm3d_gateway_refusals_total{cause="missing_api_key"} 1.0',
        'm3d_gateway_studies_total{found="new"} 1.0',
        'm3d_gateway_studies_total{found="gateway"} 1.0',
        'm3d_gateway_tokens_total{kind="prompt"} 600.0',
        'm3d_gateway_answers_total{seg="no"} 2.0',
        "m3d_gateway_requests_in_work 1.0",
    ):
        assert line in lines
