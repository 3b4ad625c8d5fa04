"""What M3D-Bench reads of M3D-Data's published layouts, and what it says of missing and broken files."""

import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from benchmarks.bench.layouts import fingerprint, samples_of
from benchmarks.bench.preflight import check
from benchmarks.bench.samples import TASKS, read_truth
from engine.errors import InvalidInput
from engine.prompt import parse_boxes
from tests.m3d_data import LIVER, REFSEG_COLUMNS, SIZE, VQA_COLUMNS, image, mask, save, write_csv, write_root
from training.data.sample import BrokenSample


@pytest.fixture
def root(tmp_path):
    return write_root(tmp_path / "root")


def one(task, root, contains=""):
    return next(sample for sample in samples_of(task, root) if contains in sample.key)


@pytest.mark.parametrize(("task", "count"), list(zip(TASKS, (1, 1, 1, 1, 6, 6, 3, 5))))
def test_each_task_reads_the_test_part_of_its_published_layout(task, count, root):
    samples = samples_of(task, root)
    assert len(samples) == count == len(check(task, samples).samples)
    for sample in samples:
        truth = read_truth(sample)
        assert truth.answer and (truth.question or task == "retrieval")
        assert truth.question.startswith(" ") != (task in ("retrieval", "report"))  # as in training


def test_a_report_is_the_text_of_its_case_in_one_line(root):
    sample = one("report", root)
    assert read_truth(sample).answer == "Finding 5. The left lung is clear."
    assert sample.scan == "M3D_Cap_npy/ct_case/000005"


def test_a_closed_question_has_its_choices_behind_it(root):
    truth = read_truth(sample := one("vqa-closed", root))
    assert truth.question == " Which plane? Choices: A. Axial B. Coronal C. Sagittal D. None"
    assert (truth.answer, sample.choice, sample.groups) == ("A. Axial", "A", {"question type": "1"})


def test_choices_that_are_empty_are_not_asked(root):
    row = ("M3D_Cap_npy/ct_case/000005/Axial.npy", "", 4, "Is it?", "Yes", "No", "", "", "No", "B")
    write_csv(root / "M3D-VQA/M3D_VQA_test5k.csv", VQA_COLUMNS, [row])
    assert read_truth(one("vqa-closed", root)).question == " Is it? Choices: A. Yes B. No"


@pytest.mark.parametrize("task", ["vqa-closed", "vqa-open"])
def test_questions_are_those_of_the_published_figures_where_their_table_is_there(task, root):
    row = ("M3D_Cap_npy/ct_case/000005/Axial.npy", "", 4, "Is it?", "Yes", "No", "", "", "No", "B")
    write_csv(root / "M3D-VQA/M3D_VQA_test5k.csv", VQA_COLUMNS, [row])
    assert read_truth(one(task, root)).question.startswith(" Is it?")
    (root / "M3D-VQA/M3D_VQA_test5k.csv").unlink()
    assert read_truth(one(task, root)).question.startswith(" Which plane?")


def test_descriptions_beside_the_data_are_what_is_asked_with(root):
    (root / "M3D_Seg_npy/term_dictionary.json").write_text(json.dumps({"liver": ["the organ that makes bile"]}))
    assert "the organ that makes bile" in read_truth(one("seg-referring", root, "0000/b")).question


def test_masks_whose_folder_has_moved_are_found(root):
    index = root / "M3D_Seg_npy/0000/0000.json"
    entries = json.loads(index.read_text())
    moved = [{key: f"/elsewhere/M3D_Seg_npy/{path}" for key, path in entry.items()} for entry in entries["test"]]
    index.write_text(json.dumps({"train": [], "test": moved}))
    checked = check("rec", samples_of("rec", root))
    assert not checked.broken and {sample.scan for sample in checked.samples} > {"M3D_Seg_npy/0000/b"}


