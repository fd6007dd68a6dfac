"""Search for the readings a probe should use: layers, positions, sets of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge import calibration, reference, stats, thresholds
from steerbridge.data import Example
from steerbridge.spec import LayerInput, Reading
from steerbridge.training import probes
from steerbridge.training.probes import ProbeDesign
from steerbridge.training.settings import Shape
from steerbridge.training.states import States

DECAY = 1e-2
# Prompts that only sound harmful are told apart better by several places together. They share few
# depths (shares of the model's), since a runtime pays for each.
SPREAD: Final = (0.27, 0.53, 0.8)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A design with what its out-of-fold scores show."""

    design: ProbeDesign
    scores: NDArray[np.float64]  # [N]; NaN where not scored
    threshold: float
    detection: float  # share of harmful prompts above the threshold, mean over their kinds
    auroc: float
    auroc_by_kind: dict[str, float]  # harmful prompts of each kind against all harmless ones

    def to_json(self) -> dict[str, Any]:
        return {
            "probe": str(self.design),
            "detection": round(self.detection, 4),
            "auroc": round(self.auroc, 5),
        }


@dataclass(frozen=True, slots=True)
class Awareness:
    """Safety Awareness Scores of every reading; the same for every goal."""

    whole: dict[str, float]  # reading -> SAS over all pairs
    by_kind: dict[str, dict[str, float]]  # reading -> kind of pair -> the same


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The chosen candidate and the evidence of the search."""

    best: Candidate
    first_round: tuple[Candidate, ...]  # every reading alone, on one fold, with a linear probe
    second_round: tuple[Candidate, ...]
    fired: NDArray[np.bool_]  # [N], see `Task.fired`


@dataclass(frozen=True, slots=True)
class Task:
    """What every candidate is judged on. Harmful prompts of weight 0 need not be caught."""

    states: States
    examples: Sequence[Example]
    harmful: NDArray[np.bool_]
    weights: NDArray[np.float64]
    folds: NDArray[np.int64]
    target: Mapping[str, float]
    seed: int

    def judge(self, design: ProbeDesign, only: Sequence[int] | None = None) -> Candidate:
        """Fit on folds, score out of fold, calibrate, measure."""
        x = self.states.of(design.readings)
        scores = probes.out_of_fold(
            x, self.harmful, self.weights, self.folds, design, self.seed, only
        )
        calm = scores[~np.isnan(scores) & ~self.harmful]
        meant = self._meant(scores)
        harm = self._by_kind(scores, meant)
        threshold = self._threshold(scores)
        return Candidate(
            design,
            scores,
            threshold,
            float(np.mean([(s > threshold).mean() for s in harm.values()])),
            stats.auroc(scores[meant], calm),
            {kind: round(stats.auroc(part, calm), 5) for kind, part in harm.items()},
        )

    def fired(self, chosen: Candidate) -> NDArray[np.bool_]:
        """Whether each prompt fires [N], by a probe and a threshold that never saw its fold.

        The threshold for a fold is chosen on scores of the other folds, each by a probe that saw
        neither; readings and shape were chosen on all folds.
        """
        x = self.states.of(chosen.design.readings)
        inner = probes.twice_out_of_fold(
            x, self.harmful, self.weights, self.folds, chosen.design, self.seed
        )
        fired = np.zeros(len(x), np.bool_)
        for fold, scores in inner.items():
            held = self.folds == fold
            fired[held] = chosen.scores[held] > self._threshold(scores)
        return fired

    def _threshold(self, scores: NDArray[np.float64]) -> float:
        """Chosen on the scores that there are."""
        calm = self._by_kind(scores, ~np.isnan(scores) & ~self.harmful)
        fire = thresholds.allowed({kind: len(s) for kind, s in calm.items()}, self.target)
        harm = self._by_kind(scores, self._meant(scores))
        return thresholds.choose(calm, fire, harm.values())

    def _meant(self, scores: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Harmful prompts that have a score and must be caught."""
        return ~np.isnan(scores) & self.harmful & (self.weights > 0)

    def _by_kind(
        self, scores: NDArray[np.float64], chosen: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.float64]]:
        return calibration.by_kind(scores, [e.kind for e in self.examples], chosen)


