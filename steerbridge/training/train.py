"""`steerbridge.train`: checks its arguments, then runs the recipe, which imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage
from steerbridge.registry import requires
from steerbridge.runtime import Progress, TrainableModel, silent
from steerbridge.training.settings import FOLDS, TrainSettings

FEWEST: Final = 4 * FOLDS  # prompts per label


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
        examples: harmful and harmless prompts, at least 20 of each; the two sides of an aligned
            pair share `Example.pair`.
        settings: None for the defaults.
        workdir: captured states are kept here, and a later run continues from them; None keeps
            nothing.
        progress: told how far each step is.

    Returns:
        The package, in memory; `save` writes it.

    Raises:
        DataError: too few prompts with either label, or `workdir` holds states of other prompts.
        RuntimeMissing: torch is not installed (extra `hf`).
    """
    for harmful, label in ((True, "harmful"), (False, "harmless")):
        count = sum(e.harmful == harmful for e in examples)
        if count < FEWEST:
            raise DataError(Problem("examples", f"{FEWEST} or more {label} prompts", str(count)))
    with requires("hf"):
        from steerbridge.training import recipe
    settings = settings or TrainSettings()
    if workdir is not None:
        return recipe.run(model, examples, settings, workdir, progress or silent)
    with tempfile.TemporaryDirectory(prefix="steerbridge-") as scratch:
        return recipe.run(model, examples, settings, Path(scratch), progress or silent)
