"""The list of commands, and the options that belong to all of them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from engine import logs
from engine.cli import ask, doctor, inspect, rank, sample, scripts, segment, serve

# A command imports what it needs when it runs, so that help comes at once. What help says of a command is an argument
# and no docstring: python -OO has none of those.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="M3D-LaMed, the 3D medical multimodal language model: serve it, ask about scans, segment them.",
    epilog="Answers and masks are for research; this is not a medical device.",
)


@app.callback()
def common(
    log_level: Annotated[
        str,
        typer.Option(envvar=logs.VARIABLE, help=f"log on stderr, and of what it starts: {', '.join(logs.LEVELS)}"),
    ] = "warning",
) -> None:
    logs.set_up("m3d", log_level)
    os.environ[logs.VARIABLE] = log_level  # for the processes of a server


app.command(help="Serve an exported model repository until Ctrl-C or SIGTERM.")(serve.serve)
app.command(help="Ask about a scan; the answer appears as it is made.")(ask.ask)
app.command(
    help="Ask for a structure; write its mask in the scan's own space, its measurements (JSON), and a picture of it."
)(segment.segment)
app.command(help="Rank texts by how well they fit a scan (M3D-CLIP), best first.")(rank.rank)
app.command(help="Write one of the packaged real scans as NIfTI, to have something to ask about.")(sample.sample)
app.command(
    help="Say what a checkpoint is, what it lacks, and what its export needs, before anything large is downloaded."
)(inspect.inspect)
app.command(help="Say what this machine has, what is missing for serving, and how to get it.")(doctor.doctor)

for script, words in (
    (scripts.export, "Export a checkpoint into a model repository (export/build_engines.py)."),
    (scripts.evaluate, "Measure a demonstration checkpoint (training/evaluate.py)."),
    (scripts.bench, "Measure a server's latency (benchmarks/latency.py)."),
):
    app.command(help=words, context_settings=scripts.CONTEXT, rich_help_panel="Commands of a clone")(script)
