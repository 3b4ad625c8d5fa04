"""What the demonstration's evaluation promises: the truth scores 1, nonsense 0, and a guess what chance says."""
from __future__ import annotations

import numpy as np
import pytest

from training.data.augment import view_of
from training.data.scans import LabelledScan
from training.evaluate import KINDS, Score, figure, measure, retrieval, summary, table

SIZE = (8, 32, 32)


@pytest.fixture
def view():
    masks = np.zeros((2, *SIZE), bool)
    masks[0, :, 4:28, 18:30], masks[1, 2:6, 8:20, 2:14] = True, True
    facts = {"modality": "CT", "part": "chest", "view": "both lungs", "finding": "Nothing else.", "tumour": "",
             "tumour_side": ""}
    scan = LabelledScan("phantom", masks[0].astype(np.float32), masks[0].astype(np.int64) + 2 * masks[1].astype(np.int64),
                        ("left lung", "right lung"), tuple(float(m.mean()) for m in masks), facts)
    return view_of(scan, None, SIZE, np.random.default_rng(0))


class Oracle:
    """Answers with the truth about a volume that is not empty, else with `nonsense`."""

    def __init__(self, view, nonsense: str | None = None):
        self.view, self.size, self.nonsense = view, SIZE, nonsense

    def __call__(self, image, questions, new_tokens):
        if self.nonsense is not None or not image.any():
            return [self.nonsense or ""] * len(questions), [None] * len(questions)
        return [q.answer for q in questions], [self.view.mask(q.structure) if q.segments else None for q in questions]


def test_the_truth_scores_one_in_every_task_and_silence_zero(view):
    scores = measure(Oracle(view), view, np.random.default_rng(1), 0.2)
    asked = {s.kind for s in scores}
    assert asked == set(KINDS) - {"text retrieval", "scan retrieval"} | {"unseen wording"}
    assert all(s.value == pytest.approx(1, abs=0.02) for s in scores)
    assert not any(s.blind for s in scores)
    silent = measure(Oracle(view, "nothing"), view, np.random.default_rng(1), 0.2)
    assert all(s.value == 0 for s in silent if s.kind != "refusal") and all(s.value for s in silent if s.kind == "refusal")


def test_chance_is_what_any_structure_in_view_would_score(view):
    scores = measure(Oracle(view), view, np.random.default_rng(1), 0.2)
    chances = {kind: {round(s.chance, 6) for s in scores if s.kind == kind} for kind in ("REG", "segmentation", "caption")}
    # Two structures that do not touch: one of two is right.
    assert chances == {"REG": {0.5}, "segmentation": {0.5}, "caption": {0.2}}


def test_retrieval_counts_reports_of_the_same_words_as_one_and_finds_what_is_nearest():
    features = np.eye(3)[[0, 0, 1, 2]]
    found = retrieval(features, features, ["a", "a", "b", "c"])
    assert [s.value for s in found] == [1] * 8
    assert [s.chance for s in found[:4]] == [0.5, 0.5, 0.25, 0.25]
    wrong = retrieval(features, features[[3, 3, 2, 0]], ["a", "a", "b", "c"])
    assert [s.value for s in wrong[:4]] == [0, 0, 1, 0]


def test_intervals_are_wilson_s_for_shares_and_hold_the_mean_of_others():
    right = figure([Score("REG", "", "", value, 0.5) for value in [1] * 15 + [0] * 5])
    # Wilson's interval of 15 in 20, by its formula.
    assert right["interval"] == pytest.approx([0.5313, 0.8881], abs=2e-4) and right["mean"] == 0.75
    ious = figure([Score("REC", "", "", value, 0.1) for value in np.linspace(0.2, 0.8, 9)])
    low, high = ious["interval"]
    assert 0.2 < low < 0.5 < high < 0.8


def test_the_summary_and_the_card_s_table_name_every_task(view):
    scores = measure(Oracle(view), view, np.random.default_rng(1), 0.2)
    found = summary(scores)
    assert found["segmentation"]["mean_dice_large"] == 1 and found["segmentation"]["large_structures"] == 2
    assert found["closed_questions"]["mean"] == 1 and found["closed_questions"]["n"] == sum(
        s.kind in ("closed VQA", "open VQA", "yes or no") for s in scores)
    lines = table(found["tasks"]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(found["tasks"])
