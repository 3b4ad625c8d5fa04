"""Streamed text adds up to what decoding all tokens at once gives."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from engine.runtime.decoder.detokenizer import Detokenizer

TEXT = "Ein Gefäß, 37 °C, naïve café — 肺 🫁 <bx_start>[0.1, 0.2]<bx_end> [SEG] end </s>"


def byte_level():
    """Every byte is a token, so that characters come in pieces."""
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace():
    """As in LLaMA-2: a word's leading space belongs to its token, and the first one of a text is stripped."""
    words = ["<unk>", *(f"▁{word}" for word in TEXT.split()), "▁", *sorted(set(TEXT))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.fixture(params=[byte_level, metaspace])
def tokenizer(request):
    tokenizer = request.param()
    tokenizer.add_special_tokens(["</s>", "<bx_start>", "<bx_end>"])
    tokenizer.add_tokens([AddedToken("[SEG]", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(ids, seed):
    generator, rest = random.Random(seed), list(ids)
    while rest:
        size = generator.randint(1, 4)
        yield rest[:size]
        rest = rest[size:]


@pytest.mark.parametrize("seed", range(8))
def test_the_deltas_add_up_to_the_decoded_answer(tokenizer, seed):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if seed:  # also what no tokenizer would write: broken characters, special tokens anywhere
        ids = random.Random(seed).choices(range(len(tokenizer)), k=200)
    text = Detokenizer(tokenizer)
    deltas = [text.add(piece) for piece in pieces(ids, seed)] + [text.finish()]
    assert "".join(deltas) == text.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_no_delta_ends_inside_a_character(tokenizer):
    text = Detokenizer(tokenizer)
    deltas = [text.add([id_]) for id_ in tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(deltas)
    assert len([delta for delta in deltas if delta]) > 10


def test_special_tokens_are_left_out_and_seg_stays(tokenizer):
    text = Detokenizer(tokenizer)
    text.finish(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert "[SEG]" in text.text and "bx_start" not in text.text and "</s>" not in text.text


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stop_text_and_what_follows_it_never_show(tokenizer, size):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    end = next(i for i in range(len(ids)) if "naïve" in tokenizer.decode(ids[:i])) + 1
    text = Detokenizer(tokenizer, stop=["naïve", "never said"])
    parts = [ids[i : min(i + size, end)] for i in range(0, end, size)]
    shown = [text.add(part) for part in parts[:-1]] + [text.finish(parts[-1], "naïve")]
    assert "".join(shown) == text.text == whole[: whole.index("naïve")]


@pytest.mark.parametrize("seed", range(6))
def test_a_marked_token_is_found_wherever_it_stands(tokenizer, seed):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    seg = tokenizer.convert_tokens_to_ids("[SEG]")
    if seed:
        ids = random.Random(seed).choices([*range(len(tokenizer)), *[seg] * 20], k=200)
    text = Detokenizer(tokenizer, marked=seg)
    for piece in pieces(ids, seed):
        text.add(piece)
    text.finish()
    assert len(text.spans) == ids.count(seg) > 0
    assert {text.text[start:end] for start, end in text.spans} == {"[SEG]"}
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i, id_ in enumerate(ids) if id_ == seg]
    assert [end for _, end in text.spans] == ends


@pytest.mark.parametrize(("stop", "spans"), [("[SEG]", [(0, 0)]), ("EG", [(0, 2)]), (" end", [(0, 5)])])
def test_a_marked_token_that_a_stop_text_cuts_off_ends_with_the_text(tokenizer, stop, spans):
    seg = tokenizer.convert_tokens_to_ids("[SEG]")
    text = Detokenizer(tokenizer, [stop], seg)
    text.finish([seg, *tokenizer(" end", add_special_tokens=False)["input_ids"]], stop)
    assert list(text.spans) == spans and spans[0][1] == len(text.text)


@pytest.mark.parametrize("pieces", [1, 3])
def test_white_space_at_the_beginning_is_left_out_if_asked_for(pieces):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    tokenizer.add_tokens([AddedToken("[SEG]", normalized=False)])
    ids = tokenizer.encode("  It is [SEG]", add_special_tokens=False)
    text = Detokenizer(tokenizer, marked=tokenizer.convert_tokens_to_ids("[SEG]"), trimmed=True)
    given = "".join(text.add(ids[start : start + pieces]) for start in range(0, len(ids), pieces)) + text.finish()
    assert given == text.text == "It is [SEG]"
    assert [given[slice(*span)] for span in text.spans] == ["[SEG]"]
