"""`python -OO` has no docstrings and no asserts: nothing that a user sees may live in them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

CONTRACTS = "from engine.volume import PRESETS; print(*(f'{name}: {preset.doc}' for name, preset in PRESETS.items()))"
HELP = "import sys; sys.argv = ['m3d', {}'--help']; from engine.cli import main; main()"


def run(code: str, *options: str) -> str:
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    "code",
    [CONTRACTS, "import engine.client; " + HELP.format("'segment', "), HELP.format("")],
    ids=["presets", "segment", "m3d"],
)
def test_what_is_printed_is_the_same_without_docstrings(code):
    printed = run(code, "-OO")
    assert len(printed) > 500 and printed == run(code)