def search(
    task: Task,
    sas: Awareness,
    shape: Shape,
    tried: Callable[[Candidate], None] = lambda _candidate: None,
) -> SearchResult:
    """Choose readings by detection at the target false-positive rates.

    First round: every reading alone, on the fold with most to catch, with a linear probe. Second,
    on all folds, as `shape`: the best reading of the first, and every position at a few depths.
    Candidates within one standard error of the best are equal; among them the readings with the
    highest mean SAS (the paper's criterion) win, then the higher AUROC.
    """

    def judged(design: ProbeDesign, only: Sequence[int] | None = None) -> Candidate:
        candidate = task.judge(design, only)
        tried(candidate)
        return candidate

    meant_N = task.harmful & (task.weights > 0)
    fold = int(np.bincount(task.folds[meant_N]).argmax())
    first = [judged(ProbeDesign((r,), "linear", DECAY), [fold]) for r in task.states.readings]
    second = [judged(ProbeDesign(readings, shape, DECAY)) for readings in _sets(first)]
    best = _pick(second, sas.whole, int(meant_N.sum()))
    return SearchResult(best, tuple(first), tuple(second), task.fired(best))


def _sets(first: Sequence[Candidate]) -> list[tuple[Reading, ...]]:
    """Sets of readings worth a closer look, without repetition."""
    ranked = sorted(first, key=lambda c: (c.auroc, c.detection), reverse=True)
    singles = [c.design.readings[0] for c in ranked]
    sets = [(singles[0],), tuple(_spread([c.design.readings[0] for c in first]))]
    return list(dict.fromkeys(sets))


def _spread(readings: Sequence[Reading]) -> Iterator[Reading]:
    """Every position at the layers nearest to the depths of SPREAD."""
    layers = sorted({r.site.layer for r in readings if isinstance(r.site, LayerInput)})
    wanted = [share * (layers[-1] + 1) for share in SPREAD]
    chosen = {min(layers, key=lambda layer: abs(layer - at)) for at in wanted}
    return (r for r in readings if isinstance(r.site, LayerInput) and r.site.layer in chosen)


def _pick(candidates: Sequence[Candidate], sas: Mapping[str, float], harmful: int) -> Candidate:
    best = max(c.detection for c in candidates)
    error = float(np.sqrt(max(best * (1 - best), 1 / harmful) / harmful))
    close = [c for c in candidates if c.detection >= best - error]
    return max(
        close,
        key=lambda c: (np.mean([sas[str(r)] for r in c.design.readings]), c.auroc),
    )


def awareness(states: States, examples: Sequence[Example]) -> Awareness:
    """SAS of every reading over the aligned pairs, and over those of each kind.

    0 where fewer than two pairs have the reading (an image, on both sides).
    """
    sides: dict[str, dict[bool, int]] = {}
    for i, example in enumerate(examples):
        if example.pair is not None:
            sides.setdefault(example.pair, {})[example.harmful] = i
    pairs = [(s[True], s[False]) for s in sides.values() if len(s) == 2]
    # Both sides of a twin share a pair, not a kind; the harmful side names it.
    kinds = {kind: [p for p in pairs if examples[p[0]].kind == kind] for kind in _kinds(examples)}
    whole = _awareness(states, pairs)
    each = {kind: _awareness(states, some) for kind, some in kinds.items() if len(some) > 1}
    return Awareness(whole, {r: {kind: sas[r] for kind, sas in each.items()} for r in whole})


def _kinds(examples: Sequence[Example]) -> list[str]:
    return sorted({e.kind for e in examples if e.harmful and e.pair is not None})


def _awareness(states: States, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    scores = {}
    harmful, harmless = [p[0] for p in pairs], [p[1] for p in pairs]
    for k, reading in enumerate(states.readings):
        a, b = states.array[harmful, k], states.array[harmless, k]
        present = ~(np.isnan(a) | np.isnan(b)).any(axis=1)
        enough = int(present.sum()) > 1
        scores[str(reading)] = reference.sas(a[present], b[present]) if enough else 0.0
    return scores
