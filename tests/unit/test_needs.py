"""What an export needs is said before it starts, and it is refused where that is not there."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from benchmarks.make_checkpoint import PUBLISHED_CLIP, config_of
from engine import memory as machine
from engine.errors import ResourceExhausted
from engine.memory import available_memory
from engine.models import needs as module
from engine.models.config import ClipConfig, LamedConfig
from engine.models.needs import Needs, needs, parts_of

GB = 10**9


def test_the_published_7b_in_fp32_exports_within_24_gb_and_its_disk_is_its_weights():
    parts = parts_of(LamedConfig.from_dict(config_of("7b")), ClipConfig.from_dict(PUBLISHED_CLIP))
    assert parts.llm == pytest.approx(6.74e9, rel=0.01) and parts.clip == pytest.approx(0.198e9, rel=0.01)
    needed = needs(parts, 28 * GB, "cpu", "fp32")
    assert needed.memory < 8 * GB and 28 * GB < needed.disk < 30 * GB
    assert needs(parts, 28 * GB, "cpu", "bf16").disk == pytest.approx(needed.disk - 2 * parts.llm)
    assert needs(parts, 28 * GB, "tensorrt", "fp16").disk > needs(parts, 28 * GB, "cpu", "fp16").disk


def test_tied_embeddings_are_counted_once():
    tied, untied = (
        parts_of(LamedConfig.from_dict(config_of("135m", tie_word_embeddings=tie))).llm for tie in (True, False)
    )
    assert untied - tied == 49156 * 576


@pytest.mark.parametrize(
    ("disk", "memory", "words"),
    [
        (9, 99, r"writes 10\.00 GB, and 9\.00 GB are free.*--repository"),
        (99, 4, r"needs 5\.00 GB of memory, and 4\.00 GB"),
    ],
)
def test_an_export_that_does_not_fit_is_refused_with_figures_and_a_way_out(monkeypatch, tmp_path, disk, memory, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk * GB))
    monkeypatch.setattr(module, "available_memory", lambda: memory * GB)
    needed = Needs(disk=10 * GB, memory=5 * GB, seconds=60, serving=0)
    with pytest.raises(ResourceExhausted, match=words):
        needed.refuse(tmp_path)


def test_what_an_earlier_export_takes_counts_as_free(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9 * GB))
    Needs(disk=10 * GB, memory=1, seconds=60, serving=0).refuse(tmp_path, freed=1 * GB)


def test_available_memory_is_what_a_container_leaves(monkeypatch):
    whole = available_memory()
    assert whole > 0
    files = {"memory.max": ["3000"], "memory.current": ["2500"], "memory.stat": ["anon 1", "inactive_file 700"]}
    monkeypatch.setattr(machine, "_cgroup_lines", files.__getitem__)
    assert available_memory() == 1200
    monkeypatch.setattr(machine, "_cgroup_lines", {**files, "memory.max": ["max"]}.__getitem__)
    assert available_memory() == pytest.approx(whole, rel=0.2)
