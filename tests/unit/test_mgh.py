"""MGH and MGZ are read as nibabel reads them, and nothing about a file is trusted."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import nibabel as nib
import numpy as np
import pytest
from nibabel.freesurfer.mghformat import MGHHeader

from engine.errors import InvalidInput
from engine.scan import read_scan
from engine.scan.limits import Limits
from tests.unit.foreign import DIRECTIONS, ORIGIN, SPACING, assert_as_nibabel, voxels
from tests.unit.refusals import refused

DIMS, FRAMES, TYPE, GOOD_RAS, DELTA, MDC, CENTRE = 4, 16, 20, 28, 30, 42, 78  # where the header has them


def affine(direction) -> np.ndarray:
    return nib.affines.from_matvec(np.asarray(direction) * SPACING, ORIGIN)


def mgh(dtype=np.int16, direction=DIRECTIONS[-1]) -> bytes:
    return nib.MGHImage(voxels(dtype), affine(direction)).to_bytes()


def changed(data: bytes, where: int, what: bytes) -> bytes:
    return data[:where] + what + data[where + len(what) :]


def number(value: int) -> bytes:
    return value.to_bytes(4, "big", signed=True)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("direction", DIRECTIONS, ids=range(len(DIRECTIONS)))
def test_what_nibabel_writes_lies_where_nibabel_has_it(direction, compress):
    data = mgh(direction=direction)
    scan = read_scan(compress(data))
    assert_as_nibabel(scan, nib.MGHImage.from_bytes(data))
    np.testing.assert_allclose(scan.affine, affine(direction), atol=0.01)
    assert scan.kind == "mgh" and not scan.notes and scan.header is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
def test_every_type_that_nibabel_writes_is_read(dtype):
    scan = read_scan(mgh(dtype))
    assert_as_nibabel(scan, nib.MGHImage.from_bytes(mgh(dtype)))
    assert scan.array.dtype.isnative


@pytest.mark.parametrize("flag", [0, -1])
def test_without_an_orientation_freesurfers_is_said_to_be_a_guess(flag):
    """nibabel has another default than FreeSurfer, whose format it is: mghRead in utils/mriio.cpp, MRI_CORONAL."""
    scan = read_scan(changed(mgh(), GOOD_RAS, flag.to_bytes(2, "big", signed=True)))
    np.testing.assert_array_equal(scan.affine, [[-1, 0, 0, 3], [0, 0, 1, -2], [0, -1, 0, 2.5], [0, 0, 0, 1]])
    assert scan.orientation == "LIA"
    assert any("guess" in note and "left and right" in note for note in scan.notes)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "where, what, words",
    [
        (FRAMES, number(5), "6 x 5 x 4 x 5"),
        (DIMS, number(1), "3 axes"),
        (DIMS, number(-6), "negative"),
        (DIMS, number(1 << 30), "max_voxels"),
        (DIMS, number(7), "promises"),
        (TYPE, number(2), "type 2"),
        (TYPE, number(-1), "type -1"),
        (DELTA, bytes(12), "damaged"),
        (DELTA, np.array([np.nan] * 3, ">f4").tobytes(), "damaged"),
        (MDC, bytes(36), "damaged"),
        (MDC, np.full(9, 3e38, ">f4").tobytes(), "damaged"),
        (CENTRE, np.array([np.inf] * 3, ">f4").tobytes(), "damaged"),
        (0, number(2), "not a"),
    ],
)
def test_what_is_no_volume_or_damaged_is_refused_with_the_cause(where, what, words, compress):
    refused(compress(changed(mgh(), where, what)), words)


def test_truncated_files_are_named_and_scan_parameters_are_not_needed():
    voxels_end = 284 + voxels().nbytes
    np.testing.assert_array_equal(read_scan(mgh()[:voxels_end]).array, voxels())
    np.testing.assert_array_equal(read_scan(gzip.compress(mgh()[:voxels_end])).array, voxels())
    for data in (mgh()[: voxels_end - 1], gzip.compress(mgh()[: voxels_end - 1])):
        refused(data, "MGH", "promises", "truncated")
    refused(gzip.compress(mgh())[:-9], "gzip", "truncated")
    refused(mgh()[:100], "promises")
    refused(mgh()[:50], "not an image")


def test_a_bomb_stops_before_it_expands():
    header = changed(mgh()[:284], DIMS, number(2) + number(2) + number(2))
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(header) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    tracemalloc.start()
    refused(bomb, "every voxel")  # a small honest header, 100 MB behind it: the excess is never read
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    refused(gzip.compress(mgh()), "decompressed", "max_bytes", limits=Limits(max_bytes=500))


def test_the_header_is_as_long_as_nibabels():
    assert MGHHeader._hdrdtype.itemsize == 90


def test_frames_beside_one_slice_are_no_axis_of_space(tmp_path):
    values = np.random.default_rng(0).random((1, 6, 7, 8)).astype(np.float32)
    nib.MGHImage(values, np.diag([5.0, 1, 2, 1])).to_filename(tmp_path / "frames.mgz")
    with pytest.raises(InvalidInput, match="1 x 6 x 7 x 8"):
        read_scan((tmp_path / "frames.mgz").read_bytes())
