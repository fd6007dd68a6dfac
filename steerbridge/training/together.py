"""Several probes as one guard: their scores on one scale, so that one threshold holds one promise.

A guard fires if any of its probes does, so a false positive of one is one of the guard. Each
probe's log-odds are shifted and stretched until ordinary prompts reach as high with one as with
another; the largest of them is then one score, whose threshold is chosen once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge import thresholds
from steerbridge.errors import DataError
from steerbridge.training import probes
from steerbridge.training.parts import Parts
from steerbridge.training.search import Scores, SearchResult, Task, calm_of, quantile

TAIL: Final = (0.8, 0.98)  # quantiles of ordinary prompts that are laid over one another
STRICTER: Final = (0.0, 0.5, 1.0, 2.0)  # how much higher a second probe's scores must be
MOST_ODDS: Final = 9.0  # of a threshold: probabilities beyond 0.9999 have few digits
GAIN: Final = 0.005  # detection that a second probe must add


@dataclass(frozen=True, slots=True)
class Member:
    """A probe of the guard: what was found for its goal, and its log-odds as slope * y + shift."""

    task: Task
    result: SearchResult
    slope: float
    shift: float

    @property
    def probe(self) -> str:
        return self.task.goal.probe

    def scores(self, index: NDArray[np.int64]) -> Scores:
        """Log-odds on the guard's scale."""
        best = self.result.best
        return self.slope * self.task.scores(best.fitted, best.design, index) + self.shift


@dataclass(frozen=True, slots=True)
class Guard:
    """The probes of a package before they are written.

    Attributes:
        threshold: in log-odds, of every probe.
        fired: whether each prompt to calibrate on fires [N], by a threshold that was chosen on four
            fifths of them without it; in the order of `Parts.of("calibrate")`.
        promise: what the threshold promises, and on what.
    """

    members: tuple[Member, ...]
    threshold: float
    fired: NDArray[np.bool_]
    promise: dict[str, Any]


def guard(parts: Parts, found: Mapping[str, tuple[Task, SearchResult]]) -> Guard:
    """The guard of the probes found, by their names in the order of their goals.

    Of a probe that reads rows and one that reads whole prompts, the second stays if it helps.
    """
    index = parts.of("search")
    on_scale = {name: _on_scale(task, result, parts) for name, (task, result) in found.items()}
    shift = dict.fromkeys(found, 0.0)
    if {"harm", "whole"} == set(found):
        alone = {name: member.scores(index) for name, member in on_scale.items()}
        shift = _useful(parts, index, alone["harm"], alone["whole"], found["harm"][0])
        on_scale = {name: on_scale[name] for name in shift}
    raised = [_moved(m, 1.0, shift[m.probe]) for m in on_scale.values()]
    slope, base = _odds(parts, index, raised)
    members = tuple(_moved(m, slope, base) for m in raised)
    calibrated = parts.of("calibrate")
    scores = _largest(members, calibrated)
    threshold, promise = _threshold(parts, calibrated, scores, members[0].task)
    fired = _honest(parts, calibrated, scores, members[0].task)
    less = min(1.0, MOST_ODDS / abs(threshold))
    return Guard(tuple(_moved(m, less, 0.0) for m in members), less * threshold, fired, promise)


def _on_scale(task: Task, result: SearchResult, parts: Parts) -> Member:
    """0 and 1 where ordinary prompts have the two quantiles of `TAIL`."""
    index = parts.of("search")
    calm = index[calm_of(parts, index)]
    found = task.scores(result.best.fitted, result.best.design, calm)
    low, high = np.quantile(found, TAIL)
    spread = max(float(high - low), 1e-3 * max(1.0, abs(float(high))))
    return Member(task, result, 1 / spread, -float(low) / spread)


def _moved(member: Member, slope: float, shift: float) -> Member:
    return Member(member.task, member.result, slope * member.slope, slope * member.shift + shift)


def _useful(
    parts: Parts, index: NDArray[np.int64], rows: Scores, whole: Scores, task: Task
) -> dict[str, float]:
    """The probes that detect most, and by how much the scores of each are moved: one alone, or both
    if that detects more."""
    forms = np.array([parts.examples[i].form for i in index])
    harmful = parts.harmful[index]

    def detection(scores: Scores) -> float:
        """Mean over forms of the share that is caught."""
        limit = quantile(scores[calm_of(parts, index)], task.settings.target_fpr)
        caught = [scores[harmful & (forms == form)] > limit for form in set(forms[harmful])]
        return float(np.mean([part.mean() for part in caught]))

    alone = {"harm": detection(rows), "whole": detection(whole)}
    both = {less: detection(np.maximum(rows, whole - less)) for less in STRICTER}
    less = max(both, key=lambda less: (both[less], less))
    if both[less] >= max(alone.values()) + GAIN:
        return {"harm": 0.0, "whole": -less}
    return {max(alone, key=lambda name: alone[name]): 0.0}


def _largest(members: Sequence[Member], index: NDArray[np.int64]) -> Scores:
    return np.asarray(np.max([m.scores(index) for m in members], axis=0))


def _odds(parts: Parts, index: NDArray[np.int64], members: Sequence[Member]) -> tuple[float, float]:
    """Slope and shift that make the largest score log-odds, both labels as likely."""
    chosen = index[parts.harmful[index] | calm_of(parts, index)]
    harmful = parts.harmful[chosen]
    return probes.platt(_largest(members, chosen), harmful, np.ones(len(chosen)))


def _threshold(
    parts: Parts, index: NDArray[np.int64], scores: Scores, task: Task
) -> tuple[float, dict[str, Any]]:
    """The threshold for all probes, and what it promises.

    With too few prompts for the confidence, the rate is that of these prompts alone.
    """
    calm = calm_of(parts, index)
    settings = task.settings
    rate, count = {"*": settings.target_fpr}, {"traffic": int(calm.sum())}
    confidence: float | None = settings.confidence
    try:
        fire = thresholds.allowed(count, rate, confidence)
    except DataError:
        confidence, fire = None, thresholds.allowed(count, rate)
    harm = scores[parts.harmful[index]]
    threshold = thresholds.choose({"traffic": scores[calm]}, fire, [harm])
    promise = {
        "rate": settings.target_fpr,
        "confidence": confidence,
        "prompts": count["traffic"],
        "may_fire": fire["traffic"],
        "needed": thresholds.needed(settings.target_fpr, settings.confidence),
    }
    return threshold, promise


def _honest(
    parts: Parts, index: NDArray[np.int64], scores: Scores, task: Task
) -> NDArray[np.bool_]:
    """Whether each prompt fires by a threshold that was chosen without it, or one that is like it
    in another form."""
    fifth = parts.prompt[index] % 5
    fired = np.zeros(len(index), np.bool_)
    for k in range(5):
        mine, others = fifth == k, fifth != k
        if mine.any() and calm_of(parts, index[others]).any():
            limit, _ = _threshold(parts, index[others], scores[others], task)
            fired[mine] = scores[mine] > limit
    return fired
