"""What the readers of M3D-Data promise: the published layout, samples that depend on nothing but (seed, epoch, index),
and clear words about whatever is wrong.
"""

from __future__ import annotations

import csv
import json
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from engine.errors import InvalidInput
from engine.prompt import BOX_START, SEG_TOKEN, parse_boxes
from tests.conftest import ROOT
from tests.m3d_data import LIVER, RIGHT_KIDNEY, SIZE, VQA_COLUMNS, image, mask, save, write_csv, write_root
from training.config import StageSettings, build
from training.data import sets
from training.data.grouping import Groups
from training.data.jitter import Change, draw_change, swap_sides
from training.data.reading import Table, mask_id
from training.data.reports import ShortReports, drawn_sentences
from training.data.sample import BrokenSample
from training.data.selection import open_pairs, open_questions, shown
from training.data.sets import (
    TASKS,
    Captions,
    ClosedVqa,
    Mixture,
    Referring,
    Structures,
    Vqa,
    YesNoVqa,
    box_of,
    open_sets,
)
from training.data.wording import class_names, descriptions, read_templates, templates

FORMATS = json.loads((ROOT / "tests/fixtures/formats/formats.json").read_text())


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return write_root(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture
def root(complete, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(complete, tmp_path / "root")


def same(a, b) -> bool:
    return (
        a.question == b.question
        and a.answer == b.answer
        and np.array_equal(a.image, b.image)
        and (a.mask is b.mask is None or np.array_equal(a.mask, b.mask))
    )


# --- what samples hold -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("split, count", [("train", 4), ("validation", 1), ("test", 1)])
def test_captions_are_reports_on_one_line_behind_a_question_without_a_space(complete, split, count):
    captions = Captions(complete, split, SIZE)
    assert len(captions) == count
    sample = captions[0]
    assert sample.image.shape == (1, *SIZE) and sample.image.dtype == np.float32
    assert sample.answer.endswith(". The left lung is clear.") and "\n" not in sample.answer
    assert sample.question in templates()["caption"]["train"]
    assert (sample.task, sample.space, sample.mask) == ("caption", False, None)
    assert Captions(complete, split, SIZE, ask=False)[0].question == ""
    assert Path(sample.source).is_file()


def test_the_choices_of_a_closed_question_stand_behind_it(complete):
    sample = ClosedVqa(complete, "train", SIZE)[1]
    assert sample.question == "Which plane? Choices: A. Axial B. Coronal C. Sagittal D. None"
    assert sample.answer == "A. Axial" and sample.space and sample.task == "vqa_closed"
    sample = Vqa(complete, "validation", SIZE)[0]
    assert (sample.question, sample.answer, sample.task) == ("Which plane?", "Axial", "vqa_open")
    sample = YesNoVqa(complete, "train", SIZE)[0]
    assert (sample.question, sample.answer, sample.task) == ("Is there a mass?", "No", "vqa_yes_no")


@pytest.mark.parametrize(
    "blank, choices", [("D", "A. Axial B. Coronal C. Sagittal"), ("B", "A. Axial C. Sagittal D. None")]
)
def test_a_blank_choice_is_left_out(root, blank, choices):
    spoil_choices(root, blank)
    assert ClosedVqa(root, "train", SIZE)[0].question == f"Which plane? Choices: {choices}"


@pytest.mark.parametrize("blank, said", [("A", "offers B, C, D, and A is right"), ("BCD", "offers A, and A is right")])
def test_a_question_without_its_right_choice_or_with_no_other_is_broken(root, blank, said):
    spoil_choices(root, blank)
    with pytest.raises(BrokenSample, match=f"row 1 {said}"):
        ClosedVqa(root, "train", SIZE)[0]


def spoil_choices(root: Path, letters: str) -> None:
    """The first question of training leaves some choices blank."""
    path = root / "M3D-VQA/M3D_VQA_train.csv"
    rows = list(csv.DictReader(path.open()))
    rows[0].update({f"Choice {letter}": " " for letter in letters})
    write_csv(path, VQA_COLUMNS, [row.values() for row in rows])


def test_the_published_test_tables_of_questions_can_be_named(complete):
    assert len(ClosedVqa(complete, "test5k", SIZE)) == len(Vqa(complete, "test5k", SIZE)) == 1
    assert len(Captions(complete, "test1k", SIZE)) == 1
    with pytest.raises(InvalidInput, match="no split 'test5k'"):
        YesNoVqa(complete, "test5k", SIZE)


def test_questions_for_yes_or_no_are_published_for_training_only(complete):
    with pytest.raises(InvalidInput, match="M3D_VQA_yn_test.csv was looked for"):
        YesNoVqa(complete, "test", SIZE)


def test_structures_are_asked_for_by_name_and_by_description(complete):
    structures = Structures(complete, "train", SIZE, code="0010", kind="segmentation")
    assert len(structures) == 4
    samples = [structures[k] for k in range(4)]
    for sample, box in zip(samples, (LIVER, LIVER, RIGHT_KIDNEY, RIGHT_KIDNEY)):
        assert SEG_TOKEN in sample.answer and sample.space
        np.testing.assert_array_equal(sample.mask, mask(box))
    assert "liver" in samples[0].question and "right kidney" in samples[2].question
    assert "liver" not in samples[1].question and any(text in samples[1].question for text in descriptions()["liver"])
    assert "liver" in samples[1].answer


def test_boxes_in_answers_and_questions_are_those_of_the_mask(complete):
    for kind, where in (("rec", "answer"), ("reg", "question")):
        structures = Structures(complete, "train", SIZE, code="0010", kind=kind)
        for k in range(len(structures)):
            sample = structures[k]
            box = box_of(mask(LIVER if k < 2 else RIGHT_KIDNEY)[0])
            np.testing.assert_allclose(parse_boxes(getattr(sample, where)), [box], atol=5e-4)
            named = sample.answer if kind == "reg" or k % 2 else sample.question
            assert sample.mask is None and structures.name(k) in named
    np.testing.assert_allclose(box_of(mask(LIVER)[0]), [1 / 8, 4 / 32, 2 / 32, 4 / 8, 15 / 32, 11 / 32])


@pytest.mark.parametrize("empty", [np.zeros((1, 1, 1, 1), np.int8), np.zeros((1, *SIZE), bool)])
def test_a_structure_that_is_not_in_the_scan_is_denied(root, empty):
    save(root / "M3D_Seg_npy/0010/a/masks/mask_0.npy", empty)
    for kind in ("segmentation", "rec", "reg"):
        structures = Structures(root, "train", SIZE, code="0010", kind=kind)
        for k in (0, 1):
            sample = structures[k]
            assert sample.mask is None and SEG_TOKEN not in sample.answer and "liver" in sample.answer
            assert BOX_START not in sample.question + sample.answer


def test_a_referring_question_means_the_voxels_with_its_mask_id(complete):
    referring = Referring(complete, "train", SIZE)
    np.testing.assert_array_equal(referring[0].mask, mask(LIVER))
    np.testing.assert_array_equal(referring[1].mask, mask(RIGHT_KIDNEY))
    assert referring[1].question == "Segment lesion 2." and referring[1].task == "refseg" and referring[1].space
    assert {Path(Referring(complete, split, SIZE)[0].source).parent.name for split in ("validation", "test")} == {
        "s0001"
    }


@pytest.mark.parametrize("base", ["", "M3D_RefSeg/", "M3D_RefSeg_npy/", "/elsewhere/M3D_RefSeg_npy/"])
@pytest.mark.parametrize("ending", [".nii.gz", ".npy"])
def test_paths_of_referring_questions_count_from_their_folder_or_from_the_root(root, base, ending):
    path = root / "M3D_RefSeg_npy/M3D_RefSeg_train.csv"
    text = path.read_text()
    assert text.count("s0000/ct.nii.gz") == text.count("s0000/mask.nii.gz") == 2
    path.write_text(text.replace("s0000/", f"{base}s0000/").replace(".nii.gz", ending))
    referring = Referring(root, "train", SIZE)
    assert referring.files(0).image == root / "M3D_RefSeg_npy/s0000/ct.npy"
    np.testing.assert_array_equal(referring[1].mask, mask(RIGHT_KIDNEY))


def test_training_questions_under_the_reference_s_name_are_taken_unless_they_are_all_questions(root):
    folder = root / "M3D_RefSeg_npy"
    train = (folder / "M3D_RefSeg_train.csv").rename(folder / "M3D_RefSeg.csv")
    assert len(Referring(root, "train", SIZE)) == 2
    train.write_text((folder / "M3D_RefSeg_all.csv").read_text())
    with pytest.raises(InvalidInput, match="holds 2 of the 2 questions of M3D_RefSeg_test.csv.*M3D_RefSeg_train.csv"):
        Referring(root, "train", SIZE)
    train.unlink()
    with pytest.raises(InvalidInput, match="M3D_RefSeg_train.csv was looked for"):
        Referring(root, "train", SIZE)


def test_a_referring_answer_without_a_mask_is_text(root):
    path = root / "M3D_RefSeg_npy/M3D_RefSeg_train.csv"
    path.write_text(path.read_text().replace("It is [SEG] on the right.", "It is on the right.", 1))
    referring = Referring(root, "train", SIZE)
    assert referring[0].mask is None and referring[0].answer == "It is on the right."
    assert referring[1].mask.any()


@pytest.mark.parametrize("base", ["./Data/data/M3D_Seg_npy/", "/old/0010/M3D_Seg_npy/"])
def test_an_index_that_names_the_place_of_its_preparation_is_read_where_it_now_lies(root, base):
    index = root / "M3D_Seg_npy/0010/0010.json"
    listed = json.loads(index.read_text())
    moved = {
        split: [{key: base + path for key, path in entry.items()} for entry in entries]
        for split, entries in listed.items()
    }
    index.write_text(json.dumps(moved))
    structures = Structures(root, "train", SIZE, code="0010", kind="segmentation")
    np.testing.assert_array_equal(structures[2].mask, mask(RIGHT_KIDNEY))
    assert structures.files(2).image == root / "M3D_Seg_npy/0010/a/image.npy"


@pytest.mark.parametrize("place", ["M3D_Seg_npy/term_dictionary.json", "term_dictionary.json"])
def test_descriptions_are_those_of_the_dictionary_beside_the_data(root, place):
    (root / place).write_text(json.dumps({"liver": ["Makes bile."]}))
    structures = Structures(root, "train", SIZE, code="0010", kind="segmentation")
    # The sentence that it is filled into goes on behind it.
    assert re.search(r"Makes bile(?!\.[?.:;,])", structures[1].question)
    # What the dictionary leaves out has our own words.
    assert any(text in structures[3].question for text in descriptions()["right kidney"])
    assert root / place in structures.sources


@pytest.mark.parametrize("content", ["[]", '{"liver": "an organ"}', '{"liver": []}', '{"liver": [" "]}'])
def test_a_dictionary_that_is_not_one_is_refused(root, content):
    (root / "M3D_Seg_npy/term_dictionary.json").write_text(content)
    with pytest.raises(InvalidInput, match="term_dictionary.json must hold descriptions by class name"):
        Structures(root, "train", SIZE, code="0010", kind="rec")


def test_one_s_own_data_set_names_its_classes_in_its_json(root):
    folder = root / "M3D_Seg_npy"
    (folder / "0000").rename(folder / "mine")
    index = json.loads((folder / "mine" / "0000.json").read_text().replace("0000/", "mine/"))
    (folder / "mine" / "0000.json").unlink()
    (folder / "mine" / "mine.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match="must name its classes"):
        Structures(root, "train", SIZE, code="mine", kind="segmentation")
    (folder / "mine" / "mine.json").write_text(json.dumps(index | {"labels": {"0": "background", "1": "wing bone"}}))
    structures = Structures(root, "train", SIZE, code="mine", kind="segmentation")
    # Without a description it is asked for by its name both times.
    assert "wing bone" in structures[0].question and "wing bone" in structures[1].question


def test_all_tasks_open_from_one_root_as_one_set(complete):
    mixture = open_sets(list(TASKS), complete, "train", SIZE, jitter=True)
    tasks = Counter(mixture[k].task for k in range(len(mixture)))
    assert tasks == {
        "caption": 8,
        "vqa_closed": 4,
        "vqa_open": 4,
        "vqa_yes_no": 4,
        "segmentation": 6,
        "rec": 6,
        "reg": 6,
        "refseg": 2,
    }
    with pytest.raises(IndexError):
        mixture[len(mixture)]


# --- mixtures --------------------------------------------------------------------------------------------------------
def test_a_set_that_comes_twice_as_often_gives_other_samples_each_time(complete):
    mixture = open_sets({"rec": 2, "caption": 1, "vqa_open": 0}, complete, "train", SIZE, jitter=True)
    assert Counter(mixture[k].task for k in range(len(mixture))) == {"rec": 12, "caption": 4}
    of_epochs = [(mixture.at(0, k), mixture.at(0, k + 2), mixture.at(1, k)) for k in (0, 1)]
    assert not any(same(a, b) for first, again, later in of_epochs for a, b in ((first, again), (again, later)))
    # Data set 0000 has one structure, asked for twice; 0010 follows with two.
    assert [mixture.at(0, k).source for k in range(4)] == [mixture.at(0, 0).source] * 4


def test_half_of_a_set_is_the_other_half_in_the_next_epoch(complete):
    half = open_sets({"caption": 0.5}, complete, "train", SIZE)
    assert len(half) == 2
    sources = [[half.at(epoch, k).source for k in range(2)] for epoch in range(4)]
    assert sources[0] == sources[2] and sources[1] == sources[3] and not set(sources[0]) & set(sources[1])
    whole = open_sets(["caption"], complete, "train", SIZE)
    assert sources[0] + sources[1] == [whole[k].source for k in range(4)]


def test_one_data_set_of_a_task_may_weigh_more_than_its_others(complete):
    mixture = open_sets({"rec": 1, "rec/0000": 3, "segmentation": 1}, complete, "train", SIZE)
    counted = Counter((mixture[k].task, Path(mixture[k].source).parent.parent.name) for k in range(len(mixture)))
    assert counted == {
        ("rec", "0000"): 6,
        ("rec", "0010"): 4,
        ("segmentation", "0000"): 2,
        ("segmentation", "0010"): 4,
    }
    with pytest.raises(InvalidInput, match="there is no rec/0099: .* there are rec/0000, rec/0010"):
        open_sets({"rec": 1, "rec/0099": 2}, complete, "train", SIZE)
    with pytest.raises(InvalidInput, match="the weights of rec leave no sample"):
        open_sets({"rec": 0}, complete, "train", SIZE)


def test_predictions_that_are_watched_are_of_every_task(complete, tmp_path):
    tasks = {"caption": 1, "vqa_closed": 1, "rec": 0, "segmentation": 2, "refseg": 1}
    m3d = {"root": str(complete), "tasks": tasks, "jitter": False}
    run = build(StageSettings, {"out": str(tmp_path / "out"), "seed": 5, "data": {"m3d": m3d}, "trainer": {}})
    questions = open_questions(run, SIZE)
    assert [sample.task for sample in shown(questions, 3)] == ["caption", "vqa_closed", "segmentation", "refseg"]
    assert [sample.task for sample in shown(questions, 6)][4:] == ["caption", "caption"]


# --- groups ----------------------------------------------------------------------------------------------------------
def test_each_round_has_each_sample_once_in_groups_of_one_scan_that_differ_from_round_to_round():
    scans = [f"scan {k % 3}" for k in range(20)] + ["alone"]
    groups = Groups(scans, 3, seed=1)
    rounds = [[groups.members(number, k) for k in range(len(groups))] for number in range(4)]
    for found in rounds:
        assert sorted(k for group in found for k in group) == list(range(21))
        assert all(len({scans[k] for k in group}) == 1 for group in found)
        # 7, 7 and 6 samples and one: no group is much smaller than it must be.
        assert Counter(map(len, found)) == {3: 4, 2: 4, 1: 1}
    assert len({tuple(map(tuple, map(sorted, found))) for found in rounds}) > 1
    assert rounds[2] == [Groups(scans, 3, seed=1).members(2, k) for k in range(len(groups))]


def grouped(root: Path, out: Path, per_scan: int, tasks, jitter: bool = False):
    m3d = {"root": str(root), "tasks": tasks, "jitter": jitter, "per_scan": per_scan}
    return open_questions(build(StageSettings, {"out": str(out), "seed": 5, "data": {"m3d": m3d}, "trainer": {}}), SIZE)


def test_questions_about_one_scan_are_those_of_an_epoch_without_groups_and_their_scan_is_read_once(
    complete, tmp_path, monkeypatch
):
    tasks = ["segmentation", "refseg", "vqa_open"]
    single, several = (grouped(complete, tmp_path / str(most), most, tasks) for most in (1, 4))
    reads, read = [], sets.read_image
    monkeypatch.setattr(sets, "read_image", lambda path, size: reads.append(path) or read(path, size))
    together = [several[0, k] for k in range(len(several))]
    # Data set 0010 asks four questions about one scan, 0000 and the referring ones two.
    assert sorted(map(len, together)) == [1, 1, 1, 1, 2, 2, 4] and len(reads) == len(together)
    assert all(len({sample.source for sample in group}) == 1 for group in together)
    apart = [sample for k in range(len(single)) for sample in single[0, k]]
    in_groups = [sample for group in together for sample in group]
    assert len(apart) == len(in_groups) and all(any(same(a, b) for b in in_groups) for a in apart)


def test_the_scan_of_a_group_is_changed_once_and_its_masks_and_boxes_with_it(complete, tmp_path):
    data, changes = grouped(complete, tmp_path / "out", 4, ["segmentation", "rec"], jitter=True), set()
    for epoch in range(12):
        for group in (data[epoch, k] for k in range(len(data))):
            assert all(np.array_equal(sample.image, group[0].image) for sample in group)
            changes.add(group[0].image.tobytes())
            for sample in group:
                if sample.mask is None:
                    box = parse_boxes(sample.answer)[0] * np.tile(SIZE, 2)
                    first, last = np.rint(box[:3]).astype(int), np.rint(box[3:]).astype(int)
                    inside = sample.image[0][tuple(slice(a, b + 1) for a, b in zip(first, last))]
                else:
                    inside = sample.image[sample.mask]
                assert inside.min() > 0.5  # all else is below 0.3 before its change of 0.1 at most
    assert len(changes) > 12


def test_a_broken_question_of_a_group_is_left_out_alone(root, tmp_path):
    (root / "M3D_Seg_npy/0010/a/masks/mask_1.npy").write_bytes(b"")
    data = grouped(root, tmp_path / "out", 4, {"segmentation": 1, "segmentation/0000": 0})
    assert len(data) == 1 and len(data[0, 0]) == 2 and data.samples.counts() == (4, 2)


@pytest.mark.parametrize("most, named", [(0, "must be 1 or more"), (-1, "must not be negative")])
def test_groups_of_nothing_are_refused(complete, tmp_path, most, named):
    with pytest.raises(InvalidInput, match=named):
        grouped(complete, tmp_path / "out", most, ["rec"])


def test_pairs_come_one_a_scan(complete, tmp_path):
    m3d = {"root": str(complete), "tasks": ["pair"], "per_scan": 2}
    run = build(StageSettings, {"out": str(tmp_path / "out"), "seed": 5, "data": {"m3d": m3d}, "trainer": {}})
    with pytest.raises(InvalidInput, match="per_scan is for questions"):
        open_pairs(run, SIZE)


# --- determinism -----------------------------------------------------------------------------------------------------
def test_a_sample_depends_on_seed_epoch_and_index_only(complete):
    def opened(seed=1, epoch=0):
        mixture = open_sets(["rec", "segmentation", "caption"], complete, "train", SIZE, seed=seed, jitter=True)
        mixture.set_epoch(epoch)
        return mixture

    first, again = opened(), opened()
    backwards = {k: again[k] for k in reversed(range(len(again)))}
    assert all(same(first[k], backwards[k]) for k in range(len(first)))
    for other in (opened(seed=2), opened(epoch=1)):
        assert not all(same(first[k], other[k]) for k in range(len(first)))
        assert len({first[k].question for k in range(len(first))}) > 3
    assert len({first[k].question for k in range(len(first)) if first[k].task == "caption"}) > 1
    assert all(same(first.at(1, k), other[k]) for k in range(len(first)))
    again.set_epoch(1)
    assert all(same(again[k], other[k]) for k in range(len(first)))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_hear_of_a_new_epoch(complete, persistent):
    mixture = open_sets(["caption", "rec"], complete, "train", SIZE, jitter=True)
    loader = DataLoader(mixture, batch_size=None, num_workers=2, persistent_workers=persistent)
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        samples = list(loader)
        assert all(same(sample, mixture[k]) for k, sample in enumerate(samples))


# --- random changes --------------------------------------------------------------------------------------------------
def test_image_mask_and_box_change_together(complete):
    segmentation = Structures(complete, "train", SIZE, code="0010", kind="segmentation", jitter=True)
    rec = Structures(complete, "train", SIZE, code="0010", kind="rec", jitter=True)
    placed, tones = set(), set()
    for epoch in range(30):
        segmentation.set_epoch(epoch), rec.set_epoch(epoch)
        sample = segmentation[0]
        bright = sample.image[sample.mask]
        # The liver is of one intensity, and nothing else has it.
        assert np.ptp(bright) < 1e-6 and (np.abs(sample.image - bright[0]) < 1e-6).sum() == sample.mask.sum()
        placed.add(sample.mask.tobytes())
        tones.add(float(bright[0]))
        sample = rec[0]
        ((x1, y1, z1, x2, y2, z2),) = np.round(parse_boxes(sample.answer) * np.tile(SIZE, 2)).astype(int)
        inside = sample.image[0, x1 : x2 + 1, y1 : y2 + 1, z1 : z2 + 1]
        assert np.ptp(inside) < 1e-6 and inside.size == mask(LIVER).sum()
    assert len(placed) > 5 and len(tones) > 10


def test_a_change_is_what_monai_does(complete):
    from monai.transforms import Flip, Rotate90

    volume = image(3)
    for turns, flips in ((1, (0, 0, 1)), (3, (1, 1, 0)), (2, (0, 0, 0)), (0, (1, 1, 1))):
        expected = volume
        if turns:
            expected = Rotate90(turns, spatial_axes=(1, 2))(expected)
        for axis in np.flatnonzero(flips):
            expected = Flip(int(axis))(expected)
        change = Change(turns, tuple(map(bool, flips)), 0.05, -0.02)
        np.testing.assert_array_equal(change.place(volume), np.asarray(expected))
        np.testing.assert_allclose(change.tone(volume), np.clip(volume * 1.05 - 0.02, 0, 1), rtol=1e-6)


def test_changes_are_as_frequent_as_the_recipe_says():
    rng = np.random.default_rng(0)
    changes = [draw_change(rng, SIZE) for _ in range(4000)]
    assert np.mean([c.turns > 0 for c in changes]) == pytest.approx(0.5, abs=0.03)
    assert Counter(c.turns for c in changes if c.turns).most_common()[-1][1] > 550
    np.testing.assert_allclose(np.mean([c.flips for c in changes], axis=0), 0.1, atol=0.02)
    for values in ([c.scale for c in changes], [c.shift for c in changes]):
        assert np.mean(np.array(values) != 0) == pytest.approx(0.5, abs=0.03) and 0.09 < np.max(np.abs(values)) <= 0.1
    assert all(draw_change(rng, (8, 32, 16)).turns in (0, 2) for _ in range(50))


def test_in_a_mirrored_body_the_words_left_and_right_change_places(complete):
    captions = Captions(complete, "train", SIZE, jitter=True)
    plain = Captions(complete, "train", SIZE)[0].image
    seen = set()
    for epoch in range(80):
        captions.set_epoch(epoch)
        sample = captions[0]
        # Of all placements the likest one tells whether the image is mirrored.
        placements = [Change(turns, flips) for turns in range(4) for flips in np.ndindex(2, 2, 2)]
        likest = max(placements, key=lambda c: np.corrcoef(c.place(plain).ravel(), sample.image.ravel())[0, 1])
        assert ("The right lung is clear" in sample.answer) == likest.mirrored != ("The left lung" in sample.answer)
        seen.add(likest.mirrored)
    assert seen == {True, False}


def test_questions_swap_sides_with_their_answers(complete, monkeypatch):
    structures = Structures(complete, "train", SIZE, code="0010", kind="rec", jitter=True)
    for flips, asked in (((False, False, True), "left kidney"), ((True, False, True), "right kidney")):
        monkeypatch.setattr(sets, "draw_change", lambda rng, size: Change(0, flips))
        assert asked in structures[2].question


def test_only_whole_words_swap_sides():
    assert swap_sides("Left-sided, bright cleft; RIGHT, left") == "Right-sided, bright cleft; LEFT, right"


# --- words -----------------------------------------------------------------------------------------------------------
def test_every_class_has_descriptions_that_do_not_name_it():
    for name in {name for names in class_names().values() for name in names}:
        told = descriptions()[name]
        assert 2 <= len(told) <= 4
        for text in told:
            assert not re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE), (name, text)
            assert not text.endswith(".") and "{" not in text


def test_every_description_of_a_structure_of_one_side_says_which():
    # Else it would fit both sides, and a mirrored body would make it false.
    for name in {name for names in class_names().values() for name in names}:
        sides = {"left", "right"} & set(name.split())
        assert all(sides <= set(re.findall(r"\w+", text)) for text in descriptions()[name]), name


def test_templates_have_the_slots_that_are_filled():
    for task in ("segmentation", "rec", "reg"):
        for style in ("by_name", "by_description"):
            texts = templates()[task][style]
            assert not set(texts["train"]) & set(texts["held_out"])
            asked = "{box}" if task == "reg" else "{name}" if style == "by_name" else "{description}"
            assert all(text.count(asked) == 1 for text in texts["train"] + texts["held_out"])
            given = {"segmentation": SEG_TOKEN, "rec": "{box}", "reg": "{name}"}[task]
            assert all(text.count(given) == 1 for text in texts["answer"])
            assert all("{name}" in text and given != "{name}" and given not in text for text in texts.get("absent", []))


def other_words(path: Path, change=lambda words: None) -> Path:
    words = json.loads(json.dumps(templates()))
    words["caption"]["train"] = ["Caption this, please."]
    words["rec"]["by_name"]["train"] = ["Box the {name}."]
    change(words)
    path.write_text(json.dumps(words))
    return path


def test_our_own_words_have_at_least_the_reference_s_variety_and_every_slot():
    """M3D's prompt_templates.py at 63e7200, counted: captions; questions, answers and denials by name and by
    description."""
    words = read_templates(ROOT / "training/data/templates.json")
    reference = {
        "segmentation": ((26, 13, 12), (21, 12, 10)),
        "rec": ((19, 32, 15), (41, 21, 13)),
        "reg": ((36, 20, 0), (17, 17, 0)),  # what is not there has no box to ask about
    }
    assert len(set(words["caption"]["train"])) >= 42
    for task, counts in reference.items():
        for style, wanted in zip(("by_name", "by_description"), counts):
            kinds = words[task][style]
            assert all(len(kinds.get(kind, ())) >= count for kind, count in zip(("train", "answer", "absent"), wanted))
            assert not set(kinds["train"]) & set(kinds["held_out"])
            assert all(len(texts) == len(set(texts)) for texts in kinds.values())


def test_other_words_take_the_place_of_our_own(complete, tmp_path):
    words = other_words(tmp_path / "words.json")
    m3d = {"root": str(complete), "tasks": ["caption", "rec"], "words": str(words)}
    run = build(StageSettings, {"out": str(tmp_path / "out"), "seed": 5, "data": {"m3d": m3d}, "trainer": {}})
    questions = open_questions(run, SIZE)
    asked = {questions[0, k][0].question for k in range(len(questions))}
    assert {"Caption this, please.", "Box the liver."} <= asked
    before = questions.fingerprint()
    other_words(words, lambda texts: texts["reg"]["by_name"]["train"].append("What has {box}?"))
    assert open_questions(run, SIZE).fingerprint() != before and {"words.json", "terms.json"} <= set(before)


def test_a_run_does_not_go_on_with_other_words_of_ours(complete, tmp_path):
    m3d = {"root": str(complete), "tasks": ["rec"]}
    run = build(StageSettings, {"out": str(tmp_path / "out"), "seed": 5, "data": {"m3d": m3d}, "trainer": {}})
    assert {"templates.json", "terms.json"} <= set(open_questions(run, SIZE).fingerprint())


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda words: words.pop("caption"), "a list of texts as caption.train"),
        (lambda words: words["rec"]["by_name"].update(train=[]), "a list of texts as rec.by_name.train"),
        (lambda words: words["rec"]["by_name"].update(answer=["There."]), "rec.by_name.answer lacks {box}: 'There.'"),
        (lambda words: words["segmentation"]["by_name"].update(answer=["{name}"]), r"lacks \[SEG\]: '{name}'"),
        (lambda words: words["reg"]["by_name"].update(train=["{box} {what}"]), "a slot that is not filled in"),
        (lambda words: words["caption"].update(train=["{name}"]), "a slot that is not filled in"),
    ],
)
def test_words_that_cannot_be_filled_are_refused(complete, tmp_path, change, said):
    words = other_words(tmp_path / "words.json", change)
    with pytest.raises(InvalidInput, match=said):
        open_sets(["rec"], complete, "train", SIZE, words=words)


