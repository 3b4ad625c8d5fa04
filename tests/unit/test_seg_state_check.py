"""The check at the start lets right states through and names wrong ones."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.errors import RepositoryError
from engine.runtime.decoder import seg_state_check
from engine.runtime.decoder.seg_state_check import check_same_states, check_seg_states
from tests.tiny_llm import write_tiny_llm


class Engine:
    """What a right engine answers, by transformers; `spoil` changes the states, `shift` the tokens."""

    def __init__(self, model, spoil, shift=0):
        self.model = model
        self.spoil = spoil
        self.shift = shift
        self.states = {}

    async def generate(self, rows, length, key, watched):
        said = self.model.generate(
            inputs_embeds=rows[None], max_new_tokens=length, min_new_tokens=length, do_sample=False
        )[0]
        rows = torch.cat([rows, self.model.get_input_embeddings()(said[:-1])])
        self.states[key] = self.model.model(inputs_embeds=rows[None]).last_hidden_state[0, -length:].detach().numpy()
        return [token + self.shift for token in said.tolist()]

    async def take(self, key, positions):
        return self.spoil(self.states[key][positions])


@pytest.fixture(scope="module", params=[False, True], ids=["llama", "phi3"])
def tiny(tmp_path_factory, request):
    return write_tiny_llm(tmp_path_factory.mktemp("tiny") / "repository", phi3=request.param)


def right(states):
    return states


def check(tiny, spoil=right) -> seg_state_check.Checked:
    engine = Engine(tiny.model, spoil)
    return asyncio.run(check_seg_states(tiny.folder, torch.float32, engine.generate, engine.take))


def check_again(tiny, before, spoil=right, shift=0) -> seg_state_check.Checked:
    engine = Engine(tiny.model, spoil, shift)
    return asyncio.run(check_same_states(before, engine.generate, engine.take))


def test_right_states_pass(tiny):
    checked = check(tiny)
    assert checked.difference < 1e-5
    assert check_again(tiny, checked).difference < 1e-5


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda states: np.roll(states, 1, axis=0), "predict"),  # the row of another token
        (lambda states: states * 1.01, "differ from transformers'"),  # close, but not the same
        (lambda states: states * np.nan, "predict"),
    ],
)
def test_wrong_states_fail_the_start(tiny, spoil, words):
    with pytest.raises(RepositoryError, match=words):
        check(tiny, spoil)


def test_a_large_model_is_checked_by_its_own_head(tiny, monkeypatch):
    monkeypatch.setattr(seg_state_check, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(seg_state_check, "_by_transformers", None)
    assert check(tiny).difference < 1e-5
    with pytest.raises(RepositoryError, match="predict"):
        check(tiny, lambda states: np.roll(states, 1, axis=0))


@pytest.mark.parametrize(
    "spoil", [lambda states: np.roll(states, 1, axis=0), lambda states: states * 1.01, lambda states: states * np.nan]
)
def test_another_way_to_compute_must_give_the_same_states(tiny, spoil):
    checked = check(tiny)
    with pytest.raises(RepositoryError, match="differ from those of vLLM's own pass"):
        check_again(tiny, checked, spoil)


def test_states_after_another_token_are_not_compared(tiny):
    """In reduced precision two ways to compute may say different tokens, and all that follows differs."""
    checked = check(tiny)
    said, states = [checked.said[0] + 1, *checked.said[1:]], checked.states.clone()
    states[1:] = 7
    assert check_again(tiny, replace(checked, said=said, states=states)).difference < 1e-5


def test_tokens_that_the_states_do_not_predict_fail_the_start(tiny):
    """A wrong output layer says another token first, after which no state can be compared."""
    with pytest.raises(RepositoryError, match="predict"):
        check_again(tiny, check(tiny), shift=1)


class Undecided:
    """An engine whose answers take turns: tokens 4 and 5 have the same row, so that either is right."""

    def __init__(self, *answers):
        self.answers = itertools.cycle(answers)
        self.kept = {}

    async def generate(self, rows, length, key, watched):
        said = next(self.answers)
        self.kept[key] = [token in watched for token in said]
        return list(said)

    async def take(self, key, positions):
        assert all(self.kept[key][position] for position in positions)
        return np.stack([table_of_a_tie()[4].numpy()] * len(positions))


def table_of_a_tie() -> torch.Tensor:
    table = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    table[5] = table[4]
    return table


@pytest.mark.parametrize("answers", [[(4, 4, 4), (4, 5, 4)], [(4, 4, 4), (5, 4, 4), (4, 5, 5), (4, 4, 5)]])
def test_a_tie_between_two_tokens_does_not_fail_the_start(tmp_path, monkeypatch, answers):
    monkeypatch.setattr(seg_state_check, "SMALL_MODEL_BYTES", 0)
    table = table_of_a_tie().bfloat16()
    save_file({"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    engine = Undecided(*answers)
    checked = asyncio.run(check_seg_states(tmp_path, torch.bfloat16, engine.generate, engine.take))
    assert set(checked.said) <= {4, 5} and checked.difference < 0.01


def test_an_engine_that_never_says_the_same_fails_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(seg_state_check, "SMALL_MODEL_BYTES", 0)
    table = table_of_a_tie().bfloat16()
    save_file({"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    engine = Undecided(*((n, n + 1, n + 2) for n in range(0, 60, 3)))
    with pytest.raises(RepositoryError, match="another answer each time"):
        asyncio.run(check_seg_states(tmp_path, torch.bfloat16, engine.generate, engine.take))
