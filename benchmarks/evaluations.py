"""Comparisons of a guard with other ways to refuse, and their records; shared by benchmarks.

Answers are kept in `.cache/answers`: `make report GUARD=safety` after `make bench-safety` asks
nothing twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import steerbridge
from common import CACHE, say
from steerbridge import Evaluation, Example, Progress, SteeringPackage
from steerbridge.evaluation import compare
from steerbridge.evaluation.answers import Asking, Store


def asking(identity: str, new: int, tell: Progress) -> Asking:
    return Asking(new, store=Store(CACHE / "answers", identity), progress=tell)


def compared(
    model: Any, package: SteeringPackage, prompts: Sequence[Example], how: Asking, name: str
) -> tuple[Evaluation, Path]:
    """The evaluation and the file of its record; prints the comparison as a table."""
    evaluation = steerbridge.evaluate(
        model,
        package,
        prompts,
        max_new_tokens=how.max_new_tokens,
        compare=True,
        store=how.store,
        progress=how.progress,
    )
    if evaluation.comparison is not None:
        say("\n".join(compare.table(evaluation.comparison)))
    path = CACHE / f"{name}-record.json"
    evaluation.save(path)
    return evaluation, path
