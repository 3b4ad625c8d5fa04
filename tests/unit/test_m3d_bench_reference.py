"""The same predictions get the same figures as from the reference's own metric code (tests/fixtures/README.md)."""

import json

import numpy as np
import pytest

from benchmarks.bench.metrics import boxes, choices, masks, retrieval, text
from tests.conftest import ROOT

RECORDED = json.loads((ROOT / "tests/fixtures/m3d_bench_reference.json").read_text())
ROWS, REFERENCE = RECORDED["rows"], RECORDED["reference"]


@pytest.mark.parametrize(
    ("metric", "score"), [("BLEU-1", text.bleu_1), ("ROUGE-1", lambda p, a: text.rouge("rouge1", p, a))]
)
def test_texts_have_the_references_bleu_and_rouge(metric, score):
    ours = [score(prediction, answer) for prediction, answer in ROWS["texts"]]
    assert ours == pytest.approx([row[metric] for row in REFERENCE["texts"]], abs=1e-12)


@pytest.mark.integration
def test_texts_have_the_references_meteor():
    meteor = text.load_meteor()
    ours = [meteor(prediction, answer) for prediction, answer in ROWS["texts"]]
    assert ours == pytest.approx([row["METEOR"] for row in REFERENCE["texts"]], abs=1e-12)


def test_boxes_have_the_references_iou():
    ours = [boxes.hull_iou(boxes.reference_box(p), boxes.reference_box(a)) for p, a in ROWS["boxes"]]
    assert ours == pytest.approx(REFERENCE["boxes"], abs=1e-12)
    assert -1 in ours and 0 in ours and max(ours) > 0.9


def test_closed_questions_are_right_when_the_reference_says_so():
    assert [choices.substring_right(p, c) for p, c in ROWS["closed"]] == [bool(v) for v in REFERENCE["closed"]]


def test_masks_have_the_references_dice():
    ours = [
        masks.soft_dice(
            None if row["logits"] is None else np.array(row["logits"]).reshape(ROWS["mask_shape"]),
            np.array([int(voxel) for voxel in row["truth"]]).reshape(ROWS["mask_shape"]) == 1,
        )
        for row in ROWS["masks"]
    ]
    assert ours == pytest.approx(REFERENCE["masks"], abs=1e-6)  # the reference sums in fp32


def test_retrieval_has_the_references_recall():
    scores = retrieval.similarity(np.array(ROWS["scans"]), np.array(ROWS["reports"]))
    for name, wanted in REFERENCE["retrieval"].items():
        matrix = scores if name.startswith("IR") else scores.T
        assert retrieval.reference_hits(matrix, int(name.split("@")[1])).mean() == pytest.approx(wanted)
