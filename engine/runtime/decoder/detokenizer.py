"""Token ids to text while they arrive; in sum exactly what decoding them all at once gives."""

from __future__ import annotations

from collections.abc import Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding gives for the first bytes of a longer character


class Detokenizer:
    """Text deltas of one answer, like the reference's `batch_decode(..., skip_special_tokens=True)`.

    Only the last few tokens are decoded again at each step. A character that several tokens spell is given when it is
    whole, and what may be the beginning of a stop text is held back until it is not.

    trimmed: whether white space at the beginning is left out.
    marked: a token that is one word of the text. spans: where it stands in the text, each time (start, end) in
    characters; behind a stop text's place both are the text's length.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), marked: int | None = None, trimmed: bool = False):
        self._tokenizer = tokenizer
        self._trimmed = trimmed
        self._marked = marked
        self._word = "" if marked is None else self._decode([marked]).strip()
        self.spans: tuple[tuple[int, int], ...] = ()
        self._hold = max((len(text) for text in stop), default=1) - 1
        self._ids: list[int] = []
        self._start = 0  # decoding begins here ...
        self._known = 0  # ... and up to here its text was taken
        self.text = ""
        self._given = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add for sure."""
        self._decode_new(token_ids)
        return self._give(len(self.text) - self._hold)

    def finish(self, token_ids: Sequence[int] = (), stop: str | None = None) -> str:
        """The rest of the text with these last tokens; up to `stop`, if that stop text ended the answer."""
        self._decode_new(token_ids)
        self._take(self._new_text())
        end = self.text.find(stop) if stop else -1
        if end >= 0:
            self.text = self.text[:end]
            self.spans = tuple((min(first, end), min(last, end)) for first, last in self.spans)
        return self._give(len(self.text))

    def _decode_new(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._ids.append(token_id)
            new = self._new_text()
            if new and not new.endswith(_INCOMPLETE):
                self._take(new)
            if token_id == self._marked:
                self.spans += ((len(self.text) - len(self._word), len(self.text)),)

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._start : self._known])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _take(self, new: str) -> None:
        self.text += new.lstrip() if self._trimmed and not self.text else new
        self._start, self._known = self._known, len(self._ids)

    def _give(self, end: int) -> str:
        delta = self.text[self._given : max(end, self._given)]
        self._given += len(delta)
        return delta

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
