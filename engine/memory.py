"""How much memory this machine has."""

from __future__ import annotations

import os
from pathlib import Path


def meminfo(key: str) -> int:
    """A value of /proc/meminfo, such as MemTotal, in bytes."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def available_memory() -> int:
    """Bytes of memory that a new process may have: what the system has left, within the limit of this container."""
    left = meminfo("MemAvailable")
    limit, used = (_cgroup(f"memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        cache = next(
            (int(line.split()[1]) for line in _cgroup_lines("memory.stat") if line.startswith("inactive_file ")), 0
        )
        left = min(left, limit - used + cache)
    return max(0, left)


def _cgroup(name: str) -> int | None:
    """A value of this process's control group (version 2); None without a limit, or without such groups."""
    lines = _cgroup_lines(name)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _cgroup_lines(name: str) -> list[str]:
    group = next(
        (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/"
    )
    path = Path("/sys/fs/cgroup", group.lstrip("/"), name)
    return path.read_text().splitlines() if os.access(path, os.R_OK) else []
