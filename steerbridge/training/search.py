"""Search for the readings a probe should use: layers, positions, pairs of both, decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import calibration, reference, stats
from steerbridge.data import Example
from steerbridge.spec import LayerInput, PromptEnd, Reading
from steerbridge.training import probes
from steerbridge.training.probes import Recipe, Shape
from steerbridge.training.states import States

FOLDS = 5
DECAY = 3e-3  # while readings are chosen, with the fast linear probe
DECAYS = (3e-3, 1e-2)
# Depths (as shares of the model) of two spread sets. Prompts that only sound harmful are told
# apart better by several places together.
SPREADS: tuple[Mapping[str, tuple[float, ...]], ...] = (
    {"end": (0.73,), "turn": (0.6,), "mean": (0.5,)},
    {"end": (0.53, 0.73), "turn": (0.47, 0.6, 0.73), "mean": (0.5,)},
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe with what its out-of-fold scores show."""

    recipe: Recipe
    scores: NDArray[np.float64]  # [N]; NaN where not scored
    threshold: float
    detection: float  # share of harmful prompts above the threshold, mean over their kinds
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
    weights: NDArray[np.float64]
    folds: NDArray[np.int64]
    target: Mapping[str, float]
    seed: int

    def judge(self, recipe: Recipe, only: Sequence[int] | None = None) -> Candidate:
        """Fit on folds, score out of fold, calibrate, measure."""
        x = self.states.of(recipe.readings)
        scores = probes.out_of_fold(
            x, self.harmful, self.weights, self.folds, recipe, self.seed, only
        )
        seen = ~np.isnan(scores)
        kinds = [e.kind for e in self.examples]
        threshold = calibration.threshold(
            calibration.by_kind(scores, kinds, seen & ~self.harmful), self.target
        )
        harm = calibration.by_kind(scores, kinds, seen & self.harmful)
        return Candidate(
            recipe,
            scores,
            threshold,
            float(np.mean([(s > threshold).mean() for s in harm.values()])),
            stats.auroc(scores[seen & self.harmful], scores[seen & ~self.harmful]),
        )


def search(
    problem: Problem, shape: Shape, progress: Callable[[str], None] = lambda _: None
) -> Found:
    """Choose readings and decay by detection at the target false-positive rates.

    First round: every reading alone, on one fold, with a linear probe; the report shows them
    all. Second round, on all folds, as `shape` with each decay: the best reading, the best of
    each position together, and a set spread over the depth of the model. Candidates within
    one standard error of the best are equal; among them the readings with the highest mean
    SAS (the paper's criterion) win, then the higher AUROC.
    """
    sas = awareness(problem.states, problem.examples)
    first = []
    for reading in problem.states.readings:
        first.append(problem.judge(Recipe((reading,), "linear", DECAY), only=[0]))
        progress(str(first[-1].recipe))
    second = []
    for readings in _sets(first):
        for decay in DECAYS:
            second.append(problem.judge(Recipe(readings, shape, decay)))
            progress(str(second[-1].recipe))
    return Found(_pick(second, sas, int(problem.harmful.sum())), sas, tuple(first), tuple(second))


def _sets(first: Sequence[Candidate]) -> list[tuple[Reading, ...]]:
    """Sets of readings worth a closer look, without repetition."""
    ranked = sorted(first, key=lambda c: (c.auroc, c.detection), reverse=True)
    singles = [c.recipe.readings[0] for c in ranked]
    best: dict[str, Reading] = {}
    for reading in singles:
        best.setdefault(_role(reading), reading)
    spreads = (
        tuple(
            found
            for role, shares in spread.items()
            for share in shares
            if (found := _nearest(singles, role, share)) is not None
        )
        for spread in SPREADS
    )
    sets = [(singles[0],), tuple(best.values()), *map(tuple, map(dict.fromkeys, spreads))]
    return list(dict.fromkeys(sets))


def _role(reading: Reading) -> str:
    """What a position stands for: the `end` of the prompt, of the user's `turn`, or a `mean`."""
    if isinstance(reading.position, PromptEnd):
        return "turn" if reading.position.offset else "end"
    return "mean"


def _nearest(readings: Sequence[Reading], role: str, share: float) -> Reading | None:
    """The reading of this role nearest to a share of the depth."""
    layers = {
        r.site.layer: r for r in readings if isinstance(r.site, LayerInput) and _role(r) == role
    }
    if not layers:
        return None
    wanted = share * (max(layers) + 1)
    return layers[min(layers, key=lambda layer: abs(layer - wanted))]


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