def test_held_out_wordings_are_asked_where_wanted(complete):
    captions = Captions(complete, "test", SIZE, wording="held_out")
    assert captions[0].question in templates()["caption"]["held_out"]


# --- long reports ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recorded", FORMATS["reports"], ids=lambda recorded: recorded["text"][:20])
def test_a_report_that_is_too_long_loses_the_sentences_that_the_reference_would_drop(recorded):
    def count(text: str) -> int:
        return len(text.split()) + 2

    drawn = {
        drawn_sentences(recorded["text"], recorded["max_tokens"], count, np.random.default_rng(seed))
        for seed in range(1000)
    }
    assert sorted(drawn) == recorded["outcomes"]


def test_the_sentences_of_a_long_report_depend_on_seed_epoch_and_index_only(root):
    for path in (root / "M3D_Cap_npy/ct_case").glob("*/text.txt"):
        path.write_text(". ".join(f"Finding {k} is here" for k in range(12)))
    values = {
        "out": str(root / "out"),
        "seed": 5,
        "data": {"m3d": {"root": str(root), "tasks": ["pair"]}},
        "trainer": {},
    }

    def opened(seed: int = 5) -> ShortReports:
        run = build(StageSettings, values | {"seed": seed})
        return ShortReports(open_pairs(run, SIZE), 20, lambda text: len(text.split()), seed)

    pairs, again = opened(), opened()
    again[0, 3]
    assert pairs[1, 2].answer == again[1, 2].answer
    assert pairs[1, 2].answer.startswith("Finding 0 is here.") and len(pairs[1, 2].answer.split()) <= 24
    assert len({pairs[1, 2].answer, pairs[0, 2].answer, pairs[1, 1].answer, opened(6)[1, 2].answer}) == 4
    assert len(pairs) == 4 and pairs.fingerprint() == pairs.pairs.fingerprint() and pairs.callbacks


