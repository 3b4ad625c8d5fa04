"""Ten minutes of good clients beside bad ones: answers stay exact, and no process takes more and more."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import numpy as np
import pytest

from engine import contract
from engine.client import M3DClient
from engine.client.connection import Connection
from engine.errors import M3DError
from engine.server import Server, free_ports
from tests.functional.raw import PUBLIC, Raw, Request, cases, good_requests, request_of
from tests.functional.test_attack import CHUNKS, LLM_WIDTH, address_of, answer_of
from tests.functional.tree import Tree
from tests.tiny import QUESTION

pytestmark = [pytest.mark.integration, pytest.mark.slow(group="soak")]

SECONDS = int(os.environ.get("M3D_SOAK_SECONDS", 600))
WARM_UP = 0.2  # of that time
GOOD, BAD = 8, 2
PATIENCE_S = 120
SAMPLE_S = 2.0
TOKENS = 24
MOST_MEMORY = 100 << 20  # over the mean, after the warm-up
HANDFUL = 16  # descriptors and threads that may come and go
MB = 1 << 20
QUESTIONS = [QUESTION, *(" ".join(f"w{5 + 7 * i % 240}" for i in range(k, k + 3 + k % 4)) for k in range(1, 6))]
TEXTS = ["w1 w2", "w3", "w40 w41 w42"]


# --- good clients ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Alone:
    """What is said of a scan when nobody else asks: token ids and text by question, masks by question, scores."""

    answers: dict[str, tuple]
    masks: dict[str, bytes]
    scores: bytes


def alone(client: M3DClient, scan: np.ndarray) -> Alone:
    study = client.upload(scan, np.eye(4))
    answers, masks = {}, {}
    for question in QUESTIONS:
        drawn = client.segment(study, question, max_new_tokens=TOKENS)
        answers[question] = drawn.answer.token_ids, drawn.answer.text
        masks[question] = mask_of(drawn)
    return Alone(answers, masks, client.rank(study, TEXTS).scores.tobytes())


def mask_of(drawn) -> bytes:
    return b"" if drawn.mask is None else np.packbits(drawn.mask).tobytes()


class Good(threading.Thread):
    """Asks until `over`; counts what it did, and what was wrong."""

    def __init__(self, url: str, scans: list[np.ndarray], expected: list[Alone], seed: int, over: threading.Event):
        super().__init__(name=f"good {seed}")
        self.url, self.scans, self.expected, self.over = url, scans, expected, over
        self.choice = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self) -> None:
        ways = [self.ask, self.ask, self.stream, self.stream, self.segment, self.rank, self.new_scan]
        while not self.over.is_set():
            with M3DClient(self.url, timeout=PATIENCE_S) as client:
                for _ in range(self.choice.randrange(1, 20)):
                    which, way = self.choice.randrange(len(self.scans)), self.choice.choice(ways)
                    question = self.choice.choice(QUESTIONS)
                    try:
                        # A known scan, but for one way.
                        study = None if way == self.new_scan else client.upload(self.scans[which], np.eye(4))
                        said = way(client, study, which, question)
                    except M3DError as error:
                        said = f"{type(error).__name__}: {error}"
                    self.done[way.__name__] += 1
                    if said:
                        self.wrong.append(f"{way.__name__} {question!r} of scan {which}: {said}")
                    if self.over.is_set():
                        return

    def ask(self, client, study, which, question) -> str:
        answer = client.ask(study, question, max_new_tokens=TOKENS)
        return self.compared(which, question, answer)

    def stream(self, client, study, which, question) -> str:
        stream = client.stream(study, question, max_new_tokens=TOKENS)
        text = "".join(stream)
        return self.compared(which, question, stream.answer) or ("" if text == stream.answer.text else "torn text")

    def segment(self, client, study, which, question) -> str:
        drawn = client.segment(study, question, max_new_tokens=TOKENS)
        wrong_mask = mask_of(drawn) != self.expected[which].masks[question]
        return self.compared(which, question, drawn.answer) or ("another mask" if wrong_mask else "")

    def rank(self, client, study, which, question) -> str:
        same = client.rank(study, TEXTS).scores.tobytes() == self.expected[which].scores
        return "" if same else "other scores"

    def new_scan(self, client, _, which, question) -> str:
        """The same voxels in another place: a study that nobody has sent, with the answers of a known one."""
        affine = np.eye(4)
        affine[:3, 3] = [self.choice.uniform(1, 1000) for _ in range(3)]
        study = client.upload(self.scans[which], affine)
        return "known" if study.info.cached else self.ask(client, study, which, question)

    def compared(self, which, question, answer) -> str:
        said = answer.token_ids, answer.text
        return "" if said == self.expected[which].answers[question] else f"another answer: {said}"


# --- bad clients -----------------------------------------------------------------------------------------------------
class Wire:
    """A proxy of one connection, that can be cut: both sides see it reset."""

    def __init__(self, url: str):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self.listening.getsockname()[1]}"
        self.server = socket.create_connection(address_of(url))
        self.client: socket.socket | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for end in filter(None, (self.client, self.server)):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()
        self.listening.close()

    def _accept(self) -> None:
        try:
            self.client, _ = self.listening.accept()
        except OSError:
            return
        threading.Thread(target=self._pass, args=(self.server, self.client), daemon=True).start()
        self._pass(self.client, self.server)

    @staticmethod
    def _pass(source: socket.socket, to: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                to.sendall(data)
        except OSError:
            pass


class Bad(threading.Thread):
    """Misbehaves until `over`, one way after the other."""

    def __init__(self, server: Server, handle: str, malformed: list[Request], seed: int, over: threading.Event):
        super().__init__(name=f"bad {seed}")
        self.server, self.handle, self.malformed, self.over = server, handle, malformed, over
        self.choice = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []

    def run(self) -> None:
        ways: list[Callable] = [self.cancels, self.vanishes, self.reads_slowly, self.sends_nonsense]
        ways += [self.sends_too_much, self.leaves_an_upload, self.speaks_http]
        while not self.over.is_set():
            way = self.choice.choice(ways)
            try:
                way()
            except (M3DError, grpc.RpcError, OSError):
                pass  # what it deserves
            except Exception as error:
                self.failed.append(f"{way.__name__}: {error!r}")
            self.done[way.__name__] += 1

    def inputs(self, tokens: int) -> dict:
        sampling = f'{{"max_new_tokens": {tokens}}}'
        values = {"STUDY": self.handle, "QUESTION": self.choice.choice(QUESTIONS), "SAMPLING": sampling, "STREAM": True}
        tensors = {tensor.name: tensor for tensor in contract.MODELS["decoder"].inputs}
        return {tensors[name]: value for name, value in values.items()}

    def cancels(self) -> None:
        connection = Connection(self.server.url)
        try:
            for _ in range(self.choice.randrange(1, 8)):
                stream = connection.stream(self.choice.choice(["decoder", "m3d_chat"]), self.inputs(200), PATIENCE_S)
                for _ in range(self.choice.randrange(3)):
                    next(stream)
                stream.close()
        finally:
            connection.close()

    def vanishes(self) -> None:
        wire = Wire(self.server.url)
        connection = Connection(wire.url)
        try:
            streams = [connection.stream("m3d_chat", self.inputs(300), PATIENCE_S) for _ in range(4)]
            next(streams[0])
        finally:
            wire.cut()
            connection.close()

    def reads_slowly(self) -> None:
        connection = Connection(self.server.url)
        try:
            stream = connection.stream("decoder", self.inputs(100), PATIENCE_S)
            for _ in range(self.choice.randrange(10)):
                next(stream)
                self.over.wait(0.1)
        finally:
            connection.close()

    def sends_nonsense(self) -> None:
        with Raw(self.server.url) as raw:
            for request in self.choice.sample(self.malformed, 20):
                raw.stream(request) if self.choice.random() < 0.5 else raw.infer(request)
            raw.bytes(self.choice.choice(["ModelInfer", "ModelStreamInfer"]), self.choice.randbytes(100))

    def sends_too_much(self) -> None:
        message = Request(model_name="study", raw_input_contents=[bytes(20 * MB)]).SerializeToString()
        with Raw(self.server.url) as raw:
            raw.bytes("ModelInfer", message, compression=self.choice.choice(list(grpc.Compression)))

    def leaves_an_upload(self) -> None:
        """Small, as it is kept for ten minutes."""
        part = request_of("study", VOLUME=bytes(1 << 16), UPLOAD=self.choice.randbytes(8).hex(), UPLOAD_RANGE=(0, MB))
        with Raw(self.server.url) as raw:
            raw.infer(part)

    def speaks_http(self) -> None:
        head = b"POST /metrics HTTP/1.1\r\nHost: m3d\r\nTransfer-Encoding: chunked\r\n\r\n"
        url = self.choice.choice([self.server.url, self.server.metrics_url])
        answer_of(address_of(url), head + CHUNKS[: 6 * self.choice.randrange(100_000)])
        urllib.request.urlopen(self.server.metrics_url, timeout=PATIENCE_S).read()


# --- what they take --------------------------------------------------------------------------------------------------
class Samples:
    """Of each process of the tree: descriptors, threads, anonymous memory, from time to time."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.taken: dict[str, list[tuple[int, int, int]]] = defaultdict(list)

    def take(self) -> None:
        for name, process in self.tree.processes.items():
            self.taken[name].append((process.descriptors, process.threads, process.anonymous))

    def grown(self) -> list[str]:
        """Which process took more than it may."""
        found = []
        for name, samples in self.taken.items():
            descriptors, threads, memory = np.array(samples, np.int64).T
            if memory.max() - memory.mean() >= MOST_MEMORY:
                found.append(f"memory of {name}")
            for what, counts in (("descriptors", descriptors), ("threads", threads)):
                if counts[-1] - counts[0] > HANDFUL:
                    found.append(f"{what} of {name}")
        return found

    def table(self) -> str:
        lines = [f"{'':22}{'descriptors':>24}{'threads':>20}{'MB: mean, max, last':>26}"]
        for name, samples in self.taken.items():
            descriptors, threads, memory = np.array(samples, np.int64).T
            mb = [f"{value / MB:.0f}" for value in (memory.mean(), memory.max(), memory[-1])]
            counts = [f"{c[0]} to {c[-1]}, at most {c.max()}" for c in (descriptors, threads)]
            lines.append(f"{name:22}{counts[0]:>24}{counts[1]:>24}{', '.join(mb):>22}")
        return "\n".join(lines)


