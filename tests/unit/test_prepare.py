"""What the preparation promises: raw folders become the published layout, whole or not at all, and nothing is skipped
in silence. And what the check of a data root says.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
from PIL import Image
from scipy import sparse
from typer.testing import CliRunner

import training.data.jobs as jobs
from engine.errors import InvalidInput, M3DError
from engine.prompt import SEG_TOKEN
from engine.scan import ARRAY_AFFINE, Scan, read_scan
from engine.volume import prepare
from tests.conftest import ROOT
from tests.m3d_data import REFSEG_COLUMNS, SIZE, image, referring_rows, save, write_csv, write_root
from training.data import check, raw
from training.data.prepare import _drawn, app
from training.data.sets import Captions, Referring, Structures, open_sets
from training.data.wording import class_names

pytestmark = pytest.mark.integration

AFFINE = np.diag([-2.0, -2.0, 5.0, 1.0])
SHAPE = (40, 36, 20)  # i, j, k
FORMATS = json.loads((ROOT / "tests/fixtures/formats/formats.json").read_text())
SIZED = ["--image-size", *map(str, SIZE), "--workers", "1"]


def run(*arguments, refused: str | None = None) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if refused:
        assert isinstance(result.exception, M3DError), result.output
        assert refused in str(result.exception)
    else:
        assert result.exception is None, (result.exception, result.output)


def report(folder: Path) -> dict:
    return json.loads((folder / "preparation.json").read_text())


def scan_array(seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).integers(-900, -700, SHAPE).astype(np.int16)
    array[5:35, 4:30, 2:18] += 800
    return array + np.arange(SHAPE[2], dtype=np.int16)


def labels() -> np.ndarray:
    """1 liver, 2 right kidney, 3 a spleen of a single voxel, between those that the model's volume takes."""
    array = np.zeros(SHAPE, np.uint8)
    array[6:20, 6:20, 3:12], array[22:30, 10:20, 6:12], array[30, 25, 9] = 1, 2, 3
    return array


def nearest(volume: np.ndarray) -> np.ndarray:
    """[D, H, W] as the published masks were resized."""
    from monai.transforms import Resize

    return Resize(SIZE, mode="nearest")(volume[None].astype(np.float32))[0].numpy().astype(volume.dtype)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def slices(folder: Path, count: int = 12, shape: tuple[int, int] = (30, 40), seed: int = 0) -> np.ndarray:
    folder.mkdir(parents=True)
    stack = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    for number, plane in enumerate(stack):
        Image.fromarray(plane).save(folder / f"{number}.png")
    return stack


# --- M3D-Seg ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def seg_raw(tmp_path) -> Path:
    for case in ("a", "b"):
        nifti(tmp_path / "raw/0010" / case / "image.nii.gz", scan_array())
        nifti(tmp_path / "raw/0010" / case / "label.nii.gz", labels())
    return tmp_path / "raw"


@pytest.mark.parametrize("rule", ["nearest", "half"])
def test_prepared_structures_are_what_the_presets_make_of_scan_and_label(seg_raw, tmp_path, rule):
    options = ["--mask", rule] if rule == "half" else []
    run("seg", seg_raw, tmp_path / "root", *SIZED, "--test-share", 0, *options)
    prepared = prepare(read_scan((seg_raw / "0010/a/image.nii.gz").read_bytes()), SIZE, "m3d-seg")
    structures = Structures(tmp_path / "root", "train", SIZE, code="0010", kind="segmentation")
    assert [structures.name(k) for k in range(0, len(structures), 2)] == [
        name for name in class_names()["0010"] if name != "spleen"
    ] * 2
    for k, value in ((0, 1), (2, 2)):
        np.testing.assert_array_equal(structures[k].image, prepared.image)
        crop = tuple(slice(*prepared.geometry.crop[axis]) for axis in (2, 1, 0))
        fine = (labels() == value)[crop].transpose(2, 1, 0)
        if rule == "nearest":
            np.testing.assert_array_equal(structures[k].mask[0], nearest(fine))
            continue
        # By hand: each voxel of the model is filled by as much as the finer voxels that it covers.
        for axis, size in enumerate(SIZE):
            fine = np.repeat(fine, size, axis=axis).astype(float)
            fine = np.stack([part.mean(axis) for part in np.split(fine, size, axis=axis)], axis=axis)
        np.testing.assert_array_equal(structures[k].mask[0], fine >= 0.5 - 1e-6)
    said = report(tmp_path / "root/M3D_Seg_npy")
    (lost,) = {entry["cause"] for entry in said["left_out"]}
    assert (
        lost
        == {"nearest": "spleen is at no voxel of the model", "half": "spleen fills no voxel of the model by half"}[rule]
    )
    assert said["lost_by_class"] == {"spleen": {"lost": 2, "of": 2}}


def test_thin_structures_are_kept_as_the_published_preparation_keeps_them(tmp_path):
    """A vessel one voxel wide: nowhere half of a voxel of the model."""
    array = np.zeros((64, 64, 32), np.uint8)
    array[20, 24, :], array[40:50, 40:50, 10:20] = 1, 2
    scan = np.random.default_rng(0).integers(0, 100, array.shape).astype(np.int16)
    nifti(tmp_path / "raw/9000/x/image.nii.gz", scan)
    nifti(tmp_path / "raw/9000/x/label.nii.gz", array)
    named = {"labels": {"0": "background", "1": "vessel", "2": "block"}}
    (tmp_path / "raw/9000/9000.json").write_text(json.dumps(named))
    for rule, names in (("nearest", ["vessel", "block"]), ("half", ["block"])):
        root = tmp_path / rule
        run("seg", tmp_path / "raw", root, *SIZED, "--test-share", 0, "--mask", rule)
        structures = Structures(root, "train", SIZE, code="9000", kind="segmentation")
        assert [structures.name(k) for k in range(0, len(structures), 2)] == names