# --- bad input that stops a run before it starts ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "task, gone",
    [("caption", "M3D_Cap_npy"), ("vqa_closed", "M3D-VQA"), ("rec", "M3D_Seg_npy"), ("refseg", "M3D_RefSeg_npy")],
)
def test_a_root_that_lacks_a_set_is_refused_with_what_was_looked_for(root, task, gone):
    shutil.rmtree(root / gone)
    with pytest.raises(InvalidInput, match="lacks") as refused:
        open_sets([task], root, "train", SIZE)
    assert gone in str(refused.value) and str(root) in str(refused.value)


def test_missing_columns_are_named(root):
    path = root / "M3D-VQA" / "M3D_VQA_train.csv"
    rows = list(csv.reader(path.open()))
    write_csv(path, [{"Choice C": "C", "Answer Choice": "right"}.get(name, name) for name in rows[0]], rows[1:])
    with pytest.raises(InvalidInput, match="lacks the columns Choice C, Answer Choice; it has Image Path, "):
        ClosedVqa(root, "train", SIZE)
    assert len(Vqa(root, "train", SIZE)) == 4  # which needs none of them


def test_a_missing_split_is_named_with_those_that_there_are(root):
    with pytest.raises(
        InvalidInput, match="no split 'test2000'; it has train, validation, test, test100, test500, test1k"
    ):
        Captions(root, "test2000", SIZE)
    with pytest.raises(InvalidInput, match="no split 'dev': choose one of train, validation, test, test5k"):
        Vqa(root, "dev", SIZE)
    index = root / "M3D_Seg_npy" / "0000" / "0000.json"
    index.write_text(json.dumps({"test": []}))
    with pytest.raises(InvalidInput, match="no split 'train'; it has test"):
        open_sets(["rec"], root, "train", SIZE)


