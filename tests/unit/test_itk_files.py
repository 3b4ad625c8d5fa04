"""What ITK writes is read as ITK reads it, in every format that it and we know."""

from __future__ import annotations

import pytest
import SimpleITK as sitk

from engine.scan import read_scan
from tests.unit.foreign import DIRECTIONS, DTYPES, assert_as_itk, itk_image

FORMATS = {"metaimage": ".mha", "nrrd": ".nrrd"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS, ids=range(len(DIRECTIONS)))
def test_what_itk_writes_lies_where_itk_has_it(tmp_path, direction, compressed, kind):
    image, path = itk_image(direction=direction), tmp_path / f"a{FORMATS[kind]}"
    sitk.WriteImage(image, path, compressed)
    scan = read_scan(path.read_bytes())
    assert_as_itk(scan, image)
    assert scan.kind == kind and not scan.notes and scan.header is None


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_that_itk_writes_is_read(tmp_path, dtype, kind):
    image, path = itk_image(dtype), tmp_path / f"a{FORMATS[kind]}"
    sitk.WriteImage(image, path, True)
    assert_as_itk(read_scan(path.read_bytes()), image)
