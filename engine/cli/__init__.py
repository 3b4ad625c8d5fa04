"""The command line, `m3d`: one module a command; `app` has the list of them, `console` how all of them look and end."""

from engine.cli.entry import main

__all__ = ["main"]
