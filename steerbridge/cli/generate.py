"""`steerbridge generate`: answers side by side, unsteered and steered, with the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge.cli import common
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import measure
from steerbridge.evaluation.answers import Asking
from steerbridge.package import load


def generate(
    package: common.Package,
    prompt: Annotated[list[str], typer.Argument(help="Prompts, in quotes.")],
    model: common.Model = "smollm2",
    runtime: common.Runtime = "hf",
    image: Annotated[
        list[Path], typer.Option(help="Image that every prompt is about; may be repeated.")
    ] = [],
    mmproj: common.Mmproj = "",
    max_new_tokens: common.MaxNew = 48,
    ignore: common.Ignore = [],
    json: common.Json = False,
) -> None:
    """Answer prompts with and without the package."""
    if not all(p.strip() for p in prompt):
        raise DataError(Problem("prompt", "a text that is not empty", repr(prompt)))
    steering = load(package)
    for path in image:
        if not path.is_file():
            raise DataError(Problem("--image", "an image file", str(path)))
    loaded = common.open_model(model, runtime, mmproj)
    rows = measure.run(
        loaded,
        steering,
        [Example(p, False, images=tuple(image)) for p in prompt],
        Asking(max_new_tokens=max_new_tokens),
        ignore,
    )
    if json:
        common.print_json({"answers": [_answer(row) for row in rows]})
        return
    for row in rows:
        print("\n".join(side_by_side(row)))


def _answer(row: measure.Row) -> dict[str, Any]:
    # The label of an interactive prompt is not known.
    return {k: v for k, v in row.as_json().items() if k not in ("harmful", "kind")}


def side_by_side(row: measure.Row, runtime: str = "") -> list[str]:
    """A prompt, its verdicts and both answers as lines of text; `runtime` says who answered."""
    outcome = row.steered.outcome
    verdicts = [
        f"{v.probe} {v.score:.4f} {'fired' if v.fired else 'quiet'} (threshold {v.threshold:.4f})"
        for v in (outcome.verdicts if outcome else ())
    ]
    return [
        "",
        f"prompt    {row.example.text}",
        *(f"image     {path}" for path in row.example.images),
        *([f"runtime   {runtime}"] if runtime else []),
        f"verdict   {'; '.join(verdicts) or 'no probe'}",
        *([] if row.plain is None else [f"unsteered {_one_line(row.plain.text)}"]),
        f"steered   {_one_line(row.steered.text)}",
    ]


def _one_line(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
