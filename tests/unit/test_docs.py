"""What the documents show exists: commands, files, anchors, code that parses."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess

import pytest
import typer.main

from benchmarks import latency
from engine.cli.app import app
from engine.models.language_model import FAMILIES
from export import build_engines
from tests import documents
from tests.conftest import ROOT

PYTHON, SHELL = documents.blocks("python"), documents.blocks("sh", "bash", "shell")
# A path in backticks that begins with a folder of this checkout.
FOLDERS = "engine|export|training|benchmarks|deploy|docs|tests|examples|m3d_demo|model_repository"
PATH = re.compile(rf"`((?:{FOLDERS})/[^`\s]*)`")
# What an export, a benchmark or a training run writes.
WRITTEN = re.compile(r"\.onnx|\.plan|layers\.txt|manifest\.json|tensorrt\.pbtxt|/llm\b|\*|…")


def commands(block: documents.Block) -> list[list[str]]:
    """The words of each line that runs `m3d` or the export."""
    lines = block.text.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    parts = [words[words.index("&&") + 1 :] if "&&" in words else words for words in split]
    return [words for words in parts if any(word.endswith(("/m3d", "build_engines.py")) for word in words)]


@pytest.mark.parametrize("block", [block for block in SHELL if commands(block)], ids=str)
def test_the_commands_of_the_documents_are_understood(block):
    for words in commands(block):
        if "..." in words:
            continue  # stands for what was said before
        parse(words)


def parse(words: list[str]) -> None:
    if "export/build_engines.py" in words:
        build_engines._parser().parse_args(words[words.index("export/build_engines.py") + 1 :])
    elif words[0].endswith("/m3d"):
        group = typer.main.get_command(app)
        with group.make_context("m3d", words[1:], resilient_parsing=False) as context:
            name, command, arguments = group.resolve_command(context, words[1:])
            if name == "export":
                build_engines._parser().parse_args(arguments)
            elif name == "bench":
                latency._parser().parse_args(arguments)
            else:
                command.make_context(name, arguments, parent=context)


def test_commands_are_found_and_a_wrong_one_is_not_understood():
    assert sum(len(commands(block)) for block in SHELL if block.document == "README.md") >= 6
    for wrong in (["bin/m3d", "ask", "scan.nii"], ["bin/m3d", "export", "--precision", "fp7"], ["bin/m3d", "dance"]):
        with pytest.raises((SystemExit, Exception)):
            parse(wrong)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_of_the_documents_parses(block):
    ast.parse(block.text)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_of_the_documents_parses(block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_family_of_language_models_is_documented():
    text = (ROOT / "docs" / "language_models.md").read_text()
    for name in FAMILIES:
        assert f"| `{name}` |" in text


# --- links -----------------------------------------------------------------------------------------------------------
def prose(document: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / document).read_text(), flags=re.M | re.S)


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("document", documents.names())
def test_the_links_of_a_document_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize("document", [name for name in documents.names() if name != "CHANGELOG.md"])
def test_the_files_that_a_document_names_exist(document):
    for path in PATH.findall(prose(document)):
        name = path.partition(":")[0]
        assert WRITTEN.search(name) or (ROOT / name).exists(), path


def test_every_document_can_be_reached_from_the_readme():
    linked, reached = ["README.md"], set()
    while linked:
        document = linked.pop()
        reached.add(document)
        for path in re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", prose(document)):
            if "://" not in path:
                name = str(((ROOT / document).parent / path).resolve().relative_to(ROOT))
                linked += [name] if name not in reached else []
    assert reached >= {name for name in documents.names() if name.startswith("docs/") or name.endswith("README.md")}


def test_a_readme_is_for_newcomers():
    text = (ROOT / "README.md").read_text()
    assert 700 <= len(text.split()) <= 1100 and "\nmake test " in text and "\nmake demo " in text
