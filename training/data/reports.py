"""Reports longer than M3D-CLIP's text encoder reads: whole sentences of them are drawn, as the reference does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from training.data.sample import Sample
from training.data.selection import M3DSamples
from training.data.views import ViewPairs

_STREAM = 1  # apart from what else is drawn for a sample


def drawn_sentences(text: str, most: int, count: Callable[[str], int], rng: np.random.Generator) -> str:
    """`text`, or of one with more than `most` tokens its first sentence and others in random order.

    Args:
        text: a report; what stands between full stops counts as a sentence.
        most: tokens that the others may have together. The first is not counted; what is too long after all is cut off
            by the tokenizer.
        count: tokens of a text, those at its beginning and end included.
        rng: draws the order.
    """
    if count(text) <= most:
        return text
    first, *others = text.split(".")
    chosen, used = [first], 0
    for k in rng.permutation(len(others)):
        tokens = count(others[k])
        if used + tokens <= most and others[k] not in chosen:
            chosen.append(others[k])
            used += tokens
    return ".".join(chosen)


class ShortReports:
    """Pairs whose reports have room in the text encoder: [epoch, index] -> Sample, other sentences in each epoch.

    pairs: the pairs. most, count: see `drawn_sentences`. seed: of the draws.
    """

    def __init__(self, pairs: M3DSamples | ViewPairs, most: int, count: Callable[[str], int], seed: int):
        self.pairs, self.most, self.count, self.seed = pairs, most, count, seed
        self.callbacks = getattr(pairs, "callbacks", ())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: tuple[int, int]) -> Sample | None:
        sample = self.pairs[place]
        if sample is None:
            return None
        rng = np.random.default_rng([self.seed, *place, _STREAM])
        return replace(sample, answer=drawn_sentences(sample.answer, self.most, self.count, rng))

    def fingerprint(self) -> dict[str, str]:
        return self.pairs.fingerprint()
