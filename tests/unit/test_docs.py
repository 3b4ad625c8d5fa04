"""The commands that the documents show are commands that there are."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main

from benchmarks import m3d_bench
from engine import cli
from engine.models.language_model import FAMILIES
from export import build_engines
from tests.conftest import ROOT


def commands(document: str) -> list[list[str]]:
    """The words of each line of the document's sh blocks that runs `m3d`, the export or M3D-Bench."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [
        words for words in split if any(word.endswith(("/m3d", "build_engines.py", "m3d_bench.py")) for word in words)
    ]


@pytest.mark.parametrize("document, count", [("docs/checkpoints.md", 6), ("docs/m3d_bench.md", 3), ("README.md", 10)])
def test_the_commands_of_a_document_are_understood(document, count):
    found = commands(document)
    assert len(found) >= count
    for words in found:
        if "..." in words:
            continue  # stands for what was said before
        if "export/build_engines.py" in words:
            build_engines._parser().parse_args(words[words.index("export/build_engines.py") + 1 :])
            continue
        if "benchmarks/m3d_bench.py" in words:
            arguments = words[words.index("benchmarks/m3d_bench.py") + 1 :]
            m3d_bench.parsed(arguments)
            continue
        group = typer.main.get_command(cli.app)
        with group.make_context("m3d", words[1:], resilient_parsing=False) as context:
            name, command, arguments = group.resolve_command(context, words[1:])
            command.make_context(name, arguments, parent=context)


def test_every_family_of_language_models_is_documented():
    text = (ROOT / "docs" / "language_models.md").read_text()
    for name in FAMILIES:
        assert f"| `{name}` |" in text


@pytest.mark.parametrize("document", ["docs/checkpoints.md", "docs/m3d_bench.md", "README.md", "training/README.md"])
def test_the_links_of_a_document_lead_to_files(document):
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert links
    for link in links:
        assert ((ROOT / document).parent / link).exists(), link
