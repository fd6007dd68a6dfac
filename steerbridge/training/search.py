"""Search for what the probes of a guard should read, on prompts that are not trained on.

Every candidate is fitted on the prompts to train on and judged on those to search on: the share of
harmful ones above the score that the allowed share of ordinary ones exceeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from steerbridge import reference, stats
from steerbridge.data import Example
from steerbridge.spec import LayerInput, Reading
from steerbridge.training import probes, tokens
from steerbridge.training.parts import Parts
from steerbridge.training.probes import Fitted, ProbeDesign
from steerbridge.training.settings import Goal, TrainSettings
from steerbridge.training.states import States
from steerbridge.training.tokens import TokenDesign

DECAY: Final = 1e-2
# Depths at which rows are kept (shares of the model's), and where whole prompts are read together
# (shares of what is read). A runtime pays for each.
ROW_DEPTHS: Final = (0.47, 0.57, 0.67)
SPREAD: Final = (0.36, 0.7, 1.0)
WINDOWS: Final = (4, 16)  # beside that of `TokenDesign`
# Of the allowed share of false positives. At one rate a few ordinary prompts decide between
# candidates.
RATES: Final = (1, 2, 4, 8)
SAMPLE: Final = 3000  # prompts that a candidate of the search is fitted on
SAMPLE_EPOCHS: Final = 6
FITS: Final = 3  # of the chosen design; the probe is their mean

Design = ProbeDesign | TokenDesign
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A design with what its scores on the prompts to search on show."""

    design: Design
    fitted: Fitted
    detection: float  # share of harmful prompts that are caught, mean over their kinds
    reach: float  # mean of that share over `RATES`: what candidates are compared by
    auroc: float  # of harmful prompts against ordinary ones
    auroc_by_kind: Mapping[str, float]

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
    """The chosen candidate, fitted on all prompts to train on, and the evidence of the search.

    Attributes:
        singles: every reading alone, with a linear probe.
        complete: False if the time was over before all was tried: then another run may find
            something else.
    """

    best: Candidate
    singles: tuple[Candidate, ...]
    tried: tuple[Candidate, ...]
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """What every candidate of a goal is fitted and judged on. Harmful prompts of weight 0 need not
    be caught."""

    states: States
    parts: Parts
    goal: Goal
    settings: TrainSettings

    @property
    def weights(self) -> NDArray[np.float64]:
        return np.array([self.goal.weight(e) for e in self.parts.examples])

    def fit(self, design: Design, sample: int | None = None, run: int = 0) -> Fitted:
        """A probe fitted on the prompts to train on, or on so many of them.

        Args:
            run: another number starts from other weights.
        """
        train = self._sampled(self.parts.of("train"), sample)
        seed = self.settings.seed + run
        harmful, weights = self.parts.harmful, self.weights
        if isinstance(design, ProbeDesign):
            x = self.states.of(design.readings)[train]
            return probes.fit(x, harmful[train], weights[train], design, seed)
        held = self._sampled(self.parts.of("search"), sample)
        fitted = tokens.fit(
            self.states.rows,
            tokens.Prompts(train, harmful[train], weights[train]),
            tokens.Prompts(held, harmful[held], weights[held]),
            design,
            seed,
            epochs=tokens.EPOCHS if sample is None else SAMPLE_EPOCHS,
        )
        return fitted.probe

    def scores(self, fitted: Fitted, design: Design, index: NDArray[np.int64]) -> Scores:
        """Log-odds of some prompts."""
        if isinstance(design, ProbeDesign):
            return fitted.scores(self.states.of(design.readings)[index])
        return tokens.scores(fitted, self.states.rows, index, design)

    def judge(self, design: Design, sample: int | None = None) -> Candidate:
        """Fit, score what is searched on, measure."""
        fitted = self.fit(design, sample)
        index = self.parts.of("search")
        return self.judged(design, fitted, self.scores(fitted, design, index))

    def judged(self, design: Design, fitted: Fitted, found: Scores) -> Candidate:
        index = self.parts.of("search")
        calm = found[calm_of(self.parts, index)]
        by_kind: dict[str, Scores] = {}
        meant = self.parts.harmful[index] & (self.weights[index] > 0)
        for kind in sorted({self.parts.examples[i].kind for i in index[meant]}):
            mine = np.array([self.parts.examples[i].kind == kind for i in index])
            by_kind[kind] = found[meant & mine]
        caught = []
        for rate in RATES:
            limit = quantile(calm, min(1.0, rate * self.settings.target_fpr))
            caught.append(float(np.mean([(s > limit).mean() for s in by_kind.values()])))
        return Candidate(
            design,
            fitted,
            caught[0],
            float(np.mean(caught)),
            stats.auroc(found[meant], calm),
            {kind: round(stats.auroc(s, calm), 5) for kind, s in by_kind.items()},
        )

    def _sampled(self, index: NDArray[np.int64], sample: int | None) -> NDArray[np.int64]:
        """Those with a weight; evenly spaced, so that kinds and forms keep their shares."""
        index = index[self.weights[index] > 0]
        if sample is None or len(index) <= sample:
            return index
        return np.asarray(index[np.linspace(0, len(index) - 1, sample).astype(int)])


