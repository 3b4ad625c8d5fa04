"""The gateway with a real model behind it: what the `openai` client gets is what the model says, and nothing is left.

Two gateways, each in a process of its own: before a server, and with an engine in its own process.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from functools import cached_property
from pathlib import Path

import httpx
import nibabel
import numpy as np
import openai
import pydantic
import pytest
from PIL import Image

from engine.api import Study
from engine.client import M3DClient
from engine.gateway import keys
from engine.runtime.server_folder import PREFIX, SHARED_MEMORY
from m3d_demo.samples import write_sample
from tests.conftest import ROOT
from tests.functional.footprint import Footprint
from tests.functional.test_client import BATCH, LONG, PATIENCE_S, WAITING
from tests.tiny import QUESTION, volume, words
from tests.unit.test_gateway import (
    MODEL,
    about,
    bearer,
    data_url,
    documented,
    documented_commands,
    file_part,
    image_part,
    post,
    wait_until,
)
from tests.unit.test_scan import saved, series, zipped

pytestmark = pytest.mark.integration

MARK = "Zyxmarked"  # of a patient, a file and a question
TOKENS = {"max_tokens": 24}


class RunningGateway:
    """`m3d gateway`, and its words. folder: its temporary files, its keys, its audit file."""

    def __init__(self, folder: Path, *arguments: object):
        self.temporary, self.audit_file, self.keys_file = folder / "tmp", folder / "audit.jsonl", folder / "keys.json"
        self.temporary.mkdir()
        self.key = self.added("ward", ("ask", "upload", "admin"), rate_per_minute=60_000, concurrency=512)
        given = [*arguments, "--keys", self.keys_file, "--port", 0, "--audit", self.audit_file]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engine.cli", "gateway", *map(str, given)],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = ""
        while not self.said.endswith("(stop with Ctrl-C)\n"):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.root = re.search(r"ready on (\S+)/v1", self.said)[1]
        self.url, self.port = f"{self.root}/v1", int(self.root.rpartition(":")[2])

    def added(self, name: str, roles=("ask", "upload"), **limits) -> str:
        return keys.add(self.keys_file, name, roles, **limits)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=PATIENCE_S)

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.root, headers=bearer(self.key), timeout=PATIENCE_S)

    def audit(self) -> list[dict]:
        return [json.loads(line) for line in self.audit_file.read_text().splitlines()]

    def metric(self, name: str) -> float:
        """0 for a count of what has not happened."""
        found = re.search(rf"^m3d_gateway_{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    def unnamed_files(self) -> list[str]:
        """Anonymous files on disk that it holds open."""
        found = []
        for number in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found.append(os.readlink(number))
            except FileNotFoundError:
                continue
        return [each for each in found if each.startswith(f"{self.temporary}/") and "(deleted)" in each]

    def stop(self) -> str:
        """What it said after it was ready."""
        self.client.close()
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode in (0, -signal.SIGTERM), err
        return out + err


@pytest.fixture(scope="module", params=["server", "repository"])
def gateway(request, tmp_path_factory):
    of = request.getfixturevalue(request.param)
    arguments = ("--server", of.url) if request.param == "server" else ("--repository", of)
    gateway = RunningGateway(tmp_path_factory.mktemp("gateway"), *arguments)
    yield gateway
    said = gateway.stop()
    assert MARK not in said and "Traceback" not in said  # vLLM says that a schema cannot be spelled
    left = [path for path in gateway.temporary.rglob("*") if path.is_file()]
    assert left == [] and not list(SHARED_MEMORY.glob(f"{PREFIX}-{gateway.process.pid}-*"))


@pytest.fixture(scope="module")
def served(gateway, server, tmp_path_factory):
    """A gateway before the tests' server."""
    if "--server" not in gateway.process.args:
        pytest.skip("this looks at the server behind the gateway")
    return gateway


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> bytes:
    """A NIfTI file."""
    return nifti()


def nifti(seed: int = 0, name: str = "") -> bytes:
    voxels = np.random.default_rng(seed).integers(-1000, 1000, (20, 30, 24)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, np.diag([-1.0, 2, 3, 1]))
    image.header["descrip"] = name.encode()
    return gzip.compress(image.to_bytes())


@pytest.fixture(scope="module")
def expected(client, scan):
    """What the model says of the scan."""
    return client.ask(client.upload(scan), QUESTION, max_new_tokens=24, logprobs=2)


def asked(gateway, *parts, question=QUESTION, **settings):
    return gateway.client.chat.completions.create(
        model=MODEL, messages=about(*parts, question=question), **(TOKENS | settings)
    )


