"""A real vLLM on a tiny random LLaMA and on a Phi-3 answers exactly as transformers, however many ask at once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

import jsonschema
import numpy as np
import psutil
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from engine.api import AnswerDetails, AnswerInfo
from engine.errors import InvalidInput, RepositoryError, ResourceExhausted, Unavailable
from engine.processor import has_bf16
from engine.runtime.acceleration import Pass
from engine.runtime.cpu import decode_kernel
from engine.runtime.decoder import Decoder, llm_engine
from engine.runtime.decoder_settings import DecoderSettings
from engine.sampling import Sampling
from tests.tiny_llm import (
    BOS,
    CONTEXT,
    EOS,
    VISUAL_TOKENS,
    VOCABULARY,
    WIDTH,
    question,
    visual_tokens,
    write_tiny_llm,
)

pytestmark = pytest.mark.integration

AT_ONCE = 12
FURTHEST = Pass.DECODE_KERNEL if decode_kernel.library() else Pass.DIRECT  # compiled where there is a C compiler
# The cache of 1250 rows holds twelve prompts, but not their answers: some are preempted. A step has 512 rows: of two
# long prompts one is cut into chunks.
SETTINGS = DecoderSettings(
    kv_cache_gib=0.0012,
    max_num_seqs=AT_ONCE,
    max_waiting=AT_ONCE,
    max_num_batched_tokens=1,
    block_size=32,
    enforce_eager=True,
    threads=1,
    restarts=1,
)
LENGTH = 64


@dataclass(frozen=True)
class Answer:
    text: str
    ids: list[int]
    finish_reason: str
    states: np.ndarray
    info: AnswerInfo
    details: AnswerDetails | None


class Running:
    """A decoder on a loop of its own thread, asked from the test's thread. broken: what was told of a broken one."""

    def __init__(self, repository):
        self.decoder = Decoder(repository, SETTINGS)
        self.health, self.broken = [], []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.run(self.decoder.start(self.health.append, self.broken.append))

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def answer(self, visual, asked, salt="", **sampling) -> Answer:
        deltas = [delta async for delta in self.decoder.answer(visual, asked, Sampling(**sampling), salt)]
        last = deltas[-1]
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        return Answer(
            "".join(delta.text for delta in deltas),
            [id_ for delta in deltas for id_ in delta.token_ids],
            last.finish_reason,
            last.states,
            last.info,
            last.details,
        )

    def ask(self, visual, asked, **sampling) -> Answer:
        return self.run(self.answer(visual, asked, **sampling))

    def ask_all(self, *cases, **sampling) -> list[Answer]:
        async def together():
            return await asyncio.gather(*(self.answer(*case, **sampling) for case in cases))

        return self.run(together())

    def kept(self) -> dict[str, int]:
        """Counts of the worker once the requests that it does not know to be over are gone."""
        for _ in range(200):
            counts = self.run(self.decoder.engine.count_states())
            if not (counts["running"] or counts["pending"]):
                break
        return counts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llm(tmp_path_factory.mktemp("tiny") / "repository")


@pytest.fixture(scope="module")
def running(tiny):
    with started(tiny) as running:
        yield running


@contextmanager
def started(tiny):
    running = Running(tiny.repository)
    try:
        yield running
    finally:
        processes = llm_engine._processes(running.decoder.engine._llm)
        running.run(running.decoder.stop())
    assert not any(psutil.pid_exists(process.pid) for process in processes)
    # None had to be killed, but by a test.
    assert {process.exitcode for process in processes} <= {0, -signal.SIGKILL}


def case(i: int):
    """Questions about 6 scans."""
    return visual_tokens(i % 6), question(i)


def long_case(i: int):
    return visual_tokens(i % 6), question(i, words=300)


def right_answer(tiny, case):
    """ids, and the states of their [SEG] tokens"""
    ids = tiny.generate(*case, LENGTH)
    return ids, tiny.states(*case, ids)[np.array(ids) == tiny.manifest.seg_token_id]


