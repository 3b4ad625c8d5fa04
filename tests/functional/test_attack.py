"""No request, client or neighbour brings the server down, shuts the others out, or reads what is not theirs.

What happened before was an attack on loopback, finding by finding. After each test on the common server its processes
are those from before, and it answers exactly.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import socket
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2

from engine import contract
from engine.client import M3DClient
from engine.client.connection import Connection
from engine.client.wire import outputs_of
from engine.errors import InvalidInput, ResourceExhausted, StudyNotFound, Unavailable
from engine.manifest import Manifest
from engine.runtime.study_store import StudyStore, content_digest
from engine.server import Server, free_ports, supervisor
from engine.server.requests import MAX_BESIDE_BYTES
from tests.functional.raw import PATIENCE_S, PUBLIC, Case, Raw, Request, cases, good_requests, npy, request_of
from tests.functional.test_client import BATCH, LONG
from tests.functional.tree import Tree, as_root, as_stranger, strangers_eyes
from tests.locks import waiting_for
from tests.tiny import IMAGE_SIZE, LAMED, QUESTION

pytestmark = pytest.mark.integration

survives = pytest.mark.usefixtures("unharmed")
LLM_WIDTH = LAMED["hidden_size"]
HANDFUL = 8  # descriptors or threads that may come and go
MOST_WORDS = 300  # of an error message
MB = 1 << 20


@pytest.fixture(scope="module")
def study(client, scans):
    return client.upload(scans[0])


@pytest.fixture(scope="module")
def expected(client, study):
    return client.ask(study, QUESTION, max_new_tokens=8)


@pytest.fixture(scope="module")
def tree(server):
    return Tree(server.supervisor_pid)


@pytest.fixture
def unharmed(server, client, study, expected, tree):
    yield
    assert Tree(server.supervisor_pid).pids == tree.pids
    assert server.is_ready()
    assert client.ask(study, QUESTION, max_new_tokens=8).token_ids == expected.token_ids
    assert until(lambda: not os.listdir(tree.run_folder / "cancelled"))


@pytest.fixture
def raw(server):
    with Raw(server.url) as raw:
        yield raw


def until(holds, seconds: float = PATIENCE_S) -> bool:
    """Whether it holds in the end."""
    pause, end = threading.Event(), time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        pause.wait(0.05)
    return True


def new_scan(seed: int) -> np.ndarray:
    """At the model's size; no other test sends it."""
    return np.random.default_rng([23, seed]).random((1, *IMAGE_SIZE), np.float32)


def status_of(call, *arguments, **more) -> grpc.StatusCode:
    try:
        call(*arguments, timeout=PATIENCE_S, **more)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


# --- 1: no request ends the server -----------------------------------------------------------------------------------
CHUNKS = b"1\r\nx\r\n" * 600_000


def answer_of(address: tuple[str, int], sent: bytes) -> bytes:
    """What comes back, until the server closes the connection or has nothing more to say."""
    came = b""
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(MB):
                came += more
        except TimeoutError:
            raise
        except OSError:
            pass  # it has heard enough
    return came


def address_of(url: str) -> tuple[str, int]:
    parts = urlsplit(url if "://" in url else f"//{url}")
    return parts.hostname, parts.port


@survives
@pytest.mark.parametrize("path", ["/metrics", "/health/ready", "/v2/models/study/infer", "/"])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_body_of_many_small_chunks_does_not_end_the_server(server, method, path):
    head = f"{method} {path} HTTP/1.1\r\nHost: m3d\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answered = answer_of(address_of(server.metrics_url), head.encode() + CHUNKS + b"0\r\n\r\n")
    good = method == "GET" and path in ("/metrics", "/health/ready")
    assert answered.startswith(b"HTTP/1.1 200") if good else not answered or answered.startswith(b"HTTP/1.1 40")


NOT_GRPC = {
    "HTTP/1.1": b"POST /v2/models/study/infer HTTP/1.1\r\nHost: m3d\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS,
    "TLS": bytes.fromhex("1603010200010001fc0303") + bytes(512),
    "noise": np.random.default_rng(23).bytes(MB),
    "noise in HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + np.random.default_rng(23).bytes(MB),
    "a frame of 16 MB": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(1 << 16),
}


@survives
@pytest.mark.parametrize("kind", NOT_GRPC)
def test_what_is_not_grpc_ends_its_own_connection(server, kind):
    answer_of(address_of(server.url), NOT_GRPC[kind])


def checked_cases(model: str, study) -> Iterator[tuple[Request, list[Case]]]:
    """A good request and all that can be wrong about it."""
    for good in good_requests(model, study.handle, LLM_WIDTH):
        every = list(cases(good))
        assert len(every) > 150 and all(case.request != good for case in every)
        yield good, every


