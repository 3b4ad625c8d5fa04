"""`m3d keys`, `m3d gateway`, TLS, and the two kinds of engines behind the gateway."""

from __future__ import annotations

import asyncio
import base64
import datetime
import gc
import signal
import ssl
import subprocess
import sys
import threading

import httpx
import numpy as np
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from engine.api import Study
from engine.cli import entrance
from engine.client import AsyncM3DClient, M3DClient
from engine.errors import StudyNotFound, Unavailable
from engine.gateway import backend, keys
from engine.gateway.backend import ThreadedM3D
from engine.gateway.settings import GatewaySettings
from tests.conftest import ROOT
from tests.unit.fake_m3d import PATIENCE_S, FakeM3D, RunningGateway
from tests.unit.fake_triton import ANSWER, HANDLE

ASKED = [("user", "what?")]
SCAN = base64.b64encode(b"a scan's file").decode()


def asked(client: openai.OpenAI, **extra):
    content = [{"type": "file", "file": {"file_data": SCAN}}, {"type": "text", "text": "what?"}]
    return client.chat.completions.create(model="m3d-lamed", messages=[{"role": "user", "content": content}], **extra)


# --- m3d keys --------------------------------------------------------------------------------------------------------
def test_the_new_key_is_the_last_word_and_enters_until_it_is_revoked(m3d, tmp_path):
    path = tmp_path / "keys.json"
    code, out, _ = m3d(
        "keys", "add", "ward", "--role", "ask,admin", "--days", "3", "--concurrency", "2", "--keys", path
    )
    key = out.split()[-1]
    found = keys.Keys(path).find(key)
    assert code == 0 and found.roles == ("ask", "admin") and found.concurrency == 2
    code, out, _ = m3d("keys", "list", "--keys", path)
    assert out.startswith("ward\task,admin\texpires 20") and "concurrency=2" in out
    assert key not in out and found.hash not in out
    assert m3d("keys", "revoke", "ward", "--keys", path)[:2] == (0, "revoked ward\n")
    assert keys.Keys(path).find(key) is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("keys", "add", "ward", "--role", "root"), "roles are ask, upload, admin"),
        (("keys", "revoke", "ward"), "m3d keys add"),
        (("keys", "list"), "m3d keys add"),
    ],
)
def test_a_key_that_cannot_be_is_one_line(m3d, tmp_path, arguments, words):
    code, _, err = m3d(*arguments, "--keys", tmp_path / "keys.json")
    assert code and words in err and err.count("\n") == 1


# --- m3d gateway -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "--server HOST:PORT or --repository DIR"),
        (("--server", "a:1", "--repository", "b"), "one of the two"),
        (("--server", "a:1"), "--keys FILE"),
        (("--server", "a:1", "--no-keys", "--keys", "k"), "--keys FILE"),
        (("--server", "a:1", "--no-keys", "--host", "0.0.0.0"), "only this machine"),
        (("--server", "a:1", "--no-keys", "--client-ca", "x"), "needs --tls"),
        (("--server", "a:1", "--keys", "/nothing/there"), "m3d keys add"),
        (("--server", "http://a:1", "--no-keys", "--port", "0"), "host:port"),
        (("--server", "a:1", "--no-keys", "--port", "0", "--tls", "/nothing"), "--tls or --client-ca"),
        (("--server", "a:1", "--no-keys", "--port", "0", "--audit", "/nothing/x"), "audit file"),
        (("--server", "a:1", "--no-keys", "--port", "70000"), "--port 70000"),
    ],
)
def test_a_gateway_that_cannot_be_is_one_line(m3d, tmp_path, arguments, words):
    code, _, err = m3d("gateway", "--audit", tmp_path / "audit.jsonl", *arguments)
    assert code and words in err.splitlines()[-1]