@pytest.fixture(scope="module")
def expected(tiny):
    """The right answers to the cases."""
    return [right_answer(tiny, case(i)) for i in range(2 * AT_ONCE)]


def assert_equals(answer: Answer, expected) -> None:
    ids, states = expected
    assert answer.ids == ids
    assert answer.states.shape == (len(states), WIDTH) and answer.states.dtype == np.float32
    assert np.abs(answer.states - states).max(initial=0) < 2e-5


def assert_nothing_is_kept(running: Running) -> None:
    counts = running.kept()
    assert {name: counts[name] for name in ("running", "requests", "rows", "pending")} == dict.fromkeys(
        ("running", "requests", "rows", "pending"), 0
    )


def test_the_cases_hold_what_the_tests_need(expected):
    assert sum(len(states) for _, states in expected) > 12
    assert any(len(states) > 1 for _, states in expected) and any(len(states) == 0 for _, states in expected)
    assert any(ids[-1] == EOS for ids, _ in expected) and any(len(ids) == LENGTH for ids, _ in expected)


def test_ids_text_and_states_are_those_of_transformers(running, expected):
    # So that this and the following hold for the shorter pass, and, where few answers are left, for the decode kernel.
    assert running.decoder.engine.layers is FURTHEST
    for i in range(4):
        answer = running.ask(*case(i), max_new_tokens=LENGTH)
        assert_equals(answer, expected[i])
        assert answer.text == running.decoder._tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if answer.ids[-1] == EOS else "length")
        assert answer.info.answer_tokens == len(answer.ids)
        assert answer.info.prompt_tokens == 1 + VISUAL_TOKENS + len(case(i)[1].split())


def test_they_stay_so_under_concurrency_and_preemption(running, expected):
    before = running.kept()["preemptions"]
    answers = running.ask_all(*((*case(i), "crowd") for i in range(2 * AT_ONCE)), max_new_tokens=LENGTH)
    for answer, right in zip(answers, expected):
        assert_equals(answer, right)
    assert running.kept()["preemptions"] > before
    assert_nothing_is_kept(running)


def test_they_stay_so_for_prompts_computed_in_chunks(running, tiny):
    before = running.kept()["cut_prompts"]
    answers = running.ask_all(*((*long_case(i), "chunks") for i in range(AT_ONCE)), max_new_tokens=LENGTH)
    for i, answer in enumerate(answers):
        assert_equals(answer, right_answer(tiny, long_case(i)))
    assert running.kept()["cut_prompts"] > before


def test_a_second_question_about_a_scan_finds_its_visual_prefix_cached(running, expected):
    first = running.ask(*case(0), salt="cached", max_new_tokens=LENGTH)
    second = running.ask(*case(6), salt="cached", max_new_tokens=LENGTH)  # the same scan
    assert first.info.cached_tokens == 0 and second.info.cached_tokens == VISUAL_TOKENS
    assert_equals(first, expected[0])
    assert_equals(second, expected[6])


def test_neither_another_scan_nor_another_tenant_finds_it(running):
    running.ask(*case(0), salt="first tenant", max_new_tokens=1)
    assert running.ask(visual_tokens(99), question(0), salt="first tenant", max_new_tokens=1).info.cached_tokens == 0
    assert running.ask(*case(0), salt="second tenant", max_new_tokens=1).info.cached_tokens == 0
    assert running.ask(*case(0), salt="first tenant", max_new_tokens=1).info.cached_tokens == VISUAL_TOKENS


def test_answers_closed_midway_are_freed_and_the_others_stay_right(running, expected):
    async def close_after(i, deltas):
        async with aclosing(running.decoder.answer(*case(i), Sampling(max_new_tokens=LENGTH))) as answer:
            async for _ in answer:
                deltas -= 1
                if deltas <= 0:
                    return None

    async def one(i):
        return await (running.answer(*case(i), max_new_tokens=LENGTH) if i % 2 else close_after(i, i))

    async def all_of_them():
        return await asyncio.gather(*map(one, range(2 * AT_ONCE)))

    for i, answer in enumerate(running.run(all_of_them())):
        if i % 2:
            assert_equals(answer, expected[i])
    assert_nothing_is_kept(running)