@survives
@pytest.mark.parametrize("model", PUBLIC)
def test_nothing_that_a_request_may_carry_ends_the_server(raw, study, model):
    """By ModelInfer. Triton itself refuses that for models that answer more than once."""
    decoupled = contract.MODELS[model].decoupled
    for good, every in checked_cases(model, study):
        assert raw.infer(good).responses or decoupled
        for case in every:
            outcome = raw.infer(case.request)
            answered = "decoupled transaction policy" in outcome.words if decoupled else outcome.responses
            assert outcome.is_typed or case.harmless and answered, f"{case.name}: {outcome}"
            assert len(outcome.words) < MOST_WORDS, case.name


@survives
@pytest.mark.parametrize("model", PUBLIC)
def test_nothing_that_a_stream_may_carry_ends_the_server_or_the_stream(raw, study, model):
    """By ModelStreamInfer: each request gets its error, and the good one at the end its answer."""
    for good, every in checked_cases(model, study):
        wrong = [case for case in every if not case.harmless]
        for place, case in enumerate(wrong):
            case.request.id = case.request.id or str(place)
        requests = [*(case.request for case in wrong), good]
        outcomes = raw.each(raw.stub.ModelStreamInfer(iter(requests), timeout=PATIENCE_S))
        assert any(outcome.responses for outcome in outcomes)
        refused = {outcome.id for outcome in outcomes if outcome.is_typed and len(outcome.words) < MOST_WORDS}
        assert sum(outcome.is_typed for outcome in outcomes) == len(wrong)
        # Of a message that has too much beside its tensors not even the id is read.
        lean = [case for case in wrong if case.request.ByteSize() <= MAX_BESIDE_BYTES]
        assert len(lean) > 100 and [case.name for case in lean if case.request.id not in refused] == []
        for case in every:
            if case.harmless:
                outcome = raw.stream(case.request)
                assert outcome.is_typed or outcome.responses, f"{case.name}: {outcome}"


@survives
@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelReady", "ModelConfig", "ModelStatistics"])
def test_bytes_that_are_no_message_are_refused(raw, method):
    cut = Request(model_name="study" * 100).SerializeToString()[:-1]
    for sent in (b"\xff" * 20, cut, b"\x0a\x02\xff\xfe"):
        words, status = raw.bytes(method, sent)
        in_stream = status is grpc.StatusCode.OK and words.startswith("INVALID_ARGUMENT: ")
        assert in_stream if method == "ModelStreamInfer" else status is grpc.StatusCode.INVALID_ARGUMENT, words


@survives
def test_an_ensemble_gives_each_output_alone(raw, study):
    """Triton leaves out steps whose outputs are not asked for, though others need them: the stream ended in silence."""
    for model in ("m3d_chat", "m3d_segment", "m3d_retrieve"):
        (good, *_) = good_requests(model, study.handle, LLM_WIDTH)
        (whole,) = raw.stream(good).responses
        for name in contract.MODELS[model].output_names:
            request = Request()
            request.CopyFrom(good)
            request.outputs.add(name=name)
            (part,) = raw.stream(request).responses
            assert [output.name for output in part.outputs] == [name]
            if name not in ("ANSWER_INFO", "STUDY_INFO"):  # which have times
                place = [output.name for output in whole.outputs].index(name)
                assert part.raw_output_contents[0] == whole.raw_output_contents[place]


# --- 2: nobody reaches what is behind the front ----------------------------------------------------------------------
def every_command_line():
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                found[pid] = file.read().replace("\0", " ")
        except (OSError, UnicodeDecodeError):
            pass
    return found


@as_root
def test_no_secret_stands_on_a_command_line(tree):
    seen = as_stranger(every_command_line)
    ours = {pid: seen[str(pid)] for pid in (tree.supervisor_pid, *tree.pids.values())}
    assert any("tritonserver" in words for words in ours.values())
    for words in ours.values():
        assert "m3d-admin" not in words and not re.search(r"(?<![0-9a-f-])[0-9a-f]{32}", words)


def opened(paths):
    """Which of these can be read or listed, and not by an error."""
    found = []
    for path in paths:
        try:
            os.listdir(path) if os.path.isdir(path) else os.read(os.open(path, os.O_RDONLY), 1)
        except OSError as error:
            assert error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT), error  # noqa: F821
        else:
            found.append(path)
    return found


