"""Search for the readings a probe should use: layers, positions, pairs of both, decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import reference, stats
from steerbridge.data import Example
from steerbridge.spec import Reading
from steerbridge.training import probes
from steerbridge.training.probes import Recipe, Shape
from steerbridge.training.states import States

FOLDS = 5
DECAYS = (1e-3, 1e-2, 1e-1)
KEPT = 3  # readings of each position that go into the second round


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe with what its out-of-fold scores show."""

    recipe: Recipe
    scores: NDArray[np.float64]  # [N]; NaN where not scored
    threshold: float
    detection: float  # share of harmful prompts above the threshold
    auroc: float

    def report(self) -> dict[str, Any]:
        return {
            "probe": str(self.recipe),
            "detection": round(self.detection, 4),
            "auroc": round(self.auroc, 5),
        }


@dataclass(frozen=True, slots=True)
class Found:
    """The chosen candidate and the evidence of the search."""

    best: Candidate
    sas: dict[str, float]  # reading -> Safety Awareness Score
    first_round: tuple[Candidate, ...]
    second_round: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What every candidate is judged on."""

    states: States
    examples: Sequence[Example]
    harmful: NDArray[np.bool_]
    folds: NDArray[np.int64]
    target: Mapping[str, float]
    seed: int

    def judge(self, recipe: Recipe, only: Sequence[int] | None = None) -> Candidate:
        """Fit on folds, score out of fold, calibrate, measure."""
        x = self.states.of(recipe.readings)
        scores = probes.out_of_fold(x, self.harmful, self.folds, recipe, self.seed, only)
        seen = ~np.isnan(scores)
        kinds = [e.kind for e in self.examples]
        threshold = probes.calibrate(
            probes.by_kind(scores, kinds, seen & ~self.harmful), self.target
        )
        harm = scores[seen & self.harmful]
        return Candidate(
            recipe,
            scores,
            threshold,
            float((harm > threshold).mean()),
            stats.auroc(harm, scores[seen & ~self.harmful]),
        )


def search(
    problem: Problem, shape: Shape, progress: Callable[[str], None] = lambda _: None
) -> Found:
    """Judge every single reading on one fold, then the best ones alone and in pairs on all.

    Among candidates whose detection is within one standard error of the best, the one whose
    readings have the highest mean SAS wins: SAS is the paper's criterion, detection at the
    target false-positive rate is what users feel.
    """
    sas = awareness(problem.states, problem.examples)
    first = []
    for reading in problem.states.readings:
        first.append(problem.judge(Recipe((reading,), "linear", DECAYS[1]), only=[0]))
        progress(str(first[-1].recipe))
    ranked = sorted(first, key=lambda c: (c.auroc, c.detection), reverse=True)
    chosen: dict[str, list[Reading]] = {}
    for candidate in ranked:
        (reading,) = candidate.recipe.readings
        group = chosen.setdefault(reading.position.type, [])
        if len(group) < KEPT:
            group.append(reading)
    second = []
    for readings in _combinations(list(chosen.values())):
        for decay in DECAYS:
            second.append(problem.judge(Recipe(readings, shape, decay)))
            progress(str(second[-1].recipe))
    return Found(_pick(second, sas, int(problem.harmful.sum())), sas, tuple(first), tuple(second))


def _combinations(groups: list[list[Reading]]) -> list[tuple[Reading, ...]]:
    singles = [(reading,) for group in groups for reading in group]
    if len(groups) < 2:
        return list(singles)
    return [*singles, *((a, b) for a in groups[0] for b in groups[1])]


def _pick(candidates: Sequence[Candidate], sas: Mapping[str, float], harmful: int) -> Candidate:
    best = max(c.detection for c in candidates)
    error = float(np.sqrt(max(best * (1 - best), 1 / harmful) / harmful))
    close = [c for c in candidates if c.detection >= best - error]
    return max(
        close,
        key=lambda c: (np.mean([sas[str(r)] for r in c.recipe.readings]), c.auroc),
    )


def awareness(states: States, examples: Sequence[Example]) -> dict[str, float]:
    """SAS of every reading over the aligned pairs among the examples (0 without two pairs)."""
    sides: dict[str, dict[bool, int]] = {}
    for i, example in enumerate(examples):
        if example.pair is not None:
            sides.setdefault(example.pair, {})[example.harmful] = i
    pairs = [(s[True], s[False]) for s in sides.values() if len(s) == 2]
    if len(pairs) < 2:
        return {str(r): 0.0 for r in states.readings}
    harmful, harmless = (list(side) for side in zip(*pairs, strict=True))
    return {
        str(r): reference.sas(states.array[harmful, k], states.array[harmless, k])
        for k, r in enumerate(states.readings)
    }
