"""The client on a real Triton: requests that end early free their place, slow readers hold up nobody."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from engine import contract
from engine.client import M3DClient, Study
from engine.client.connection import Connection
from engine.errors import Cancelled, DeadlineExceeded, M3DError, ResourceExhausted, StudyNotFound
from tests.functional.footprint import Footprint
from tests.tiny import QUESTION

pytestmark = pytest.mark.integration

LONG = 480  # tokens: seconds of decoding, nearly to the context's end
BATCH, WAITING = 16, 64  # max_num_seqs and max_waiting of table decoder.cpu in model_repository/settings.toml
PATIENCE_S = 120


@pytest.fixture(scope="module")
def study(client, scans):
    return client.upload(scans[0])


@pytest.fixture(scope="module")
def long_answer(client, study):
    answer = client.ask(study, QUESTION, max_new_tokens=LONG)
    assert len(answer.token_ids) == LONG
    return answer


class Reader(threading.Thread):
    """Reads a stream to its end, whatever that is."""

    def __init__(self, stream, done: queue.SimpleQueue | None = None):
        super().__init__(daemon=True)
        self.stream = stream
        self.done = done
        self.begun = threading.Event()
        self.ended_by: M3DError | None = None
        self.began_at = self.ended_at = math.inf
        self.start()

    def run(self):
        try:
            for _ in self.stream:
                self.began_at = min(self.began_at, time.monotonic())
                self.begun.set()
        except M3DError as error:
            self.ended_by = error
        finally:
            self.ended_at = time.monotonic()
            if self.done:
                self.done.put(self)


def closed(stream):
    stream.close()


def past_its_deadline(stream):
    with pytest.raises(DeadlineExceeded):
        list(stream)


@pytest.mark.parametrize("end", [closed, past_its_deadline], ids=lambda f: f.__name__)
def test_a_request_that_ends_early_frees_its_place_in_the_batch(client, study, long_answer, end):
    """The decoder's batch is full, the last to come ends early, and one that waited begins before any other is done."""
    with ExitStack() as stack:

        def ask(timeout=None):
            return stack.enter_context(client.stream(study, QUESTION, max_new_tokens=LONG, timeout=timeout))

        readers = [Reader(ask()) for _ in range(BATCH - 1)]
        assert all(reader.begun.wait(PATIENCE_S) for reader in readers)
        # In a full batch an answer takes longer than alone: the others are still at it when this deadline passes.
        last = ask(timeout=0.5 * long_answer.timings.total_s if end is past_its_deadline else None)
        next(last)
        waiting = Reader(ask())
        end(last)
        assert waiting.begun.wait(PATIENCE_S)
        assert all(reader.ended_at > waiting.began_at for reader in readers)
    for reader in (*readers, waiting):
        reader.join(PATIENCE_S)
        assert not reader.is_alive() and (reader.ended_by is None or isinstance(reader.ended_by, Cancelled))


def test_questions_beyond_what_the_server_takes_are_refused_at_once(client, study):
    with ExitStack() as stack:
        done = queue.SimpleQueue()
        for _ in range(BATCH + WAITING + 1):  # each on a stream of its own, so any of them may come last
            Reader(stack.enter_context(client.stream(study, QUESTION, max_new_tokens=LONG)), done)
        refused = done.get(timeout=PATIENCE_S)
        assert isinstance(refused.ended_by, ResourceExhausted)
    while True:  # the others were cancelled, so there is room soon
        try:
            assert client.ask(study, QUESTION, max_new_tokens=1).token_ids
            break
        except ResourceExhausted:
            continue


def test_a_reader_that_is_slow_holds_up_nobody_and_misses_nothing(client, study, long_answer):
    stream = client.stream(study, QUESTION, max_new_tokens=LONG)
    first = next(stream)
    for _ in range(4):
        assert client.ask(study, QUESTION, max_new_tokens=LONG).token_ids == long_answer.token_ids
    assert first + "".join(stream) == long_answer.text
    assert stream.answer.token_ids == long_answer.token_ids


def test_the_ensemble_answers_like_the_client(server, study, long_answer):
    """m3d_chat, for clients of other kinds."""
    connection = Connection(server.url)
    inputs = {
        contract.STUDY_IN: study.handle,
        contract.QUESTION: QUESTION,
        contract.STREAM: True,
        contract.SAMPLING: f'{{"max_new_tokens": {LONG}}}',
    }
    responses = list(connection.stream("m3d_chat", inputs, PATIENCE_S))
    assert "".join(response.text("TEXT") for response in responses) == long_answer.text
    assert responses[-1].text("FINISH_REASON") == "length"
    connection.close()


@pytest.mark.slow(group="soak")
def test_many_streams_of_the_ensemble_leave_the_server_alive(server, client, study):
    """It does not use all outputs of the decoder. Dropping them killed the decoder within a few thousand responses."""

    def ask(stream: int) -> int:
        connection = Connection(server.url)
        inputs = {
            contract.STUDY_IN: study.handle,
            contract.QUESTION: f"{QUESTION} {stream}",
            contract.STREAM: True,
            contract.SAMPLING: f'{{"max_new_tokens": {LONG}}}',
        }
        responses = sum(1 for _ in connection.stream("m3d_chat", inputs, PATIENCE_S))
        connection.close()
        return responses

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(ask, range(24))) > 2000
    assert client.is_ready()


def test_a_handle_of_nothing_is_not_found(client):
    with pytest.raises(StudyNotFound):
        client.ask(Study("0" * 64), QUESTION)


def test_a_mask_and_its_answer_are_those_of_a_plain_question(client, study):
    found = client.segment(study, QUESTION, max_new_tokens=24)
    asked = client.ask(study, QUESTION, max_new_tokens=24)
    assert found.answer.token_ids == asked.token_ids
    assert "[SEG]" in asked.text and found.mask is not None
    assert found.mask.shape == study.info.shape


def test_clients_that_come_and_go_leave_triton_no_sockets(server, study):
    """A cancelled call cost one for good: about 30 of these 100."""
    triton = Footprint(server.supervisor_pid).triton_pid

    def ask(_):
        with M3DClient(server.url, timeout=PATIENCE_S) as client:
            assert client.ask(study, QUESTION, max_new_tokens=2).token_ids

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(ask, range(20)))
        before = len(os.listdir(f"/proc/{triton}/fd"))
        list(threads.map(ask, range(100)))
    assert len(os.listdir(f"/proc/{triton}/fd")) <= before + 8