@as_root
def test_another_user_reads_nothing_of_the_processes_but_that_they_run(server, tree):
    names = ("environ", "mem", "maps", "fd", "cwd", "root/dev/shm", "map_files")
    paths = [f"/proc/{pid}/{name}" for pid in (tree.supervisor_pid, *tree.pids.values()) for name in names]
    paths += [str(tree.run_folder), str(server.log), str(tree.run_folder / "health")]
    control = [f"/proc/{tree.supervisor_pid}/cmdline", "/dev/shm"]
    assert as_stranger(opened, [*paths, *control]) == control


def connected(sockets):
    """To which of these one can connect."""
    found = []
    for path in sockets:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(path)
            except OSError as error:
                assert error.errno == errno.EACCES, error  # noqa: F821
            else:
                found.append(path)
    return found


@as_root
def test_another_user_reaches_no_triton_behind_the_front(server, tree):
    sockets = [str(path) for path in tree.run_folder.iterdir() if path.is_socket()]
    inside = server.inside_url.removeprefix("unix:")
    assert inside in sockets and str(tree.run_folder / "metrics") in sockets and len(sockets) > 2
    assert as_stranger(connected, sockets) == []
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(inside)  # they are there: this user can


ADMIN = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
ADMIN += tuple(
    f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in ("Status", "Register", "Unregister")
)
HEADERS = ((), (("triton-grpc-protocol-m3d-admin", "0" * 32),), (("authorization", "Bearer root"), ("m3d-admin", "")))


