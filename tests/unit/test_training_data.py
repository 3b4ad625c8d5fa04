"""What the training data promise: masks move with images, mirrored bodies swap their sides, answers are true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import training
from engine.prompt import parse_boxes
from training.data.augment import Augmentation, view_of
from training.data.jitter import swap_sides
from training.data.questions import CLOSED, SHARES, ask, caption, draw, is_right, words
from training.data.scans import SOURCES, LabelledScan, facts_of
from training.packing import filled_share

SIZE = (16, 32, 32)
STILL = Augmentation(**{field.name: 0 for field in dataclasses.fields(Augmentation)})
MOVING = dataclasses.replace(STILL, rotate_degrees=10, zoom=0.15, shift=0.05)


@pytest.fixture(scope="module")
def scan() -> LabelledScan:
    """A bright block on the patient's left (high W) that holds a brighter one, a dark one on the right."""
    image = np.zeros((24, 48, 48), np.float32)
    left, right, tumour = np.zeros((3, *image.shape), bool)
    left[6:18, 12:36, 28:44] = True
    right[6:18, 12:36, 4:20] = True
    tumour[10:14, 20:28, 32:40] = True
    image[left], image[right], image[tumour] = 0.6, 0.3, 1.0
    parts = {"left lung": left, "right lung": right, "lung tumour": tumour}
    bits = sum(mask.astype(np.int64) << k for k, mask in enumerate(parts.values()))
    facts = {
        "modality": "CT",
        "part": "chest",
        "view": "both lungs",
        "finding": "There is a tumour in the {tumour_side} lung.",
        "tumour": "lung tumour",
        "tumour_side": "left",
    }
    return LabelledScan("phantom", image, bits, tuple(parts), tuple(float(m.mean()) for m in parts.values()), facts)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(8))
def test_masks_stay_on_their_structures_however_the_scan_is_moved(scan, seed):
    view = view_of(scan, dataclasses.replace(MOVING, mirror=0.5), SIZE, rng(seed))
    bright, dark = ("left lung", "right lung") if view.facts["tumour_side"] == "left" else ("right lung", "left lung")
    assert view.image[view.mask("lung tumour")].mean() > 0.85
    assert view.image[view.mask(bright) & ~view.mask("lung tumour")].mean() > 0.5
    assert 0.2 < view.image[view.mask(dark)].mean() < 0.4
    assert view.image[view.bits == 0].mean() < 0.1


def test_a_mirrored_body_swaps_left_and_right_in_masks_names_and_facts(scan):
    plain = view_of(scan, STILL, SIZE, rng())
    mirrored = view_of(scan, dataclasses.replace(STILL, mirror=1), SIZE, rng())
    np.testing.assert_array_equal(mirrored.image, plain.image[:, :, ::-1])
    np.testing.assert_array_equal(mirrored.mask("right lung"), plain.mask("left lung")[:, :, ::-1])
    # Left is where W is high, mirrored or not.
    for view in (plain, mirrored):
        assert view.box("left lung")[2] > 0.5 > view.box("right lung")[5]
    assert (plain.facts["tumour_side"], mirrored.facts["tumour_side"]) == ("left", "right")


def test_a_view_without_augmentation_is_the_scan_itself(scan):
    view = view_of(scan, None, scan.image.shape, rng())
    np.testing.assert_allclose(view.image, scan.image, atol=1e-6)
    np.testing.assert_array_equal(view.bits, scan.bits)


def test_what_has_left_the_view_is_not_asked_about(scan):
    halved = dataclasses.replace(scan, bits=np.where(np.arange(48) < 24, 0, scan.bits))
    view = view_of(halved, None, SIZE, rng())
    assert view.visible == ("left lung", "lung tumour")


def test_boxes_are_first_and_last_voxels_over_the_axis_length(scan):
    view = view_of(scan, None, scan.image.shape, rng())
    np.testing.assert_allclose(view.box("left lung"), [6 / 24, 12 / 48, 28 / 48, 17 / 24, 35 / 48, 43 / 48])


def test_the_decoder_s_grid_sees_the_share_of_each_cell(scan):
    mask = np.zeros((8, 16, 16), bool)
    mask[0, :2, 0] = True
    share = filled_share(mask, (1, 1, 1))
    assert share.shape == (4, 4, 4)
    assert share[0, 0, 0] == 2 / 32 and share.sum() == 2 / 32