@pytest.mark.parametrize("dtype, error, size", [("float16", 5e-4, 2), ("uint8", 0.5 / 255 + 1e-6, 1)])
def test_images_may_be_stored_smaller(seg_raw, tmp_path, dtype, error, size):
    run("seg", seg_raw, tmp_path / "whole", *SIZED, "--test-share", 0)
    run("seg", seg_raw, tmp_path / "small", *SIZED, "--test-share", 0, "--dtype", dtype)
    whole, small = (
        Structures(tmp_path / name, "train", SIZE, code="0010", kind="segmentation") for name in ("whole", "small")
    )
    assert np.load(small.files(0).image).dtype.itemsize == size
    assert small[0].image.dtype == np.float32
    np.testing.assert_allclose(small[0].image, whole[0].image, atol=error)
    np.testing.assert_array_equal(small[0].mask, whole[0].mask)


def test_a_class_that_is_not_in_the_scan_gets_the_published_empty_mask_and_is_denied(seg_raw, tmp_path):
    run("seg", seg_raw, tmp_path / "root", *SIZED, "--test-share", 0)
    absent = tmp_path / "root/M3D_Seg_npy/0010/a/masks/mask_3.npy"
    assert np.load(absent).tolist() == [[[[False]]]]
    # The spleen is in the scan, too small to be seen: it is neither asked for nor denied.
    assert not absent.with_name("mask_2.npy").exists()
    structures = Structures(tmp_path / "root", "train", SIZE, code="0010", kind="segmentation")
    (index,) = [k for k in range(0, len(structures), 2) if structures.files(k).mask == absent]
    sample = structures[index]
    assert "pancreas" in sample.answer and SEG_TOKEN not in sample.answer and sample.mask is None


def test_one_label_image_one_file_per_class_and_the_published_arrays_give_the_same(seg_raw, tmp_path):
    folder = seg_raw / "0010"
    (folder / "b" / "label.nii.gz").unlink()
    for value, name in ((1, "liver"), (2, "right_kidney"), (0, "pancreas")):
        nifti(folder / "b" / "masks" / f"{name}.nii.gz", (labels() == value).astype(np.uint8) * bool(value))
    array, masks = scan_array().astype(np.float64), labels()
    bright = array[array > array.mean()]
    array = (np.clip(array, *np.percentile(bright, (0.05, 99.95))) - bright.mean()) / bright.std()
    save(folder / "c" / "image.npy", array[None])
    stack = np.stack([masks == value for value in (1, 2, 3, 4)])
    sparse.save_npz(folder / "c" / f"mask_{stack.shape}", sparse.csr_matrix(stack.reshape(4, -1).astype(np.int32)))
    run("seg", seg_raw, tmp_path / "root", *SIZED, "--test-share", 0)
    made = tmp_path / "root/M3D_Seg_npy/0010"
    for case in ("b", "c"):
        np.testing.assert_allclose(np.load(made / case / "image.npy"), np.load(made / "a" / "image.npy"), atol=1e-5)
        written = ["mask_0.npy", "mask_1.npy", "mask_3.npy"]  # mask_2, the spleen, fills no voxel or has no file
        assert sorted(path.name for path in (made / case / "masks").iterdir()) == written
        for name in written:
            np.testing.assert_array_equal(np.load(made / case / "masks" / name), np.load(made / "a" / "masks" / name))


def test_one_s_own_classes_are_named_by_their_mask_files(tmp_path):
    nifti(tmp_path / "raw/9000/x/ct.nii.gz", scan_array())
    nifti(tmp_path / "raw/9000/x/segmentations/wing_bone.nii.gz", (labels() == 1).astype(np.uint8))
    run("seg", tmp_path / "raw", tmp_path / "root", *SIZED, "--test-share", 0)
    structures = Structures(tmp_path / "root", "train", SIZE, code="9000", kind="rec")
    assert structures.names == ("wing bone",) and "wing bone" in structures[0].question


def test_cases_are_held_out_by_their_name_or_as_the_raw_json_says(seg_raw, tmp_path):
    for number in range(12):
        shutil.copytree(seg_raw / "0010/a", seg_raw / "0010" / f"{number:02}")
    run("seg", seg_raw, tmp_path / "one", *SIZED, "--test-share", 0.4)
    shutil.rmtree(seg_raw / "0010/03")
    run("seg", seg_raw, tmp_path / "two", *SIZED, "--test-share", 0.4)

    def cases(root, split):
        index = json.loads((root / "M3D_Seg_npy/0010/0010.json").read_text())
        return {Path(entry["image"]).parent.name for entry in index[split]}

    assert cases(tmp_path / "one", "test") - {"03"} == cases(tmp_path / "two", "test")
    assert cases(tmp_path / "one", "test") and cases(tmp_path / "one", "train")
    (seg_raw / "0010/0010.json").write_text(
        json.dumps({"train": [{"image": "0010/a/image.npy"}], "test": [{"image": "0010/b/image.npy"}]})
    )
    run("seg", seg_raw, tmp_path / "two", *SIZED, "--test-share", 0)
    # Cases that the published index does not list are in no split: in which they would leak, nobody knows.
    assert (cases(tmp_path / "two", "train"), cases(tmp_path / "two", "test")) == ({"a"}, {"b"})
    unlisted = {
        Path(entry["path"]).name for entry in report(tmp_path / "two/M3D_Seg_npy")["left_out"] if not entry["lost"]
    }
    assert unlisted == {f"{number:02}" for number in range(12)} - {"03"}


def test_the_published_dictionary_goes_with_the_data(seg_raw, tmp_path):
    (tmp_path / "term_dictionary.json").write_text('{"liver": ["Makes bile."]}')
    run("seg", seg_raw, tmp_path / "root", *SIZED, "--test-share", 0)
    structures = Structures(tmp_path / "root", "train", SIZE, code="0010", kind="rec")
    assert "Makes bile" in structures[1].question