def test_a_data_set_without_cases_of_a_split_is_left_out_of_it(root):
    index = root / "M3D_Seg_npy" / "0000" / "0000.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"test": []}))
    for split, codes in (("train", ["0000", "0010"]), ("test", ["0010"]), ("validation", ["0010"])):
        assert [part.code for part in open_sets(["rec"], root, split, SIZE).sets] == codes


def test_images_of_another_size_than_the_model_s_are_refused_at_once(complete):
    for task in TASKS:
        with pytest.raises(InvalidInput, match="1 x 8 x 32 x 32.*the model takes 1 x 8 x 32 x 16"):
            open_sets([task], complete, "train", (8, 32, 16))


def damage_shape(path):
    save(path, np.zeros((1, 8, 16, 32), bool))


@pytest.mark.parametrize(
    "task, masks",
    [
        ("segmentation", "M3D_Seg_npy/0010/a/masks"),
        ("reg", "M3D_Seg_npy/0010/a/masks"),
        ("refseg", "M3D_RefSeg_npy/s0000"),
    ],
)
@pytest.mark.parametrize(
    "damage, said",
    [
        (damage_shape, "the masks of {} have shape 1 x 8 x 16 x 32 .*the model takes 1 x 8 x 32 x 32"),
        (Path.unlink, "none of . masks that .* can be read"),
    ],
)
def test_masks_that_do_not_fit_the_images_are_refused_at_once(root, task, masks, damage, said):
    for path in (root / masks).glob("mask*.npy"):
        damage(path)
    with pytest.raises(InvalidInput, match=said.format(task)):
        open_sets([task], root, "train", SIZE)


