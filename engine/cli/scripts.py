"""`m3d export`, `m3d evaluate`, `m3d bench`: scripts of a clone, which stay where they are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import typer

from engine.errors import Unavailable

_ROOT = Path(__file__).resolve().parents[2]
# All words behind the command are the script's, --help among them.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def export(context: typer.Context) -> None:
    _run("export/build_engines.py", context)


def evaluate(context: typer.Context) -> None:
    _run("training/evaluate.py", context)


def bench(context: typer.Context) -> None:
    _run("benchmarks/latency.py", context)


def _run(script: str, context: typer.Context) -> None:
    """Run a script in this process. Raises Unavailable if it, or what it imports, is not installed."""
    command = context.command_path  # "m3d export"
    if not (_ROOT / script).is_file():
        raise Unavailable(
            f"{command} runs {script} of a clone of m3d-engine, and this installation is the package alone: clone the "
            f"repository, run `make demo` or `make check` there, and call .venv/bin/{command}"
        )
    sys.path.insert(0, str(_ROOT))
    module = script.removesuffix(".py").replace("/", ".")
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{command} needs {error.name}, which is not installed: run `make check` in {_ROOT}, or install "
            "'m3d-engine[cpu,train,bench]'"
        ) from None
    sys.argv = [command, *context.args]
    raise typer.Exit(main() or 0)
