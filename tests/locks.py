"""Who waits for a study store's locks, as the kernel lists it."""

from __future__ import annotations

from pathlib import Path

from engine.runtime.study_store import StudyStore


def waiting_for(store: StudyStore) -> int:
    """How many threads and processes wait for a lock of the store; proc_locks(5)."""
    inode = (store.root / ".locks").stat().st_ino
    return sum(
        "->" in line and line.split()[-3].endswith(f":{inode}") for line in Path("/proc/locks").read_text().splitlines()
    )