def test_what_is_skipped_is_reported_with_its_cause(seg_raw, tmp_path):
    folder = seg_raw / "0010"
    nifti(folder / "shape" / "image.nii.gz", scan_array())
    nifti(folder / "shape" / "label.nii.gz", labels()[:-1])
    nifti(folder / "place" / "image.nii.gz", scan_array())
    nifti(folder / "place" / "label.nii.gz", labels(), AFFINE + np.diag([0, 0, 1, 0]))
    nifti(folder / "class" / "image.nii.gz", scan_array())
    nifti(folder / "class" / "label.nii.gz", labels() * 20)
    nifti(folder / "unlabelled" / "image.nii.gz", scan_array())
    nifti(folder / "empty" / "image.nii.gz", scan_array())
    nifti(folder / "empty" / "label.nii.gz", labels() * 0)
    nifti(folder / "cut" / "label.nii.gz", labels())
    cut = nifti(folder / "cut" / "image.nii.gz", scan_array())
    cut.write_bytes(cut.read_bytes()[:1000])
    (folder / "nothing").mkdir()
    run("seg", seg_raw, tmp_path / "root", *SIZED)
    said = report(tmp_path / "root/M3D_Seg_npy")
    assert said["made"] == 2
    causes = {Path(entry["path"]).name: entry["cause"] for entry in said["skipped"]}
    for case, cause in (
        ("shape", "has shape 39 x 36 x 20, its image 40 x 36 x 20"),
        ("place", "affines differ"),
        ("class", "from 0 to 13"),
        ("unlabelled", "no labels"),
        ("empty", "no class"),
        ("cut", "truncated"),
        ("nothing", "no image"),
    ):
        assert cause in causes.pop(case)
    assert not causes
    assert not [path for path in (tmp_path / "root").rglob("*") if "partial" in path.name]
    listed = json.loads((tmp_path / "root/M3D_Seg_npy/0010/0010.json").read_text())
    assert {Path(entry["image"]).parent.name for split in ("train", "test") for entry in listed[split]} == {"a", "b"}


def test_the_first_and_the_last_class_are_taken_and_one_more_is_refused(tmp_path):
    classes = len(class_names()["0010"])
    array = labels()
    array[6:20, 22:30, 3:12], array[22:30, 22:30, 3:12] = classes, 11
    array[array == 3] = 0
    nifti(tmp_path / "raw/0010/all/image.nii.gz", scan_array())
    nifti(tmp_path / "raw/0010/all/label.nii.gz", array)
    nifti(tmp_path / "raw/0010/more/image.nii.gz", scan_array())
    nifti(tmp_path / "raw/0010/more/label.nii.gz", np.where(array == classes, classes + 1, array))
    run("seg", tmp_path / "raw", tmp_path / "root", *SIZED, "--test-share", 0)
    (skipped,) = report(tmp_path / "root/M3D_Seg_npy")["skipped"]
    assert skipped["case"] == "0010/more" and f"from 0 to {classes}" in skipped["cause"]
    masks = {int(path.stem[5:]): np.load(path) for path in (tmp_path / "root/M3D_Seg_npy/0010/all/masks").iterdir()}
    assert sorted(masks) == list(range(classes))
    assert [number for number in sorted(masks) if masks[number].any()] == [0, 1, 10, classes - 1]


