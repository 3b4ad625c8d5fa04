"""What the model `study` does beside opening scans: it forgets them, and says which model answers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine import contract
from engine.api import EngineInfo
from engine.errors import InvalidInput, StudyNotFound
from engine.methods import typed
from engine.runtime.step import LocalInputs
from engine.runtime.study import Studies
from engine.runtime.study_step import StudyStep
from engine.runtime.study_store import StudyStore
from engine.scan import pack_scan
from tests.unit.fake_models import SIZE, FakeModels, manifest

SCAN = np.frombuffer(pack_scan(np.random.default_rng(0).random((1, *SIZE), np.float32))[0], np.uint8)


@pytest.fixture
def step(tmp_path):
    with StudyStore(tmp_path / "store", 10_000_000) as store:
        step = StudyStep(Studies(store, manifest(), FakeModels()))
        yield step
        step.close()


def ask(step, **inputs):
    answered = step(LocalInputs({getattr(contract, name): value for name, value in inputs.items()}))
    return answered() if callable(answered) else answered


def test_a_study_can_be_forgotten(step):
    handle = ask(step, VOLUME=SCAN)["STUDY"]
    assert ask(step, STUDY_IN=handle)["STUDY"] == handle
    assert set(ask(step, STUDY_IN=handle, FORGET=True).values()) == {""}
    for again in ({"STUDY_IN": handle}, {"STUDY_IN": handle, "FORGET": True}):
        with pytest.raises(StudyNotFound):
            ask(step, **again)


def test_a_scan_that_was_forgotten_is_prepared_and_encoded_again(step):
    handle = ask(step, VOLUME=SCAN)["STUDY"]
    ask(step, STUDY_IN=handle, FORGET=True)
    answered = ask(step, VOLUME=SCAN)
    assert answered["STUDY"] == handle and not json.loads(answered["STUDY_INFO"])["cached"]
    assert step.studies.infer.calls["vision_encoder"] == 2


def test_the_model_is_described_without_a_scan(step):
    answered = ask(step, DESCRIBE=True)
    assert answered["STUDY"] == answered["STUDY_INFO"] == ""
    told = typed(EngineInfo, answered["MODEL_INFO"])
    assert told == manifest().info and told.model.manifest_sha256 == manifest().identity
    assert told.models == ("m3d_segment", "m3d_retrieve")


def test_false_is_as_if_it_were_not_said(step):
    handle = ask(step, VOLUME=SCAN, FORGET=False, DESCRIBE=False)["STUDY"]
    assert ask(step, STUDY_IN=handle, FORGET=False)["STUDY"] == handle


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"FORGET": True}, "no STUDY"),
        ({"FORGET": True, "VOLUME": SCAN}, "VOLUME came with FORGET, which goes with STUDY"),
        ({"FORGET": True, "STUDY_IN": "a", "SEGMENT_HINT": True}, "SEGMENT_HINT came with FORGET"),
        ({"DESCRIBE": True, "STUDY_IN": "a"}, "STUDY came with DESCRIBE, which goes with nothing"),
        ({"DESCRIBE": True, "FORGET": True}, "FORGET came with DESCRIBE"),
    ],
)
def test_what_does_not_go_together_is_refused(step, inputs, words):
    with pytest.raises(InvalidInput, match=words):
        ask(step, **inputs)
