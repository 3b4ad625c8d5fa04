"""M3D-LaMed on Qwen2.5 and on Llama-3 with their chat templates: a checkpoint is read, exported, run by vLLM and
served, and answers as transformers' own classes do with transformers' own chat template."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from engine.client import M3DClient
from engine.manifest import LLM_FOLDER, Manifest
from engine.models.checkpoint import load_lamed, read_config
from engine.prompt import IMAGE_TOKEN
from engine.runtime.acceleration import Pass
from engine.server import Server, free_ports
from tests import tiny, tiny_chats
from tests.conftest import ROOT, copy_repository
from tests.functional.test_decoder_engine import AT_ONCE, FURTHEST, LENGTH, started

pytestmark = pytest.mark.integration

TURNS = [
    ("system", "be short"),
    ("user", "what is it?"),
    ("assistant", "It is [SEG]."),
    ("user", "which organ is shown in this image?"),
]


@dataclass(frozen=True)
class Exported:
    """checkpoint: on a language model of `kind`. repository: its export. wanted: transformers' answers."""

    kind: str
    checkpoint: Path
    repository: Path

    @cached_property
    def wanted(self) -> tiny_chats.Chat:
        return tiny_chats.Chat(self.kind, self.checkpoint)

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.read(self.repository)

    @cached_property
    def answers(self) -> dict[str, tuple[list[int], np.ndarray]]:
        return {question: self.wanted.answer(question, LENGTH) for question in tiny_chats.QUESTIONS}


@pytest.fixture(scope="module", params=tiny_chats.KINDS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint, repository = tiny_chats.write(request.param, folder / "lamed"), copy_repository(folder)
    command = ["export/build_engines.py", "--checkpoint", checkpoint, "--target", "cpu", "--repository", repository]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return Exported(request.param, checkpoint, repository)


def test_the_answers_hold_what_the_tests_need(exported):
    answers, (turn_end, text_end) = list(exported.answers.values()), exported.wanted.ends
    assert sum(len(states) > 0 for _, states in answers) > 4 and any(len(states) == 0 for _, states in answers)
    assert any(ids[-1] == turn_end for ids, _ in answers) and any(len(ids) == LENGTH for ids, _ in answers)
    assert read_config(exported.checkpoint)["eos_token_id"] == text_end  # so the layout alone knows the other


def test_a_checkpoint_is_read_and_answers_like_transformers(exported):
    lamed, tokenizer = load_lamed(exported.checkpoint)
    prompt = lamed.config.prompt(tokenizer)
    for question, (ids, states) in exported.answers.items():
        asked = torch.tensor([prompt.input_ids(question)])
        said, found, logits = lamed.generate(
            torch.from_numpy(tiny.volume())[None], asked, len(prompt.head), LENGTH, eos_token_id=list(prompt.stop_ids)
        )
        assert said.tolist() == ids and (logits is None) == (len(states) == 0)
        np.testing.assert_allclose(found[said == lamed.config.seg_token_id], states, atol=1e-5)


def test_the_export_is_transformers_model_with_its_tokenizer_and_all_that_ends_an_answer(exported):
    folder, manifest = exported.repository / LLM_FOLDER, exported.manifest
    found, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(found) is tiny_chats.KINDS[exported.kind].model_class
    ids = torch.tensor([exported.wanted.prompt_ids("what is it?")])
    with torch.inference_mode():
        assert torch.equal(found(ids).logits, exported.wanted.model(ids).logits)
    assert tokenizer.get_vocab() == exported.wanted.tokenizer.get_vocab()
    assert manifest.family == tiny_chats.KINDS[exported.kind].model_type
    assert manifest.eos_token_ids == tuple(exported.wanted.ends)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is exported.wanted.is_tied


def test_vllm_answers_questions_and_conversations_like_transformers(exported):
    """The start itself compares states with transformers'. A pass that ignored biases would say something else."""
    cases = [*tiny_chats.QUESTIONS[:AT_ONCE], TURNS, TURNS[1:]]
    right = [exported.wanted.answer(asked, LENGTH) for asked in cases]
    assert len({tuple(ids) for ids, _ in right[-2:]}) == 2  # a system turn matters
    visual = exported.wanted.visual_tokens
    # The shorter passes are for LLaMA's layers; vLLM has another class for Qwen2.5, with biases.
    is_llama = tiny_chats.KINDS[exported.kind].model_class is LlamaForCausalLM
    with started(exported) as running:
        assert running.decoder.engine.layers is (FURTHEST if is_llama else Pass.VLLM)
        one, *others = [(visual, asked) for asked in cases]
        answers = [running.ask(*one, max_new_tokens=LENGTH)]
        for start in range(0, len(others), AT_ONCE):
            answers += running.ask_all(*others[start : start + AT_ONCE], max_new_tokens=LENGTH)
    for answer, asked, (ids, states) in zip(answers, cases, right):
        assert answer.ids == ids
        assert answer.text == exported.wanted.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.finish_reason == ("stop" if ids[-1] in exported.wanted.ends else "length")
        assert answer.info.prompt_tokens == len(exported.wanted.prompt_ids(asked))
        assert np.abs(answer.states - states).max(initial=0) < 1e-4


@torch.inference_mode()
def likelihood(wanted: tiny_chats.Chat, question: str, text: str) -> float:
    """log p(text | question) by transformers: an answer begins with the text's own tokens."""
    asked, said = wanted.prompt_ids(question), wanted.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor(asked + said)
    rows = wanted.model.get_input_embeddings()(ids)
    rows[ids == wanted.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] = torch.from_numpy(wanted.visual_tokens)
    scores = wanted.model(inputs_embeds=rows[None]).logits[0, len(asked) - 1 : -1].log_softmax(-1)
    return float(scores[range(len(said)), said].sum())


def test_the_server_answers_and_segments_like_transformers(exported, tmp_path):
    with Server(exported.repository, **free_ports(), log=tmp_path / "triton.log") as server:
        with M3DClient(server.url, timeout=300) as client:
            study = client.upload(tiny.volume()[0])
            for question, (ids, _) in exported.answers.items():
                answer = client.ask(study, question, max_new_tokens=LENGTH)
                assert list(answer.token_ids) == ids
                assert answer.finish_reason == ("stop" if ids[-1] in exported.wanted.ends else "length")
            question, (ids, states) = next((q, found) for q, found in exported.answers.items() if len(found[1]))
            found = client.segment(study, question, return_logits=True, max_new_tokens=LENGTH)
            talked = client.ask(study, messages=TURNS, max_new_tokens=LENGTH)
            schema = {"type": "object", "properties": {"seen": {"type": "boolean"}}, "required": ["seen"]}
            held = client.ask(study, question, json_schema=schema, choices=["yes", "no"])
    assert list(talked.token_ids) == exported.wanted.answer(TURNS, LENGTH)[0] and talked.history_used
    assert isinstance(json.loads(held.text)["seen"], bool) and held.finish_reason == "stop"
    assert held.choices == pytest.approx(
        {text: likelihood(exported.wanted, question, text) for text in ("yes", "no")}, abs=1e-3
    )
    lamed, _ = load_lamed(exported.checkpoint)
    with torch.inference_mode():
        features = lamed.seg_module.encode(torch.from_numpy(tiny.volume())[None])
        wanted = lamed.segment(features, torch.from_numpy(states).mean(0, keepdim=True))[0, 0].numpy()
    assert list(found.answer.token_ids) == ids
    assert np.abs(found.logits - wanted).max() <= 2e-4 * np.abs(wanted).max()
