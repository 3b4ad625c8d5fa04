"""What the demonstration's evaluation promises: the truth scores 1, nonsense 0, and a guess what chance says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import training
from tests.tiny import write_tiny_lamed
from training.data.augment import view_of
from training.data.questions import Question
from training.data.scans import LabelledScan
from training.evaluate import (
    KINDS,
    Answerer,
    Priors,
    Score,
    box_iou,
    dice,
    figure,
    finding,
    measure,
    reports,
    retrieval,
    summary,
    table,
)

SIZE = (8, 32, 32)
DEMO = Path(training.__file__).parent / "demo"


@pytest.fixture
def view():
    masks = np.zeros((2, *SIZE), bool)
    masks[0, :, 4:28, 18:30], masks[1, 2:6, 8:20, 2:14] = True, True
    facts = {
        "modality": "CT",
        "part": "chest",
        "view": "both lungs",
        "finding": "No tumour is seen.",
        "tumour": "",
        "tumour_side": "",
    }
    bits = masks[0].astype(np.int64) + 2 * masks[1].astype(np.int64)
    scan = LabelledScan(
        "phantom",
        masks[0].astype(np.float32),
        bits,
        ("left lung", "right lung"),
        tuple(float(m.mean()) for m in masks),
        facts,
    )
    return view_of(scan, None, SIZE, np.random.default_rng(0))


class Oracle:
    """Answers with the truth about a volume that is not empty, else with `nonsense`."""

    def __init__(self, view, nonsense: str | None = None):
        self.view, self.size, self.nonsense = view, SIZE, nonsense

    def __call__(self, image, questions, new_tokens):
        if self.nonsense is not None or not image.any():
            return [self.nonsense or ""] * len(questions), [None] * len(questions)
        return [q.answer for q in questions], [self.view.mask(q.structure) if q.segments else None for q in questions]


def measured(view, nonsense: str | None = None, number: int = 0, seed: int = 1) -> list[Score]:
    return measure(Oracle(view, nonsense), view, number, np.random.default_rng(seed), Priors([view], [view]))


def test_the_truth_scores_one_in_every_task_and_nonsense_zero(view):
    scores = measured(view)
    assert {s.kind for s in scores} == set(KINDS) - {"text retrieval", "scan retrieval"} | {"unseen wording"}
    assert all(s.value == pytest.approx(1, abs=0.02) for s in scores)
    assert not any(s.blind for s in scores)
    # A refusal, too, must be said.
    assert not any(s.value for s in measured(view, "nothing"))


def test_chance_is_what_any_structure_in_view_would_score(view):
    scores = measured(view)
    chances = {kind: {round(s.chance, 3) for s in scores if s.kind == kind} for kind in ("REG", "segmentation", "REC")}
    # Two structures that do not touch: one of two is right.
    assert chances == {"REG": {0.5}, "segmentation": {0.5}, "REC": {0.5}}


def test_the_best_guess_knows_the_commonest_answer_and_the_usual_place(view):
    scores = measured(view)
    # About one scan everything is known without a look: what is in it, where it lies, what its report says.
    assert all(s.prior == pytest.approx(1) for s in scores if s.prior is not None)
    other = replace(view, scan="other", facts={**view.facts, "modality": "MR"})
    priors = Priors([view, other, other], [view])
    asked = [Question("modality", "", "", key=key) for key in ("CT", "MR")]
    assert [priors.closed(q) for q in asked] == [0, 1]
    assert priors.reports.most_common(1)[0] == (finding(other), 2)
    assert priors.usual(replace(view, facts={**view.facts, "part": "brain"}), "left lung", lambda v: 1.0) is None


def test_a_report_must_have_modality_part_and_the_side_of_the_tumour(view):
    assert reports(view, "This is a CT scan of the chest. No tumour is seen.")
    assert not reports(view, "This is an MR scan of the chest. No tumour is seen.")
    assert not reports(view, "This is a CT scan of the chest. There is a tumour in the left lung.")
    ill = replace(view, facts={**view.facts, "tumour": "left lung", "tumour_side": "left"})
    assert reports(ill, "A CT scan of the chest. There is a small tumour in the left lung.")
    assert not reports(ill, "A CT scan of the chest. There is a small tumour in the right lung.")
    assert not reports(ill, "A CT scan of the chest. No tumour is seen.")


def test_boxes_and_masks_are_compared_by_their_union_and_their_sum():
    # Two cubes of 4 voxels a side, shifted by 2 along one axis: 32 voxels together of 96.
    a = np.array([0, 0, 0, 3, 3, 3]) / np.tile(SIZE, 2)
    b = np.array([2, 0, 0, 5, 3, 3]) / np.tile(SIZE, 2)
    assert box_iou(a, b, SIZE) == pytest.approx(32 / 96)
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 0:4, :4, :4], masks[1, 2:6, :4, :4] = True, True
    assert dice(*masks) == pytest.approx(2 * 32 / 128)


def test_retrieval_is_right_when_the_finding_agrees():
    features = np.eye(3)[[0, 0, 1, 2]]
    found = retrieval(features, features, ["a", "a", "b", "c"])
    assert [s.value for s in found] == [1] * 8
    assert [s.chance for s in found[:4]] == [0.5, 0.5, 0.25, 0.25]
    wrong = retrieval(features, features[[3, 3, 2, 0]], ["a", "a", "b", "c"])
    assert [s.value for s in wrong[:4]] == [0, 0, 1, 0]


def test_intervals_take_answers_about_one_view_together():
    def scores(views):
        return [Score("REG", "", "", view, value, 0.5) for view, values in enumerate(views) for value in values]

    alone, together = [scores(views) for views in ([[v] for v in [1.0, 0.0] * 40], [[1.0] * 10, [0.0] * 10] * 4)]
    (low, high), (lower, higher) = figure(alone)["interval"], figure(together)["interval"]
    assert lower < low < 0.5 < high < higher
    # All right in 20 views: Wilson's, by its formula n / (n + z²).
    assert figure(scores([[1.0, 1.0]] * 20))["interval"] == pytest.approx([0.8389, 1], abs=2e-4)
    assert figure(scores([[1.0, 0.0]]))["interval"] is None


def test_the_summary_is_json_and_the_card_s_table_names_every_task(view):
    scores = measured(view)
    found = json.loads(json.dumps(summary(scores), allow_nan=False))
    assert found["segmentation"]["mean_dice_large"] == 1 and found["segmentation"]["large_structures"] == 2
    assert found["closed_questions"]["mean"] == 1 and found["closed_questions"]["n"] == sum(
        s.kind in ("closed VQA", "open VQA", "yes or no") for s in scores
    )
    lines = table(found["tasks"]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(found["tasks"])


def test_many_questions_at_once_are_answered_as_one_by_one(tmp_path):
    answerer = Answerer(write_tiny_lamed(tmp_path / "lamed"))
    answerer.lamed.llm.float()
    texts = ["Where?", "Is there anything in this scan that should not be there?"]
    image = np.random.default_rng(0).random(answerer.size, dtype=np.float32)
    answers, masks = answerer(image, [Question("", text, "") for text in texts], 12)
    for text, answer, mask in zip(texts, answers, masks):
        ids, start = torch.tensor([answerer.prompt.input_ids(text)]), len(answerer.prompt.head)
        ids, _, logits = answerer.lamed.generate(torch.from_numpy(image)[None, None], ids, start, 12)
        alone = answerer.tokenizer.decode(ids, skip_special_tokens=False).split(answerer.tokenizer.eos_token)[0].strip()
        assert answer == alone
        assert (mask is None) == (logits is None) and (
            mask is None or (mask == (logits[0, 0] > 0).numpy()).mean() > 0.99
        )
