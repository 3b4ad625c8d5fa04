"""Many questions about two patients at once: every answer is the one that it would be alone."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import Cancelled
from engine.server import supervisor
from tests.functional.footprint import stub_of

pytestmark = pytest.mark.integration

QUESTIONS = 32
TOKENS = 40


@pytest.fixture(scope="module")
def asked(client, scans):
    """(study, question) of 64 requests: two scans, the same 32 questions, interleaved."""
    studies = [client.upload(scan) for scan in scans]
    questions = [
        " ".join(f"w{random.Random(i).randrange(5, 250)}" for _ in range(1 + i % 7)) + f" w{5 + i}"
        for i in range(QUESTIONS)
    ]
    return [(study, question) for question in questions for study in studies]


@pytest.fixture(scope="module")
def alone(client, asked):
    answers = [client.ask(*request, max_new_tokens=TOKENS) for request in asked]
    different = sum(answers[i].token_ids != answers[i + 1].token_ids for i in range(0, len(answers), 2))
    assert different > QUESTIONS / 2, "the scans must matter, or the test could not see them mixed"
    return answers


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow(group="soak")) for n in range(1, 9))])
def test_survivors_of_a_crowd_half_cancelled_get_the_answers_they_get_alone(client, asked, alone, seed):
    choice = random.Random(seed)
    cut_after = {i: choice.randrange(TOKENS // 2) for i in choice.sample(range(len(asked)), len(asked) // 2)}
    everyone = threading.Barrier(len(asked))

    def request(i: int):
        everyone.wait()
        stream = client.stream(*asked[i], max_new_tokens=TOKENS)
        if i not in cut_after:
            return "".join(stream), stream.answer
        for _ in range(cut_after[i]):
            if next(stream, None) is None:
                break
        stream.close()
        return None

    with ThreadPoolExecutor(len(asked)) as pool:
        results = list(pool.map(request, range(len(asked))))
    survivors = [i for i in range(len(asked)) if i not in cut_after]
    assert len(survivors) == len(asked) // 2
    for i in survivors:
        text, answer = results[i]
        assert answer.token_ids == alone[i].token_ids
        assert text == answer.text == alone[i].text
        assert answer.finish_reason == alone[i].finish_reason


def test_masks_of_two_patients_drawn_at_once_are_those_drawn_alone(client, asked):
    pairs = asked[:8]
    alone = [client.segment(*request, max_new_tokens=TOKENS) for request in pairs]
    with ThreadPoolExecutor(len(pairs)) as pool:
        together = list(pool.map(lambda request: client.segment(*request, max_new_tokens=TOKENS), pairs))
    assert any(found.mask is not None for found in alone)
    for one, other in zip(alone, together):
        assert one.answer.token_ids == other.answer.token_ids
        assert (one.mask is None) == (other.mask is None)
        assert one.mask is None or (one.mask == other.mask).all()


def test_a_cancelled_stream_says_so(client, asked):
    stream = client.stream(*asked[0], max_new_tokens=TOKENS)
    stream.close()
    with pytest.raises(Cancelled):
        next(stream)


@pytest.mark.parametrize("graph", ["vision_encoder", "segmentation_encoder"])
def test_an_encoder_leaves_most_of_the_cores_to_answers_in_progress(server, client, asked, graph):
    client.segment(*asked[0], max_new_tokens=TOKENS)  # now all its threads are there
    stub = stub_of(server.supervisor_pid, graph)
    decoder = stub_of(server.supervisor_pid, "decoder")
    decoding = [thread for pid in (decoder, *supervisor.descendants(decoder)) for thread in _threads(pid)]
    # The thread that runs the graph, and the last that its library has started; those between may be Triton's own.
    for thread in (stub, max(_threads(stub))):
        assert _niceness(thread) >= max(map(_niceness, decoding)) + 5


def _threads(pid: int) -> list[int]:
    return list(map(int, os.listdir(f"/proc/{pid}/task")))


def _niceness(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)
