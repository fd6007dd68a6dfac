"""Comparisons of a guard with other ways to refuse, and their records; shared by benchmarks.

Answers are kept in `.cache/answers`: `make report` after `make bench-safety` asks nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import CACHE, say
from steerbridge import data
from steerbridge.data import Example
from steerbridge.evaluation import compare, measure, record
from steerbridge.evaluation.answers import Asking, Store
from steerbridge.package import SteeringPackage


def asking(identity: str, new: int, tell: Callable[[str, int, int], None]) -> Asking:
    return Asking(new, store=Store(CACHE / "answers", identity), tell=tell)


def compared(
    model: Any, package: SteeringPackage, prompts: Sequence[Example], how: Asking, name: str
) -> tuple[compare.Comparison, Path]:
    """The comparison, its table shown, and the file of its record."""
    contrasts = [e for e in data.from_corpus("train") if e.harmful]
    found = compare.compare(model, package, prompts, contrasts, how)
    say("\n".join(compare.table(found)))
    path = CACHE / f"{name}-record.json"
    made = record.build(
        found.rows,
        package=package,
        runtime="hf",
        model=model.facts.name,
        quantisation=model.quantisation,
        judge=how.judge.name,
        max_new_tokens=how.max_new_tokens,
        comparison=found,
        perplexity=measure.perplexity(model, package),
    )
    record.write(made, path)
    return found, path


def every(prompts: Sequence[Example], count: int) -> list[Example]:
    """So many prompts of each label, taken evenly."""
    chosen = []
    for harmful in (True, False):
        side = [p for p in prompts if p.harmful is harmful]
        kept = min(count, len(side))
        chosen += [side[i * len(side) // kept] for i in range(kept)]
    return chosen