def test_one_s_own_classes_may_be_more_than_nine_and_are_named_by_number(tmp_path):
    array = np.where(labels() == 2, 10, labels() == 1)
    nifti(tmp_path / "raw/9000/x/image.nii.gz", scan_array())
    nifti(tmp_path / "raw/9000/x/label.nii.gz", array.astype(np.uint8))
    (tmp_path / "raw/9000/9000.json").write_text(
        json.dumps({"labels": {"0": "background"} | {str(k): f"part {chr(64 + k)}" for k in range(1, 11)}})
    )
    run("seg", tmp_path / "raw", tmp_path / "root", *SIZED, "--test-share", 0)
    structures = Structures(tmp_path / "root", "train", SIZE, code="9000", kind="segmentation")
    assert [structures.name(k) for k in range(0, len(structures), 2)] == [f"part {letter}" for letter in "ABCDEFGHIJ"]
    assert [k // 2 for k in range(0, len(structures), 2) if structures[k].mask is not None] == [0, 9]


def test_the_share_is_held_out_for_each_split():
    drawn = Counter(_drawn(f"case {k}", 0.2, ("test", "validation")) for k in range(4000))
    for split, share in (("test", 0.2), ("validation", 0.2), ("train", 0.6)):
        assert drawn[split] / 4000 == pytest.approx(share, abs=0.03)


# --- resuming --------------------------------------------------------------------------------------------------------
def test_complete_cases_are_kept_and_changed_ones_made_again(seg_raw, tmp_path):
    root = tmp_path / "root"
    run("seg", seg_raw, root, *SIZED)
    made = root / "M3D_Seg_npy/0010/a/image.npy"
    before = made.stat().st_mtime_ns
    run("seg", seg_raw, root, *SIZED)
    assert (report(root / "M3D_Seg_npy")["kept"], made.stat().st_mtime_ns) == (2, before)
    assert report(root / "M3D_Seg_npy")["left_out"]  # still known, though nothing was done
    nifti(seg_raw / "0010/a/image.nii.gz", scan_array(1))
    run("seg", seg_raw, root, *SIZED)
    assert [report(root / "M3D_Seg_npy")[key] for key in ("made", "kept")] == [1, 1]
    assert made.stat().st_mtime_ns != before
    run("seg", seg_raw, root, *SIZED, "--preset", "ct")
    assert report(root / "M3D_Seg_npy")["made"] == 2


def test_a_case_that_is_interrupted_leaves_nothing_that_looks_complete(tmp_path):
    target = tmp_path / "out" / "case"

    def interrupted(folder: Path):
        (folder / "image.npy").write_bytes(b"half")
        raise KeyboardInterrupt

    job = jobs.Job("case", (tmp_path,), target, {}, interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.do(job)
    assert not target.exists()
    # As a killed process leaves it:
    partial = target.with_name(".case.partial")
    partial.mkdir(parents=True)
    (partial / "old.npy").write_bytes(b"half")
    assert jobs.do(jobs.Job("case", (tmp_path,), target, {}, lambda folder: [])).state == "made"
    assert sorted(path.name for path in target.iterdir()) == ["prepared.json"] and not partial.exists()


def test_a_folder_of_somebody_else_s_is_never_overwritten(seg_raw, tmp_path):
    theirs = tmp_path / "root/M3D_Seg_npy/0010/a"
    theirs.mkdir(parents=True)
    (theirs / "image.npy").write_bytes(b"precious")
    run("seg", seg_raw, tmp_path / "root", *SIZED)
    (skipped,) = report(tmp_path / "root/M3D_Seg_npy")["skipped"]
    assert "was not made by this command" in skipped["cause"]
    assert (theirs / "image.npy").read_bytes() == b"precious"


def cases_of(root: Path, code: str = "0010") -> Counter:
    """How many masks the index lists, by case."""
    index = json.loads((root / f"M3D_Seg_npy/{code}/{code}.json").read_text())
    return Counter(Path(entry["image"]).parent.name for split in ("train", "test") for entry in index[split])


def test_cases_of_another_raw_folder_stay_in_the_index(seg_raw, tmp_path):
    root, more = tmp_path / "root", tmp_path / "more"
    shutil.copytree(seg_raw / "0010/a", more / "0010/c")
    for folder in (seg_raw, more, seg_raw):
        run("seg", folder, root, *SIZED)
    each = len(class_names()["0010"]) - 1  # all but the spleen
    assert cases_of(root) == {"a": each, "b": each, "c": each}
    # What can no longer be made is still there as it was made.
    (seg_raw / "0010/a/label.nii.gz").unlink()
    run("seg", seg_raw, root, *SIZED)
    assert report(root / "M3D_Seg_npy")["skipped"][0]["case"] == "0010/a" and cases_of(root)["a"] == each


def test_cases_that_this_command_did_not_make_stay_in_the_index(seg_raw, tmp_path):
    folder = tmp_path / "root/M3D_Seg_npy/0010"
    for case in ("a", "z"):
        save(folder / case / "image.npy", image(0))
    (folder / "0010.json").write_text(
        json.dumps(
            {
                "numTest": 0,
                "test": [],
                "train": [
                    {"image": f"{folder}/{case}/image.npy", "label": f"{folder}/{case}/masks/mask_0.npy"}
                    for case in "az"
                ],
            }
        )
    )
    run("seg", seg_raw, tmp_path / "root", *SIZED)
    found = cases_of(tmp_path / "root")
    assert (found["a"], found["z"]) == (1, 1) and found["b"] > 1


def test_other_classes_under_the_same_numbers_are_refused_before_anything_is_made(tmp_path):
    for raw_folder, case, name in (("one", "x", "wing bone"), ("two", "y", "beak")):
        nifti(tmp_path / raw_folder / "9000" / case / "ct.nii.gz", scan_array())
        nifti(tmp_path / raw_folder / "9000" / case / "masks" / f"{name}.nii.gz", (labels() == 1).astype(np.uint8))
    root = tmp_path / "root"
    run("seg", tmp_path / "one", root, *SIZED)
    run("seg", tmp_path / "two", root, *SIZED, refused="for example x, whose classes are wing bone; here they are beak")
    assert cases_of(root, "9000") == {"x": 1} and not (root / "M3D_Seg_npy/9000/y").exists()
    # One's own case with other classes is made anew, so that nothing is left of the old ones.
    (tmp_path / "one/9000/x/masks/wing bone.nii.gz").rename(tmp_path / "one/9000/x/masks/wing.nii.gz")
    run("seg", tmp_path / "one", root, *SIZED)
    assert json.loads((root / "M3D_Seg_npy/9000/9000.json").read_text())["labels"]["1"] == "wing"
    assert cases_of(root, "9000") == {"x": 1}


def _die(item: int) -> int:
    import os

    os._exit(1)


def test_a_worker_that_dies_is_a_clear_error():
    with pytest.raises(M3DError, match="worker processes died.*fewer --workers"):
        list(jobs.parallel(_die, range(3), 2))


def test_an_interrupted_command_says_how_to_go_on(tmp_path):
    def interrupted(folder: Path):
        raise KeyboardInterrupt

    source = tmp_path / "source"
    source.mkdir()
    made = jobs.Job("one", (source,), tmp_path / "out/one", {}, lambda folder: [])
    with pytest.raises(M3DError, match="interrupted; complete cases are kept"):
        jobs.do_all([made, jobs.Job("two", (source,), tmp_path / "out/two", {}, interrupted)], 1, "test")
    assert jobs.do(made).state == "kept"


def test_workers_end_with_a_killed_parent(tmp_path):
    script = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from training.data.jobs import parallel\n"
        "if __name__ == '__main__':\n"
        "    for _, pid in parallel(eval, ['__import__(\"os\").getpid()', '__import__(\"time\").sleep(600)'], 2):\n"
        "        print(pid, flush=True)\n"
    )
    (tmp_path / "script.py").write_text(script)
    root = str(Path(jobs.__file__).parents[2])
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py", root], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    worker.wait(timeout=60)


def test_several_workers_make_the_same(seg_raw, tmp_path):
    run("seg", seg_raw, tmp_path / "one", *SIZED)
    run("seg", seg_raw, tmp_path / "two", *SIZED[:-1], 2)
    for path in (tmp_path / "one").rglob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(tmp_path / "two" / path.relative_to(tmp_path / "one")))
    assert report(tmp_path / "two/M3D_Seg_npy")["made"] == 2


