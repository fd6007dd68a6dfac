"""`steerbridge generate`: answers side by side, unsteered and steered, with the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import command_line
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import measure
from steerbridge.evaluation.answers import Asking
from steerbridge.package import load


def generate(
    package: command_line.Package,
    prompt: Annotated[list[str], typer.Argument(help="Prompts, in quotes.")],
    model: command_line.Model = "smollm2",
    runtime: command_line.Runtime = "hf",
    image: Annotated[
        list[Path], typer.Option(help="Image for every prompt; may be repeated.")
    ] = [],
    mmproj: command_line.Mmproj = "",
    max_new_tokens: command_line.MaxNew = 48,
    ignore: command_line.Ignore = [],
    json: command_line.Json = False,
) -> None:
    """Answer prompts with and without the package."""
    if not all(p.strip() for p in prompt):
        raise DataError(Problem("prompt", "a text that is not empty", repr(prompt)))
    steering = load(package)
    for path in image:
        if not path.is_file():
            raise DataError(Problem("--image", "an image file", str(path)))
    loaded = command_line.open_model(model, runtime, mmproj)
    rows = measure.run(
        loaded,
        steering,
        [Example(p, False, images=tuple(image)) for p in prompt],
        Asking(max_new_tokens=max_new_tokens),
        ignore,
    )
    if json:
        command_line.print_json({"answers": [_answer(row) for row in rows]})
        return
    for row in rows:
        print(row.describe())


def _answer(row: measure.Row) -> dict[str, Any]:
    # The label of an interactive prompt is not known.
    return {k: v for k, v in row.to_json().items() if k not in ("harmful", "kind")}