@pytest.mark.parametrize("wording", ["train", "held_out"])
@pytest.mark.parametrize("mirror", [0, 1])
def test_every_answer_is_true_of_the_view(scan, mirror, wording):
    view = view_of(scan, dataclasses.replace(STILL, mirror=mirror), SIZE, rng())
    other = {"left": "right", "right": "left"}[view.facts["tumour_side"]]
    for seed in range(30):
        for task in SHARES:
            q = ask(task, view, rng(seed), wording)
            assert "{" not in q.question + q.answer
            if task in CLOSED:
                assert is_right(q, q.answer)
            if task in ("side", "side_yes", "tumour", "describe"):
                assert view.facts["tumour_side"] in q.answer and other not in q.answer
            if task == "box":
                np.testing.assert_allclose(parse_boxes(q.answer)[0], view.box(q.structure), atol=5e-4)
            if task == "presence" and q.key == "No":
                assert q.structure not in view.visible
            assert q.segments == (task == "segment")


def test_yes_and_no_are_equally_frequent(scan):
    view = view_of(scan, None, SIZE, rng())
    keys = [ask("presence", view, rng(seed)).key for seed in range(400)]
    assert 0.4 < keys.count("Yes") / 400 < 0.6


def test_a_wrong_answer_to_a_closed_question_is_not_right(scan):
    view = view_of(scan, None, SIZE, rng())
    side = ask("side", view, rng())
    assert is_right(side, "The tumour is on the left side.")
    assert not is_right(side, "The tumour is on the right side.") and not is_right(side, "left or right")
    assert not is_right(ask("modality", view, rng()), "It is an MR scan.")


def test_held_out_wordings_are_never_trained():
    for task in words()["tasks"].values():
        assert task["held_out"] and not set(task["train"]) & set(task["held_out"])


def test_questions_depend_on_the_seed_only(scan):
    view = view_of(scan, None, SIZE, rng())
    assert draw(view, rng(5), 6) == draw(view, rng(5), 6) != draw(view, rng(6), 6)


def test_only_the_named_tasks_are_drawn_as_often_as_they_say(scan):
    view = view_of(scan, None, SIZE, rng())
    drawn = [q.task for q in draw(view, rng(), 400, {"box": 3, "name_box": 1, "describe": 0})]
    assert set(drawn) == {"box", "name_box"} and 0.7 < drawn.count("box") / 400 < 0.8


def test_a_view_that_allows_no_task_is_asked_nothing(scan):
    unseen = dataclasses.replace(view_of(scan, None, SIZE, rng()), visible=())
    assert draw(unseen, rng(), 6, {"box": 1, "side": 1}) == []
    assert {q.task for q in draw(unseen, rng(), 6, {"box": 1, "modality": 1})} == {"modality"}


def test_swapping_sides_twice_changes_nothing():
    text = "left lung, right of the left ventricle"
    assert swap_sides(text) == "right lung, left of the right ventricle" and swap_sides(swap_sides(text)) == text


def test_every_source_has_facts_whose_part_the_words_know():
    assert set(facts_of()) == set(SOURCES)
    for facts in facts_of().values():
        assert facts["part"] in words()["parts"] and facts["modality"] in words()["modalities"]


def test_the_demo_s_held_out_scans_are_in_no_training_configuration():
    folder = Path(training.__file__).parent / "configs" / "demo"
    evaluated = json.loads((folder / "8_evaluate.json").read_text())
    for file in folder.glob("*.json"):
        scans = json.loads(file.read_text()).get("data", {}).get("scans", {"train": {}})["train"]
        assert set(scans) <= set(SOURCES) and not set(scans) & set(evaluated["held_out"])
    assert set(evaluated["held_out"]) | set(evaluated["train"]) <= set(SOURCES)


def test_reports_name_only_what_is_in_view(scan):
    view = view_of(scan, None, SIZE, rng())
    for seed in range(10):
        text = caption(view, rng(seed))
        assert "chest" in text and "CT" in text
        assert set(text.partition("In view: ")[2].rstrip(".").split(", ")) <= set(view.visible)