def test_answers_cancelled_at_random_moments_are_freed(running):
    generator = random.Random(0)

    async def cancelled(i):
        task = asyncio.create_task(running.answer(*case(i), max_new_tokens=LENGTH))
        await asyncio.wait([task], timeout=generator.random() / 10)
        return not task.cancel() or await asyncio.gather(task, return_exceptions=True)

    async def all_of_them():
        return await asyncio.gather(*map(cancelled, range(2 * AT_ONCE)))

    running.run(all_of_them())
    assert_nothing_is_kept(running)
    assert running.decoder._answering == 0


def test_nothing_is_kept_after_a_thousand_answers(running):
    async def short(i):
        async with aclosing(running.decoder.answer(*case(i), Sampling(max_new_tokens=1 + i % 4))) as answer:
            async for _ in answer:
                if i % 3 == 0:
                    return

    async def batch(start):
        await asyncio.gather(*map(short, range(start, start + AT_ONCE)))

    for start in range(0, 1000, AT_ONCE):
        running.run(batch(start))
    assert_nothing_is_kept(running)


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(running, expected):
    def words(ids):
        return running.decoder._tokenizer.decode(ids, skip_special_tokens=True)

    seg = running.decoder.manifest.seg_token_id
    i, end, stop = next(
        (i, end, stop)
        for i, (ids, _) in enumerate(expected)
        for end in range(2, len(ids) - 2)
        if seg in ids[:end] and (stop := words(ids[end : end + 2])) not in words(ids[: end + 1])
    )
    ids, _ = expected[i]
    answer = running.ask(*case(i), max_new_tokens=LENGTH, stop=(stop, "never said"))
    assert answer.text.strip() == words(ids[:end])
    assert answer.finish_reason == "stop" and answer.ids == ids[: end + 2]
    assert len(answer.states) == answer.ids.count(seg)
    assert_nothing_is_kept(running)


def test_a_seed_gives_the_same_answer_alone_and_among_others(running):
    sampling = dict(max_new_tokens=LENGTH, temperature=1.5, top_p=0.9, top_k=40, seed=17)
    alone = [running.ask(*long_case(i), **sampling) for i in range(AT_ONCE)]
    before = running.kept()["cut_prompts"]
    together = running.ask_all(*((*long_case(i), "seeds") for i in range(AT_ONCE)), **sampling)
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert running.kept()["cut_prompts"] > before, "which vLLM alone does not survive with a seed"
    other = running.ask(*long_case(0), **{**sampling, "seed": 18})
    assert other.ids != alone[0].ids


class PenaltyWithBos(LogitsProcessor):
    """transformers' penalty, which knows the answer only, and the prompt's BOS."""

    def __call__(self, input_ids, scores):
        ids = torch.cat([torch.tensor([[BOS]]), input_ids], dim=1)
        return RepetitionPenaltyLogitsProcessor(1.3)(ids, scores)


def test_the_repetition_penalty_sees_this_answer_only(running, tiny):
    right = [tiny.generate(*case(i), LENGTH, logits_processor=[PenaltyWithBos()]) for i in range(AT_ONCE)]
    answers = running.ask_all(*map(case, range(AT_ONCE)), max_new_tokens=LENGTH, repetition_penalty=1.3)
    assert [answer.ids for answer in answers] == right


# --- log-probabilities, choices, constraints --------------------------------------------------------------------------
CHOICES = {"w5": [5], "w6 w7": [6, 7], "w6 w9 w9": [6, 9, 9], "w6": [6], "w200": [200]}