# --- M3D-Cap ---------------------------------------------------------------------------------------------------------
def test_slices_and_texts_become_pairs(tmp_path):
    case = tmp_path / "ct_case" / "000001"
    stack = slices(case / "Axial_Pöschl")
    (case / "text.txt").write_text("title: x\nstudy_findings: A nodule\nin the lung.\n")
    nifti(case / "delayed.nii.gz", scan_array())
    run("cap", tmp_path / "ct_case", tmp_path / "root", *SIZED, "--test-share", 0)
    captions = Captions(tmp_path / "root", "train", SIZE, ask=False)
    assert [Path(captions[k].source).name for k in range(2)] == ["Axial_Poschl.npy", "delayed.npy"]
    assert captions[0].answer == captions[1].answer == "A nodule in the lung."
    expected = prepare(Scan(stack, ARRAY_AFFINE, "npy"), SIZE, "m3d-cap").image
    np.testing.assert_array_equal(captions[0].image, expected)
    # Slice 10 comes after slice 9, not after slice 1.
    assert captions[0].source.endswith("M3D_Cap_npy/ct_case/000001/Axial_Poschl.npy")


def test_series_whose_names_differ_in_diacritics_alone_are_both_kept(tmp_path):
    case = tmp_path / "ct_case" / "1"
    stacks = [slices(case / name, seed=seed) for seed, name in enumerate(("Axial_Poschl", "Axial_Pöschl"))]
    (case / "text.txt").write_text("Findings.")
    run("cap", tmp_path / "ct_case", tmp_path / "root", *SIZED, "--test-share", 0)
    captions = Captions(tmp_path / "root", "train", SIZE)
    assert [Path(captions[k].source).name for k in range(2)] == ["Axial_Poschl.npy", "Axial_Poschl_2.npy"]
    for k, stack in enumerate(stacks):
        expected = prepare(Scan(stack, ARRAY_AFFINE, "npy"), SIZE, "m3d-cap").image
        np.testing.assert_array_equal(captions[k].image, expected)


@pytest.mark.parametrize(
    "text, said",
    [
        ("a\nstudy_findings: Clear lungs.\ndiscussion: b", "Clear lungs. discussion: b"),
        ("study_findings: \n", "study_findings:"),
        ("x discussion: All is well.", "All is well."),
        ("study_findings: -\ndiscussion: none", "- discussion: none"),
        ("Plain\ntext", "Plain text"),
        (" \n", ""),
    ],
)
def test_the_findings_of_a_text_are_taken(text, said):
    assert raw.findings(text) == said


def test_slices_that_do_not_fit_are_left_out_and_named(tmp_path):
    case = tmp_path / "ct_case" / "1"
    slices(case / "good")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(case / "good" / "12.png")
    (case / "good" / "13.png").write_bytes(b"not a picture")
    slices(case / "bad", count=1)
    slices(case / "half", count=4)
    for number in (1, 3):
        (case / "half" / f"{number}.png").write_bytes(b"not a picture")
    (case / "text.txt").write_text("Findings.")
    slices(tmp_path / "ct_case" / "2" / "series")  # without a text
    slices(tmp_path / "ct_case" / "3" / "series", count=1)
    (tmp_path / "ct_case" / "3" / "text.txt").write_text("Findings.")
    run("cap", tmp_path / "ct_case", tmp_path / "root", *SIZED)
    said = report(tmp_path / "root/M3D_Cap_npy")
    causes = {
        Path(entry["path"]).relative_to(tmp_path / "ct_case").as_posix(): entry["cause"] for entry in said["left_out"]
    }
    for path, cause in (
        ("1/good/12.png", "5 x 5 pixels"),
        ("1/good/13.png", "cannot be read"),
        ("1/bad", "only 1 of 1 slices"),
        ("1/half", "only 2 of 4 slices"),
        ("2/series", "no .txt"),
    ):
        assert cause in causes.pop(path)
    assert not causes and said["made"] == 1
    assert "no series can be used: series: only 1 of 1" in said["skipped"][0]["cause"]


def published_cap(raw: Path, place: str = "{family}/{family}_00/{case}") -> dict[str, list]:
    """M3D-Cap as it is downloaded and unpacked, with its index; what the index says."""
    cases = {
        ("ct_case", "000006"): ["Axial_lung_window", "Axial_Pöschl", "骨窗"],
        ("ct_quizze", "000007"): ["Coronal_C_"],
    }
    published = {"Axial_Pöschl": "Axial_Poschl", "骨窗": "Gu Chuang "}
    pairs = []
    for number, ((family, case), series) in enumerate(cases.items()):
        folder = raw / place.format(family=family, case=case)
        for name in series:
            slices(folder / name, seed=number)
            image = f"M3D_Cap_npy/{family}/{case}/{published.get(name, name)}.npy"
            pairs.append({"image": image, "text": f"M3D_Cap_npy/{family}/{case}/text.txt"})
        (folder / "text.txt").write_text("study_findings: The lungs are clear.")
    index = {"train": pairs[:2], "validation": pairs[2:3], "test": pairs[3:], "test100": pairs[3:], "test1k": pairs[3:]}
    (raw / "M3D_Cap.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize(
    "place", ["{family}/{family}_00/{case}", "{family}_00/{case}", "{family}_image/{case}", "M3D_Cap/{family}/{case}"]
)
def test_archives_unpacked_as_downloaded_become_the_published_pairs(tmp_path, place):
    index = published_cap(tmp_path / "raw", place)
    run("cap", tmp_path / "raw", tmp_path / "root", *SIZED)
    made = json.loads((tmp_path / "root/M3D_Cap_npy/M3D_Cap.json").read_text())
    key = {split: sorted(pair["image"] for pair in pairs) for split, pairs in index.items()}
    assert {split: sorted(pair["image"] for pair in pairs) for split, pairs in made.items()} == key
    assert not report(tmp_path / "root/M3D_Cap_npy")["left_out"]
    assert Captions(tmp_path / "root", "test1k", SIZE)[0].answer == "The lungs are clear."