def test_masks_of_what_is_not_in_the_scan_hide_no_other_shape(root):
    first, second = (root / f"M3D_Seg_npy/0010/a/masks/mask_{k}.npy" for k in (0, 1))
    for path in (first, second):
        save(path, np.zeros((1, 1, 1, 1), np.int8))
    assert open_sets(["rec"], root, "train", SIZE)[0].answer
    damage_shape(second)
    with pytest.raises(InvalidInput, match="1 x 8 x 16 x 32 .*mask_1.npy"):
        open_sets(["rec"], root, "train", SIZE)


def test_the_look_at_a_few_masks_meets_several_classes(root, monkeypatch):
    # 8 cases of 13 classes, each asked for twice: every 26th sample is of the same class.
    index = root / "M3D_Seg_npy/0010/0010.json"
    index.write_text(
        json.dumps(
            {
                "train": [
                    {"image": "0010/a/image.npy", "label": f"0010/{case}/masks/mask_{k}.npy"}
                    for case in range(8)
                    for k in range(13)
                ]
            }
        )
    )
    looked = []
    monkeypatch.setattr(sets, "stored_shape", lambda path: looked.append(path.name) or (1, *SIZE))
    Structures(root, "train", SIZE, code="0010", kind="rec")
    assert len({name for name in looked if name.startswith("mask")}) > 3


