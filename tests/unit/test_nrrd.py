"""NRRD is read as ITK and pynrrd read it, and nothing about a file is trusted."""

from __future__ import annotations

import gzip
import io

import nrrd
import numpy as np
import pytest
import SimpleITK as sitk

from engine.scan import read_scan
from engine.scan.limits import Limits
from tests.unit.foreign import DIRECTIONS, assert_as_itk, itk_image, voxels
from tests.unit.refusals import refused

HEADER = {
    "type": "int16",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "6 5 4",
    "space directions": "(2,0,0) (0,3,0) (0,0,4)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(7,8,9)",
}


def file(data=None, magic="NRRD0005", newline="\n", **fields) -> bytes:
    """A file with its fields as given (_ for a space), without those that are None."""
    header = HEADER | {name.replace("_", " "): value for name, value in fields.items()}
    lines = [magic, *(f"{name}: {value}" for name, value in header.items() if value is not None), "", ""]
    return newline.join(lines).encode() + (voxels("<i2").tobytes("F") if data is None else data)


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS", "left-anterior-superior", "LAS", "LPS"])
@pytest.mark.parametrize("encoding", ["raw", "gzip", "gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", ">f4", "u1"])
def test_what_pynrrd_writes_lies_where_itk_has_it(tmp_path, space, encoding, dtype):
    path = tmp_path / "a.nrrd"
    header = {
        "space": space,
        "space directions": np.diag([0.7, 1.3, 2.9]) @ DIRECTIONS[-1],
        "space origin": [1.0, -2.0, 3.0],
        "encoding": encoding,
    }
    nrrd.write(str(path), voxels(dtype), header)
    scan = read_scan(path.read_bytes())
    assert_as_itk(scan, sitk.ReadImage(path))
    np.testing.assert_array_equal(scan.array, nrrd.read(str(path))[0])
    assert not scan.notes


