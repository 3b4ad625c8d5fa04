"""DICOM through a real server: its study model starts the process that decodes compressed frames."""

from __future__ import annotations

import pytest

from engine.client import M3DClient
from engine.errors import InvalidInput
from engine.server.server import Server, free_ports
from tests.unit.test_dicom import JPEG_LS, LOSSLESS_SV1, beside, encoded, frame_of, with_frames
from tests.unit.test_scan import enhanced, saved, series, zipped

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def client(light_repository, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with Server(light_repository, **free_ports(), log=log) as server, M3DClient(server.url, timeout=300) as client:
        yield client


@pytest.mark.parametrize("syntax", [LOSSLESS_SV1, JPEG_LS])
def test_a_compressed_series_is_read_by_the_server(client, tmp_path, syntax):
    for dataset in [*series(8, shape=(64, 64), PixelRepresentation=1), beside("SR")]:
        whole = encoded(dataset, syntax) if "PixelData" in dataset else dataset
        (tmp_path / f"{dataset.SOPInstanceUID}.dcm").write_bytes(saved(whole))
    info = client.upload(tmp_path).info
    assert info.shape == (64, 64, 8) and info.spacing_mm == pytest.approx([0.9, 0.7, 2.5])
    assert "the DICOM modality is CT" in info.reason and "1 SR" in info.reason


def test_one_enhanced_file_is_read_by_the_server(client, tmp_path):
    (tmp_path / "enhanced.dcm").write_bytes(saved(enhanced(9)))
    assert client.upload(tmp_path / "enhanced.dcm").info.shape == (12, 10, 9)


def test_a_damaged_frame_is_refused_and_the_server_goes_on(client, tmp_path):
    slices = [encoded(dataset, JPEG_LS) for dataset in series(3, shape=(64, 64))]
    damaged = [*slices[:2], with_frames(slices[2], [frame_of(slices[2])[:-40] + b"\xff\xd9"])]
    for name, datasets in (("damaged.zip", damaged), ("whole.zip", slices)):
        (tmp_path / name).write_bytes(zipped(datasets))
    with pytest.raises(InvalidInput, match="could not be decoded"):
        client.upload(tmp_path / "damaged.zip")
    assert client.upload(tmp_path / "whole.zip").info.shape == (64, 64, 3)
