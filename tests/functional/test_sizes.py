"""A checkpoint of the published size, 28 GB in fp32, exports on a 24 GB machine, within what is said beforehand."""

from __future__ import annotations

import shutil

import pytest

from engine.manifest import Manifest
from engine.models.checkpoint import bytes_read, read_config
from engine.models.config import LamedConfig
from engine.models.needs import needs, parts_of
from tests.conftest import copy_repository
from tests.functional.footprint import run_watched

pytestmark = [pytest.mark.slow(group="sizes"), pytest.mark.timeout(1500)]

DISK = 46e9  # the checkpoint, and its export in bf16


def test_a_7b_in_fp32_exports_within_the_memory_that_is_said(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < DISK:
        pytest.skip(f"{DISK / 1e9:.0f} GB of disk are needed at {tmp_path}, {free / 1e9:.0f} are free")
    checkpoint, repository = tmp_path / "checkpoint", copy_repository(tmp_path)
    run_watched("benchmarks/make_checkpoint.py", "--llm", "7b", "--fp32", checkpoint)
    assert bytes_read(checkpoint) > 27e9
    parts = parts_of(LamedConfig.from_dict(read_config(checkpoint)))
    needed = needs(parts, bytes_read(checkpoint), "cpu", "bf16")
    said, peak = run_watched(
        "export/build_engines.py", "--checkpoint", checkpoint, "--precision", "bf16", "--repository", repository
    )
    assert f"this export needs {needed}" in said
    print(f"{needed}; peak {peak / 1e9:.1f} GB")
    assert peak < needed.memory < 24e9
    assert (
        0.9 * sum(Manifest.read(repository).files.values())
        < needed.disk
        < 1.1 * sum(Manifest.read(repository).files.values())
    )
    shutil.rmtree(tmp_path)