def calm_of(parts: Parts, index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the prompts false positives are counted on: traffic; all harmless ones where there
    is none."""
    traffic = parts.traffic[index]
    return traffic if traffic.any() else ~parts.harmful[index]


def quantile(calm: Scores, share: float) -> float:
    """The score that at most this share of them exceeds."""
    return float(np.sort(calm)[max(0, len(calm) - 1 - int(share * len(calm)))])


def row_sites(num_layers: int) -> tuple[LayerInput, ...]:
    """Where rows are kept: at a few depths of the model."""
    layers = {min(max(1, round(share * num_layers)), num_layers - 1) for share in ROW_DEPTHS}
    return tuple(LayerInput(stream="layer_input", layer=layer) for layer in sorted(layers))


def search(task: Task, sas: Awareness, tried: Callable[[], None]) -> SearchResult:
    """The best design for the goal of a task, fitted on all prompts to train on."""
    if task.goal.reads == "rows":
        return _rows(task, tried)
    return _whole(task, sas, tried)


def _rows(task: Task, tried: Callable[[], None]) -> SearchResult:
    """Sites first, two at a time, then windows; each step keeps what has the longest reach, then
    the highest AUROC. Ends when the time is over."""
    until, complete = time.monotonic() + 60 * task.settings.search_minutes, True
    hidden = tokens.HIDDEN if task.settings.probe == "mlp" else 0
    scope: Literal["prompt", "both"] = "both" if task.settings.answers else "prompt"
    found: list[Candidate] = []

    def best_of(designs: Iterator[TokenDesign]) -> TokenDesign:
        nonlocal complete
        for design in designs:
            if found and time.monotonic() > until:
                complete = False
                break
            found.append(task.judge(design, SAMPLE))
            tried()
        top = max(found, key=lambda c: (c.reach, c.auroc)).design
        assert isinstance(top, TokenDesign)
        return top

    sites = task.states.rows.sites
    pairs = combinations(sites, min(2, len(sites)))
    design = best_of(TokenDesign(pair, hidden=hidden, scope=scope) for pair in pairs)
    design = best_of(replace(design, window=window) for window in WINDOWS)
    return SearchResult(_mean(task, design, tried), (), tuple(found), complete)


def _mean(task: Task, design: TokenDesign, tried: Callable[[], None]) -> Candidate:
    """The mean of several fits on all prompts: each has false alarms of its own, and those few
    decide where the threshold stands."""
    fits = []
    for run in range(FITS):
        fits.append((task.fit(design, run=run), 1 / FITS))
        tried()
    mean = tokens.blended(fits)
    return task.judged(design, mean, task.scores(mean, design, task.parts.of("search")))


def _whole(task: Task, sas: Awareness, tried: Callable[[], None]) -> SearchResult:
    """Every reading alone with a linear probe; then, in the shape that is asked for, the best of
    them, and every position at a few depths of the model.

    Candidates within one standard error of the best are equal; among them the readings with the
    highest mean SAS (the paper's criterion) win, then the higher AUROC.
    """
    singles = []
    for reading in task.states.readings:
        singles.append(task.judge(ProbeDesign((reading,), "linear", DECAY), SAMPLE))
        tried()
    found = []
    for readings in _sets(singles):
        found.append(task.judge(ProbeDesign(readings, task.settings.probe, DECAY)))
        tried()
    index = task.parts.of("search")
    meant = int((task.parts.harmful[index] & (task.weights[index] > 0)).sum())
    return SearchResult(_pick(found, sas.whole, meant), tuple(singles), tuple(found))


def _sets(singles: Sequence[Candidate]) -> list[tuple[Reading, ...]]:
    """Sets of readings worth a closer look, without repetition."""
    ranked = sorted(singles, key=lambda c: (c.auroc, c.detection), reverse=True)
    all_of_them = [reading for c in singles for reading in _readings(c)]
    return list(dict.fromkeys([_readings(ranked[0]), tuple(_spread(all_of_them))]))


def _readings(candidate: Candidate) -> tuple[Reading, ...]:
    assert isinstance(candidate.design, ProbeDesign)
    return candidate.design.readings


def _spread(readings: Sequence[Reading]) -> Iterator[Reading]:
    """Every position at the layers nearest to the depths of SPREAD."""
    layers = sorted({r.site.layer for r in readings if isinstance(r.site, LayerInput)})
    wanted = [share * layers[-1] for share in SPREAD]
    chosen = {min(layers, key=lambda layer: abs(layer - at)) for at in wanted}
    return (r for r in readings if isinstance(r.site, LayerInput) and r.site.layer in chosen)


def _pick(candidates: Sequence[Candidate], sas: Mapping[str, float], harmful: int) -> Candidate:
    best = max(c.detection for c in candidates)
    error = float(np.sqrt(max(best * (1 - best), 1 / harmful) / harmful))
    close = [c for c in candidates if c.detection >= best - error]
    return max(
        close,
        key=lambda c: (np.mean([sas[str(r)] for r in _readings(c)]), c.auroc),
    )


def awareness(states: States, examples: Sequence[Example]) -> Awareness:
    """SAS of every reading over the aligned pairs in the form `chat`, and over those of each kind.

    0 where fewer than two pairs have the reading (an image, on both sides).
    """
    sides: dict[str, dict[bool, int]] = {}
    for i, example in enumerate(examples):
        if example.pair is not None and example.form == "chat":
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
