"""Retrieval: whether what belongs to a query is among the first k, from the embeddings of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.errors import InvalidInput

RANKS = (1, 5, 10)


def similarity(scans: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[N, N] products of embeddings [N, E] of scans and of texts; row: a scan. Raises InvalidInput for NaN and Inf."""
    for what, array in (("scans", scans), ("texts", texts)):
        if not np.isfinite(array).all():
            raise InvalidInput(f"embeddings of {what} hold values that are not finite: nothing can be ranked by them")
    return np.asarray(scans, np.float32) @ np.asarray(texts, np.float32).T


def reference_hits(scores: np.ndarray, k: int) -> np.ndarray:
    """[N] bool: whether the diagonal is among the k greatest of each row, by torch.topk as in the reference.

    Where scores are equal, topk's order decides.
    """
    import torch

    if k >= len(scores):
        return np.ones(len(scores), bool)
    found = torch.from_numpy(np.ascontiguousarray(scores)).topk(k, dim=1).indices
    return (found == torch.arange(len(scores))[:, None]).any(dim=1).numpy()


def hits(scores: np.ndarray, texts: Sequence[str], k: int, *, of_texts: bool) -> np.ndarray:
    """[N] bool: whether something right is among the k best of each row of scores [query, candidate].

    Several scans may have one and the same report: whichever of them, or its report, is found is right. What is not
    right and has an equal score comes first, so that embeddings that are all alike find nothing.
    of_texts: whether candidates are texts. Equal texts count as one candidate then.
    """
    first_with: dict[str, int] = {}
    group = np.array([first_with.setdefault(text, number) for number, text in enumerate(texts)])
    right = group[:, None] == group[None]
    best = np.where(right, scores, -np.inf).max(axis=1)
    before = ~right & (scores >= best[:, None])
    if of_texts:
        before &= (group == np.arange(len(texts)))[None]
    return before.sum(axis=1) < k