def test_one_archive_alone_is_prepared_with_the_index_above_it(tmp_path):
    published_cap(tmp_path / "raw")
    run("cap", tmp_path / "raw/ct_quizze/ct_quizze_00", tmp_path / "root", *SIZED, "--test-share", 0)
    made = json.loads((tmp_path / "root/M3D_Cap_npy/M3D_Cap.json").read_text())
    assert {split: [pair["image"][12:] for pair in pairs] for split, pairs in made.items() if pairs} == dict.fromkeys(
        ("test", "test100", "test1k"), ["ct_quizze/000007/Coronal_C_.npy"]
    )


def test_raw_folders_of_other_names_than_the_index_has_are_refused_before_anything_is_made(tmp_path):
    published_cap(tmp_path / "raw")
    (tmp_path / "raw/ct_quizze/ct_quizze_00/000007").rename(tmp_path / "raw/ct_quizze/ct_quizze_00/7")
    arguments = ("cap", tmp_path / "raw", tmp_path / "root", *SIZED)
    run(*arguments, refused="does not list 1 of the 1 series of ct_quizze, for example ct_quizze/7/Coronal_C_.npy")
    assert not (tmp_path / "root").exists()
    run(*arguments, "--unlisted", 1)
    (left_out,) = report(tmp_path / "root/M3D_Cap_npy")["left_out"]
    assert "does not list it" in left_out["cause"]


def test_two_folders_of_the_same_case_are_refused(tmp_path):
    for folder in ("ct_case_00", "ct_case_01"):
        slices(tmp_path / "raw" / folder / "000001" / "s")
        (tmp_path / "raw" / folder / "000001" / "text.txt").write_text("Findings.")
    run("cap", tmp_path / "raw", tmp_path / "root", *SIZED, refused="are both case ct_case/000001")


@pytest.mark.parametrize("name, published", FORMATS["series"].items())
def test_series_are_named_as_the_published_preparation_names_them(name, published):
    assert raw.series_names([name, "other"], {published, "other"})[name] == published
    if all(ord(c) < 0x370 or 0x2000 <= ord(c) < 0x2070 for c in name):  # without an index to look it up in, too
        assert raw.series_names([name], ())[name] == published


def test_pairs_are_split_as_the_raw_json_says_and_other_folders_pairs_stay(tmp_path):
    for name in ("ct_case", "ct_quizze"):
        for number in "12":
            slices(tmp_path / "raw" / name / number / "s", seed=int(number))
            (tmp_path / "raw" / name / number / "text.txt").write_text("Findings.")
    (tmp_path / "raw/ct_case" / "M3D_Cap.json").write_text(
        json.dumps(
            {"train": [{"image": "M3D_Cap_npy/ct_case/1/s.npy"}], "test500": [{"image": "M3D_Cap_npy/ct_case/2/s.npy"}]}
        )
    )
    for _ in range(2):
        for name in ("ct_case", "ct_quizze"):
            run("cap", tmp_path / "raw" / name, tmp_path / "root", *SIZED, "--test-share", 0)
    # Both families at once, from the folder that holds them, lie where the published questions look for them.
    run("cap", tmp_path / "raw", tmp_path / "root", *SIZED, "--test-share", 0)
    both = json.loads((tmp_path / "root/M3D_Cap_npy/M3D_Cap.json").read_text())
    assert sorted(pair["image"][12:] for pair in both["train"]) == [
        f"{name}/{number}/s.npy" for name in ("ct_case", "ct_quizze") for number in "12"
    ]
    run("cap", tmp_path / "raw/ct_case", tmp_path / "root", *SIZED, "--test-share", 0)
    index = json.loads((tmp_path / "root/M3D_Cap_npy/M3D_Cap.json").read_text())
    assert {split: sorted(pair["image"][12:] for pair in pairs) for split, pairs in index.items() if pairs} == {
        "train": ["ct_case/1/s.npy", "ct_quizze/1/s.npy", "ct_quizze/2/s.npy"],
        "test500": ["ct_case/2/s.npy"],
    }


def test_pairs_whose_case_can_no_longer_be_made_stay(tmp_path):
    for number in "12":
        slices(tmp_path / "ct_case" / number / "s", seed=int(number))
        (tmp_path / "ct_case" / number / "text.txt").write_text("Findings.")
    run("cap", tmp_path / "ct_case", tmp_path / "root", *SIZED, "--test-share", 0)
    (tmp_path / "ct_case/1/text.txt").write_text(" ")
    run("cap", tmp_path / "ct_case", tmp_path / "root", *SIZED, "--test-share", 0)
    assert report(tmp_path / "root/M3D_Cap_npy")["skipped"][0]["case"] == "ct_case/1"
    captions = Captions(tmp_path / "root", "train", SIZE)
    assert [captions[k].answer for k in range(len(captions))] == ["Findings."] * 2


