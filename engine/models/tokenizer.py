"""The tokenizer of a published checkpoint: a bare sentencepiece model, read as the reference's slow tokenizer reads it.

The published M3D-LaMed folders hold `tokenizer.model` and no `tokenizer.json`. transformers' own conversion orders
merges by id, which gives other ids for runs of spaces, and knows one of the two ways in which the reference puts the
leading space. This one orders merges by the pieces' scores, as sentencepiece merges.
Source: transformers 4.39.1, models/llama/tokenization_llama.py (`legacy`), which the reference pins; sentencepiece,
src/bpe_model.cc.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError
from engine.models.layout import read_object

MODEL = "tokenizer.model"
SPACE = "▁"  # sentencepiece's sign for a space
BPE_MODEL = 2  # trainer_spec.model_type
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5  # kinds of pieces that text is merged to; the others are <unk>, control, bytes
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class LeadingSpaceTokenizer(PreTrainedTokenizerFast):
    """A tokenizer.json of `legacy: false`, with what the slow tokenizer does to a whole text before it is split.

    It puts one space before every text. tokenizer.json alone puts none before a text that has one already, or that
    begins with `[SEG]`; prompts begin with image tokens, so they need none. It takes a literal `▁` for a space, and all
    that Python calls space is removed behind tokens with `rstrip` (Phi-3's), where tokenizers leaves the separators
    U+001C to U+001F.
    """

    def _encode_plus(self, text, *arguments, **settings):
        if isinstance(text, str):
            text = self._led(text)
        elif isinstance(text, (list, tuple)) and not settings.get("is_split_into_words"):
            text = [self._led(one) if isinstance(one, str) else one for one in text]
        return super()._encode_plus(text, *arguments, **settings)

    def _led(self, text: str) -> str:
        added = self.added_tokens_decoder.values()
        text = text.replace(SPACE, " ")
        if eager := [re.escape(token.content) for token in added if token.rstrip]:
            text = re.sub(rf"({'|'.join(eager)})\s+", r"\1", text)
        ordinary = {token.content for token in added} - set(self.all_special_tokens)
        return f" {text}" if text.startswith((" ", *ordinary)) else text


# save_pretrained writes the name of the class, and others read the folder, too.
LeadingSpaceTokenizer.__name__ = PreTrainedTokenizerFast.__name__


def from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """The exact fast tokenizer of a folder with `tokenizer.model`.

    Args:
        folder: a checkpoint with tokenizer.model, and with tokenizer_config.json, added_tokens.json and
            special_tokens_map.json as transformers' slow tokenizers save them, where it has them.

    Returns:
        A tokenizer whose ids are those of the reference's `AutoTokenizer.from_pretrained(folder, use_fast=False)`.

    Raises:
        CheckpointError: the model cannot be read, is no BPE model, or normalises text in a way that is not known.
    """
    path = folder / MODEL
    model = _read_model(path)
    config = _object(folder / "tokenizer_config.json")
    try:
        names, extra, added = _special_tokens(folder, config, [piece.piece for piece in model.pieces])
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: tokenizer_config.json, added_tokens.json or special_tokens_map.json is damaged "
            f"({type(error).__name__}: {error}): get the checkpoint again"
        ) from None
    legacy = config.get("legacy")
    legacy = True if legacy is None else bool(legacy)  # as transformers 4.39 has it where nothing is said
    backend = Tokenizer(_bpe(path, model, names["unk_token"]))
    replace = normalizers.Replace(" ", SPACE)
    if not legacy:
        backend.normalizer = replace
        if config.get("add_prefix_space", True):
            backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    elif model.normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add(path, backend, added)
    backend.post_processor = _ends(backend, names, config)
    return tokenizer_class(backend)(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=config.get("clean_up_tokenization_spaces", False),
        model_max_length=config.get("model_max_length"),
        padding_side=config.get("padding_side", "right"),
        extra_special_tokens=extra,
        **{name: token for name, token in names.items() if token is not None},
    )


def tokenizer_class(backend: Tokenizer) -> type[PreTrainedTokenizerFast]:
    """The class that gives the ids of `from_sentencepiece` with the tokenizer.json that was saved from it."""
    first = isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace) and isinstance(
        backend.normalizer, normalizers.Replace
    )
    return LeadingSpaceTokenizer if first else PreTrainedTokenizerFast


def _read_model(path: Path):
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    try:
        model.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise CheckpointError(f"{path} is no sentencepiece model ({error}): get the checkpoint again") from None
    if model.trainer_spec.model_type != BPE_MODEL or not model.pieces:
        raise CheckpointError(f"{path} is no BPE model of sentencepiece, the only kind that is read exactly")
    given = model.normalizer_spec
    if given.precompiled_charsmap or given.remove_extra_whitespaces or not given.escape_whitespaces:
        raise CheckpointError(
            f"{path} normalises text (rule {given.name!r}), which is not read exactly. Save the checkpoint's "
            "tokenizer as tokenizer.json, and remove tokenizer.model"
        )
    return model


def _bpe(path: Path, model, unknown: str | None) -> BPE:
    """The pieces and their merges, best score first.

    Of equal scores, the longer piece comes first: only runs of spaces have equal scores in LLaMA's and Mistral's
    models, and sentencepiece, which merges what lies leftmost first, makes the leftmost run as long as it can.
    """
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    if lost := sorted({character for piece in scores for character in piece if character not in scores}):
        raise CheckpointError(
            f"{path} has pieces of characters that are no pieces themselves ({' '.join(lost[:5])}): it cannot be read "
            "exactly"
        )
    merges = [
        (-score, -len(piece), -cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    pairs = [(piece[:-cut], piece[-cut:]) for _, _, cut, piece in sorted(merges)]
    return BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=model.trainer_spec.byte_fallback)


def _special_tokens(
    folder: Path, config: dict, pieces: list[str]
) -> tuple[dict[str, str | None], list[str], dict[int, dict[str, Any]]]:
    """(name such as bos_token -> its text, the texts of further special tokens, id -> settings of every token that is
    found before text is merged)."""
    mapped = _object(folder / "special_tokens_map.json")
    decoder = {int(token_id): dict(token) for token_id, token in config.get("added_tokens_decoder", {}).items()}
    # Where tokenizer_config.json has no added_tokens_decoder (before transformers 4.34), the map comes first.
    settings = {**mapped, **config} if decoder else {**config, **mapped}
    names = {name: _text(settings.get(name)) for name in NAMED}
    names["unk_token"] = names["unk_token"] or "<unk>"
    names["bos_token"] = names["bos_token"] or "<s>"
    names["eos_token"] = names["eos_token"] or "</s>"
    extra = [str(_text(token)) for token in settings.get("additional_special_tokens") or ()]
    special = {*filter(None, names.values()), *extra}
    for content, token_id in _object(folder / "added_tokens.json").items():
        decoder.setdefault(int(token_id), {"content": content, "special": content in special})
    known = {token["content"] for token in decoder.values()}
    for name, content in names.items():
        if content is not None and content not in known:
            if content not in pieces:
                raise CheckpointError(f"{folder}: the tokenizer's {name} {content!r} is none of its tokens")
            decoder[pieces.index(content)] = {"content": content, "special": True}
            known.add(content)
    return names, extra, dict(sorted(decoder.items()))


def _add(path: Path, backend: Tokenizer, added: dict[int, dict[str, Any]]) -> None:
    """Add the tokens in the order of their ids. Raises CheckpointError where one would get another id."""
    for token_id, given in added.items():
        settings = {key: bool(given.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "special")}
        token = AddedToken(given["content"], normalized=False, **settings)
        (backend.add_special_tokens if settings["special"] else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{path.parent}: the token {token.content!r} has id {token_id} there, which would be "
                f"{backend.token_to_id(token.content)}: ids of added tokens must follow the {MODEL}'s without a gap"
            )


def _ends(backend: Tokenizer, names: dict[str, str | None], config: dict) -> processors.TemplateProcessing:
    """What stands before and behind every text: BOS, unless the folder says otherwise."""
    bos = [str(names["bos_token"])] if config.get("add_bos_token", True) else []
    eos = [str(names["eos_token"])] if config.get("add_eos_token", False) else []
    single = [*bos, "$A:0", *eos]
    pair = [*single, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)]
    ids = [(token, backend.token_to_id(token)) for token in (*bos, *eos)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _object(path: Path) -> dict:
    """A JSON object; empty if the folder has no such file."""
    return read_object(path) if path.is_file() else {}


def _text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