def test_what_is_not_installed_is_named(m3d, monkeypatch, tmp_path):
    monkeypatch.setattr(entrance, "_NEEDED", ("fastapi", "not_there"))
    code, _, err = m3d("keys", "list", "--keys", tmp_path / "keys.json")
    assert code == 1 and "needs not_there: pip install 'm3d-engine[gateway]'" in err


@pytest.mark.integration
def test_the_command_serves_a_server_until_sigterm_and_writes_audit_lines(triton, tmp_path):
    path = tmp_path / "keys.json"
    key = keys.add(path, "ward")
    arguments = ["gateway", "--server", triton.url, "--keys", path, "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "engine.cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            url = process.stderr.readline().split()[2]
            with openai.OpenAI(base_url=url, api_key=key, timeout=PATIENCE_S) as client:
                assert asked(client).choices[0].message.content == "".join(ANSWER)
                assert len(list(asked(client, stream=True))) == len(ANSWER) + 2
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (0, -signal.SIGTERM) and err == ""
    assert out.count('"operation": "POST /v1/chat/completions"') == 2 and key not in out


def test_a_client_that_goes_away_ends_its_request_on_the_server(triton, tmp_path):
    triton.endless = True
    gateway = RunningGateway(Held(triton.url), tmp_path, None, GatewaySettings())
    try:
        with openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0) as client:
            stream = asked(client, stream=True)
            assert next(iter(stream)).choices[0].delta.role == "assistant"
            stream.close()
        assert triton.cancelled.wait(PATIENCE_S)
    finally:
        gateway.stop()


class Held(AsyncM3DClient):
    """What `RunningGateway.stop` looks at, of a `FakeM3D`."""

    def __init__(self, url: str):
        super().__init__(url)
        self.closed = False

    def let_go(self) -> None:
        pass

    async def close(self) -> None:
        await super().close()
        self.closed = True


