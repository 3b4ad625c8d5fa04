"""Questions are tokenised as the reference does, within bounds; boxes are read from answers."""

from __future__ import annotations

import numpy as np
import pytest
import write_checkpoint
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError, InvalidInput
from engine.prompt import Prompt, format_box, parse_boxes
from tests import tiny

N, CONTEXT = 8, 40


@pytest.fixture(scope="module")
def tokenizer():
    import json

    case = {"image_token_id": tiny.IMAGE_TOKEN_ID, "seg_token_id": 7, "config": tiny.LAMED}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(write_checkpoint.tokenizer(case))),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return Prompt(tokenizer, N, CONTEXT)


def test_the_prompt_is_bos_then_image_tokens_then_the_question(prompt):
    assert prompt.input_ids("w5 w6") == [1] + [tiny.IMAGE_TOKEN_ID] * N + [5, 6]
    assert prompt.question_ids("w5 w6") == [5, 6]


@pytest.mark.parametrize("question", ["", "   ", "\n\t"])
def test_an_empty_question_is_refused(prompt, question):
    with pytest.raises(InvalidInput, match="empty"):
        prompt.question_ids(question)


def test_a_question_may_fill_the_context_but_one_token(prompt):
    most = CONTEXT - 1 - N - 1
    assert len(prompt.question_ids(" ".join(["w5"] * most))) == most
    with pytest.raises(InvalidInput, match=f"at most {most}"):
        prompt.question_ids(" ".join(["w5"] * (most + 1)))


def test_a_huge_question_is_refused_before_it_is_tokenised(prompt, monkeypatch):
    monkeypatch.setattr(prompt, "tokenizer", None)
    with pytest.raises(InvalidInput, match="characters"):
        prompt.question_ids("x" * 10_000_000)


def test_a_tokenizer_without_image_tokens_is_refused():
    case = {"image_token_id": tiny.IMAGE_TOKEN_ID, "seg_token_id": 7, "config": tiny.LAMED}
    import json

    spec = write_checkpoint.tokenizer(case)
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<im_patch>"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(CheckpointError, match="image tokens"):
        Prompt(other, N, CONTEXT)


def test_boxes_are_read_back_as_written():
    boxes = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 0, 0, 1, 1, 1]])
    text = "It is at " + " and ".join(format_box(box) for box in boxes)
    np.testing.assert_allclose(parse_boxes(text), boxes)


@pytest.mark.parametrize(
    "text", ["", "none", "[1, 2, 3]", "[0.5, 0, 0, 0.1, 1, 1]", "[0, 0, 0, 1.5, 1, 1]", "[a, b, c, d, e, f]"]
)
def test_what_is_no_box_is_left_out(text):
    assert parse_boxes(text).shape == (0, 6)
