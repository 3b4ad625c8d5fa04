"""The documents and their code blocks, which are tests."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from tests.conftest import ROOT

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
PARSED_ONLY, RUN_WITH_SERVER = "parsed only: ", "run: demo server"


def names() -> list[str]:
    """All tracked Markdown files, by their path in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return sorted(name for name in listed if (ROOT / name).is_file())


@dataclass(frozen=True)
class Block:
    """A code block. mark: the text of the comment before it, or empty."""

    document: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The code blocks of all documents in these languages."""
    found = []
    for name in names():
        text = (ROOT / name).read_text()
        for block in _BLOCK.finditer(text):
            if block["language"] in languages:
                line = text.count("\n", 0, block.start("text"))
                found.append(Block(name, line, block["language"], block["text"], block["mark"] or ""))
    return found