def test_beside_bad_clients_good_ones_are_answered_exactly_and_nothing_grows(repository, scans, tmp_path):
    with Server(repository, **free_ports(), log=tmp_path / "triton.log") as server:
        with M3DClient(server.url, timeout=PATIENCE_S) as client:
            expected = [alone(client, scan) for scan in scans]
            handle = client.upload(scans[0], np.eye(4)).handle
        assert expected[0] != expected[1], "the scans must matter, or the test could not see them mixed"
        over, tree = threading.Event(), Tree(server.supervisor_pid)
        samples, before = Samples(tree), tree.pids
        good = [Good(server.url, list(scans), expected, seed, over) for seed in range(GOOD)]
        malformed = [
            case.request
            for model in PUBLIC
            for good_ in good_requests(model, handle, LLM_WIDTH)
            for case in cases(good_)
        ]
        bad = [Bad(server, handle, malformed, seed, over) for seed in range(BAD)]
        started = time.monotonic()
        for client_ in (*good, *bad):
            client_.start()
        try:
            while (passed := time.monotonic() - started) < SECONDS and server._supervisor.poll() is None:
                if passed >= WARM_UP * SECONDS:
                    samples.take()
                over.wait(SAMPLE_S)
        finally:
            over.set()
            for client_ in (*good, *bad):
                client_.join(PATIENCE_S)
        samples.take()
        done = sum((client_.done for client_ in (*good, *bad)), Counter())
        wrong = [words for client_ in good for words in client_.wrong]
        report = f"{dict(done)}\n{samples.table()}\n" + "\n".join(wrong[:20])
        print(report)
        assert Tree(server.supervisor_pid).pids == before, report
        assert wrong == [] and samples.grown() == [], report
        assert [words for client_ in bad for words in client_.failed] == []
        assert min(done.values()) > 0 and len(done) == 6 - 1 + 7, report