@pytest.mark.parametrize(
    "label, said", [("0000/a/masks/liver.npy", "mask_<class id>.npy"), ("0000/a/masks/mask_1.npy", "1 classes, from 0")]
)
def test_a_label_without_a_known_class_is_refused(root, label, said):
    index = root / "M3D_Seg_npy" / "0000" / "0000.json"
    index.write_text(json.dumps({"train": [{"image": "0000/a/image.npy", "label": label}]}))
    with pytest.raises(InvalidInput, match=said):
        Structures(root, "train", SIZE, code="0000", kind="rec")


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not JSON"),
        ("[]", "no split"),
        ('{"train": [{"image": "a.npy"}]}', "has no text"),
        ('{"train": []}', "no entries"),
    ],
)
def test_an_unusable_index_is_refused(root, content, said):
    (root / "M3D_Cap_npy" / "M3D_Cap.json").write_text(content)
    with pytest.raises(InvalidInput, match=said):
        Captions(root, "train", SIZE)


def test_paths_that_lead_nowhere_are_refused_at_once(root):
    shutil.rmtree(root / "M3D_Cap_npy" / "ct_case")
    with pytest.raises(InvalidInput, match="none of 4 images .* can be read"):
        Vqa(root, "train", SIZE)


def test_an_unknown_task_is_refused(complete):
    with pytest.raises(InvalidInput, match="no task 'vqa': choose from"):
        open_sets(["vqa"], complete, "train", SIZE)


