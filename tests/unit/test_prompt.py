"""Prompts are laid out as each family was trained, within bounds; boxes are read from answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import write_checkpoint
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError, InvalidInput
from engine.models.language_model import FAMILIES
from engine.prompt import IMAGE_TOKEN, Prompt, Turn, format_box, parse_boxes
from engine.prompt.llama3 import Llama3Layout
from engine.prompt.plain import PlainLayout
from engine.prompt.qwen2 import Qwen2Layout
from tests import tiny, tiny_chats
from tests.conftest import ROOT

N, CONTEXT = 8, 40
FORMATS = json.loads((ROOT / "tests/fixtures/formats/formats.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    case = {"image_token_id": tiny.IMAGE_TOKEN_ID, "seg_token_id": 7, "config": tiny.LAMED}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(write_checkpoint.tokenizer(case))),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return Prompt(PlainLayout(tokenizer), N, CONTEXT)


@pytest.fixture(scope="module", params=tiny_chats.KINDS)
def chat(request, tmp_path_factory):
    """(layout, with transformers' own tokenizer and template) of a family with a chat template."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_chats.tokenizer(request.param).save_pretrained(folder)
    found = tiny_chats.Chat(request.param, folder)
    return FAMILIES[tiny_chats.KINDS[request.param].model_type].layout(found.tokenizer), found


def test_the_prompt_is_bos_then_image_tokens_then_the_question(prompt):
    assert prompt.input_ids("w5 w6") == [1] + [tiny.IMAGE_TOKEN_ID] * N + [5, 6]
    assert prompt.split_ids("w5 w6") == ([1], [5, 6]) and prompt.head == [1] and prompt.padding_id == 1


@pytest.mark.parametrize("question", ["", "   ", "\n\t"])
def test_an_empty_question_is_refused(prompt, question):
    with pytest.raises(InvalidInput, match="empty"):
        prompt.split_ids(question)


def test_a_question_may_fill_the_context_but_one_token(prompt):
    most = CONTEXT - 1 - N - 1
    assert len(prompt.split_ids(" ".join(["w5"] * most)).tail) == most
    with pytest.raises(InvalidInput, match=f"the question has {most + 1} tokens; with 1 . 8 .* at most {most}"):
        prompt.split_ids(" ".join(["w5"] * (most + 1)))


def test_a_huge_question_is_refused_before_it_is_tokenised(prompt, monkeypatch):
    monkeypatch.setattr(prompt.layout, "tokenizer", None)
    with pytest.raises(InvalidInput, match="characters"):
        prompt.split_ids("x" * 10_000_000)


def test_a_tokenizer_without_image_tokens_is_refused():
    case = {"image_token_id": tiny.IMAGE_TOKEN_ID, "seg_token_id": 7, "config": tiny.LAMED}
    spec = write_checkpoint.tokenizer(case)
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "<im_patch>"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(CheckpointError, match="image tokens"):
        Prompt(PlainLayout(other), N, CONTEXT)
    spec["model"]["vocab"]["<other>"] = spec["model"]["vocab"].pop("<im_patch>")
    with pytest.raises(CheckpointError, match="does not know <im_patch>"):
        PlainLayout(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>"))


def test_a_plain_prompt_needs_a_tokenizer_that_puts_bos_first_and_training_makes_one():
    other = tiny_chats.tokenizer("llama3")
    other.backend_tokenizer.post_processor = None
    with pytest.raises(CheckpointError, match="does not put BOS before <im_patch>"):
        PlainLayout(other)
    PlainLayout.prepare(other)
    assert Prompt(PlainLayout(other), N, CONTEXT).head == [other.bos_token_id]
    with pytest.raises(CheckpointError, match="no BOS"):
        PlainLayout.prepare(tiny_chats.tokenizer("qwen2"))


def test_a_plain_prompt_ends_where_the_checkpoint_says_else_at_the_tokenizer_s_end(tokenizer):
    layout = PlainLayout(tokenizer)
    assert layout.stop_ids([7, 9]) == (7, 9) and layout.stop_ids(None) == (2,)
    assert Prompt(layout, N, CONTEXT, [7, 9]).text([5, 6, 9, 5]) == "w5 w6"


def test_a_single_turn_family_is_asked_the_last_question_alone(prompt):
    turns = [Turn("system", "w3"), Turn("user", "w4"), Turn("assistant", ""), Turn("user", "w5 w6")]
    assert not prompt.multi_turn and prompt.input_ids(turns) == prompt.input_ids("w5 w6")


QUESTION = "what is it?"
CONVERSATIONS = [
    QUESTION,
    "  what\n\nis it\t? \n",
    " " + QUESTION,
    "\u00e9\u0065\u0301 \U0001f600 12345",
    [("user", QUESTION)],
    [("system", " be short\n"), ("user", QUESTION)],
    [("user", QUESTION), ("assistant", "the liver <bx_start>[0.1, 0.2]<bx_end>\n"), ("user", "\nwhere [SEG] ?")],
    [("system", "be short"), *[("user", "what?"), ("assistant", "It is [SEG].")] * 3, ("user", "which organ")],
]


@pytest.mark.parametrize("asked", CONVERSATIONS)
def test_chats_have_the_ids_of_transformers_chat_template(chat, asked):
    layout, wanted = chat
    prompt = Prompt(layout, tiny.NUM_VISUAL_TOKENS, 4096)
    ids = prompt.input_ids(asked)
    assert ids == wanted.prompt_ids(asked) and prompt.multi_turn
    head, tail = prompt.split_ids(asked)
    assert ids == [*head, *[prompt.image_token_id] * tiny.NUM_VISUAL_TOKENS, *tail]
    own_system = not isinstance(asked, str) and asked[0][0] == "system"
    assert (head == prompt.head) is not own_system


def test_a_chat_needs_no_bos_and_no_chat_template_of_the_checkpoint(chat):
    layout, wanted = chat
    template, wanted.tokenizer.chat_template = wanted.tokenizer.chat_template, None
    try:
        assert Prompt(layout, 2, 256).input_ids(QUESTION)
    finally:
        wanted.tokenizer.chat_template = template
    assert tiny_chats.tokenizer("qwen2").bos_token_id is None


def test_a_chat_ends_with_its_turn_or_its_text_whatever_else_the_checkpoint_says(chat):
    layout, wanted = chat
    assert layout.stop_ids(None) == tuple(wanted.ends)
    assert layout.stop_ids([5, wanted.ends[1]]) == (*wanted.ends, 5)
    prompt = Prompt(layout, 2, 256)
    said = wanted.tokenizer("It is here", add_special_tokens=False)["input_ids"]
    assert prompt.text([*said, wanted.ends[0], *said]) == "It is here" == prompt.text(said)


def test_training_reads_the_prompt_that_is_asked_then_the_answer_and_the_end_of_the_turn(chat):
    layout, wanted = chat
    prompt = Prompt(layout, tiny.NUM_VISUAL_TOKENS, 4096)
    ids, start = prompt.answered(" " + QUESTION, "\nIt is [SEG].")
    assert ids[:start] == prompt.split_ids(" " + QUESTION).tail
    end = wanted.ends[0]
    assert ids[start:] == [*wanted.tokenizer("\nIt is [SEG].", add_special_tokens=False)["input_ids"], end]


@pytest.mark.parametrize("choice", ["yes", "It is [SEG].", "the liver"])
def test_a_choice_has_the_tokens_that_training_reads_as_an_answer(chat, prompt, choice):
    chats = Prompt(chat[0], tiny.NUM_VISUAL_TOKENS, 4096)
    ids, start = chats.answered(QUESTION, choice)
    for asked in (QUESTION, [("user", "what?"), ("assistant", "a scan"), ("user", QUESTION)]):
        assert chats.choice_ids(asked, choice) == ids[start:-1]
    ids, start = prompt.answered("w5 w6", "w8 w9")
    assert prompt.choice_ids("w5 w6", "w8 w9") == ids[start:-1] == [8, 9]
    assert prompt.choice_ids([Turn("user", "w3"), Turn("assistant", "w4"), Turn("user", "w5 w6")], "w8") == [8]


def test_a_choice_cannot_hold_what_separates_turns_or_ends_answers(chat, prompt):
    chats = Prompt(chat[0], 2, 4096)
    for token in chats.layout.reserved:
        with pytest.raises(InvalidInput, match="a choice holds <.*leave it out"):
            chats.choice_ids(QUESTION, f"a{token}")
    with pytest.raises(InvalidInput, match="a choice holds </s>, which ends answers: leave it out"):
        Prompt(prompt.layout, N, CONTEXT, [2]).choice_ids("w5", "w6 </s>")


def test_a_choice_that_shares_a_token_with_the_question_is_refused(prompt, monkeypatch):
    ids = {"<im_patch>w5": [1, 315, 5], "<im_patch>w5 w6": [1, 315, 56]}
    monkeypatch.setattr(prompt.layout, "_encode", ids.get)
    with pytest.raises(InvalidInput, match="'w6' and the question's end share a token.*end the question with"):
        prompt.choice_ids("w5", "w6")


@pytest.mark.parametrize("kind, layout", [("qwen2", Llama3Layout), ("llama3", Qwen2Layout)])
def test_a_tokenizer_of_another_family_is_refused(kind, layout):
    with pytest.raises(CheckpointError, match=rf"does not know <\|.*{layout.__name__}.*model_type right"):
        layout(tiny_chats.tokenizer(kind))


def test_a_turn_cannot_hold_what_separates_turns_or_stands_for_the_scan(chat):
    layout, _ = chat
    prompt = Prompt(layout, 2, 4096)
    for token in layout.reserved:
        with pytest.raises(InvalidInput, match="a turn of the user holds <"):
            prompt.input_ids(f"a{token}system b")
        with pytest.raises(InvalidInput, match="a turn of the assistant holds <"):
            prompt.input_ids([("user", "a"), ("assistant", token), ("user", "b")])
    assert IMAGE_TOKEN in layout.reserved


@pytest.mark.parametrize(
    "turns, words",
    [
        ([], "none"),
        ([("user", "a"), ("user", "b")], "user, user"),
        ([("assistant", "a"), ("user", "b")], "assistant, user"),
        ([("user", "a"), ("assistant", "b")], "user, assistant"),
        ([("system", "a")], "system"),
        ([("user", "a"), ("system", "b"), ("user", "c")], "user, system, user"),
        ([("tool", "a")], "tool"),
        ([("user", "")], "the question is empty"),
        ([("user", "a"), ("assistant", " "), ("user", "b")], "a turn of the assistant is empty"),
        ([("user",)], "a turn is a role and a text"),
        ([("user", 3)], "'user' and a int"),
    ],
)
def test_turns_out_of_order_are_refused(chat, turns, words):
    with pytest.raises(InvalidInput, match=words):
        Prompt(chat[0], 2, 4096).input_ids(turns)


def test_a_conversation_may_fill_the_context_but_one_token(chat):
    whole = len(Prompt(chat[0], 2, 4096).input_ids([("user", "a"), ("assistant", "b"), ("user", "c")]))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert len(Prompt(chat[0], 2, whole + 1).input_ids(turns)) == whole
    with pytest.raises(InvalidInput, match="the conversation has .* shorten it"):
        Prompt(chat[0], 2, whole).input_ids(turns)
    with pytest.raises(CheckpointError, match="no room for a question"):
        Prompt(chat[0], 2, len(Prompt(chat[0], 2, 4096).head) + 4)


def test_boxes_are_read_back_as_written():
    boxes = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0, 0, 0, 1, 1, 1]])
    text = "It is at " + " and ".join(format_box(box) for box in boxes)
    np.testing.assert_allclose(parse_boxes(text), boxes)


@pytest.mark.parametrize("recorded", FORMATS["boxes"], ids=lambda recorded: recorded["text"])
def test_boxes_are_written_as_the_reference_writes_them(recorded):
    corners = np.array([recorded["first"], recorded["last"]]) / recorded["shape"]
    assert format_box(corners.ravel()) == f"<bx_start>{recorded['text']}<bx_end>"


@pytest.mark.parametrize(
    "text", ["", "none", "[1, 2, 3]", "[0.5, 0, 0, 0.1, 1, 1]", "[0, 0, 0, 1.5, 1, 1]", "[a, b, c, d, e, f]"]
)
def test_what_is_no_box_is_left_out(text):
    assert parse_boxes(text).shape == (0, 6)