def test_boxes_are_asked_for_by_name_and_by_description(root):
    samples = samples_of("rec", root)
    assert {sample.groups["asked"] for sample in samples} == {"by name", "by description"}
    truth = read_truth(one("rec", root, "0000/b/masks/mask_0.npy by_name"))
    first, last = [axis.start for axis in LIVER], [axis.stop - 1 for axis in LIVER]
    assert truth.box == pytest.approx(np.array([*first, *last]) / np.tile(SIZE, 2))
    assert parse_boxes(truth.answer)[0] == pytest.approx(truth.box, abs=6e-4)


def test_reg_shows_the_box_and_wants_the_name(root):
    truth = read_truth(one("reg", root, "0000/b/masks/mask_0.npy by_name"))
    assert len(parse_boxes(truth.question)) == 1 and "liver" in truth.answer


@pytest.mark.parametrize("task", ["rec", "reg", "seg-semantic"])
def test_a_structure_that_is_not_in_the_scan_is_asked_for_and_denied(task, root):
    np.save(root / "M3D_Seg_npy/0000/b/masks/mask_0.npy", np.zeros((1, 1, 1, 1)))
    sample = one(task, root, "0000/b/masks/mask_0.npy by_name")
    assert check(task, [sample]).samples
    truth = read_truth(sample)
    assert truth.box is None and not truth.mask.any() and truth.mask.shape == SIZE
    assert "liver" in truth.question and "[SEG]" not in truth.answer and not len(parse_boxes(truth.answer))


def test_referring_questions_come_from_both_sets(root):
    samples = samples_of("seg-referring", root)
    assert {sample.groups["data set"] for sample in samples} == {"RefSeg", "0000", "0010"}
    truth = read_truth(one("seg-referring", root, "000002"))
    assert (truth.question, truth.answer) == (" Segment lesion 2.", "It is [SEG] on the right.")
    assert truth.mask.sum() == 2 * 8 * 5  # the second label's voxels only


def test_either_set_alone_is_enough_for_referring_questions(root):
    (root / "M3D_RefSeg_npy/M3D_RefSeg_test.csv").unlink()
    assert {s.groups["data set"] for s in samples_of("seg-referring", root)} == {"0000", "0010"}


def test_the_voxel_size_of_an_npy_image_stands_beside_it_or_is_unknown(root):
    sample = one("seg-semantic", root, "0000/b")
    assert read_truth(sample).spacing_mm is None
    sample.image.with_name("image.spacing.json").write_text("[5, 0.7, 0.7]")
    assert read_truth(sample).spacing_mm == (5.0, 0.7, 0.7)
    sample.image.with_name("image.spacing.json").write_text("[5, 0, 0.7]")
    with pytest.raises(BrokenSample, match="three numbers above 0"):
        read_truth(sample)


@pytest.fixture
def in_nifti(root):
    """The folder of a case in NIfTI, in place of data set 0000."""
    folder, affine = root / "M3D_Seg_npy/0000/n", np.diag([0.5, -0.5, 3, 1])
    folder.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((20, 20, 6)), affine), folder / "image.nii.gz")
    label = np.zeros((20, 20, 6), np.uint8)
    label[2:5, 3:6, 1:3] = 1
    nibabel.save(nibabel.Nifti1Image(label, affine), folder / "mask_0.nii.gz")
    entries = [{"image": "0000/n/image.nii.gz", "label": "0000/n/mask_0.nii.gz"}]
    (root / "M3D_Seg_npy/0000/0000.json").write_text(json.dumps({"train": [], "test": entries}))
    return folder


def test_scans_in_nifti_are_segmented_in_their_own_space(root, in_nifti):
    sample = one("seg-semantic", root, "0000/n")
    assert check("seg-semantic", [sample]).samples
    truth = read_truth(sample)
    assert truth.mask.sum() == 18 and truth.spacing_mm == pytest.approx((0.5, 0.5, 3))
    # Boxes are written in the model's volume, which is not known of a NIfTI file's mask.
    assert all("0010" in sample.key for sample in samples_of("rec", root))


def cut_end(path):
    path.write_bytes(path.read_bytes()[:-12])