@survives
@pytest.mark.parametrize("method", ADMIN)
def test_what_is_an_administrators_is_unknown_to_the_front_whatever_the_headers(raw, method):
    known = {known.name for known in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    assert method in known
    for headers in HEADERS:
        _, status = raw.bytes(method, b"", metadata=headers)
        assert status is grpc.StatusCode.UNIMPLEMENTED


def test_every_method_of_tritons_is_either_served_or_an_administrators():
    known = {known.name for known in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    served = {"ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig"}
    assert known == served | {"ModelStatistics", "ModelInfer", "ModelStreamInfer"} | set(ADMIN)


@survives
@pytest.mark.parametrize("model", [name for name, model in contract.MODELS.items() if not model.public])
def test_a_model_inside_cannot_be_called(server, raw, study, model):
    values = {"IMAGE": np.zeros((1, 1, *IMAGE_SIZE), np.float32), "STUDY": study.handle, "TEXTS": ["w1"]}
    values |= {"INPUT_IDS": np.ones((1, 4), np.int64), "ATTENTION_MASK": np.ones((1, 4), np.int64)}
    values |= {"SEG_STATE": np.zeros((1, LLM_WIDTH), np.float32)}
    with Raw(server.inside_url) as inside:
        (features,) = inside.infer(request_of("segmentation_encoder", IMAGE=values["IMAGE"])).responses
        values["FEATURES"] = np.frombuffer(features.raw_output_contents[0], np.float32).reshape(
            features.outputs[0].shape
        )
        request = request_of(model, **{name: values[name] for name in contract.MODELS[model].input_names})
        assert inside.infer(request).responses  # it is a good one
    for outcome in (raw.infer(request), raw.stream(request)):
        assert outcome.words == f"unknown model: '{model}' is not found"


# --- 3: nobody reads a scan ------------------------------------------------------------------------------------------
@as_root
@survives
def test_another_user_finds_nothing_of_a_scan_while_it_is_worked_on(server, client, tmp_path, request):
    scan = new_scan(3)
    marks = [scan.tobytes()[place : place + 256] for place in (0, scan.nbytes // 2 // 256 * 256, scan.nbytes - 256)]
    question = "w61 w62 w63 w61 w62 w63"
    since = time.time()
    control = Path("/dev/shm/m3d-test-of-strangers")
    request.addfinalizer(lambda: control.unlink(missing_ok=True))
    control.write_bytes(b"..." + marks[0])
    control.chmod(0o644)
    needles = [*marks, question.encode()]
    with strangers_eyes(needles, ["/tmp", str(server.log.parent)], since) as found, Raw(server.url) as raw:
        for _ in range(3):
            sent = client.upload(scan)
            client.segment(sent, question, max_new_tokens=24)
            client.rank(sent, [question, "w5"])
            values = {"VOLUME": npy(scan), "QUESTION": question, "STREAM": True}
            assert raw.stream(request_of("m3d_chat", **values)).responses
        assert found() == [f"{control}: needle 0"]
    text = server.log.read_bytes()
    assert not any(mark in text for mark in (*needles, sent.handle.encode()))


def test_the_log_is_its_owners_alone(server):
    assert stat.S_IMODE(server.log.stat().st_mode) == 0o600


# --- 4: clients come and go ------------------------------------------------------------------------------------------
def come_and_go(server, study, count: int) -> None:
    """Questions of new clients, a few at a time: plain, streaming, and cancelled in turn."""

    def one(number: int) -> None:
        with M3DClient(server.url, timeout=PATIENCE_S) as client:
            if number % 3 == 0:
                assert client.ask(study, QUESTION, max_new_tokens=2).token_ids
            elif number % 3 == 1:
                assert list(client.stream(study, QUESTION, max_new_tokens=4))
            else:
                stream = client.stream(study, QUESTION, max_new_tokens=200)
                next(stream) if number % 2 else None
                stream.close()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(one, range(count)))


@survives
def test_a_thousand_new_clients_leave_no_descriptor_and_no_thread(server, study, tree):
    come_and_go(server, study, 100)
    watched = {name: tree[name] for name in ("triton", "front")}
    before = {name: (process.descriptors, process.threads) for name, process in watched.items()}
    come_and_go(server, study, 1000)

    def grew() -> dict:
        now = {name: (process.descriptors, process.threads) for name, process in watched.items()}
        pairs = [(name, what, now[name][what] - before[name][what]) for name in watched for what in (0, 1)]
        return {(name, ("descriptors", "threads")[what]): more for name, what, more in pairs if more > HANDFUL}

    assert until(lambda: not grew(), 30), grew()


# --- 5: many connections ---------------------------------------------------------------------------------------------
def test_each_process_may_open_as_many_files_as_the_hard_limit_allows(tree):
    for name in ("front", "triton"):
        limits = Path(f"/proc/{tree.pids[name]}/limits").read_text()
        soft, hard = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits).groups()
        assert int(soft) == min(int(hard), supervisor.MOST_FILES) >= 2000


@survives
def test_idle_connections_keep_nobody_out_and_fill_no_log(server, study, expected):
    """1,000 ended a server of 1,024 descriptors, which then wrote 22 MB a second into its log."""
    logged = server.log.stat().st_size
    with ExitStack() as stack:
        for url in (server.url, server.metrics_url):
            for _ in range(1500):
                stack.enter_context(socket.create_connection(address_of(url), timeout=PATIENCE_S))
        for _ in range(5):
            with M3DClient(server.url, timeout=PATIENCE_S) as client:
                assert client.ask(study, QUESTION, max_new_tokens=8).token_ids == expected.token_ids
            assert b"nv_inference_count" in urllib.request.urlopen(server.metrics_url, timeout=PATIENCE_S).read()
    assert server.log.stat().st_size - logged < MB


# --- 6, 9: uploads ---------------------------------------------------------------------------------------------------
SMALL_BYTES = 2 * MB  # the largest scan of a server in which little memory is soon taken


@pytest.fixture(scope="module")
def small_server(light_repository, tmp_path_factory):
    """It takes in two scans of SMALL_BYTES at a time, and has none of its own."""
    folder = tmp_path_factory.mktemp("small")
    repository = shutil.copytree(light_repository, folder / "model_repository", symlinks=True)
    (repository / "settings.toml").write_text(f"[study]\nmax_bytes = {SMALL_BYTES}\n")
    with Server(repository, **free_ports(), log=folder / "triton.log") as server:
        yield server


def part_of(scan: bytes, start: int, end: int, name: str, size: int | None = None) -> Request:
    place = (start, size or len(scan))
    return request_of("study", VOLUME=scan[start:end], UPLOAD=name, UPLOAD_RANGE=place)


def sent_in_parts(raw: Raw, scan: bytes, name: str) -> str:
    """The handle."""
    half = len(scan) // 2
    requests = part_of(scan, 0, half, name), part_of(scan, half, len(scan), name)
    outcome = raw.stream(*requests)
    assert outcome.error is None, outcome
    return outputs_of(outcome.responses[-1]).text("STUDY")


def test_uploads_that_stand_still_leave_their_share_to_other_connections(small_server):
    """Three of them took all memory, for good."""
    scan = npy(new_scan(6))
    with ExitStack() as stack:
        first, *others = (stack.enter_context(Raw(small_server.url)) for _ in range(3))
        for number in range(3):  # each all but its last byte, over one connection: as much as there is in all
            outcome = first.infer(part_of(bytes(SMALL_BYTES), 0, SMALL_BYTES - 1, f"slow {number}"))
            assert outcome.error is None if number == 0 else isinstance(outcome.error, ResourceExhausted), outcome
            assert number == 0 or "over this connection" in outcome.words
        for number, raw in enumerate(others):
            assert len(sent_in_parts(raw, scan, f"good {number}")) == 64


def test_two_uploads_of_one_name_are_no_study_of_both(server, client, study):
    """A's first half, then B's, then A's second: that was a valid study of two patients."""
    scans = [npy(new_scan(seed)) for seed in (90, 91)]
    half = len(scans[0]) // 2
    with Raw(server.url) as first, Raw(server.url) as second:
        begun = first.infer(part_of(scans[0], 0, half, "the same"))
        assert begun.responses[0].raw_output_contents[0] == bytes(4)
        for outcome in (
            second.infer(part_of(scans[1], 0, half, "the same")),
            first.infer(part_of(scans[0], half, len(scans[0]), "the same")),
            second.infer(part_of(scans[1], half, len(scans[1]), "the same")),
        ):
            assert isinstance(outcome.error, (InvalidInput, Unavailable)), outcome
            assert "name" in outcome.words
        third = first.infer(part_of(scans[0], 0, half, "a name of its own"))
        assert third.error is None
        crossed = second.infer(part_of(scans[1], half, len(scans[1]), "a name of its own"))
        assert isinstance(crossed.error, InvalidInput) and "another connection" in crossed.words
        assert first.infer(part_of(scans[0], half, len(scans[0]), "a name of its own")).error is not None


# --- 7: large messages -----------------------------------------------------------------------------------------------
def taken(tree: Tree, *names: str) -> dict[str, int]:
    """MB of memory and of shared memory besides studies."""
    return {"/dev/shm": tree.shared_bytes >> 20} | {name: tree[name].anonymous >> 20 for name in names}


def growth(before: dict[str, int], after: dict[str, int], most: int) -> dict[str, int]:
    return {name: after[name] - before[name] for name in before if after[name] - before[name] > most}


@survives
@pytest.mark.parametrize("compression", grpc.Compression)
@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelReady"])
def test_a_message_of_more_than_a_part_is_refused_before_it_is_taken_in(server, tree, method, compression):
    """Of 1 GB each one stayed in /dev/shm for good. Those that are small until they are unpacked, too."""
    names = "triton", "front", "study"
    message = Request(model_name="m3d_chat", raw_input_contents=[bytes(64 * MB)]).SerializeToString()
    before = taken(tree, *names)
    for _ in range(4):
        with Raw(server.url) as raw:
            words, status = raw.bytes(method, message, compression=compression)
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in words
    assert growth(before, taken(tree, *names), most=40) == {}


@pytest.fixture
def light_server(light_repository, tmp_path):
    """A fresh one, which has taken no memory yet."""
    with Server(light_repository, **free_ports(), log=tmp_path / "triton.log") as server:
        yield server


@pytest.mark.parametrize("count", [10, pytest.param(30, marks=pytest.mark.slow(group="soak"))])
def test_the_memory_of_many_large_scans_is_given_back(light_server, scans, count):
    """50 of 100 MB left 8 GB behind."""
    tree, random = Tree(light_server.supervisor_pid), np.random.default_rng(7)
    with M3DClient(light_server.url, timeout=PATIENCE_S) as client:
        client.upload(scans[0])
        before = taken(tree, *tree.processes)
        for _ in range(count):
            client.upload(random.random((240, 256, 256), np.float32), preset="mr")
        assert until(lambda: not growth(before, taken(tree, *tree.processes), most=100), 60), taken(
            tree, *tree.processes
        )


def test_the_memory_of_many_large_messages_at_once_is_given_back(light_server, scans):
    """200 of 16 MB left 6 GB in the front: gRPC's errors keep their messages, and the C library what comes in pieces.
    Triton keeps some memory in each of its threads, of which it starts no more."""
    tree = Tree(light_server.supervisor_pid)
    middle = part_of(bytes(16 * MB), 0, 16 * MB, "of nothing", size=64 * MB)
    middle.raw_input_contents[-1] = np.array([MB, 64 * MB], np.int64).tobytes()
    with M3DClient(light_server.url, timeout=PATIENCE_S) as client:
        client.upload(scans[0])
    before = taken(tree, "front")
    with Raw(light_server.url) as one, Raw(light_server.url) as other, ThreadPoolExecutor(20) as threads:
        for outcome in threads.map(lambda raw: raw.infer(middle), [one, other] * 20):
            assert isinstance(outcome.error, Unavailable) and "does not know the upload" in outcome.words, outcome
    assert until(lambda: not growth(before, taken(tree, "front"), most=100), 60), (before, taken(tree, "front"))


# --- 8: ready means ready --------------------------------------------------------------------------------------------
NOT_SERVING, SERVING = b"\x08\x02", b"\x08\x01"


class Readiness:
    """What each way to ask says of a server, and of its chat."""

    def __init__(self, server):
        self.server = server
        self.raw = Raw(server.url)

    def __call__(self) -> dict[str, bool]:
        stub, check = self.raw.stub, self.raw.channel.unary_unary("/grpc.health.v1.Health/Check")
        return {
            "ServerReady": stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=PATIENCE_S).ready,
            "m3d_chat": self.model("m3d_chat"),
            "m3d_segment": self.model("m3d_segment"),
            "decoder": self.model("decoder"),
            "gRPC's health": {SERVING: True, NOT_SERVING: False}[check(b"", timeout=PATIENCE_S)],
            "/health/ready": self.server.is_ready(),
        }

    def model(self, name: str) -> bool:
        return self.raw.stub.ModelReady(service_pb2.ModelReadyRequest(name=name), timeout=PATIENCE_S).ready


def page_of(server, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(server.metrics_url.replace("/metrics", path), timeout=PATIENCE_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def with_decoder(repository: Path, folder: Path, **settings) -> Path:
    """A copy of the repository in which the language model has these settings."""
    copied = shutil.copytree(repository, folder / "model_repository", symlinks=True)
    lines = (f"{name} = {value}\n" for name, value in settings.items())
    (copied / "settings.toml").write_text(f"[decoder.cpu]\n{''.join(lines)}")
    return copied


@pytest.mark.slow(group="faults")
def test_a_server_whose_language_model_died_is_not_ready_until_it_is_back(repository, scans, tmp_path):
    """It said that it was, for the 13 s of a restart."""
    with Server(repository, **free_ports(), log=tmp_path / "triton.log") as server, M3DClient(server.url) as client:
        study = client.upload(scans[0])
        before = client.ask(study, QUESTION, max_new_tokens=8)
        ready = Readiness(server)
        assert set(ready().values()) == {True}
        os.kill(Tree(server.supervisor_pid).pids["vllm"], signal.SIGKILL)
        with pytest.raises(Unavailable, match="the language model is restarting|stopped while it answered"):
            while True:  # nobody has noticed at first: such a question waits for an answer, and gets its error
                client.ask(study, QUESTION, max_new_tokens=8)
        assert set(ready().values()) == {False} and ready.model("study") and ready.model("m3d_retrieve")
        assert not client.is_ready() and page_of(server, "/health/live") == (200, "live\n")
        code, words = page_of(server, "/health/ready")
        assert code == 503 and words == "the language model is restarting\n"
        assert client.upload(new_scan(8)).info.shape  # what does not need it goes on
        assert until(lambda: set(ready().values()) == {True})
        assert client.ask(study, QUESTION, max_new_tokens=8).token_ids == before.token_ids


@pytest.mark.slow(group="faults")
def test_a_server_whose_language_model_does_not_come_back_ends_with_the_cause(repository, scans, tmp_path):
    """It stayed, ready and useless, and a service manager had nothing to see."""
    hopeless = with_decoder(repository, tmp_path, restarts=0)
    with Server(hopeless, **free_ports(), log=tmp_path / "triton.log") as server, M3DClient(server.url) as client:
        study = client.upload(scans[0])
        stream = client.stream(study, QUESTION, max_new_tokens=LONG)
        next(stream)
        os.kill(Tree(server.supervisor_pid).pids["vllm"], signal.SIGKILL)
        with pytest.raises(Unavailable, match="out of order.*must be started again"):
            list(stream)
        with pytest.raises(Unavailable, match="ended by itself.*language model is out of order .it stopped 1 times"):
            server.wait()
        assert "out of order (it stopped 1 times within an hour" in server.log.read_text(errors="replace")


# --- 10: low, but not nothing ----------------------------------------------------------------------------------------
@survives
def test_a_handle_cannot_be_computed_from_what_is_told(server, client, tree, tmp_path):
    scan = new_scan(10)
    sent = client.upload(scan)
    assert client.upload(scan).handle == sent.handle  # it is the same each time
    told = [content_digest(npy(scan)), None, "auto", Manifest.read(server.repository).identity]
    (folder,) = tree.shared_memory.glob("m3d-studies-*")
    with StudyStore(folder) as theirs, StudyStore(tmp_path / "own") as own:
        assert theirs.handle_of(*told) == sent.handle != own.handle_of(*told)


def test_a_scan_has_another_handle_on_each_server(small_server, tmp_path):
    scan = new_scan(10)
    with Server(small_server.repository, **free_ports(), log=tmp_path / "triton.log") as server:
        with M3DClient(server.url) as one, M3DClient(small_server.url) as other:
            first, second = one.upload(scan), other.upload(scan)
    assert first.info.model == second.info.model and first.handle != second.handle


MISSING = [("m3d_chat", "QUESTION"), ("m3d_segment", "QUESTION"), ("decoder", "QUESTION"), ("decoder", "STUDY")]
MISSING += [("m3d_retrieve", "TEXTS"), ("segmentation", "SEG_STATES"), ("segmentation", "STUDY")]


@survives
@pytest.mark.parametrize("model, name", MISSING)
def test_a_request_without_what_it_needs_is_told_so(raw, study, model, name):
    """Its stream just ended, or told of a deadlock."""
    (request, *_) = good_requests(model, study.handle, LLM_WIDTH)
    place = [given.name for given in request.inputs].index(name)
    request.inputs.pop(place), request.raw_input_contents.pop(place)
    outcomes = [raw.stream(request)] + ([] if contract.MODELS[model].decoupled else [raw.infer(request)])
    for outcome in outcomes:
        assert isinstance(outcome.error, InvalidInput) and name in outcome.words and model in outcome.words


LONG_TEXT = "y" * 1_000_000
ECHOES = {
    "a preset": ("study", {"VOLUME": npy(np.zeros((8, 8, 8), np.int16)), "PRESET": LONG_TEXT}),
    "a handle": ("study", {"STUDY": LONG_TEXT}),
    "a handle to ask about": ("decoder", {"STUDY": LONG_TEXT, "QUESTION": QUESTION}),
    "the name of an upload": ("study", {"VOLUME": b"x", "UPLOAD": LONG_TEXT, "UPLOAD_RANGE": (0, 2)}),
    "a unit": (
        "study",
        {"VOLUME": npy(np.zeros((8, 8, 8), np.int16)), "CROP": [0, 0, 0, 1, 1, 1], "CROP_UNIT": LONG_TEXT},
    ),
    "a setting": ("m3d_chat", {"QUESTION": QUESTION, "SAMPLING": json.dumps({LONG_TEXT: 1})}),
    "a setting's value": ("m3d_chat", {"QUESTION": QUESTION, "SAMPLING": json.dumps({"temperature": LONG_TEXT})}),
    "a number": ("m3d_chat", {"QUESTION": QUESTION, "SAMPLING": '{"max_new_tokens": ' + "9" * 4000 + "}"}),
    "a stop text": ("m3d_chat", {"QUESTION": QUESTION, "SAMPLING": json.dumps({"stop": [LONG_TEXT]})}),
    "a stop that is none": ("m3d_chat", {"QUESTION": QUESTION, "SAMPLING": json.dumps({"stop": {LONG_TEXT: 1}})}),
    "no JSON": ("m3d_chat", {"QUESTION": QUESTION, "SAMPLING": LONG_TEXT}),
    "a question": ("m3d_chat", {"QUESTION": LONG_TEXT}),
    "a text": ("m3d_retrieve", {"TEXTS": [LONG_TEXT]}),
}


@survives
@pytest.mark.parametrize("name", ECHOES)
def test_an_error_does_not_echo_a_megabyte(raw, study, name):
    model, values = ECHOES[name]
    if model not in ("study", "decoder"):
        values = {"STUDY": study.handle, **values}
    outcome = raw.stream(request_of(model, **values))
    assert isinstance(outcome.error, (InvalidInput, StudyNotFound)), outcome
    assert len(outcome.words) < MOST_WORDS and "y" * 201 not in outcome.words


@survives
def test_more_texts_than_are_ranked_in_a_minute_are_refused(raw, study):
    assert raw.infer(request_of("m3d_retrieve", STUDY=study.handle, TEXTS=["w1"] * 256)).responses
    refused = raw.infer(request_of("m3d_retrieve", STUDY=study.handle, TEXTS=["w1"] * 257))
    assert isinstance(refused.error, InvalidInput) and "257" in refused.words and "256" in refused.words


def words_during_a_stop(server: Server, ways: list, seed: int) -> list[str]:
    """What clients are told from when a server is asked to stop until it is gone: in a stream that was open before,
    which comes first, and by each of the ways, again and again. A scan that takes very long is in work meanwhile.
    """
    scan = npy(new_scan(seed))
    (folder,) = Tree(server.supervisor_pid).shared_memory.glob("m3d-studies-*")
    requests = queue.SimpleQueue()
    with StudyStore(folder) as store, Raw(server.url) as raw, ThreadPoolExecutor(2) as threads:
        open_before = raw.stub.ModelStreamInfer(iter(requests.get, None), timeout=PATIENCE_S)
        requests.put(Request(model_name="nothing"))
        assert "unknown model" in next(open_before).error_message
        identity = Manifest.read(server.repository).identity
        with store.lock(store.handle_of(content_digest(scan), None, "auto", identity), "image"):
            slow = threads.submit(raw.infer, request_of("study", VOLUME=scan))
            assert until(lambda: waiting_for(store))
            stopping = threads.submit(server.stop)
            said = [refused(way) for _ in range(10) for way in ways]
            requests.put(request_of("study", STUDY="0" * 64))
            requests.put(None)
            (in_stream,) = raw.each(open_before)
        while not stopping.done():
            said.append(refused(ways[0]))
        for outcome in (in_stream, slow.result()):
            assert outcome.error is None or isinstance(outcome.error, Unavailable), outcome
    return [in_stream.words, *said]


def refused(way) -> str:
    """How it ends at last; until the server stops it is answered."""
    with pytest.raises(Unavailable) as told:
        while True:
            way()
    return str(told.value)


def test_uploads_to_a_server_that_stops_are_told_so(light_repository, scans, tmp_path):
    with Server(light_repository, **free_ports(), log=tmp_path / "triton.log") as server:
        with M3DClient(server.url) as client:
            in_stream, *_ = words_during_a_stop(server, [lambda: client.upload(scans[0])], 11)
    assert "is stopping" in in_stream


@pytest.mark.slow(group="faults")
def test_clients_of_a_server_that_stops_are_told_so(repository, scans, tmp_path):
    """They read that it serves no such thing, and that ranking needs --clip-checkpoint."""
    with Server(repository, **free_ports(), log=tmp_path / "triton.log") as server:
        with M3DClient(server.url) as client:
            study = client.upload(scans[0])
            ways = [
                lambda: client.rank(study, ["w1"]),
                lambda: client.ask(study, QUESTION, max_new_tokens=1),
                lambda: list(client.stream(study, QUESTION, max_new_tokens=1)),
                lambda: client.segment(study, QUESTION, max_new_tokens=1),
                lambda: client.upload(scans[0]),
            ]
            in_stream, *said = words_during_a_stop(server, ways, 12)
    assert "is stopping" in in_stream
    assert not [words for words in said if "clip-checkpoint" in words or "does not serve" in words]


def test_what_a_killed_supervisor_left_goes_with_the_next_start(light_repository, scans, tmp_path, monkeypatch):
    """Its folder for temporary files stayed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    first = Server(light_repository, **free_ports(), log=tmp_path / "first.log")
    first.start()
    tree = Tree(first.supervisor_pid)
    run_folder = tree.run_folder
    with M3DClient(first.url) as client:
        client.upload(scans[0])
    assert run_folder.parent == tmp_path
    os.kill(first.supervisor_pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(tree.processes.values(), timeout=PATIENCE_S)
    assert alive == []
    assert run_folder.is_dir()
    with Server(light_repository, **free_ports(), log=tmp_path / "second.log") as second:
        assert not run_folder.exists()
        (own,) = Tree(second.supervisor_pid).shared_memory.glob("m3d-studies-*")
        assert not [path for path in Path("/dev/shm").glob("m3d-studies-*") if f"-{tree.pids['triton']}-" in path.name]
    assert list(tmp_path.glob("m3d-*")) == []
    first.stop()


# --- what nobody waits for -------------------------------------------------------------------------------------------
@survives
@pytest.mark.parametrize("model", ["decoder", "m3d_chat"])
def test_what_clients_close_is_not_decoded_to_its_end(server, client, study, tree, model):
    """Neither the answers in work nor those that wait for their turn, behind which the last question comes."""
    sampling = json.dumps({"max_new_tokens": 240})
    values = {"STUDY": study.handle, "QUESTION": QUESTION, "SAMPLING": sampling}

    def arrived() -> int:
        with Raw(server.url) as raw:
            request = service_pb2.ModelStatisticsRequest(name="decoder")
            return raw.stub.ModelStatistics(request, timeout=PATIENCE_S).model_stats[0].inference_count

    def work_of(end) -> float:
        """Seconds of processor time."""
        before, already = sum(tree["vllm"].cpu_times()[:2]), arrived()
        with closing(Connection(server.url)) as connection:
            streams = [
                connection.stream(model, named(model, values | {"STREAM": number == 0}), PATIENCE_S)
                for number in range(3 * BATCH)
            ]
            next(streams[0])  # the language model is at it
            assert until(lambda: arrived() == already + len(streams))
            end(streams)
        assert client.ask(study, QUESTION, max_new_tokens=1).token_ids
        return sum(tree["vllm"].cpu_times()[:2]) - before

    read = work_of(lambda streams: [list(stream) for stream in streams])
    closed = work_of(lambda streams: [stream.close() for stream in streams])
    assert closed < read / 2


def named(model: str, values: dict[str, object]) -> dict[contract.Tensor, object]:
    return {tensor: values[tensor.name] for tensor in contract.MODELS[model].inputs if tensor.name in values}