def test_line_ends_comments_keys_and_old_versions_are_read():
    for data in (
        file(newline="\r\n"),
        file(magic="NRRD0001\n# a comment: with a colon\nkey:=value: with one"),
        file(magic="NRRD0004\nSegment0_Name:=liver"),
        file(centers="cell cell cell", content="a scan", thicknesses="NaN NaN NaN"),
        file(type="signed short int", space="LPS", Encoding=None),
    ):
        scan = read_scan(data)
        np.testing.assert_array_equal(scan.array, voxels())
        np.testing.assert_allclose(scan.affine, [[-2, 0, 0, -7], [0, -3, 0, -8], [0, 0, 4, 9], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "unit, millimetres", [("mm", 1), ("cm", 10), ("m", 1000), ("um", 0.001), ("µm", 0.001), ("", 1), ("microns", 0.001)]
)
def test_space_units_become_millimetres(unit, millimetres):
    scan = read_scan(file(space_units=f'"{unit}" "{unit}" "{unit}"'))
    np.testing.assert_allclose(scan.spacing_mm, np.array([2, 3, 4]) * millimetres)
    np.testing.assert_allclose(scan.affine[:3, 3], np.array([-7, -8, 9]) * millimetres)


def test_a_file_without_a_place_says_what_is_a_guess(tmp_path):
    for fields in ({"space": None, "space_dimension": "3"}, {"space": "scanner-xyz"}, {"space": "3D-right-handed"}):
        scan = read_scan(file(**fields))
        np.testing.assert_allclose(scan.affine[:3, 3], [-7, -8, 9])
        assert any("guess" in note and "left and right" in note for note in scan.notes)
    data = file(space=None, space_directions=None, space_origin=None, spacings="2 3 4")
    (tmp_path / "a.nrrd").write_bytes(data)
    scan = read_scan(data)
    assert_as_itk(scan, sitk.ReadImage(tmp_path / "a.nrrd"))
    assert any("guess" in note and "left and right" in note for note in scan.notes) and len(scan.notes) == 1
    for spacings in (None, "nan nan nan"):
        scan = read_scan(file(space=None, space_directions=None, space_origin=None, spacings=spacings))
        assert scan.spacing_mm == (1, 1, 1) and any("1 mm is a guess" in note for note in scan.notes)


@pytest.mark.parametrize("space, orientation", [("RAS", "RAS"), ("LAS", "LAS"), ("LPS", "LPS")])
def test_a_space_without_directions_is_a_guess(space, orientation):
    """ITK refuses spacings in a named space."""
    scan = read_scan(file(space=space, space_directions=None, spacings="2 3 4"))
    assert scan.orientation == orientation and scan.spacing_mm == (2, 3, 4)
    assert any("guess" in note for note in scan.notes)


def test_spacings_have_units_too():
    fields = {"space": None, "space_directions": None, "space_origin": None, "spacings": "2 3 4"}
    assert read_scan(file(**fields, units='"cm" "cm" "cm"')).spacing_mm == (20, 30, 40)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "sizes": "1 6 5 4",
            "kinds": "vector domain domain domain",
            "space_directions": "none (2,0,0) (0,3,0) (0,0,4)",
        },
        {"sizes": "6 5 4 1", "kinds": None, "space_directions": "(2,0,0) (0,3,0) (0,0,4) none"},
        {
            "sizes": "6 5 4 1",
            "kinds": "domain domain domain time",
            "space_directions": "(2,0,0) (0,3,0) (0,0,4) (nan,nan,nan)",
        },
    ],
)
def test_another_axis_of_length_one_is_dropped(fields):
    scan = read_scan(file(dimension="4", **fields))
    np.testing.assert_array_equal(scan.array, voxels())
    assert scan.spacing_mm == (2, 3, 4)


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"sizes": "3 8 5", "kinds": "RGB-color domain domain", "space_directions": "none (1,0,0) (0,1,0)"},
            "rgb-color",
        ),
        ({"dimension": "4", "sizes": "6 5 2 2", "kinds": None, "space_directions": None}, "6 x 5 x 2 x 2"),
        (
            {
                "dimension": "4",
                "sizes": "6 5 2 2",
                "kinds": "space space space list",
                "space_directions": "(2,0,0) (0,3,0) (0,0,4) none",
            },
            "2 (list)",
        ),
        ({"dimension": "2", "sizes": "6 20", "kinds": None, "space_directions": None}, "3 axes"),
        ({"sizes": "6 20 1"}, "3 axes"),
        ({"type": "block"}, "block"),
        ({"type": None}, "no type"),
        ({"sizes": None}, "no sizes"),
        ({"dimension": "4"}, "sizes"),
        ({"sizes": "6 5 -4"}, "sizes"),
        ({"sizes": "6 5 4.0"}, "sizes"),
        ({"sizes": "6 5 " + "9" * 5000}, "sizes"),
        ({"endian": None}, "endian"),
        ({"encoding": "bzip2"}, "raw and gzip"),
        ({"encoding": "ascii"}, "raw and gzip"),
        ({"encoding": None}, "raw and gzip"),
        ({"space": "3D-left-handed"}, "3d-left-handed"),
        ({"space": "left-posterior-superior-time"}, "patient's sides"),
        ({"space_directions": "(2,0,0) (2,0,0) (0,0,4)"}, "orientation"),
        ({"space_directions": "(2,0,0) (0,inf,0) (0,0,4)"}, "orientation"),
        ({"space_directions": "(2,0,0) (0,3,0)"}, "directions"),
        ({"space_directions": "(2,0) (0,3) (0,4)"}, "3 numbers"),
        ({"space_directions": "2 0 0"}, "vectors"),
        ({"space_origin": "(1,2)"}, "3 numbers"),
        ({"space_units": '"parsec" "mm" "mm"'}, "mm, cm, m or um"),
        ({"byte_skip": "-1"}, "skips"),
        ({"line_skip": "3"}, "skips"),
        ({"kinds": "domain domain"}, "kinds"),
        ({"magic": "NRRD0009"}, "NRRD0001"),
        ({"magic": "NRRD0005\nwhat is this"}, "no field"),
        ({"magic": "NRRD0005\ntype: short"}, "twice"),
    ],
)
def test_what_is_no_volume_or_damaged_is_refused_with_the_cause(fields, words):
    refused(file(**fields), words)


@pytest.mark.parametrize("field", ["data_file", "datafile"])
def test_a_detached_header_says_what_to_send(field, tmp_path):
    refused(file(b"", **{field: "scan.raw.gz"}), "another file", "scan.raw.gz", ".nrrd")
    sitk.WriteImage(itk_image(), tmp_path / "a.nhdr")
    refused((tmp_path / "a.nhdr").read_bytes(), "another file", "SimpleITK", ".nrrd")


def test_headers_that_lie_are_refused_before_memory_is_taken():
    refused(file()[:-1], "promises", "truncated")
    refused(file(b""), "promises", "only 0 bytes")
    refused(file(sizes="6000 5000 4000"), "max_voxels")
    packed = gzip.compress(voxels("<i2").tobytes("F"))
    refused(file(packed, sizes="6 5 5", encoding="gzip"), "promises", "only 240")
    refused(file(packed[:-1], encoding="gzip"), "truncated")
    refused(file(packed[:-6] + b"12345678", encoding="gzip"), "damaged")
    refused(file(b"no gzip at all", encoding="gzip"), "damaged")
    refused(file(packed, sizes="1000 1000 500", encoding="gzip"), "max_bytes", limits=Limits(max_bytes=10_000))
    refused(b"NRRD0005\ntype: short\n", "no end")
    refused(b"NRRD0005\n# " + b"long" * (1 << 19) + b"\n\n", "no end")


def test_what_follows_the_voxels_is_not_read():
    np.testing.assert_array_equal(read_scan(file() + b"more").array, voxels())
    packed = gzip.compress(voxels("<i2").tobytes("F") + bytes(1 << 20))
    np.testing.assert_array_equal(read_scan(file(packed, encoding="gzip")).array, voxels())
    assert nrrd.reader.read_header(io.BytesIO(file()))["sizes"].tolist() == [6, 5, 4]