# --- M3D-RefSeg ------------------------------------------------------------------------------------------------------
def test_referring_questions_keep_their_masks(tmp_path):
    nifti(tmp_path / "raw/s0000/ct.nii.gz", scan_array())
    nifti(tmp_path / "raw/s0000/mask.nii.gz", labels())
    nifti(tmp_path / "raw/s0001/ct.nii.gz", scan_array())
    rows = [
        (f"M3D_RefSeg/{case}/ct.nii.gz", f"M3D_RefSeg/{case}/mask.nii.gz", number, 0, f"Segment {number}.", "[SEG].")
        for case, number in (("s0000", 1), ("s0000", "2.0"), ("s0000", 3), ("s0000", 0), ("s0001", 1), ("s0002", 1))
    ]
    write_csv(tmp_path / "raw/M3D_RefSeg_train.csv", REFSEG_COLUMNS, rows)
    run("refseg", tmp_path / "raw", tmp_path / "root", *SIZED)
    referring = Referring(tmp_path / "root", "train", SIZE)
    assert [referring[k].question for k in range(len(referring))] == ["Segment 1.", "Segment 2.0."]
    prepared = prepare(read_scan((tmp_path / "raw/s0000/ct.nii.gz").read_bytes()), SIZE, "m3d-refseg")
    crop = tuple(slice(*prepared.geometry.crop[axis]) for axis in (1, 2, 0))
    np.testing.assert_array_equal(referring[1].mask[0], nearest((labels() == 2)[crop].transpose(2, 0, 1)))
    said = report(tmp_path / "root/M3D_RefSeg_npy")
    assert [entry["cause"] for entry in said["skipped"]] == [
        "ct.nii.gz and mask.nii.gz are looked for, and at least one is missing"
    ]
    causes = [entry["cause"] for entry in said["left_out"]]
    assert causes == [
        "mask 3 is at no voxel of the model",
        "s0000 has no mask 3",
        "s0000 has no mask 0",
        "its case 's0001' is not prepared",
        "its case 's0002' is not prepared",
    ]
    assert said["lost_by_class"] == {"lesion": {"lost": 1, "of": 3}}


def test_the_published_tables_beside_the_cases_are_prepared_and_all_questions_are_not_trained_on(tmp_path):
    for case in ("s0000", "s0001"):
        nifti(tmp_path / "M3D_RefSeg" / case / "ct.nii.gz", scan_array())
        nifti(tmp_path / "M3D_RefSeg" / case / "mask.nii.gz", labels())
    tables = {"train": ["s0000"], "test": ["s0001"], "all": ["s0000", "s0001"]}
    for split, cases in tables.items():
        rows = [row for case in cases for row in referring_rows(case)]
        write_csv(tmp_path / f"M3D_RefSeg_{split}.csv", REFSEG_COLUMNS, rows)
    run("refseg", tmp_path / "M3D_RefSeg", tmp_path / "root", *SIZED)
    for split, case in (("train", "s0000"), ("test", "s0001")):
        referring = Referring(tmp_path / "root", split, SIZE)
        assert {Path(referring[k].source).parent.name for k in range(len(referring))} == {case}
    # Under the reference's name for the training questions, the table of all is told by the test's.
    (tmp_path / "M3D_RefSeg_train.csv").unlink()
    (tmp_path / "M3D_RefSeg_all.csv").rename(tmp_path / "M3D_RefSeg.csv")
    run("refseg", tmp_path / "M3D_RefSeg", tmp_path / "root", *SIZED, refused="it is the table of all questions")


def test_referring_questions_of_another_raw_folder_stay(tmp_path):
    root = tmp_path / "root"
    for folder, case, tables in (
        ("one", "s0000", ("M3D_RefSeg_train.csv", "M3D_RefSeg_test.csv")),
        ("two", "s0001", ("M3D_RefSeg.csv",)),
    ):
        nifti(tmp_path / folder / case / "ct.nii.gz", scan_array())
        nifti(tmp_path / folder / case / "mask.nii.gz", labels())
        for name in tables:
            write_csv(
                tmp_path / folder / name,
                REFSEG_COLUMNS,
                [(f"x/{case}/ct.nii.gz", f"x/{case}/mask.nii.gz", 1, 0, f"Segment {case}.", "[SEG].")],
            )
    for folder in ("one", "two", "one", "two"):
        run("refseg", tmp_path / folder, root, *SIZED)

    def asked(split: str) -> list[str]:
        referring = Referring(root, split, SIZE)
        return sorted(referring[k].question for k in range(len(referring)))

    assert asked("train") == ["Segment s0000.", "Segment s0001."] and asked("test") == ["Segment s0000."]
    (tmp_path / "one/M3D_RefSeg_test.csv").unlink()
    run("refseg", tmp_path / "one", root, *SIZED)
    assert len((root / "M3D_RefSeg_npy/M3D_RefSeg_test.csv").read_text().splitlines()) == 1


# --- refusals --------------------------------------------------------------------------------------------------------
def test_raw_folders_without_a_usable_case_are_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    run("seg", tmp_path / "none", tmp_path / "root", refused="is not a folder")
    run("seg", tmp_path / "raw", tmp_path / "root", refused="none was found")
    run("seg", tmp_path / "raw", tmp_path / "raw" / "root", refused="lies inside")
    run("cap", tmp_path / "raw", tmp_path / "root", "--preset", "x-ray", refused="no preset 'x-ray'")
    run("refseg", tmp_path / "raw", tmp_path / "root", refused="hold no M3D_RefSeg_train.csv")
    run(
        "seg",
        tmp_path / "raw",
        tmp_path / "root",
        "--mask",
        "all",
        refused="no rule for masks 'all': choose one of near",
    )
    run("cap", tmp_path / "raw", tmp_path / "root", "--dtype", "int8", refused="no type of stored images 'int8'")
    write_csv(tmp_path / "raw/M3D_RefSeg_train.csv", ("Image", "Mask"), [])
    run("refseg", tmp_path / "raw", tmp_path / "root", refused="lacks the columns Mask_ID, Question_Type")
    (tmp_path / "raw/9000/x").mkdir(parents=True)
    run("seg", tmp_path / "raw", tmp_path / "root", refused="its classes must be named")


# --- the check -------------------------------------------------------------------------------------------------------
def checked(root: Path, *arguments) -> tuple[int, str, dict]:
    import typer

    command = typer.Typer()
    command.command()(check.check)
    target = root.parent / "check.json"
    result = CliRunner().invoke(command, [str(a) for a in (root, *SIZED, "--report", target, *arguments)])
    if isinstance(result.exception, InvalidInput):
        raise result.exception
    return result.exit_code, result.output, json.loads(target.read_text())


