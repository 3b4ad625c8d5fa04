"""The tokenizer of a published folder gives the ids of the reference's slow tokenizer, for every text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from published import write_published

from engine.errors import CheckpointError
from engine.models.checkpoint import load_tokenizer
from tests.conftest import ROOT

pytestmark = pytest.mark.integration

RECORDED = json.loads((ROOT / "tests" / "fixtures" / "published" / "tokenizer_texts.json").read_text())
FOLDERS = {
    "llama2": ("llama2", False),
    "llama2_legacy_true": ("llama2", True),
    "llama2_legacy_absent": ("llama2", None),
    "phi3": ("phi3", False),
    "llama3": ("llama3", False),
}
IMAGES = "<im_patch>" * 8
SPACE = "▁"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder with the tokenizer's files, as published."""
    made = {}
    for name, (kind, legacy) in FOLDERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_published.write_tokenizer(kind, made[name], legacy)
    return made


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory):
    """name -> folder with a tokenizer.json, as an export writes it, and no sentencepiece model."""
    saved = {name: tmp_path_factory.mktemp(f"{name}-exported") for name in folders}
    for name, folder in folders.items():
        load_tokenizer(folder).save_pretrained(saved[name])
    return saved


class Slow:
    """The reference's slow tokenizer, written out: split at added tokens, then sentencepiece itself on each part.

    Source: transformers 4.39.1, tokenization_utils.py (tokenize) and models/llama/tokenization_llama.py.
    """

    def __init__(self, folder: Path):
        self.sp = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.legacy = config.get("legacy", True) is not False
        named = [config.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
        mapped = [*named, *config.get("additional_special_tokens", ())]
        self.all_special = {token["content"] if isinstance(token, dict) else token for token in mapped}
        self.added = {token["content"]: (int(i), token) for i, token in config["added_tokens_decoder"].items()}
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")")
        if not self.legacy:
            self.sp.override_normalizer_spec(add_dummy_prefix=False)

    def __call__(self, text: str) -> list[int]:
        if not text:
            return [1]
        if not self.legacy:
            text = SPACE + text.replace(SPACE, " ")
        parts = self.split.split(text)
        for position in range(1, len(parts), 2):
            if self.added[parts[position]][1]["rstrip"]:
                parts[position + 1] = parts[position + 1].lstrip()
        ids = [[self.added[part][0]] if part in self.added else self._pieces(part) for part in parts if part]
        lone = self.sp.piece_to_id(SPACE)
        if not self.legacy and len(parts) > 1 and ids[0] == [lone] and parts[1] in self.all_special:
            ids = ids[1:]
        return [1, *(token for part in ids for token in part)]

    def _pieces(self, part: str) -> list[int]:
        if self.legacy or not part.startswith((SPACE, " ")):
            return self.sp.encode(part)
        return self.sp.encode("<unk>" + part)[len(self.sp.encode("<unk>")) :]


# What separates tokenizers: runs of spaces, added tokens in words, other spaces, marks, characters that are no pieces.
PIECES = st.sampled_from(
    [" ", "  ", "   ", " " * 15, " " * 17, " " * 33, "\n", "\t", "\r\n", SPACE, "[SEG]", "<im_patch>", "<bx_start>"]
    + [
        "<bx_end>",
        "</s>",
        "<s>",
        "<unk>",
        "<|end|>",
        "<|user|>",
        "<0x0A>",
        "liver",
        "Which",
        "é",
        "e\u0301",
        "肝",
        "🙂",
    ]
    + ["👩\u200d⚕️", "\u00a0", "\u3000", "\x00", "\x07", "ﬁ", "½", "aaaaaaa", "ababab", "0.125", "...", "----", "[", "]"]
)
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=12).map("".join)


@pytest.mark.parametrize("name", FOLDERS)
def test_recorded_texts_have_the_references_ids_before_and_after_an_export(folders, exported, name):
    for tokenizer in (load_tokenizer(folders[name]), load_tokenizer(exported[name])):
        for text, ids in zip(RECORDED["texts"], RECORDED["ids"][name], strict=True):
            assert tokenizer(IMAGES + text)["input_ids"][9:] == ids, text


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "llama3"])
@pytest.mark.parametrize("before", ["", IMAGES])
def test_any_text_has_the_ids_that_sentencepiece_gives(folders, exported, name, before):
    slow, fast = Slow(folders[name]), load_tokenizer(exported[name])

    @settings(max_examples=200, deadline=None, database=None)
    @given(text=TEXTS)
    @example(text=" ")
    @example(text="[SEG] first")
    @example(text="word[SEG]  word")
    @example(text="    Hello\n    Hello")
    @example(text=f"<|end|>{SPACE}<|user|>\x1c x")
    def equal(text):
        assert fast(before + text)["input_ids"] == slow(before + text), repr(text)
        assert fast([before + text, "x"])["input_ids"][0] == slow(before + text)

    equal()


def test_the_slow_tokenizer_written_out_is_the_references(folders):
    for name in set(FOLDERS) - {"llama3"}:
        slow = Slow(folders[name])
        for text, ids in zip(RECORDED["texts"], RECORDED["ids"][name], strict=True):
            assert slow(IMAGES + text)[9:] == ids, (name, text)


def test_an_export_needs_no_sentencepiece(exported):
    for folder in exported.values():
        assert (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").exists()


def test_special_tokens_keep_their_ids_and_are_not_in_decoded_text_but_seg_is(folders):
    for name, seg in (("llama2", 32003), ("phi3", 32014), ("llama3", 128259)):
        tokenizer = load_tokenizer(folders[name])
        ids = tokenizer(IMAGES + "It is [SEG].")["input_ids"]
        assert ids[1:9] == [seg - 3] * 8 and seg in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "It is [SEG]."


def _edited(folder: Path, target: Path, edit) -> Path:
    from sentencepiece import sentencepiece_model_pb2

    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    edit(model)
    (target / "tokenizer.model").write_bytes(model.SerializeToString())
    return target


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda model: setattr(model.trainer_spec, "model_type", 1), "no BPE model"),
        (lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True), "normalises text"),
        (lambda model: setattr(model.pieces[29000], "piece", "\u4e00\U0001f9e0x"), "read exactly"),
    ],
)
def test_a_model_that_cannot_be_read_exactly_is_refused(folders, tmp_path, edit, words):
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(_edited(folders["llama2"], tmp_path, edit))


def test_a_file_that_is_no_model_and_ids_with_a_gap_are_refused(folders, tmp_path):
    for file in folders["llama2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["32010"] = config["added_tokens_decoder"].pop("32003")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"'\[SEG\]' has id 32010"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="no sentencepiece model"):
        load_tokenizer(tmp_path)