def spoil_middle(path):
    """What is packed is no longer what the compression says."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 10] = b"\xff" * 10
    path.write_bytes(content)


def swapped_checksum(path):
    content = bytearray(path.read_bytes())
    content[-8] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut_end, spoil_middle, swapped_checksum])
@pytest.mark.parametrize("name", ["mask_0.nii.gz", "image.nii.gz"])
def test_a_nifti_file_that_is_not_whole_is_found_before_anything_is_asked(name, spoil, root, in_nifti):
    spoil(in_nifti / name)
    (broken,) = check("seg-semantic", [one("seg-semantic", root, "0000/n")]).broken
    assert broken.path.endswith(name) and "is not a whole NIfTI file" in broken.cause


def test_a_nifti_file_without_compression_has_all_of_its_bytes(root, in_nifti):
    path = in_nifti / "mask_0.nii"
    nibabel.save(nibabel.load(in_nifti / "mask_0.nii.gz"), path)
    sample = replace(one("seg-semantic", root, "0000/n"), mask=path)
    assert check("seg-semantic", [sample]).samples
    path.write_bytes(path.read_bytes()[:-1])
    assert check("seg-semantic", [sample]).causes == {"is not a whole NIfTI file (EOFError)": 1}


@pytest.mark.parametrize("spoil", [cut_end, spoil_middle])
def test_a_mask_that_breaks_during_a_run_is_a_broken_sample(spoil, root, in_nifti):
    """It fails alone: any other error would end the run, and every run that resumes it."""
    spoil(in_nifti / "mask_0.nii.gz")
    with pytest.raises(BrokenSample, match="mask_0.nii.gz: cannot be read"):
        read_truth(one("seg-semantic", root, "0000/n"))


def test_a_limit_takes_the_same_samples_in_every_run_and_more_of_them_when_it_is_greater(root):
    everything = {sample.key for sample in samples_of("rec", root)}
    few, more = ({sample.key for sample in samples_of("rec", root, n)} for n in (2, 4))
    assert len(few) == 2 and few < more < everything
    assert few == {sample.key for sample in samples_of("rec", root, 2)}


def test_questions_of_one_scan_stand_together(root):
    images = [sample.image for sample in samples_of("rec", root)]
    assert images == sorted(images)


def test_the_fingerprint_tells_indices_apart(root):
    before = {task: fingerprint(task, root) for task in TASKS}
    index = root / "M3D_Seg_npy/0000/0000.json"
    index.write_text(index.read_text() + "\n")
    changed = {task for task in TASKS if fingerprint(task, root) != before[task]}
    assert changed == {"rec", "reg", "seg-semantic", "seg-referring"}


# --- what is missing or broken ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", TASKS)
def test_a_task_without_data_says_what_it_looked_for(task, tmp_path):
    wanted = {"rec": "NNNN.json", "reg": "NNNN.json", "seg-semantic": "NNNN.json"}
    name = wanted.get(task, "M3D_RefSeg_test.csv" if task == "seg-referring" else "M3D_")
    with pytest.raises(InvalidInput, match=f"(?s)lacks.*{name}.* looked for"):
        samples_of(task, tmp_path)


def test_a_root_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="is not a folder"):
        samples_of("rec", tmp_path / "nowhere")


def test_entries_that_stand_there_twice_are_refused(root):
    index = root / "M3D_Cap_npy/M3D_Cap.json"
    found = json.loads(index.read_text())
    found["test"] *= 2
    index.write_text(json.dumps(found))
    with pytest.raises(InvalidInput, match="1 entries for report stand there twice"):
        samples_of("report", root)


def vqa_row(**changes):
    row = {
        **dict.fromkeys(VQA_COLUMNS, ""),
        "Image Path": "M3D_Cap_npy/ct_case/000005/Axial.npy",
        "Question Type": "1",
        "Question": "Which?",
        "Choice A": "x",
        "Choice B": "y",
        "Answer": "x",
        "Answer Choice": "A",
    }
    return tuple((row | changes)[column] for column in VQA_COLUMNS)


def test_broken_rows_are_listed_and_counted(root):
    rows = [vqa_row(), *[vqa_row(**{"Image Path": "nowhere.npy"})] * 2, vqa_row(**{"Answer Choice": "C"})]
    write_csv(root / "M3D-VQA/M3D_VQA_test5k.csv", VQA_COLUMNS, rows)
    checked = check("vqa-closed", samples_of("vqa-closed", root))
    assert len(checked.samples) == 1 and checked.causes == {"is missing": 2, "row 4 offers A, B, and C is right": 1}
    assert "2 x is missing" in checked.words()


def test_a_mask_id_that_is_no_label_is_broken(root):
    rows = [("s0001/ct.nii.gz", "s0001/mask.nii.gz", label, 0, "Which?", "It is [SEG].") for label in (1, "x")]
    write_csv(root / "M3D_RefSeg_npy/M3D_RefSeg_test.csv", REFSEG_COLUMNS, rows)
    checked = check("seg-referring", samples_of("seg-referring", root))
    assert checked.causes == {"row 2 has Mask_ID 'x', not a whole number from 1": 1}


def test_a_row_without_a_question_is_broken(root):
    write_csv(root / "M3D-VQA/M3D_VQA_test5k.csv", VQA_COLUMNS, [vqa_row(Question="")])
    assert check("vqa-open", samples_of("vqa-open", root)).causes == {"row 1 has no Question": 1}


BROKEN_FILES = {
    "is not a whole .npy file (ValueError)": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "is not one .npy array of real numbers": lambda path: np.save(path, np.array(["text"])),
    "is missing": lambda path: path.unlink(),
    "the image has shape (32, 32), wanted is 1 x D x H x W": lambda path: np.save(path, np.zeros((32, 32))),
}


@pytest.mark.parametrize("cause", BROKEN_FILES)
def test_a_broken_image_is_found_by_its_header(cause, root):
    BROKEN_FILES[cause](root / "M3D_Seg_npy/0000/b/image.npy")
    samples = [sample for sample in samples_of("rec", root) if "0000/b" in sample.key]
    assert check("rec", samples).causes == {cause: 2}


def test_a_mask_of_another_shape_is_broken(root):
    save(root / "M3D_Seg_npy/0000/b/masks/mask_0.npy", mask(LIVER)[:, :4])
    (broken,) = check("seg-semantic", [one("seg-semantic", root, "0000/b")]).broken
    assert "the mask has shape (1, 4, 32, 32), its image (1, 8, 32, 32)" in broken.cause


def test_a_referring_question_whose_label_is_not_in_the_mask_is_broken(root):
    save(root / "M3D_RefSeg_npy/s0001/mask.npy", np.zeros((1, *SIZE)))
    with pytest.raises(BrokenSample, match="no voxel of the mask is 2"):
        read_truth(one("seg-referring", root, "000002"))


def test_more_than_the_share_of_broken_samples_stops_the_run(root):
    rows = [vqa_row() for _ in range(9)] + [vqa_row(**{"Image Path": "nowhere.npy"})]
    write_csv(root / "M3D-VQA/M3D_VQA_test5k.csv", VQA_COLUMNS, rows)
    checked = check("vqa-open", samples_of("vqa-open", root))
    checked.refuse(0.1)
    with pytest.raises(
        InvalidInput, match=r"(?s)1 of 10 samples of vqa-open are broken.*5\.0%.*nowhere.npy: is missing"
    ):
        checked.refuse(0.05)


def test_an_image_that_many_samples_share_is_looked_at_once(root, monkeypatch):
    from benchmarks.bench import preflight

    looked, stored_shape = [], preflight.stored_shape
    monkeypatch.setattr(preflight, "stored_shape", lambda path: looked.append(path) or stored_shape(path))
    check("rec", samples_of("rec", root))
    images = [path for path in looked if path.name == "image.npy"]
    assert len(images) == len(set(images)) == 2
    assert image(0).shape[1:] == SIZE
