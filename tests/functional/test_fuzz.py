"""Random damage to scan files: each is read or refused with our own error, never with a stray exception."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import M3DError
from engine.scan import read_scan
from tests.unit.foreign import voxels
from tests.unit.test_metaimage import file as metaimage
from tests.unit.test_mgh import mgh
from tests.unit.test_nrrd import file as nrrd
from tests.unit.test_scan import enhanced, nifti, saved, series, values

pytestmark = [pytest.mark.slow(group="fuzz"), pytest.mark.filterwarnings("ignore")]
EXAMPLES = 10_000


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values())
    return buffer.getvalue()


def archive(slices: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for index, data in enumerate(slices):
            file.writestr(f"{index}.dcm", data)
    return buffer.getvalue()


SERIES = [saved(dataset) for dataset in series(3)]
# name: (what is damaged, how it becomes the file that is sent). An archive is damaged within: its checksum would
# hide the rest.
FILES = {
    "nifti": (nifti(), bytes),
    "nifti of floats": (nifti(values(dtype=np.float32)), bytes),
    "npy": (npy(), bytes),
    "nrrd": (nrrd(space_units='"mm" "mm" "mm"', spacings="1 1 1"), bytes),
    "gzipped nrrd": (nrrd(gzip.compress(voxels("<i2").tobytes("F")), encoding="gzip"), bytes),
    "metaimage": (metaimage(DistanceUnits="mm", HeaderSize="0"), bytes),
    "compressed metaimage": (metaimage(zlib.compress(voxels("<i2").tobytes("F")), CompressedData="True"), bytes),
    "mgh": (mgh(np.float32), bytes),
    "mgz": (mgh(), gzip.compress),
    "dicom": (SERIES[1], lambda data: archive([SERIES[0], data, SERIES[2]])),
    "enhanced dicom": (saved(enhanced(3)), lambda data: archive([data])),
}
# (where, what): a few bytes changed, mostly in the header, where a change means something.
CHANGES = st.lists(
    st.tuples(st.integers(0, 600) | st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8
)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_our_own_words(name):
    whole, sent = FILES[name]

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES, cut=st.none() | st.integers(0, len(whole)))
    def damaged(changes, cut):
        data = bytearray(whole)
        for where, what in changes:
            data[where % len(data)] = what
        try:
            scan = read_scan(sent(bytes(data[:cut])))
        except M3DError as refused:
            assert str(refused)
        else:
            assert np.isfinite(scan.affine).all() and scan.array.ndim == 3

    damaged()
