"""All requests of one call share its timeout."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from engine import methods
from engine.api import AnswerInfo, ModelInfo
from engine.errors import StudyNotFound
from engine.methods import Methods, Outputs, run

SCAN = np.zeros((8, 8, 8), np.int16)


class Slow:
    """A transport whose every request takes a second, and which has each study once evicted."""

    def __init__(self, clock):
        self.clock = clock
        self.given: list[tuple[str, float | None]] = []
        self.evicts = False

    def _take(self, what, timeout):
        self.given.append((what, timeout))
        self.clock[0] += 1

    def work(self, function, *arguments):
        return function(*arguments)

    def upload(self, file, inputs, timeout):
        self._take("upload", timeout)
        info = dict.fromkeys(("preset", "reason", "shape", "spacing_mm", "orientation", "prepare_s", "cached", "model"))
        info["model"] = dict.fromkeys(field.name for field in fields(ModelInfo))
        return texts(STUDY="study", STUDY_INFO=json.dumps(info))

    def infer(self, model, inputs, timeout):
        self._take(model, timeout)
        if self.evicts:
            self.evicts = False
            raise StudyNotFound("it is gone")
        return Outputs(
            SCAN_EMBEDDING=np.zeros(4),
            SCORES=np.zeros(1),
            TEXT_EMBEDDINGS=np.zeros((1, 4)),
            TEXT_CUT=np.zeros(1, bool),
            TEXT_LIMIT=np.ones(1, int),
        )

    def stream(self, model, inputs, timeout):
        self._take(model, timeout)
        return self

    def read(self):
        info = dict.fromkeys((field.name for field in fields(AnswerInfo)), 0)
        outputs = texts(TEXT="yes", FINISH_REASON="stop", ANSWER_INFO=json.dumps(info))
        return Outputs(**outputs, TOKEN_IDS=np.zeros(1, int), BOXES=np.zeros((0, 6)), SEG_STATES=np.zeros((0, 4)))

    def finish(self):
        pass

    def close(self):
        pass


def texts(**values):
    return Outputs({name: np.array([value.encode()], object) for name, value in values.items()})


CALLS = {
    "ask": lambda m, study: m.ask(study, "What?", None, 10.0, {}),
    "segment": lambda m, study: m.segment(study, "What?", None, False, "reference", 10.0, {}),
    "rank": lambda m, study: m.rank(study, ["w"], 10.0),
    "embed": lambda m, study: m.embed(study, 10.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_request_of_a_call_is_given_what_the_ones_before_have_left(name, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(methods.time, "monotonic", lambda: clock[0])
    transport = Slow(clock)
    transport.evicts = name in ("rank", "embed")  # so that the scan is sent again, too
    run(CALLS[name](Methods(600.0), SCAN), transport)
    assert len(transport.given) >= 2
    assert [left for _, left in transport.given] == [10.0 - passed for passed in range(len(transport.given))]


def test_a_call_whose_time_is_over_gives_its_last_request_no_time(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(methods.time, "monotonic", lambda: clock[0])
    transport = Slow(clock)
    run(Methods(0.5).ask(SCAN, "What?", None, None, {}), transport)
    assert [left for _, left in transport.given] == [0.5, pytest.approx(0.001)]
