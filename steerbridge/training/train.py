"""`steerbridge.train`: checks its arguments, then runs the recipe, which imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from steerbridge.data import Example
from steerbridge.datasets import checks
from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage
from steerbridge.registry import requires
from steerbridge.runtime import Progress, TrainableModel, silent
from steerbridge.training.settings import FOLDS, TrainSettings

FEWEST: Final = 4 * FOLDS  # distinct prompts per label


def train(
    model: TrainableModel,
    examples: Sequence[Example],
    settings: TrainSettings | None = None,
    *,
    workdir: Path | None = None,
    progress: Progress | None = None,
) -> SteeringPackage:
    """Train a steering package: probes, thresholds and an intervention.

    The same model, examples, settings and seed give the same package.

    Args:
        model: opened by a runtime that can train, such as `open_model("hf", ...)`.
        examples: harmful and harmless prompts, at least 20 of each that differ; the two sides of
            an aligned pair share `Example.pair`.
        settings: None for the defaults.
        workdir: captured states are kept here, and a later run continues from them; None keeps
            nothing.
        progress: told how far each step is.

    Returns:
        The package, in memory; `save` writes it.

    Raises:
        DataError: too few prompts with either label, one with both, or `workdir` holds states
            of other prompts.
        RuntimeMissing: torch is not installed (extra `hf`).
    """
    check(examples)
    with requires("hf"):
        from steerbridge.training import recipe
    settings = settings or TrainSettings()
    if workdir is not None:
        return recipe.run(model, examples, settings, workdir, progress or silent)
    with tempfile.TemporaryDirectory(prefix="steerbridge-") as scratch:
        return recipe.run(model, examples, settings, Path(scratch), progress or silent)


def check(examples: Sequence[Example]) -> None:
    """Refuse prompts that nothing can be learnt from.

    Raises:
        DataError: a prompt has both labels, or there are too few of either that differ.
    """
    checks.check(examples)
    for label, count in checks.distinct(examples).items():
        if count < FEWEST:
            want = f"{FEWEST} or more {label} prompts that differ"
            raise DataError(Problem("examples", want, str(count)))
    for label, count in checks.groups_by_label(examples).items():
        if count < FOLDS:
            want = f"{FOLDS} or more groups of {label} prompts that are not alike"
            raise DataError(Problem("examples", want, str(count)))
