"""The bookkeeping of kept states: the right rows by key and position, and nothing that stays behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from engine.runtime.decoder import seg_states
from engine.runtime.decoder.seg_states import Request, SegStates, Step

SEG = 7


def begin(states, request_id, key, prompt_length=10):
    request = Request(key, frozenset([SEG]), prompt_length)
    states.begin(request_id, request)
    return request


def step(watched, sampled, is_ready=lambda: True):
    """A step whose row i holds the value 100 * position."""
    rows = torch.stack([torch.full((4,), 100.0 * position) for _, _, position in watched])
    return Step(rows, watched, is_ready, lambda: sampled)


def nothing_is_kept(states):
    counts = states.counts()
    return not any(counts[name] for name in ("running", "requests", "rows", "pending"))


def test_only_rows_of_watched_tokens_are_kept():
    states = SegStates()
    a, b = begin(states, "a", "key-a"), begin(states, "b", "key-b")
    states.record(step([(0, a, 0), (1, b, 5)], [[3], [SEG]]))
    states.record(step([(0, a, 1), (1, b, 6)], [[SEG], [4]]))
    assert states.counts()["rows"] == 2
    assert states.take("key-a", [1])[0].tolist() == [100.0] * 4
    assert states.take("key-b", [5, 6])[0].tolist() == [500.0] * 4


def test_a_kept_row_does_not_hold_its_step():
    states = SegStates()
    first = step([(0, begin(states, "a", "key"), 0)], [[SEG]])
    states.record(first)
    assert states.take("key", [0])[0].untyped_storage().data_ptr() != first.rows.untyped_storage().data_ptr()


def test_tokens_that_arrive_later_are_waited_for_in_order():
    states = SegStates()
    request = begin(states, "a", "key")
    arrived = []
    states.record(step([(0, request, 0)], [[SEG]], lambda: 0 in arrived))
    states.record(step([(0, request, 1)], [[SEG]], lambda: 1 in arrived))
    states.finish(["a"])
    assert states.counts()["pending"] == 3 and states.counts()["rows"] == 0
    arrived += [0, 1]
    assert [row[0].item() for row in states.take("key", [0, 1])] == [0.0, 100.0]
    assert nothing_is_kept(states)


def test_a_request_without_states_frees_itself_when_it_finishes():
    states = SegStates()
    states.record(step([(0, begin(states, "a", "key"), 0)], [[3]]))
    states.finish(["a"])
    assert nothing_is_kept(states)


def test_a_dropped_request_keeps_nothing_of_what_is_still_under_way():
    states = SegStates()
    request = begin(states, "a", "key")
    arrived = []
    states.record(step([(0, request, 0)], [[SEG]], lambda: bool(arrived)))
    states.drop("key")
    arrived.append(True)
    states.record(step([(0, request, 1)], [[SEG]]))
    states.finish(["a"])
    assert nothing_is_kept(states)


def test_a_step_that_samples_nothing_for_a_request_keeps_nothing():
    states = SegStates()
    states.record(step([(0, begin(states, "a", "key"), 0)], [[]]))
    assert states.take("key", [0]) == [None]


def test_a_request_announced_again_after_preemption_keeps_its_states():
    states = SegStates()
    states.record(step([(0, begin(states, "a", "key"), 0)], [[SEG]]))
    begin(states, "a", "key")
    assert states.take("key", [0])[0] is not None


def test_nothing_is_left_after_a_thousand_requests_however_they_end():
    states = SegStates(unclaimed_limit=8)
    for i in range(1000):
        request = begin(states, f"id-{i}", f"key-{i}")
        for position in range(3):
            states.record(step([(0, request, position)], [[SEG if i % 2 else 3]]))
        if i % 5 == 0:
            states.drop(f"key-{i}")  # cancelled
        states.finish([f"id-{i}"])
        if i % 5 == 1:
            states.take(f"key-{i}", [0])
    counts = states.counts()
    assert counts["running"] == counts["pending"] == 0
    assert counts["requests"] == 8, "finished requests that nobody asks for are bounded"


@pytest.mark.parametrize("workers, at_once", [(1, True), (2, False)])
def test_an_engine_that_is_one_process_ends_at_once(monkeypatch, workers, at_once):
    """One with workers clears them away."""
    done = []
    monkeypatch.setattr(seg_states.engine_process, "end_with", lambda owner: done.append(owner))
    monkeypatch.setattr(seg_states.engine_process, "end_at_once_when_asked", lambda: done.append("at once"))
    worker = seg_states.SegStateExtension()
    worker.model_runner = SimpleNamespace(execute_model=None, sample_tokens=None, device=torch.device("cuda"))
    worker.parallel_config = SimpleNamespace(world_size=workers)
    worker.watch_seg_states(7)
    assert done == [7, "at once"][: 1 + at_once]
