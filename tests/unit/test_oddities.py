"""What the check of a data root promises about whole sets: repeats across splits and turned scans are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.data.oddities import AXES, centre, repeats, subject, turned_cases, turned_sets
from training.data.sample import Sample

PLACES = {"liver": (0.6, 0.4, 0.3), "spleen": (0.65, 0.6, 0.8), "bladder": (0.1, 0.3, 0.5), "heart": (0.9, 0.3, 0.6)}


def cases(count: int, seed: int = 0, spread: float = 0.03, turned: dict[int, int] = {}) -> dict:  # noqa: B006
    """Centres of the structures in `count` cases; turned: the axis along which a case is mirrored."""
    rng = np.random.default_rng(seed)
    found = {}
    for k in range(count):
        found[f"case {k}"] = {name: np.array(place) + rng.normal(0, spread, 3) for name, place in PLACES.items()}
        if k in turned:
            for place in found[f"case {k}"].values():
                place[turned[k]] = 1 - place[turned[k]]
    return found


def test_a_mirrored_case_is_found_with_its_axis_and_no_other_is():
    assert turned_cases(cases(12)) == []
    for axis in range(3):
        assert turned_cases(cases(12, turned={5: axis})) == [("case 5", AXES[axis])]
    assert turned_cases(cases(12, turned={1: 0, 7: 2})) == [("case 1", "D"), ("case 7", "W")]


def test_where_cases_or_structures_are_few_nothing_is_told():
    assert turned_cases(cases(3, turned={1: 0})) == []
    two = {case: dict(list(places.items())[:2]) for case, places in cases(12, turned={1: 0}).items()}
    assert turned_cases(two) == [] and turned_cases({}) == []


def test_missing_structures_are_no_oddity():
    found = cases(12, turned={5: 0})
    del found["case 5"]["liver"], found["case 3"]["spleen"]
    found["case 4"] = {}
    assert turned_cases(found) == [("case 5", "D")]


def test_a_data_set_that_lies_otherwise_than_the_others_is_found():
    sets = {code: cases(8, seed) for seed, code in enumerate(("0001", "0002", "0003"))}
    assert turned_sets(sets) == []
    sets["0009"] = cases(8, 4, turned=dict.fromkeys(range(8), 0))
    assert turned_sets(sets) == [("0009", "D")]
    assert turned_sets({"0009": sets["0009"]}) == []


def test_the_centre_of_a_mask_is_a_share_of_each_axis():
    mask = np.zeros((4, 10, 8), bool)
    mask[1, 2:4, 6] = True
    np.testing.assert_allclose(centre(mask), [1.5 / 4, 3 / 10, 6.5 / 8])


def sample(task: str, question: str, answer: str) -> Sample:
    return Sample(np.zeros((1, 1, 1, 1), np.float32), question, answer, None, True, task, "")


@pytest.mark.parametrize("spelled", ["The lungs are clear.", "the  lungs\nARE clear."])
def test_a_report_that_stands_in_two_splits_is_counted_however_it_is_spelled(spelled):
    train = [subject(sample("caption", "a", "The lungs are clear."), Path("ct_case/1/x.npy"))]
    train.append(subject(sample("caption", "b", "A mass."), Path("ct_case/2/x.npy")))
    same = subject(sample("caption", "c", spelled), Path("ct_case/1/y.npy"))
    other = subject(sample("caption", "c", spelled), Path("ct_quizze/7/y.npy"))
    new = subject(sample("caption", "a", "No mass."), Path("ct_case/1/y.npy"))
    assert repeats(train, [same, other, new]) == (2, 1)
    assert repeats([], [same]) == (0, 0)


def test_of_questions_about_a_scan_both_must_repeat_and_of_drawn_ones_the_scan():
    asked = [subject(sample("vqa_open", question, ""), Path(image)) for image in "ab" for question in ("x?", "y?")]
    assert repeats(asked[:1], asked) == (1, 0)
    drawn = [subject(sample("segmentation", question, ""), Path(image)) for image in "ab" for question in ("x?", "y?")]
    assert repeats(drawn[:1], drawn) == (2, 0)
