"""Files and folders that appear whole or not at all: written beside their place, then moved there."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, values) -> None:
    """Write a JSON file; folders above it are made."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def place(source: Path, target: Path) -> None:
    """Move a folder to its place once everything in it is on the disk."""
    for file in source.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    source.rename(target)
