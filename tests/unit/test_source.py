"""A study's source says which DICOM image each slice of its array, and so of a mask, comes from."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from engine.errors import InvalidInput, Unavailable
from engine.scan import scan_pieces
from engine.source import Source, content_of
from tests.unit.test_dicom import JPEG_LS, LOSSLESS_SV1, ORIENTATIONS, beside, encoded
from tests.unit.test_scan import enhanced, nifti, saved, series, zipped

STUDY, FRAME = generate_uid(), generate_uid()


def source_of(scan) -> Source:
    """As `upload` keeps it."""
    return Source(scan, None, "auto", None, content_of(scan_pieces(scan)[0]))


def written(folder: Path, slices) -> Path:
    """A folder of folders, whose names say nothing of the slices' order."""
    for index, dataset in enumerate(slices):
        path = folder / f"disk {index % 2}" / f"IM{97 * (index + 1) % 89:04}"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(saved(dataset))
    return folder


def without_decoder(monkeypatch, folder: Path) -> None:
    """As a client is whose extra [dicom] is not installed."""
    package = folder / "no decoder"
    package.mkdir()
    (package / "imagecodecs.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(package))


def images_of(source: Source) -> list[pydicom.Dataset]:
    """What pydicom reads from the files that the source names, in the order of its slices."""
    if isinstance(source.scan, Path) and source.scan.suffix == ".zip":
        with zipfile.ZipFile(source.scan) as archive:
            return [pydicom.dcmread(io.BytesIO(archive.read(each.file))) for each in source.series().slices]
    return [pydicom.dcmread(each.file) for each in source.series().slices]


def given_as(kind: str, folder: Path):
    """A folder of files, as a user may hand it over."""
    if kind == "folder":
        return folder
    if kind == "list":
        return sorted((str(path) for path in folder.rglob("*") if path.is_file()), reverse=True)
    archive = folder.parent / "series.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in folder.rglob("*"):
            if path.is_file():
                opened.write(path, path.relative_to(folder))
    return archive


@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
@pytest.mark.parametrize("kind", ["folder", "list", "zip"])
def test_each_slice_of_the_array_is_the_image_that_its_reference_names(tmp_path, kind, orientation):
    slices = series(7, orientation=orientation, StudyInstanceUID=STUDY, FrameOfReferenceUID=FRAME)
    source = source_of(given_as(kind, written(tmp_path / "scan", slices)))
    scan, found = source.read(), source.series()
    assert (found.study_uid, found.series_uid) == (STUDY, slices[0].SeriesInstanceUID)
    assert found.frame_of_reference_uid == FRAME and len(found.slices) == scan.array.shape[2] == 7
    for k, (reference, image) in enumerate(zip(found.slices, images_of(source))):
        assert reference.sop_instance_uid == image.SOPInstanceUID and reference.sop_class_uid == image.SOPClassUID
        assert reference.frame is None
        np.testing.assert_array_equal(scan.array[:, :, k].T, image.pixel_array - 1024.0)
        position = (scan.affine @ [0, 0, k, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(position, image.ImagePositionPatient, atol=1e-5)


@pytest.mark.parametrize("kind", ["file", "folder", "bytes"])
def test_frames_of_one_file_are_named_by_their_numbers(tmp_path, kind):
    dataset = enhanced(6)
    path = tmp_path / "scan" / "enhanced"
    path.parent.mkdir()
    path.write_bytes(saved(dataset))
    source = source_of({"file": path, "folder": path.parent, "bytes": path.read_bytes()}[kind])
    scan, pixels = source.read(), dataset.pixel_array
    for k, reference in enumerate(source.series().slices):
        assert reference.sop_instance_uid == dataset.SOPInstanceUID
        assert reference.file == ("" if kind == "bytes" else str(path))
        np.testing.assert_array_equal(scan.array[:, :, k].T, pixels[reference.frame - 1] - 5.0)
    assert [each.frame for each in source.series().slices] == [6, 5, 4, 3, 2, 1]


def test_copies_and_what_lies_beside_the_series_are_no_slices(tmp_path):
    slices = series(4)
    folder = written(tmp_path / "scan", [*slices, slices[1], beside("SR")])
    (folder / "note.txt").write_text("hello")
    found = source_of(folder).series()
    assert sorted(each.sop_instance_uid for each in found.slices) == sorted(each.SOPInstanceUID for each in slices)


def test_uids_that_the_files_do_not_have_are_empty(tmp_path):
    slices = series(3)
    for index, dataset in enumerate(slices):
        dataset.StudyInstanceUID = f"1.2.{index}"  # several
        del dataset.SeriesInstanceUID
    found = source_of(written(tmp_path / "scan", slices)).series()
    assert (found.study_uid, found.series_uid, found.frame_of_reference_uid) == ("", "", "")


def test_a_name_that_is_no_text_is_found_again(tmp_path):
    folder = written(tmp_path / "scan", series(3))
    first = next(path for path in folder.rglob("*") if path.is_file())
    os.rename(first, os.fsencode(folder) + b"/\xff\xfe")
    assert len(images_of(source_of(folder))) == 3


@pytest.mark.parametrize("syntax", [LOSSLESS_SV1, JPEG_LS])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_series_of_compressed_files_needs_no_decoder(tmp_path, monkeypatch, kind, syntax):
    slices = [encoded(dataset, syntax) for dataset in series(5)]
    source = source_of(given_as(kind, written(tmp_path / "scan", slices)))
    with_decoder, scan = source.series(), source.read()
    assert with_decoder == scan.series if kind == "zip" else len(with_decoder.slices) == scan.array.shape[2]
    without_decoder(monkeypatch, tmp_path)
    assert source.series() == with_decoder
    with pytest.raises(Unavailable, match=r"m3d-engine\[dicom\]"):
        source.read()


def test_the_series_of_a_compressed_file_of_frames_needs_no_decoder(tmp_path, monkeypatch):
    without_decoder(monkeypatch, tmp_path)
    found = source_of(saved(encoded(enhanced(6), LOSSLESS_SV1))).series()
    assert [each.frame for each in found.slices] == [6, 5, 4, 3, 2, 1]


def test_a_localizer_beside_the_series_is_no_slice_of_it(tmp_path):
    localizer = series(1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    source = source_of(written(tmp_path / "scan", [*series(4), *localizer]))
    assert len(source.series().slices) == source.read().array.shape[2] == 4


@pytest.mark.parametrize("scan", [nifti(), np.random.default_rng(0).random((4, 5, 6))], ids=["NIfTI", "array"])
def test_a_scan_of_another_format_has_no_series(scan):
    assert source_of(scan).series() is None


def test_a_series_that_changed_since_it_was_sent_is_refused(tmp_path):
    folder = written(tmp_path / "scan", series(4))
    source = source_of(folder)
    assert source.series()
    next(path for path in folder.rglob("*") if path.is_file()).unlink()
    with pytest.raises(InvalidInput, match="not the one that was sent.*upload it again"):
        source.series()
    shutil.rmtree(folder)
    with pytest.raises(InvalidInput, match="is gone or cannot be read: upload it again"):
        source.series()


def test_a_zip_in_memory_names_its_members():
    slices = series(3)
    found = source_of(zipped(slices)).series()
    names = {dataset.SOPInstanceUID: f"series/{index:03}.dcm" for index, dataset in enumerate(slices)}
    assert [each.file for each in found.slices] == [names[each.sop_instance_uid] for each in found.slices]