def inline(content: bytes) -> dict:
    return file_part(file_data=base64.b64encode(content).decode())


# --- answers ---------------------------------------------------------------------------------------------------------
def test_the_answer_is_the_models(gateway, client, scan, expected):
    answered = asked(gateway, inline(scan))
    assert answered.choices[0].message.content == expected.text
    assert answered.choices[0].finish_reason == expected.finish_reason == "length"
    assert answered.usage.completion_tokens == 24 and answered.usage.prompt_tokens == expected.timings.prompt_tokens
    assert answered.m3d["preset"] == client.upload(scan).info.preset and answered.system_fingerprint


def test_a_stream_is_the_same_answer_in_pieces(gateway, scan, expected):
    chunks = list(asked(gateway, inline(scan), stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == expected.text and len(list(filter(None, texts))) > 1
    assert chunks[-1].usage.completion_tokens == 24 and chunks[-2].choices[0].finish_reason == "length"


def test_the_asynchronous_client_gets_the_same_answers_at_once(gateway, scan, expected):
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key=gateway.key, max_retries=0) as client:

            async def streamed() -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=about(inline(scan), question=QUESTION), stream=True, **TOKENS
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(streamed() for _ in range(4)))

    assert asyncio.run(ask()) == [expected.text] * 4


def test_log_probabilities_are_the_models(gateway, scan, expected):
    found = asked(gateway, inline(scan), logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [each.token for each in found] == [each.text for each in expected.logprobs] and len(found) == 24
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-4)
    assert all(len(each.top_logprobs) == 2 for each in found)


def test_sampling_settings_reach_the_language_model(gateway, client, scan, expected):
    settings = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
    sampled = client.ask(scan, QUESTION, max_new_tokens=24, **settings)
    assert asked(gateway, inline(scan), **settings).choices[0].message.content == sampled.text != expected.text
    stop = expected.text.split()[3]
    stopped = asked(gateway, inline(scan), stop=[stop])
    assert stopped.choices[0].finish_reason == "stop" and expected.text.startswith(stopped.choices[0].message.content)
    assert asked(gateway, inline(scan), max_tokens=3).usage.completion_tokens == 3
    chosen = asked(gateway, inline(scan), extra_body={"choices": ["w5", "w6 w7"], "only_choices": True})
    best = max(chosen.m3d["choices"], key=chosen.m3d["choices"].get)
    assert chosen.choices[0].message.content.strip() == best


def test_a_conversation_goes_to_the_model_which_says_that_it_reads_the_last_question_only(gateway, scan, expected):
    messages = [
        {"role": "system", "content": "w3"},
        *about(inline(scan), question="w4 w5"),
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": QUESTION},
    ]
    answered = gateway.client.chat.completions.create(model=MODEL, messages=messages, **TOKENS)
    assert answered.choices[0].message.content == expected.text
    assert "earlier messages were not read" in answered.m3d["notes"][0]


