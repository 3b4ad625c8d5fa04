"""Through export and the running server, answers and masks are the reference's: ids equal, mask logits within 1e-4."""
from __future__ import annotations

import json

import numpy as np
import pytest

import weights
import write_checkpoint
from engine.client import M3DClient
from engine.server import Server, free_ports
from export.build_engines import export
from tests.conftest import ROOT, copy_repository

CASE = ROOT / "tests" / "fixtures" / "dev_small"


@pytest.fixture(scope="module")
def case():
    return json.loads((CASE / "case.json").read_text())


@pytest.fixture(scope="module")
def client(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev_small")
    repository = copy_repository(folder)
    export(write_checkpoint.write(CASE / "case.json", folder / "checkpoint"), repository, precision="fp32")
    with Server(repository, **free_ports(), log=folder / "triton.log") as server, M3DClient(server.url) as client:
        yield client


def test_the_server_answers_and_segments_like_the_reference(case, client):
    expected = np.load(CASE / "expected.npz")
    volume = weights.volume(tuple(case["volume_shape"]), case["volume_seed"])[0]
    study = client.upload(volume)
    question, most = write_checkpoint.question(case), case["generate"]["max_new_tokens"]

    answer = client.ask(study, question, max_new_tokens=most)
    assert list(answer.token_ids) == expected["output_ids"].tolist()
    special = {token for token, text in write_checkpoint.special_tokens(case).items() if text != "[SEG]"}
    assert answer.text == write_checkpoint.words([t for t in case["output_ids"] if t not in special], case)

    found = client.segment(study, question, return_logits=True, max_new_tokens=most)
    assert list(found.answer.token_ids) == expected["output_ids"].tolist()
    logits = found.logits
    np.testing.assert_allclose(logits[::4, ::16, ::16], expected["seg_logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[len(logits) // 2, ::2, ::2], expected["seg_logits_mid"], atol=1e-4, rtol=0)
    assert abs(int((logits > 0).sum()) - int(expected["seg_positive"])) <= 10
    assert abs(int(found.mask.sum()) - int(expected["seg_positive"])) <= 10
