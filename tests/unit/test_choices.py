"""Choices are scored token by token, each beginning once, so many at a time, and held to by a grammar of tokens."""

from __future__ import annotations

import asyncio

import pytest
import xgrammar

from engine.runtime.decoder.choices import STEPS_AT_ONCE, grammar_of, logprobs_of, steps_of

CHOICES = {"a": (5,), "a b": (5, 6), "a c d": (5, 7, 8), "e": (9,)}


def test_each_beginning_is_scored_once():
    assert steps_of(CHOICES) == [(5,), (9,), (5, 6), (5, 7), (5, 7, 8)]


def test_a_choice_has_the_sum_of_its_tokens():
    asked = []

    async def score(said, token):
        asked.append((*said, token))
        return -(10.0 ** -len(said)) * token

    assert asyncio.run(logprobs_of(CHOICES, score)) == pytest.approx(
        {"a": -5, "a b": -5.6, "a c d": -5 - 0.7 - 0.08, "e": -9}
    )
    assert asked == steps_of(CHOICES)


def test_so_many_are_scored_at_a_time():
    working, most = 0, 0

    async def score(said, token):
        nonlocal working, most
        working += 1
        most = max(most, working)
        for _ in range(3):
            await asyncio.sleep(0)
        working -= 1
        return 0.0

    asyncio.run(logprobs_of({str(token): (token,) for token in range(40)}, score))
    assert most == STEPS_AT_ONCE and working == 0


def test_when_one_fails_the_others_end():
    ended = []

    async def score(said, token):
        if token == 9:
            raise RuntimeError("no answer")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(token)

    with pytest.raises(RuntimeError, match="no answer"):
        asyncio.run(logprobs_of(CHOICES, score))
    assert sorted(ended) == [5, 6, 7, 8]


def test_the_grammar_takes_the_tokens_of_one_choice_then_the_end():
    vocabulary = xgrammar.TokenizerInfo([b"t%d" % token for token in range(10)], vocab_size=10, stop_token_ids=[0])
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_grammar(grammar_of(CHOICES))

    def takes(*ids):
        matcher = xgrammar.GrammarMatcher(compiled)
        return all(matcher.accept_token(id_) for id_ in ids)

    assert all(takes(*ids, 0) for ids in CHOICES.values())
    assert not any(takes(*ids) for ids in ((6,), (5, 8), (5, 7, 0), (5, 6, 7), (0,)))
