"""The check at the start lets right states through and names wrong ones."""
from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from engine.errors import RepositoryError
from engine.runtime.decoder import seg_state_check
from engine.runtime.decoder.seg_state_check import check_seg_states
from tests.tiny_llm import write_tiny_llm


class Engine:
    """What a right engine answers, by transformers; `spoil` changes the states."""

    def __init__(self, model, spoil):
        self.model = model
        self.spoil = spoil
        self.states = {}

    async def generate(self, rows, length, key, watched):
        said = self.model.generate(inputs_embeds=rows[None], max_new_tokens=length, min_new_tokens=length,
                                   do_sample=False)[0]
        rows = torch.cat([rows, self.model.get_input_embeddings()(said[:-1])])
        self.states[key] = self.model.model(inputs_embeds=rows[None]).last_hidden_state[0, -length:].detach().numpy()
        return said.tolist()

    async def take(self, key, positions):
        return self.spoil(self.states[key][positions])


@pytest.fixture(scope="module", params=[False, True], ids=["llama", "phi3"])
def tiny(tmp_path_factory, request):
    return write_tiny_llm(tmp_path_factory.mktemp("tiny") / "repository", phi3=request.param)


def check(tiny, spoil=lambda states: states):
    engine = Engine(tiny.model, spoil)
    return asyncio.run(check_seg_states(tiny.folder, torch.float32, engine.generate, engine.take))


def test_right_states_pass(tiny):
    assert check(tiny) < 1e-5


@pytest.mark.parametrize("spoil, words", [
    (lambda states: np.roll(states, 1, axis=0), "predict"),  # the row of another token
    (lambda states: states * 1.01, "differ from transformers'"),  # close, but not the same
    (lambda states: states * np.nan, "predict"),
])
def test_wrong_states_fail_the_start(tiny, spoil, words):
    with pytest.raises(RepositoryError, match=words):
        check(tiny, spoil)


def test_a_large_model_is_checked_by_its_own_head(tiny, monkeypatch):
    monkeypatch.setattr(seg_state_check, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(seg_state_check, "_direct", None)
    assert check(tiny) < 1e-5
    with pytest.raises(RepositoryError, match="predict"):
        check(tiny, lambda states: np.roll(states, 1, axis=0))
