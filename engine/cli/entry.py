"""Entry point of `m3d`. It imports little, so that Ctrl-C ends the command cleanly from its first moment on."""

from __future__ import annotations

import sys

from engine.cli import console


def main() -> None:
    """Run `m3d` with the arguments of this process, and exit with the status that `console.run` gives."""
    sys.exit(console.run(_body))


def _body() -> None:
    from engine.cli.app import app

    app(prog_name="m3d")