def test_a_root_as_published_passes_with_its_counts(tmp_path):
    root = write_root(tmp_path / "root")
    code, output, said = checked(root)
    assert code == 0 and not said["problems"] and not said["turned"]
    assert {
        (part["task"], part["split"]): part["samples"] for part in said["sets"] if part["task"] != "segmentation"
    } == {
        **{
            (task, split): 4 if split == "train" else 1
            for split in ("train", "validation", "test")
            for task in ("caption", "vqa_closed")
        },
        ("vqa_closed", "test5k"): 1,
        ("vqa_yes_no", "train"): 4,
        ("refseg", "train"): 2,
        ("refseg", "test"): 2,
    }
    assert all(0 <= part["low"] < part["high"] <= 1 and not part["broken"] for part in said["sets"])
    assert "M3D_VQA_train.csv" in output and "an epoch of these reads" in output


def test_the_check_counts_what_an_epoch_reads(tmp_path):
    root = write_root(tmp_path / "root")
    said = checked(root, "--task", "caption", "--task", "refseg")[2]["read"]
    images = {
        path: path.stat().st_size for path in [*(root / "M3D_Cap_npy").rglob("*.npy"), *root.rglob("s000*/*.npy")]
    }
    assert said["distinct_bytes"] == sum(images.values())
    assert said["bytes"] - said["distinct_bytes"] == sum(path.stat().st_size for path in root.rglob("s000*/*.npy"))


def test_the_check_tells_of_reports_and_scans_that_stand_in_two_splits(tmp_path):
    root = write_root(tmp_path / "root")
    # As the reference's issue 61 found it: a quiz of the test split is a case of the training split.
    texts = [root / "M3D_Cap_npy/ct_case" / case / "text.txt" for case in ("000000", "000005")]
    texts[1].write_text(texts[0].read_text())
    index = root / "M3D_Seg_npy/0010/0010.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps(listed | {"test": listed["test"] + listed["train"][:1]}))
    code, output, said = checked(root, "--task", "caption", "--task", "segmentation")
    assert code == 0 and said["repeated"] == [
        {"task": "caption", "split": "test", "samples": 1, "in_train": 1, "of_other_cases": 1},
        {"task": "segmentation", "split": "test", "samples": 8, "in_train": 2, "of_other_cases": 0},
    ]
    assert "repeated: of caption, test, 1 of 1 samples are in train as well, 1 of them in another case" in output


def test_the_check_tells_of_scans_whose_slices_run_the_other_way(tmp_path):
    root = write_root(tmp_path / "root")
    folder = root / "M3D_Seg_npy/0010"
    entries = []
    for case in range(6):
        for number, place in enumerate([(0, 2, 2), (3, 10, 10), (6, 20, 20)]):
            mask = np.zeros((1, *SIZE), bool)
            mask[0][tuple(slice(start, start + 2) for start in place)] = True
            save(folder / f"{case}/masks/mask_{number}.npy", mask[:, ::-1] if case == 4 else mask)
            entries.append({"image": f"0010/{case}/image.npy", "label": f"0010/{case}/masks/mask_{number}.npy"})
        save(folder / f"{case}/image.npy", image(case))
    (folder / "0010.json").write_text(json.dumps({"train": entries, "test": []}))
    code, output, said = checked(root, "--task", "segmentation")
    assert code == 0 and said["turned"] == [{"code": "0010", "image": str(folder / "4/image.npy"), "axis": "D"}]
    assert f"turned: the structures of {folder / '4/image.npy'} follow each other along D the other way" in output


def test_the_check_finds_what_training_would_stumble_over(tmp_path):
    root = write_root(tmp_path / "root")
    bad_mask = root / "M3D_Seg_npy/0010/b/masks/mask_0.npy"
    save(bad_mask, np.zeros((1, 8, 16, 32), bool))
    bad_image = root / "M3D_Cap_npy/ct_case/000002/Axial.npy"
    save(bad_image, image(0) * 7)
    (root / "M3D-VQA/M3D_VQA_yn_val.csv").write_text("Image Path,Question\n")
    (root / "M3D-VQA/M3D_VQA_test.csv").unlink()
    code, output, said = checked(root)
    assert code == 1
    assert [problem["cause"].split("; ")[0].split("/")[-1] for problem in said["problems"]] == [
        "M3D_VQA_test.csv was looked for",
        "M3D_VQA_yn_val.csv lacks the column Answer",
    ]
    broken = {
        (part["task"], part["split"]): {tuple(e["paths"]) for e in part["broken"]}
        for part in said["sets"]
        if part["broken"]
    }
    assert broken == {
        ("caption", "train"): {(str(bad_image),)},
        ("vqa_closed", "train"): {(str(bad_image),)},
        ("vqa_yes_no", "train"): {(str(bad_image),)},
        ("segmentation", "test"): {(str(bad_mask), str(root / "M3D_Seg_npy/0010/b/image.npy"))},
    }
    assert "mask has shape 1 x 8 x 16 x 32" in output and str(bad_mask) in output
    assert checked(root, "--task", "refseg")[0] == 0
    with pytest.raises(InvalidInput, match="holds no set"):
        checked(tmp_path)


def test_an_image_that_many_samples_share_is_read_once(tmp_path, monkeypatch):
    root = write_root(tmp_path / "root")
    rows = list(csv.reader((root / "M3D-VQA/M3D_VQA_train.csv").open()))
    write_csv(root / "M3D-VQA/M3D_VQA_train.csv", rows[0], rows[1:] * 6)
    read, plain = [], check.read_image
    monkeypatch.setattr(check, "read_image", lambda path, size: read.append(path) or plain(path, size))
    (found,) = check.examine(open_sets(["vqa_open"], root, "train", SIZE).sets, 1)
    assert len(read) == 4 and not found.broken
