"""`steerbridge train`: prompts in, steering package out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge.cli import common
from steerbridge.cli.inspect import sheet
from steerbridge.encodings import plain
from steerbridge.errors import RuntimeMissing
from steerbridge.evaluation import plots


def train(
    out: Annotated[Path, typer.Argument(help="Package to write: a directory, or a .gguf file.")],
    model: common.Model = "smollm2",
    data: common.Data = [],
    corpus: common.Corpus = "train+validation",
    refusal: Annotated[str, typer.Option(help="The sentence of a refusal.")] = "",
    probe: Annotated[str, typer.Option(help="Shape of the probe: mlp or linear.")] = "mlp",
    intervention: Annotated[
        str, typer.Option(help="head_matrix, add_vector or project_out.")
    ] = "head_matrix",
    rank: Annotated[int, typer.Option(help="Rank of the head matrix; 0 keeps it dense.")] = 0,
    fpr: common.Fpr = 0.01,
    borderline_fpr: common.BorderlineFpr = 0.02,
    seed: Annotated[int, typer.Option(help="Same seed, same package.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the package.")] = "steerbridge-guard",
    cache: Annotated[
        Path | None,
        typer.Option(help="Keep captured states here; a later run goes on from them."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a plot here (PNG): SAS and AUROC by layer, position and kind."),
    ] = None,
    json: common.Json = False,
) -> None:
    """Train a package on pairs of prompts and save it."""
    recipe = _recipe()
    settings = recipe.TrainSettings(
        name=name,
        refusal=refusal or recipe.DEFAULT_REFUSAL,
        probe=_one_of("--probe", probe, "mlp", "linear"),
        intervention=_one_of(
            "--intervention", intervention, "head_matrix", "add_vector", "project_out"
        ),
        rank=rank or None,
        target_fpr=common.targets(fpr, borderline_fpr),
        seed=seed,
    )
    loaded = common.trainable(common.open_model(model, "hf"))
    prompts = common.examples(data, corpus)
    with tempfile.TemporaryDirectory() as scratch:
        package = recipe.train(loaded, prompts, settings, cache or Path(scratch), common.steps())
    package.save(out)
    if report:
        plots.readings(package, report)
    if json:
        common.print_json({"package": str(out), "spec": plain(package.spec)})
    else:
        print(sheet(package))
        print(f"\nsaved to {out}")


def _recipe() -> Any:
    try:
        from steerbridge.training import recipe
    except ImportError as error:
        raise RuntimeMissing("torch", extra="train") from error
    return recipe


def _one_of(option: str, value: str, *allowed: str) -> Any:
    if value not in allowed:
        raise typer.BadParameter(f"{option}: expected {' or '.join(allowed)}, found {value}")
    return value