# --- broken samples --------------------------------------------------------------------------------------------------
def damage_nan(path):
    save(path, np.full((1, *SIZE), np.nan, np.float32))


@pytest.mark.parametrize(
    "damage, cause",
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a whole .npy"),
        (lambda path: path.write_bytes(b"hello"), "not a whole .npy"),
        (lambda path: path.write_bytes(b""), "not a whole .npy"),
        (lambda path: save(path, np.array([{}], dtype=object)), "not a whole .npy"),
        (lambda path: save(path, image(0)[:, :4]), "1 x 4 x 32 x 32, the model takes 1 x 8 x 32 x 32"),
        (lambda path: save(path, image(0) * 255), "wanted are 0 to 1"),
        (damage_nan, "not finite"),
        (lambda path: save(path, np.zeros((1, *SIZE), np.float32)), "every voxel"),
    ],
)
def test_a_broken_image_is_named_with_its_cause(root, damage, cause):
    path = root / "M3D_Cap_npy/ct_case/000001/Axial.npy"
    damage(path)
    captions = Captions(root, "train", SIZE)
    with pytest.raises(BrokenSample, match=cause) as broken:
        captions[1]
    assert broken.value.paths == (str(path),) and str(path) in str(broken.value)
    assert captions[0].answer and captions[2].answer