@torch.inference_mode()
def logprobs_of(tiny, visual, asked, said) -> torch.Tensor:
    """fp32 [len(said), V] by transformers: what each token that was said was chosen from."""
    return tiny.model.lm_head(torch.from_numpy(tiny.states(visual, asked, said))).log_softmax(-1)


def likelihood(tiny, visual, asked, said) -> float:
    return float(logprobs_of(tiny, visual, asked, said)[range(len(said)), said].sum())


def assert_choices(tiny, case, answer) -> None:
    assert answer.details.choices == pytest.approx(
        {text: likelihood(tiny, *case, ids) for text, ids in CHOICES.items()}, abs=1e-4
    )


def test_log_probabilities_are_those_of_transformers(running, tiny, expected):
    for i in range(4):
        answer = running.ask(*case(i), max_new_tokens=LENGTH, logprobs=4)
        assert_equals(answer, expected[i])
        right = logprobs_of(tiny, *case(i), answer.ids)
        assert [token.token_id for token in answer.details.logprobs] == answer.ids
        for token, scores in zip(answer.details.logprobs, right):
            assert token.logprob == pytest.approx(float(scores[token.token_id]), abs=1e-4)
            top = scores.topk(4)
            assert [each.logprob for each in token.top] == pytest.approx(top.values.tolist(), abs=1e-4)
            assert [each.token_id for each in token.top] == top.indices.tolist()
            assert token.text == running.decoder._tokenizer.decode([token.token_id])


def test_choices_have_their_likelihood_however_many_tokens_they_have(running, tiny, expected):
    for i in range(3):
        answer = running.ask(*case(i), max_new_tokens=LENGTH, choices=list(CHOICES))
        assert_equals(answer, expected[i])
        assert_choices(tiny, case(i), answer)


def test_they_stay_right_among_others(running, tiny, expected):
    """In one batch: plain questions, log-probabilities, choices and an answer that is held to them."""

    async def together():
        kinds = ({}, {"logprobs": 2}, {"choices": list(CHOICES)}, {"choices": list(CHOICES), "only_choices": True})
        return await asyncio.gather(
            *(running.answer(*case(i), max_new_tokens=LENGTH, **kinds[i % 4]) for i in range(AT_ONCE))
        )

    answers = running.run(together())
    for i, answer in enumerate(answers):
        if i % 4 < 3:
            assert_equals(answer, expected[i])
        if i % 4 == 0:
            assert answer.details is None
        if i % 4 == 1:
            right = logprobs_of(tiny, *case(i), answer.ids)
            assert [[each.token_id for each in token.top] for token in answer.details.logprobs] == right.topk(
                2
            ).indices.tolist()
        if i % 4 > 1:
            assert_choices(tiny, case(i), answer)
    assert_nothing_is_kept(running)


def test_temperature_and_penalty_change_no_log_probability(running, tiny):
    answer = running.ask(
        *case(0), max_new_tokens=8, temperature=1.5, seed=3, repetition_penalty=1.5, logprobs=0, choices=list(CHOICES)
    )
    right = logprobs_of(tiny, *case(0), answer.ids)[range(len(answer.ids)), answer.ids]
    assert [token.logprob for token in answer.details.logprobs] == pytest.approx(right.tolist(), abs=1e-4)
    assert all(token.top == () for token in answer.details.logprobs)
    assert_choices(tiny, case(0), answer)


def test_an_answer_may_be_held_to_the_choices(running, tiny):
    for i in range(3):
        said, left = [], list(CHOICES.values())
        while left:
            scores = logprobs_of(tiny, *case(i), [*said, 0])[-1]
            allowed = {ids[len(said)] if len(said) < len(ids) else EOS for ids in left}
            said.append(max(allowed, key=lambda id_: scores[id_]))
            left = [ids for ids in left if ids[: len(said)] == said]
        answer = running.ask(*case(i), max_new_tokens=LENGTH, choices=list(CHOICES), only_choices=True)
        assert answer.ids == said and answer.finish_reason == "stop" and answer.text.strip() in CHOICES


