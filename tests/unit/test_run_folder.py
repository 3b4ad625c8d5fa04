"""The files by which the front and the models of one server tell each other what they must know."""

from __future__ import annotations

import fcntl
import os
import tempfile

import pytest

from engine.runtime.run_folder import READY, RunFolder
from engine.server.server import RUN_LOCK, RUN_PREFIX, sweep


def test_health_is_what_was_said_last_and_starting_before(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.health == "starting"
    folder.health = "out of order (it stopped 4 times within an hour)"
    folder.health = READY
    assert folder.health == READY and RunFolder(tmp_path).health == READY


def test_health_takes_no_new_place_on_a_disk(tmp_path):
    """Else a full one would keep what was said before, for ever."""
    folder = RunFolder(tmp_path)
    before = os.stat(tmp_path / "health")
    folder.health = "x" * 10_000
    after = os.stat(tmp_path / "health")
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size)
    assert os.listdir(tmp_path).count("health") == 1 and len(os.listdir(tmp_path)) == 2


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_supervisor_left_is_removed_and_what_is_in_use_is_not(temporary):
    left, used, young, other = (temporary / f"{RUN_PREFIX}{name}" for name in ("left", "used", "young", "other"))
    for folder in (left, used, young):
        folder.mkdir()
    other.write_text("a file of somebody's")
    (left / RUN_LOCK).touch()
    with open(used / RUN_LOCK, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep()
    assert not left.exists() and used.exists() and young.exists() and other.exists()


@pytest.mark.parametrize("trap", ["fifo", "link"])
def test_what_others_put_there_neither_holds_up_a_start_nor_is_removed(temporary, trap):
    folder = temporary / f"{RUN_PREFIX}trap"
    folder.mkdir()
    os.mkfifo(folder / RUN_LOCK) if trap == "fifo" else (folder / RUN_LOCK).symlink_to("/dev/zero")
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
    sweep()
    assert folder.exists() or trap == "fifo"