def test_a_schema_that_the_vocabulary_cannot_spell_is_refused(gateway, scan):
    """The tiny vocabulary has no brace; the test below has one that does."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="cannot be held to its json_schema"):
        asked(gateway, inline(scan), response_format=form)


def test_an_answer_is_json_of_the_schema(demo_server, tmp_path):
    class Scan(pydantic.BaseModel):
        modality: str = pydantic.Field(pattern=None, json_schema_extra={"enum": ["CT", "MR"]})

    gateway = RunningGateway(tmp_path, "--server", demo_server.url)
    try:
        chest = write_sample("chest-ct", tmp_path / "scan.nii.gz").read_bytes()
        parsed = gateway.client.chat.completions.parse(
            model=MODEL, messages=about(inline(chest), question="Is it CT or MR?"), response_format=Scan
        )
        assert parsed.choices[0].message.parsed.modality in ("CT", "MR")
    finally:
        gateway.stop()


# --- scans, in all forms ---------------------------------------------------------------------------------------------
def pictures() -> list[bytes]:
    slices = np.random.default_rng(3).integers(0, 255, (6, 32, 40)).astype(np.uint8)
    found = []
    for each in slices:
        buffer = io.BytesIO()
        Image.fromarray(each).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


DICOM = series()
FORMS = {
    "raw base64": lambda scan: ([inline(scan)], scan),
    "data URL": lambda scan: ([file_part(file_data=data_url(scan))], scan),
    "NIfTI": lambda scan: ([image_part(scan, "application/x-nifti")], scan),
    "zip": lambda scan: ([image_part(zipped(DICOM), "application/zip")], zipped(DICOM)),
    "npy": lambda scan: ([image_part(npy(volume()), "application/octet-stream")], npy(volume())),
    "DICOM files": lambda scan: ([image_part(saved(each), "application/dicom") for each in DICOM], zipped(DICOM)),
    "pictures": lambda scan: (
        [image_part(each, "image/png") for each in pictures()],
        npy(np.stack([np.asarray(Image.open(io.BytesIO(each))) for each in pictures()])),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_scan_in_any_form_is_answered_as_its_file_is(gateway, client, scan, form):
    parts, file = FORMS[form](scan)
    right = client.ask(file, QUESTION, max_new_tokens=24)
    assert asked(gateway, *parts).choices[0].message.content == right.text


def test_a_file_is_encoded_once_for_all_that_is_asked_of_it(gateway, client):
    content = nifti(5)
    right = client.ask(content, QUESTION, max_new_tokens=24).text
    before = gateway.metric('studies_total{found="gateway"}')
    file = gateway.client.files.create(file=("scan.nii.gz", content), purpose="user_data")
    study = gateway.http.post("/v1/studies", json={"file_id": file.id}).json()
    for part in (file_part(file_id=file.id), file_part(file_id=study["id"])):
        answered = asked(gateway, part)
        assert answered.choices[0].message.content == right and answered.m3d["study"] == study["id"]
    assert gateway.metric('studies_total{found="gateway"}') == before + 1
    assert study["preset"] == client.upload(content).info.preset
    assert study["shape"] == [20, 30, 24] and study["orientation"] == "LAS"
    assert gateway.http.get(f"/v1/studies/{study['id']}").json() == study
    assert gateway.client.files.delete(file.id).deleted


def test_an_evicted_study_is_answered_from_its_file_and_is_gone_without_it(served, client):
    content = nifti(6)
    file = served.client.files.create(file=("scan.nii.gz", content), purpose="user_data")
    right = asked(served, file_part(file_id=file.id)).choices[0].message.content
    study = served.http.post("/v1/studies", content=content).json()["id"]
    handle = Study(client.upload(content).handle)
    client.forget(handle)
    assert asked(served, file_part(file_id=file.id)).choices[0].message.content == right
    assert served.client.files.delete(file.id).deleted
    client.forget(handle)
    with pytest.raises(openai.APIStatusError) as gone:
        asked(served, file_part(file_id=study))
    assert gone.value.status_code == 410 and "upload the scan again" in gone.value.message


# --- masks, rankings, embeddings -------------------------------------------------------------------------------------
@pytest.mark.parametrize("merge", ["reference", "each"])
def test_masks_and_measurements_are_the_models(gateway, client, scan, merge):
    right = client.segment(scan, QUESTION, merge=merge, max_new_tokens=24)
    assert right.mask.any() and (len(right.segments) > 1) == (merge == "each")
    study = gateway.http.post("/v1/studies", content=scan).json()["id"]
    asked = {"question": QUESTION, "merge": merge, "max_tokens": 24}
    found = gateway.http.post(f"/v1/studies/{study}/segment", json=asked).json()
    assert found["answer"] == right.answer.text and len(found["segments"]) == len(right.segments)
    for segment, each in zip(found["segments"], right.segments):
        mask = nibabel.Nifti1Image.from_bytes(
            gzip.decompress(gateway.client.files.content(segment["mask"]["id"]).content)
        )
        np.testing.assert_array_equal(np.asarray(mask.dataobj).astype(bool), each.mask)
        np.testing.assert_allclose(mask.affine, each.affine)
        assert segment["measurements"]["voxel_count"] == each.measurements.voxel_count
        assert (segment["words"], segment["span"], segment["score"]) == (each.words, list(each.span), each.score)
        gateway.client.files.delete(segment["mask"]["id"])


def test_rankings_and_embeddings_are_the_models(gateway, client, scan):
    texts = [words(3), words(600), words(40)]
    right, study = client.rank(scan, texts), gateway.http.post("/v1/studies", content=scan).json()["id"]
    ranked = gateway.http.post(f"/v1/studies/{study}/rank", json={"texts": texts}).json()["data"]
    assert [(each["text"], each["score"]) for each in ranked] == [
        (text, pytest.approx(score)) for text, score in right.sorted()
    ]
    found = gateway.client.embeddings.create(model="m3d-clip", input=[texts[0], file_part(file_id=study)])
    ours = [client.embed_texts(texts[:1]).embeddings[0], client.embed(scan)]
    np.testing.assert_allclose([each.embedding for each in found.data], ours, atol=1e-6)


# --- ends ------------------------------------------------------------------------------------------------------------
def test_streams_that_their_clients_close_free_their_places(gateway, scan):
    """As many as there are places, and one more, which is refused; when they are closed, there is room."""
    study = file_part(file_id=gateway.http.post("/v1/studies", content=scan).json()["id"])
    ends: list[Exception | None] = []

    async def fill() -> None:
        async with openai.AsyncOpenAI(
            base_url=gateway.url, api_key=gateway.key, max_retries=0, timeout=PATIENCE_S
        ) as client:
            refused = asyncio.Event()

            async def read() -> None:
                try:
                    async for _ in await client.chat.completions.create(
                        model=MODEL, messages=about(study, question=QUESTION), stream=True, max_tokens=LONG
                    ):
                        pass
                except openai.APIStatusError as error:
                    ends.append(error)
                    refused.set()

            reading = [asyncio.ensure_future(read()) for _ in range(BATCH + WAITING + 1)]
            await asyncio.wait_for(refused.wait(), PATIENCE_S)
            for each in reading:
                each.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    asyncio.run(fill())
    assert ends[0].status_code == 503 and ends[0].code == "overloaded"
    while True:
        try:
            assert asked(gateway, study, max_tokens=1).usage.completion_tokens == 1
            break
        except openai.InternalServerError as error:
            assert error.code == "overloaded"
    wait_until(lambda: gateway.metric("requests_in_work") == 1)  # the one that reads it
    assert "disconnected" in [line["outcome"] for line in gateway.audit()]


# --- the documented commands -----------------------------------------------------------------------------------------
def test_the_documented_curl_commands_are_answered(gateway, tmp_path, scan):
    study = gateway.http.post("/v1/studies", content=scan).json()["id"]
    expected = ("m3d-lamed", '"preset"', '"preset"', '"answer"', '"score"', "data: [DONE]")
    commands = documented_commands()
    assert len(commands) == len(expected)
    for command, part in zip(commands, expected):
        answer = documented(gateway, gateway.key, tmp_path, ["sh", "-c", command], scan, STUDY=study)
        assert part in answer and '"error"' not in answer, answer


# --- what is kept ----------------------------------------------------------------------------------------------------
def test_a_marked_patient_and_question_are_kept_nowhere(gateway, server):
    """In logs, audit lines, temporary folders and shared memory, of the gateway and what is behind it."""
    dicom = zipped(series(count=5, PatientName=MARK, PatientID=MARK, StudyDescription=MARK))
    scan = nifti(9, MARK)
    parts = [image_part(dicom, "application/zip"), image_part(scan)]
    file = gateway.client.files.create(file=(f"{MARK}.nii.gz", scan), purpose="user_data")
    for part in (*parts, file_part(file_id=file.id)):
        assert asked(gateway, part, question=f"w1 {MARK}", user=MARK).choices[0].finish_reason
    for bad in ({"file_id": MARK}, {"file_data": MARK}):
        with pytest.raises(openai.APIStatusError):
            asked(gateway, file_part(**bad), question=MARK)
    broken = gateway.http.post("/v1/studies", content=MARK.encode() * 100)
    assert broken.status_code == 400
    study = gateway.http.post("/v1/studies", json={"file_id": file.id}).json()["id"]
    assert gateway.http.post(f"/v1/studies/{study}/segment", json={"question": MARK}).status_code == 200
    assert gateway.client.files.delete(file.id).deleted
    assert gateway.http.delete(f"/v1/studies/{study}").status_code == 200
    footprint = Footprint(server.supervisor_pid)
    places = [gateway.temporary, gateway.audit_file, server.log, Path(os.fsdecode(footprint.run_folder))]
    places += SHARED_MEMORY.glob(f"{PREFIX}-{gateway.process.pid}-*")
    places += Path(f"/proc/{server.supervisor_pid}/root{SHARED_MEMORY}").glob("*")
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    contents = [path.read_bytes() for path in files]
    assert any(b'"orientation"' in content for content in contents)  # the studies are looked at
    assert len(gateway.audit()) > 5
    marked = [path for path, content in zip(files, contents) if MARK.encode() in content or MARK in str(path)]
    assert marked == []


# --- requests that no client of good will makes ----------------------------------------------------------------------
def answer_to(gateway, sent: bytes, close: bool = False) -> bytes:
    """What comes until the gateway closes, or `Connection: close` has it close."""
    with socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) as connection:
        try:
            connection.sendall(sent)
            if close:
                return b""
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionError:
            return b""


def test_bad_requests_are_refused_with_their_cause_and_leave_nothing(gateway, scan):
    close, kept = "Connection: close", (gateway.metric("file_bytes"), gateway.unnamed_files())
    key, small = gateway.key, gateway.added("small", max_upload_mb=1)
    dicom, form = "Content-Type: application/dicom", "Content-Type: multipart/form-data; boundary=b"
    chunked = post("/v1/studies", b"", key, dicom, close, "Transfer-Encoding: chunked")
    chunked = chunked.replace(b"Content-Length: 0\r\n", b"")
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../../etc/x"\r\n\r\n'
    json_type = "Content-Type: application/json"
    refused = (
        ("body_too_large", post("/v1/studies", bytes(1_200_000), small, dicom, close)),
        ("invalid_value", chunked + b"1\r\nx\r\n" * 600_000 + b"0\r\n\r\n"),  # it arrives, and is no scan
        ("unsupported_media_type", post("/v1/chat/completions", b"{}", key, "Content-Type: text/plain", close)),
        ("key_in_url", post(f"/v1/studies?api_key={key}", b"x", key, dicom, close)),
        ("invalid_api_key", post("/v1/studies", b"x", "m3d-" + "A" * 43, dicom, close)),
        ("unknown_url", post("/v1/../../etc/passwd", b"{}", key, json_type, close)),
        ("unknown_url", post("/v1/studies/..%2f..%2fetc%2fpasswd/rank", b'{"texts": ["x"]}', key, json_type, close)),
    )
    for code, sent in refused:
        answer = answer_to(gateway, sent)
        assert answer.startswith(b"HTTP/1.1 4") and f'"code": "{code}"'.encode() in answer, (code, answer[:500])
        assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}
    for path, kind in (("/v1/studies", dicom), ("/v1/files", form)):  # half of an upload
        answer_to(gateway, post(path, head + bytes(3 << 20), key, kind, length=16 << 20), close=True)
    for length in (10, 1000):  # half of a question
        answer_to(gateway, post("/v1/chat/completions", b'{"model"', key, json_type, length=length), close=True)
    named = gateway.http.post(
        "/v1/files", content=head + b"x\r\n--b--\r\n", headers={"content-type": "multipart/form-data; boundary=b"}
    ).json()
    assert named["filename"] == "x" and gateway.client.files.delete(named["id"]).deleted
    assert answer_to(gateway, b"GET / HT") == b""  # a slow loris: it is closed after a while
    wait_until(lambda: gateway.metric("requests_in_work") == 1)
    wait_until(lambda: (gateway.metric("file_bytes"), gateway.unnamed_files()) == kept)
    assert gateway.metric("json_bytes_in_work") == 0
    assert asked(gateway, inline(scan)).choices[0].finish_reason == "length"


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_is_gone_before_its_answer_leaves_nothing(gateway, streams):
    """Its connection ends while the scan is prepared, while the answer is decoded, or before it is read."""
    for seed in range(3):
        messages = about(inline(nifti(20 + seed)), question=QUESTION)
        body = json.dumps({"model": MODEL, "messages": messages, "stream": streams, "max_tokens": LONG}).encode()
        with socket.create_connection(("127.0.0.1", gateway.port), PATIENCE_S) as connection:
            connection.sendall(post("/v1/chat/completions", body, gateway.key))
            if seed == 1:
                wait_until(lambda: gateway.metric("requests_in_work") > 1)
            elif seed == 2 and streams:
                assert connection.recv(64).startswith(b"HTTP/1.1 200")
    wait_until(lambda: gateway.metric("requests_in_work") == 1)
    assert gateway.metric("json_bytes_in_work") == 0


def test_many_clients_at_once_get_their_own_answers(gateway, client):
    """No answer is another scan's."""
    scans = [nifti(30 + seed) for seed in range(4)]
    right = [client.ask(each, QUESTION, max_new_tokens=24).text for each in scans]
    assert len(set(right)) == len(right)
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = asked(gateway, inline(scans[number % 4])).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [found[number] for number in range(12)] == [right[number % 4] for number in range(12)]


def test_the_server_behind_it_can_go_and_the_gateway_says_so(tmp_path):
    """Nobody answers at the address."""
    gateway = RunningGateway(tmp_path, "--server", "127.0.0.1:1")
    try:
        assert gateway.http.get("/health/ready").status_code == 503
        with pytest.raises(openai.InternalServerError) as raised:
            asked(gateway, inline(nifti()))
        assert raised.value.status_code == 503 and raised.value.code == "unavailable"
    finally:
        gateway.stop()


def test_m3d_client_and_gateway_may_use_a_server_at_once(served, server, scan, expected):
    with M3DClient(server.url, timeout=PATIENCE_S) as other:
        with other.stream(scan, QUESTION, max_new_tokens=LONG) as stream:
            next(stream)
            assert asked(served, inline(scan)).choices[0].message.content == expected.text