@pytest.mark.parametrize(
    "asked, choices, words",
    [
        ("w5", ["w600", "w601"], "same tokens"),
        ("w5", ["w5 </s>"], "</s>, which ends answers"),
        ("w5", [f"w{i} " * 50 + "w4" for i in range(5, 15)], "510 tokens in all, at most 256"),
        ("w5 " * (CONTEXT - VISUAL_TOKENS - 3), ["w5 w5 w5"], "a choice has 3 tokens.*room for 2"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(running, expected, asked, choices, words):
    with pytest.raises(InvalidInput, match=words):
        running.ask(visual_tokens(0), asked, choices=choices, max_new_tokens=1)
    assert_equals(running.ask(*case(1), max_new_tokens=LENGTH), expected[1])


def test_a_cancelled_question_ends_the_scoring_of_its_choices(running):
    async def cancelled(i):
        task = asyncio.create_task(running.answer(*case(i), max_new_tokens=1, choices=list(CHOICES)))
        await asyncio.wait([task], timeout=i / 1000)
        return not task.cancel() or await asyncio.gather(task, return_exceptions=True)

    async def all_of_them():
        return await asyncio.gather(*map(cancelled, range(AT_ONCE)))

    running.run(all_of_them())
    assert_nothing_is_kept(running)
    assert running.decoder._answering == 0


SCHEMA = {
    "type": "object",
    "properties": {
        "organ": {"enum": ["liver", "spleen", "left kidney"]},
        "seen": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "words": {"type": "array", "items": {"$ref": "#/$defs/word"}, "maxItems": 2},
    },
    "required": ["organ", "seen", "count", "words"],
    "$defs": {"word": {"type": "string", "maxLength": 3}},
}


def spell_bytes(tiny) -> None:
    """Give it a tokenizer whose tokens 3, 4, ... are single bytes."""
    path = tiny.folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    free = [id_ for id_ in range(3, VOCABULARY) if id_ != tiny.manifest.seg_token_id]
    vocabulary = settings["model"]["vocab"]
    names = {id_: name for name, id_ in vocabulary.items()} | dict(zip(free, alphabet))
    settings["model"] = {"type": "BPE", "vocab": {name: id_ for id_, name in sorted(names.items())}, "merges": []}
    settings["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    settings["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    path.write_text(json.dumps(settings))


def test_an_answer_may_be_held_to_a_json_schema(tmp_path):
    tiny = write_tiny_llm(tmp_path / "repository")
    spell_bytes(tiny)
    with started(tiny) as running:
        asked = "What is this?"
        before = running.ask(visual_tokens(0), asked, max_new_tokens=24)
        assert "{" not in before.text[:1]
        settings = [{}, {}, {"temperature": 1.0, "seed": 5}, {"logprobs": 2}]

        async def together():
            return await asyncio.gather(
                *(
                    running.answer(visual_tokens(i), asked, max_new_tokens=200, json_schema=SCHEMA, **more)
                    for i, more in enumerate(settings)
                )
            )

        answers = running.run(together())
        for answer in answers:
            assert answer.finish_reason == "stop"
            jsonschema.validate(json.loads(answer.text), SCHEMA)
        assert all(len(each.logprobs) == len(answers[3].ids) for each in [answers[3].details])
        cut = running.ask(visual_tokens(0), asked, max_new_tokens=5, json_schema=SCHEMA)
        assert cut.finish_reason == "length" and answers[0].text.startswith(cut.text)
        # As training spells an answer: behind a space.
        choices = running.ask(visual_tokens(0), asked, max_new_tokens=1, choices=["yes", "no"]).details.choices
        held = running.ask(visual_tokens(0), asked, max_new_tokens=9, choices=["yes", "no"], only_choices=True)
        assert held.text in ("yes", "no") and set(choices) == {"yes", "no"}
        assert running.ask(visual_tokens(0), asked, max_new_tokens=24).ids == before.ids


def test_a_schema_that_this_model_cannot_spell_fails_its_own_answer_only(running, expected):
    """The vocabulary has words, and no brace."""

    async def together():
        asked = [running.answer(*case(i), max_new_tokens=LENGTH) for i in range(3)]
        asked.insert(1, running.answer(*case(1), max_new_tokens=LENGTH, json_schema={"type": "object"}))
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = running.run(together())
    refused = answers.pop(1)
    assert type(refused) is InvalidInput and "cannot be held to its json_schema" in str(refused)
    for answer, right in zip(answers, expected):
        assert_equals(answer, right)
    assert running.decoder.health == "ready"
    assert_nothing_is_kept(running)


def with_value(value):
    visual = visual_tokens(0).copy()
    visual[3, 5] = value
    return visual


@pytest.mark.parametrize(
    "visual, asked, sampling, words",
    [
        (
            visual_tokens(0)[:, :-1],
            "w5",
            {},
            f"must be floats of shape .{VISUAL_TOKENS}, {WIDTH}., not float32 .64, 127.",
        ),
        (visual_tokens(0)[:, :1], "w5", {}, "must be floats of shape"),
        (visual_tokens(0)[:-1], "w5", {}, "must be floats of shape"),
        (np.ones((VISUAL_TOKENS, WIDTH), np.int64), "w5", {}, "not int64"),
        (with_value(np.nan), "w5", {}, "not finite"),
        (with_value(np.inf), "w5", {}, "not finite"),
        (visual_tokens(0), "  ", {}, "question is empty"),
        (visual_tokens(0), "w5 " * CONTEXT, {}, "may have at most"),
        (visual_tokens(0), "w5", {"max_new_tokens": CONTEXT}, f"room for {CONTEXT - VISUAL_TOKENS - 2}"),
    ],
)
def test_what_would_break_the_engine_is_refused_and_the_next_answer_is_right(
    running, expected, visual, asked, sampling, words
):
    with pytest.raises(InvalidInput, match=words):
        running.ask(visual, asked, **sampling)
    assert_equals(running.ask(*case(1), max_new_tokens=LENGTH), expected[1])


def test_the_default_length_is_cut_to_what_the_context_has_left(running):
    answer = running.ask(visual_tokens(0), "w5 " * (CONTEXT - VISUAL_TOKENS - 1 - 4))
    assert len(answer.ids) == 4 and answer.finish_reason == "length"


def test_questions_beyond_the_limit_are_refused_at_once(running, expected):
    async def fill_then_ask():
        tasks = [asyncio.create_task(running.answer(*case(i), max_new_tokens=LENGTH)) for i in range(2 * AT_ONCE)]
        await asyncio.wait(tasks, timeout=0)
        try:
            with pytest.raises(ResourceExhausted, match=f"{2 * AT_ONCE} questions"):
                await running.answer(*case(0))
        finally:
            answers = await asyncio.gather(*tasks)
        return answers

    for answer, right in zip(running.run(fill_then_ask()), expected):
        assert_equals(answer, right)


def test_a_slow_reader_gets_fewer_and_larger_deltas(running, expected):
    async def read_slowly():
        deltas = []
        async with aclosing(running.decoder.answer(*case(2), Sampling(max_new_tokens=LENGTH))) as answer:
            async for delta in answer:
                deltas.append(delta)
                if len(deltas) == 1:  # until the engine has nothing more to do
                    while (await running.decoder.engine.count_states())["running"]:
                        pass
        return deltas

    deltas = running.run(read_slowly())
    assert len(deltas) == 2
    assert [id_ for delta in deltas for id_ in delta.token_ids] == expected[2][0]


def test_an_engine_that_dies_fails_its_answers_and_comes_back_once(running, expected):
    """Last: it uses up the restarts."""

    async def kill_while_answering():
        tasks = [asyncio.create_task(running.answer(*case(i), max_new_tokens=400)) for i in range(AT_ONCE)]
        await asyncio.wait(tasks, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        os.kill(running.decoder.engine.process_ids[0], signal.SIGKILL)
        return await asyncio.gather(*tasks, return_exceptions=True)

    failed = [answer for answer in running.run(kill_while_answering()) if not isinstance(answer, Answer)]
    assert failed and all(isinstance(error, Unavailable) for error in failed)
    assert running.decoder.health == "restarting"
    with pytest.raises(Unavailable, match="restarting: try again"):
        running.ask(*case(0))

    running.run(running.decoder.engine.restarted())
    assert running.decoder.health == "ready"
    assert_equals(running.ask(*case(0), max_new_tokens=LENGTH), expected[0])

    os.kill(running.decoder.engine.process_ids[0], signal.SIGKILL)
    while running.decoder.health == "ready":  # noticed without a request
        running.run(asyncio.sleep(0.05))
    with pytest.raises(Unavailable, match="out of order .it stopped 2 times.*the server must be started again"):
        running.ask(*case(0))
    (broken,) = running.broken
    assert "out of order (it stopped 2 times" in broken
    assert running.health[:-1] == ["ready", "restarting", "ready"] and running.health[-1] in broken


def test_phi3_answers_like_transformers_with_a_sliding_window_and_long_rope(tmp_path):
    """The start itself compares states with transformers'."""
    tiny = write_tiny_llm(tmp_path / "repository", phi3=True)
    right = [right_answer(tiny, long_case(i)) for i in range(3)] + [right_answer(tiny, case(i)) for i in range(AT_ONCE)]
    assert sum(len(states) for _, states in right) >= 8
    with started(tiny) as running:
        assert running.decoder.engine.layers is Pass.DIRECT  # its rotary embedding is another one
        answers = running.ask_all(*map(long_case, range(3)), *map(case, range(AT_ONCE)), max_new_tokens=LENGTH)
        for answer, expected in zip(answers, right):
            assert_equals(answer, expected)


def test_a_repository_of_an_unknown_family_is_refused_with_those_that_are_known(tmp_path):
    tiny = write_tiny_llm(tmp_path / "repository", family="lamed_other")
    with pytest.raises(RepositoryError, match="family 'lamed_other' is none of 'lamed_llama'.*export the repository"):
        Decoder(tiny.repository)


def test_a_llama_with_attention_bias_keeps_vllms_own_pass_and_answers_like_transformers(tmp_path):
    """The shorter passes know no biases: they are never used on a model that has them."""
    tiny = write_tiny_llm(tmp_path / "repository", attention_bias=True)
    right = [right_answer(tiny, case(i)) for i in range(AT_ONCE)]
    with started(tiny) as running:
        assert running.decoder.engine.layers is Pass.VLLM
        answers = running.ask_all(*map(case, range(AT_ONCE)), max_new_tokens=LENGTH)
    for answer, expected in zip(answers, right):
        assert_equals(answer, expected)


def test_in_bf16_states_are_right_and_kernels_called_directly_where_the_processor_has_it(tmp_path):
    tiny = write_tiny_llm(tmp_path / "repository", precision="bf16")
    with started(tiny) as running:
        assert running.decoder.engine.layers is (FURTHEST if has_bf16() else Pass.VLLM)
        answers = running.ask_all(*map(case, range(AT_ONCE)), max_new_tokens=LENGTH)
    assert sum(len(answer.states) for answer in answers) >= 8
    for i, answer in enumerate(answers):
        # In fp32, and for the tokens that were said: greedy ones may be others after rounding.
        states = tiny.states(*case(i), answer.ids)
        wanted = states[np.array(answer.ids) == tiny.manifest.seg_token_id]
        assert np.abs(answer.states - wanted).max(initial=0) < 8e-2 * np.abs(states).max()
