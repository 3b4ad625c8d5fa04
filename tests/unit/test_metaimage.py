"""MetaImage is read as ITK reads it, and nothing about a file is trusted."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from engine.scan import read_scan
from engine.scan.limits import Limits
from tests.unit.foreign import assert_as_itk, itk_image, voxels
from tests.unit.refusals import refused

HEADER = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 0 0 1 1 0 0",
    "Offset": "7 8 9",
    "ElementSpacing": "2 3 4",
    "DimSize": "6 5 4",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


def file(data=None, newline="\n", equals=" = ", **keys) -> bytes:
    """A file with its keys as given, without those that are None; new ones come before the last."""
    header = {**HEADER, **keys}
    header["ElementDataFile"] = header.pop("ElementDataFile")
    lines = [f"{key}{equals}{value}{newline}" for key, value in header.items() if value is not None]
    return "".join(lines).encode() + (voxels("<i2").tobytes("F") if data is None else data)


def by_itk(data, folder) -> sitk.Image:
    (folder / "itk.mha").write_bytes(data)
    return sitk.ReadImage(folder / "itk.mha")


@pytest.mark.parametrize(
    "keys",
    [
        {"BinaryDataByteOrderMSB": "True"},
        {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"},
        {"BinaryDataByteOrderMSB": None},
        {"BinaryData": None},
        {"Offset": None, "Position": "7 8 9"},
        {"Offset": None},
        {"TransformMatrix": None, "Orientation": "0 1 0 0 0 1 1 0 0"},
        {"ElementSpacing": None, "ElementSize": "2 3 4"},
        {"ElementSize": "9 9 9"},
        {"ElementSpacing": "2 -3 4"},
        {"ElementType": "MET_LONG", "DimSize": "6 5 2"},
        {"ElementNumberOfChannels": "1", "Comment": "by hand"},
        {"CompressedData": None},
        {"newline": "\r\n"},
        {"equals": "="},
        {"ObjectType": None},
    ],
    ids=str,
)
def test_a_header_means_what_itk_takes_it_for(tmp_path, keys):
    data = file(**keys)
    scan = read_scan(data)
    assert_as_itk(scan, by_itk(data, tmp_path))
    assert not scan.notes


def test_what_the_header_does_not_say_is_a_guess_as_itks(tmp_path):
    for keys in ({"TransformMatrix": None}, {"TransformMatrix": None, "AnatomicalOrientation": "RAI"}):
        data = file(**keys)
        scan = read_scan(data)
        assert_as_itk(scan, by_itk(data, tmp_path))
        assert any("left and right" in note and "guess" in note for note in scan.notes)
    data = file(ElementSpacing=None)
    scan = read_scan(data)
    assert_as_itk(scan, by_itk(data, tmp_path))
    assert scan.notes == ("the MetaImage file has no voxel sizes: that they are 1 mm is a guess",)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"TransformMatrix": None, "AnatomicalOrientation": "LPI"}, "AnatomicalOrientation"),
        ({"BinaryData": "False"}, "BinaryData"),
        ({"ObjectType": "Tube"}, "ObjectType"),
        ({"ElementNumberOfChannels": "3"}, "ElementNumberOfChannels"),
        ({"ElementToIntensityFunctionSlope": "2"}, "Slope"),
        ({"ElementToIntensityFunctionOffset": "-1024"}, "Offset"),
        ({"DistanceUnits": "cm"}, "DistanceUnits"),
        ({"HeaderSize": "-1"}, "HeaderSize"),
        ({"ElementType": "MET_FLOAT_MATRIX"}, "MET_FLOAT_MATRIX"),
        ({"ElementType": None}, "no values"),
        ({"NDims": "2", "DimSize": "6 20"}, "3 axes"),
        ({"NDims": "4", "DimSize": "6 5 2 2"}, "6 x 5 x 2 x 2"),
        ({"NDims": "4", "DimSize": "6 5 4 1"}, "4 axes"),
        ({"DimSize": "6 5 1"}, "3 axes"),
        ({"DimSize": "6 5"}, "DimSize"),
        ({"DimSize": "6 5 -4"}, "DimSize"),
        ({"DimSize": "6 5 four"}, "DimSize"),
        ({"DimSize": None}, "DimSize"),
        ({"NDims": None}, "NDims"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "orientation"),
        ({"TransformMatrix": "1 0 0 0 nan 0 0 0 1"}, "orientation"),
        ({"TransformMatrix": "1 0 0 1"}, "9 numbers"),
        ({"TransformMatrix": "one"}, "TransformMatrix"),
        ({"ElementSpacing": "0 1 1"}, "orientation"),
        ({"ElementSpacing": "1 1"}, "3"),
        ({"Offset": "inf 0 0"}, "orientation"),
        ({"Position": "1 2 3"}, "two values"),
        ({"equals": " "}, "not an image"),
        ({"ElementDataFile": None}, "truncated"),
    ],
)
def test_what_is_no_volume_or_damaged_is_refused_with_the_cause(keys, words):
    refused(file(**keys), words)


def test_a_header_with_its_voxels_elsewhere_says_what_to_send(tmp_path):
    sitk.WriteImage(itk_image(), tmp_path / "a.mhd")
    refused((tmp_path / "a.mhd").read_bytes(), "another file", "a.raw", ".mha")
    refused(file(b"", ElementDataFile="LIST"), "another file", ".mha")
    refused(file(b"", ElementDataFile="slice%03d.raw 1 4 1"), "another file", ".mha")


def test_headers_that_lie_are_refused_before_memory_is_taken():
    refused(file()[:-1], "promises", "truncated")
    refused(file(b""), "promises", "only 0 bytes")
    refused(file(DimSize="6000 5000 4000"), "max_voxels")
    packed = zlib.compress(voxels("<i2").tobytes("F"))
    refused(file(packed, DimSize="6 5 5", CompressedData="True"), "promises", "only 240")
    refused(file(packed[:-1], CompressedData="True"), "truncated")
    refused(file(packed[:-4] + b"1234", CompressedData="True"), "damaged")
    refused(file(b"no zlib at all", CompressedData="True"), "damaged")
    refused(file(packed, DimSize="1000 1000 500", CompressedData="True"), "max_bytes", limits=Limits(max_bytes=10_000))
    refused(b"ObjectType = Image\n" + b"Comment = long\n" * 10_000, "truncated")


def test_what_follows_the_voxels_is_not_read():
    np.testing.assert_array_equal(read_scan(file() + b"more").array, voxels())
    packed = zlib.compress(voxels("<i2").tobytes("F") + bytes(1 << 20)) + b"more"
    np.testing.assert_array_equal(read_scan(file(packed, CompressedData="True")).array, voxels())
