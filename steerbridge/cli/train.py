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
    sentence: Annotated[
        str, typer.Option(help="The sentence that the guard says when it refuses.")
    ] = DEFAULT_REFUSAL,
    refuse: Annotated[
        str,
        typer.Option(
            help="say the sentence; or a trained head (head_matrix), or a direction (add_vector, "
            "project_out), that makes the model refuse."
        ),
    ] = "say",
    reads: Annotated[
        str,
        typer.Option(
            help="What probes read: rows, whole prompts (as older tools do), or what is best."
        ),
    ] = "best",
    probe: Annotated[str, typer.Option(help="Shape of the probe: mlp or linear.")] = "mlp",
    rank: Annotated[int, typer.Option(help="Rank of the head matrix; 0 keeps it dense.")] = 0,
    fpr: Annotated[
        float, typer.Option(help="Share of ordinary prompts that may fire, in all their forms.")
    ] = 0.01,
    confidence: Annotated[
        float, typer.Option(help="Probability with which that holds for others like them.")
    ] = 0.95,
    answers: Annotated[
        int,
        typer.Option(
            help="Train on so many of the model's own answers too: the guard goes on reading while "
            "the model answers.",
            min=0,
        ),
    ] = 0,
    search_minutes: Annotated[
        float, typer.Option(help="For the search over layers and windows, at most.")
    ] = 10.0,
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
        sentence=sentence,
        refuse=_one_of("--refuse", refuse, "say", "head_matrix", "add_vector", "project_out"),
        reads=_one_of("--reads", reads, "best", "rows", "whole"),
        probe=_one_of("--probe", probe, "mlp", "linear"),
        rank=rank or None,
        target_fpr=_share("--fpr", fpr),
        confidence=_share("--confidence", confidence),
        answers=answers,
        search_minutes=search_minutes,
        seed=seed,
    )
    check_target(out)
    if report:
        plots.require()
        require_writable(report)
    prompts = options.Prompts(data, label, map, encoding, corpus).read("to train on")
    check(prompts, settings)
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


def _share(option: str, value: float) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(f"{option}: expected a share between 0 and 1, found {value:g}")
    return value


def _one_of(option: str, value: str, *allowed: str) -> Any:
    if value not in allowed:
        raise typer.BadParameter(f"{option}: expected {' or '.join(allowed)}, found {value}")
    return value
