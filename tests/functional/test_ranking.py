"""Rankings by a real server: reports are read up to BERT's 512 tokens, and what is beyond is said to be."""

from __future__ import annotations

import numpy as np
import pytest

from engine.contract import MODELS
from tests.tiny import clip_scores, volume, words

pytestmark = pytest.mark.integration

BATCH = MODELS["clip_text_encoder"].max_batch_size


def test_scores_are_those_of_each_text_alone_at_512_tokens(client, clip_checkpoint):
    texts = [words(count, count) for count in (1, 7, 127, 200, 510, 511, 900)]
    texts += [words(20, seed) for seed in range(BATCH)]
    ranking = client.rank(volume(), texts)
    np.testing.assert_allclose(ranking.scores, clip_scores(clip_checkpoint, texts), atol=1e-6, rtol=0)
    assert np.flatnonzero(ranking.cut).tolist() == [5, 6] and ranking.text_limit == 512


def test_reports_that_share_their_first_128_tokens_get_different_scores(client):
    begun = words(127)
    ranking = client.rank(volume(), [f"{begun} {words(300, 1)}", f"{begun} {words(300, 2)}"])
    assert abs(np.diff(ranking.scores)) > 1e-5 and ranking.cut == (False, False)
