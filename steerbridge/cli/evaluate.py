"""`steerbridge eval`: what the guard stops and what it disturbs, on labelled prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerbridge.cli import common
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import measure
from steerbridge.package import load


def evaluate(
    package: common.Package,
    model: common.Model = "smollm2",
    runtime: common.Runtime = "hf",
    mmproj: common.Mmproj = "",
    data: common.Data = [],
    corpus: common.Corpus = "none",
    limit: Annotated[int, typer.Option(help="Use every k-th prompt, this many; 0: all.")] = 0,
    max_new_tokens: common.MaxNew = 48,
    ignore: common.Ignore = [],
    rows: Annotated[
        Path | None, typer.Option(help="Write one JSON object per prompt to this file.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Measure attack success, false positives and changed answers."""
    steering = load(package)
    prompts = common.examples(data, corpus)
    if not prompts:
        raise DataError(Problem("--data or --corpus", "prompts to measure on", "none"))
    if limit and limit < len(prompts):
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    loaded = common.open_model(model, runtime, mmproj)
    found = measure.run(
        loaded,
        steering,
        prompts,
        max_new_tokens=max_new_tokens,
        ignore=ignore,
        progress=common.progress("answers"),
    )
    if rows:
        measure.write_rows(rows, found)
    result = measure.summary(found)
    if json:
        common.print_json(result)
        return
    kinds = result.pop("kinds")
    for key, value in result.items():
        print(f"{key:<20} {value}")
    for kind, rates in kinds.items():
        shown = ", ".join(f"{name} {rate}" for name, rate in rates.items() if rate is not None)
        print(f"{kind:<20} {shown}")