# --- TLS -------------------------------------------------------------------------------------------------------------
def certificate(folder, name: str, issuer=None) -> tuple:
    """(PEM file with key and certificate, certificate, key); signed by the issuer's, or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    _, by, by_key = issuer or (None, None, key)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(by_key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    kind = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    path.write_bytes(pem + built.public_bytes(serialization.Encoding.PEM))
    return path, built, key


def test_with_tls_and_an_authority_only_who_has_a_certificate_and_a_key_is_answered(tmp_path):
    authority = certificate(tmp_path, "authority")
    server, _, _ = certificate(tmp_path, "server", authority)
    ours, _, _ = certificate(tmp_path, "ours", authority)
    foreign, _, _ = certificate(tmp_path, "foreign")
    key = keys.add(tmp_path / "keys.json", "ward")
    gateway = RunningGateway(
        FakeM3D(), tmp_path, tmp_path / "keys.json", GatewaySettings(), tls=server, client_ca=authority[0]
    )

    def get(certificate=None, headers=None):
        context = ssl.create_default_context(cafile=authority[0])
        if certificate is not None:
            context.load_cert_chain(certificate)
        with httpx.Client(verify=context) as client:
            return client.get(f"https://localhost:{gateway.port}/v1/models", headers=headers).status_code

    try:
        assert get(ours, {"authorization": f"Bearer {key}"}) == 200
        assert get(ours) == 401
        for other in (None, foreign):
            with pytest.raises(httpx.TransportError):
                get(other, {"authorization": f"Bearer {key}"})
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{gateway.port}/v1/models")
    finally:
        gateway.stop()


# --- engines behind it -----------------------------------------------------------------------------------------------
@pytest.fixture(params=["server", "threads"])
def engine(request, triton):
    """The two adapters, before a server that the test holds."""
    return AsyncM3DClient(triton.url) if request.param == "server" else ThreadedM3D(M3DClient(triton.url))


def run(engine, work):
    async def done():
        try:
            return await work
        finally:
            await engine.close()

    return asyncio.run(done())


def test_an_engine_does_what_the_gateway_needs(engine, triton):
    triton.mask = np.ones((4, 4, 4), bool)

    async def work():
        study = await engine.upload(np.ones((4, 4, 4), np.float32))
        info = await engine.describe(Study(study.handle))
        stream = engine.stream(study, messages=ASKED)
        texts = [text async for text in stream]
        found = await engine.segment(study, "where?")
        ranking = await engine.rank(study, ["a", "b"])
        embedding, texts_embedded = await engine.embed(study), await engine.embed_texts(["a"])
        assert await engine.is_ready() and (await engine.info()).models
        await engine.forget(study)
        return study, info, texts, stream.answer, found, ranking, embedding, texts_embedded

    study, info, texts, answer, found, ranking, embedding, embedded = run(engine, work())
    assert study.handle == HANDLE and info.preset == study.info.preset
    assert texts == list(ANSWER) and answer.text == "".join(ANSWER)
    assert found.mask.any() and len(ranking.scores) == 2 and embedding.shape == embedded.embeddings[0].shape


def test_an_engine_raises_what_the_server_says(engine, triton):
    triton.evicted = True

    async def work():
        study = Study(HANDLE)
        with pytest.raises(StudyNotFound):
            await anext(engine.stream(study, messages=ASKED))
        with pytest.raises(StudyNotFound):
            await engine.rank(study, ["a"])

    run(engine, work())


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_a_stream_that_nobody_reads_ends_on_the_server(engine, triton, how):
    triton.endless = True

    async def work():
        study = await engine.upload(np.ones((4, 4, 4), np.float32))
        stream = engine.stream(study, messages=ASKED)
        assert await anext(stream)
        if how == "closed":
            await stream.aclose()
        else:
            reading = asyncio.ensure_future(_all(stream))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert await asyncio.to_thread(triton.cancelled.wait, PATIENCE_S)

    run(engine, work())


class SlowM3D:
    """Its `info` lasts until it may end."""

    def __init__(self):
        self.began, self.may_end = threading.Event(), threading.Event()

    def info(self, timeout=None):
        self.began.set()
        assert self.may_end.wait(PATIENCE_S)

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        pass


def test_a_call_that_is_cancelled_is_in_work_until_its_thread_ends():
    m3d = SlowM3D()
    engine = ThreadedM3D(m3d)

    async def work():
        calling = asyncio.ensure_future(engine.info())
        assert await asyncio.to_thread(m3d.began.wait, PATIENCE_S)
        calling.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        in_work = not calling.done()
        m3d.may_end.set()
        await asyncio.gather(calling, return_exceptions=True)
        return in_work, calling.cancelled()

    assert run(engine, work()) == (True, True)


def test_an_engine_whose_threads_are_all_busy_is_ready(monkeypatch):
    monkeypatch.setattr(backend, "THREADS", 1)
    m3d = SlowM3D()
    engine = ThreadedM3D(m3d)

    async def work():
        calling = asyncio.ensure_future(engine.info())
        assert await asyncio.to_thread(m3d.began.wait, PATIENCE_S)
        try:
            return await asyncio.wait_for(engine.is_ready(), PATIENCE_S)
        finally:
            m3d.may_end.set()
            await calling

    assert run(engine, work())


async def _all(stream) -> None:
    async for _ in stream:
        pass


def test_the_end_of_a_cancelled_call_is_not_logged(caplog):
    """It filled the pipe of a gateway's standard error, and its loop stood still."""
    begun, may_end = threading.Event(), threading.Event()

    class Failing:
        def info(self, timeout=None):
            begun.set()
            may_end.wait()
            raise Unavailable("the engine was closed")

    async def cancel():
        call = asyncio.create_task(ThreadedM3D(Failing()).info())
        await asyncio.to_thread(begun.wait)
        call.cancel()
        asyncio.get_running_loop().call_soon(may_end.set)
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(cancel())
    gc.collect()
    assert not caplog.records
