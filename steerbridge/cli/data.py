"""`steerbridge data`: what files of prompts hold, before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import command_line
from steerbridge.datasets import checks, options


def data(
    files: Annotated[list[Path], typer.Argument(help="Files and directories, as for --data.")],
    label: options.Label = [],
    map: options.Map = [],
    encoding: options.Encoding = "",
    corpus: options.Corpus = "none",
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Count tokens as this model gets them; empty: do not."),
    ] = "",
    runtime: command_line.Runtime = "hf",
    json: command_line.Json = False,
) -> None:
    """Show what prompts hold and how files are read; exit code 1 if a prompt has both labels."""
    prompts = options.Prompts(files, label, map, encoding, corpus)
    readings = prompts.readings()
    examples = prompts.examples(readings, "to look at")
    more: dict[str, Any] = {}
    if model:
        loaded = command_line.open_model(model, runtime)
        more = {"render": loaded.render, "context_length": loaded.facts.context_length}
    sheet = checks.sheet(examples, **more)
    if json:
        command_line.print_json({"files": [one.to_json() for one in readings], **sheet.to_json()})
    else:
        print("\n".join(checks.lines(sheet)))
    if sheet.contradictions:
        raise typer.Exit(1)
