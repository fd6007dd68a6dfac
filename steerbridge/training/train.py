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
from steerbridge.training.settings import TrainSettings

FEWEST: Final = 20  # distinct prompts per label
FEWEST_GROUPS: Final = 10  # that are not alike: a fold for each


def train(
    model: TrainableModel,
    examples: Sequence[Example],
    settings: TrainSettings | None = None,
    *,
    workdir: Path | None = None,
    progress: Progress | None = None,
) -> SteeringPackage:
    """Train a steering package: probes, thresholds and a refusal.

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
    settings = settings or TrainSettings()
    check(examples, settings)
    with requires("hf"):
        from steerbridge.training import recipe
    if workdir is not None:
        return recipe.run(model, examples, settings, workdir, progress or silent)
    with tempfile.TemporaryDirectory(prefix="steerbridge-") as scratch:
        return recipe.run(model, examples, settings, Path(scratch), progress or silent)


def check(examples: Sequence[Example], settings: TrainSettings) -> None:
    """Refuse prompts that nothing can be learnt from.

    Raises:
        DataError: a prompt has both labels, there are too few of either that differ, no probe of
            these settings is for them, or a rank is asked for without a head matrix.
    """
    checks.check(examples)
    if not settings.goals_in_use(examples):
        want = "a probe for these prompts (those beside pictures are read whole)"
        raise DataError(Problem("reads", want, settings.reads))
    if settings.rank is not None and settings.refuse != "head_matrix":
        raise DataError(Problem("rank", "refuse=head_matrix, which has one", settings.refuse))
    for label, count in checks.distinct(examples).items():
        if count < FEWEST:
            want = f"{FEWEST} or more {label} prompts that differ"
            raise DataError(Problem("examples", want, str(count)))
    for label, count in checks.groups_by_label(examples).items():
        if count < FEWEST_GROUPS:
            want = f"{FEWEST_GROUPS} or more groups of {label} prompts that are not alike"
            raise DataError(Problem("examples", want, str(count)))