def test_a_mask_of_another_shape_than_its_image_is_broken(root):
    path = root / "M3D_Seg_npy/0010/a/masks/mask_1.npy"
    save(path, np.zeros((1, 8, 32, 16), bool))
    structures = Structures(root, "train", SIZE, code="0010", kind="rec")
    with pytest.raises(BrokenSample, match="mask has shape 1 x 8 x 32 x 16, its image 1 x 8 x 32 x 32") as broken:
        structures[2]
    assert broken.value.paths == (str(path), str(root / "M3D_Seg_npy/0010/a/image.npy"))
    assert structures[0].answer
    save(path, np.ones((1, 1, 1, 1), bool))  # only a single 0 says that there is nothing
    with pytest.raises(BrokenSample, match="mask has shape 1 x 1 x 1 x 1"):
        structures[2]


def test_a_single_0_is_no_mask_of_a_referring_question(root):
    referring = Referring(root, "train", SIZE)
    save(root / "M3D_RefSeg_npy/s0000/mask.npy", np.zeros((1, 1, 1, 1), np.uint16))
    with pytest.raises(BrokenSample, match="mask has shape 1 x 1 x 1 x 1"):
        referring[0]
    with pytest.raises(InvalidInput, match="masks of refseg have shape 1 x 1 x 1 x 1"):
        Referring(root, "train", SIZE)


def test_broken_words_are_named_with_their_row(root):
    rows = [
        ("M3D_Cap_npy/ct_case/000000/Axial.npy", "", 1, "Which?", "a", "b", "c", "d", "a", answer)
        for answer in ("A", "E", "")
    ] + [("M3D_Cap_npy/ct_case/000000/Axial.npy", "", 1)]
    write_csv(root / "M3D-VQA/M3D_VQA_train.csv", VQA_COLUMNS, rows)
    closed = ClosedVqa(root, "train", SIZE)
    assert closed[0].answer == "A. a"
    for index, cause in (
        (1, "row 2 has Answer Choice 'E'"),
        (2, "row 3 has no Answer Choice"),
        (3, "row 4 has no Question and no Answer"),
    ):
        with pytest.raises(BrokenSample, match=cause):
            closed[index]
    (root / "M3D_Cap_npy/ct_case/000000/text.txt").write_text(" \n")
    with pytest.raises(BrokenSample, match="the text is empty"):
        Captions(root, "train", SIZE)[0]


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"Mask_ID": "7"}, "no voxel of the mask is 7"),
        ({"Mask_ID": "x"}, "Mask_ID 'x'"),
        ({"Mask_ID": "0"}, "Mask_ID '0'"),
        ({"Mask_ID": "1.5"}, "'1.5', not a whole number from 1"),
        ({"Mask_ID": "nan"}, "Mask_ID 'nan'"),
        ({"Answer": " "}, "row 2 has no answer"),
        ({"Question": ""}, "row 2 has no question"),
    ],
)
def test_a_referring_row_that_cannot_be_taught_is_broken(root, change, cause):
    path = root / "M3D_RefSeg_npy/M3D_RefSeg_train.csv"
    rows = list(csv.DictReader(path.open()))
    rows[1].update(change)
    write_csv(path, rows[0].keys(), [row.values() for row in rows])
    referring = Referring(root, "train", SIZE)
    with pytest.raises(BrokenSample, match=cause):
        referring[1]
    assert referring[0].mask.any()


def test_a_mask_id_is_a_whole_number_however_it_is_written():
    assert [mask_id(cell) for cell in ("1", "2.0", " 13 ", "1e2")] == [1, 2, 13, 100]
    assert {mask_id(cell) for cell in ("0", "-1", "0.5", "1.5", "inf", "nan", "", "one")} == {None}


def test_broken_samples_survive_the_way_between_processes():
    broken = pickle.loads(pickle.dumps(BrokenSample(["a", "b"], "cut off")))
    assert (broken.paths, broken.cause, str(broken)) == (("a", "b"), "cut off", "a and b: cut off")


def test_a_table_gives_back_its_rows():
    rows = [{"a": "ü", "b": "x" * k} for k in range(5)]
    table = Table(rows)
    assert list(table) == rows and len(table) == 5
    assert len(Mixture([])) == 0
