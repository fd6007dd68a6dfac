"""`steerbridge train`: prompts in, steering package out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import command_line
from steerbridge.atomic import require_writable
from steerbridge.datasets import options
from steerbridge.evaluation import plots
from steerbridge.package import check_target
from steerbridge.sheet import describe
from steerbridge.training.settings import DEFAULT_REFUSAL, TrainSettings
from steerbridge.training.train import check
from steerbridge.training.train import train as run


def train(
    out: Annotated[Path, typer.Argument(help="Package to write: a directory, or a .gguf file.")],
    model: command_line.Model = "smollm2",
    runtime: command_line.Runtime = "hf",
    data: options.Data = [],
    label: options.Label = [],
    map: options.Map = [],
    encoding: options.Encoding = "",
    corpus: options.Corpus = "train+validation",
    refusal: Annotated[
        str, typer.Option(help="The sentence that the guard says when it refuses.")
    ] = DEFAULT_REFUSAL,
    probe: Annotated[str, typer.Option(help="Shape of the probe: mlp or linear.")] = "mlp",
    intervention: Annotated[
        str, typer.Option(help="head_matrix, add_vector or project_out.")
    ] = "head_matrix",
    rank: Annotated[int, typer.Option(help="Rank of the head matrix; 0 keeps it dense.")] = 0,
    fpr: command_line.Fpr = 0.01,
    borderline_fpr: command_line.BorderlineFpr = 0.02,
    seed: Annotated[int, typer.Option(help="The same seed gives the same package.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the package.")] = "steerbridge-guard",
    cache: Annotated[
        Path | None,
        typer.Option(help="Keep captured states here; a later run continues from them."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a plot (PNG): SAS and AUROC by layer, position and kind (extra: report)."
        ),
    ] = None,
    json: command_line.Json = False,
) -> None:
    """Train a package on labelled prompts and save it."""
    settings = TrainSettings(
        name=name,
        refusal=refusal,
        probe=_one_of("--probe", probe, "mlp", "linear"),
        intervention=_one_of(
            "--intervention", intervention, "head_matrix", "add_vector", "project_out"
        ),
        rank=rank or None,
        target_fpr=command_line.targets(fpr, borderline_fpr),
        seed=seed,
    )
    check_target(out)
    if report:
        plots.require()
        require_writable(report)
    prompts = options.Prompts(data, label, map, encoding, corpus).read("to train on")
    check(prompts)
    loaded = command_line.trainable(command_line.open_model(model, runtime))
    package = run(loaded, prompts, settings, workdir=cache, progress=command_line.progress())
    package.save(out)
    if report:
        plots.readings(package, report)
    if json:
        command_line.print_json({"package": str(out), "spec": package.spec.to_json()})
    else:
        print(describe(package))
        print(f"\nsaved to {out}")


def _one_of(option: str, value: str, *allowed: str) -> Any:
    if value not in allowed:
        raise typer.BadParameter(f"{option}: expected {' or '.join(allowed)}, found {value}")
    return value
