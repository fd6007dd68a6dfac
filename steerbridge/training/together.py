"""Several probes as one guard that holds one promise.

A guard fires if any of its probes does, so a false positive of one is one of the guard. Of probes
that are to catch the same prompts, each one's log-odds are shifted and stretched until ordinary
prompts reach as high with one as with another; the largest of them is then one score, a channel,
whose threshold is chosen once. Probes for different prompts (harm in a text, in a picture) are
channels of their own: one that tells its prompts badly apart does not raise the threshold of the
others.
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
from steerbridge.training.settings import TrainSettings

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
        thresholds: in log-odds, of each probe.
        fired: whether each prompt to calibrate on fires [N], by a threshold that was chosen on four
            fifths of them without it; in the order of `Parts.of("calibrate")`.
        promise: what the threshold promises, and on what.
    """

    members: tuple[Member, ...]
    thresholds: tuple[float, ...]
    fired: NDArray[np.bool_]
    promise: dict[str, Any]


def guard(parts: Parts, found: Mapping[str, tuple[Task, SearchResult]]) -> Guard:
    """The guard of the probes found, by their names in the order of their goals.

    Of a probe that reads rows and one that reads whole prompts, the second stays if it helps.
    """
    channels = [_channel(parts, {name: found[name] for name in c}) for c in _channels(parts, found)]
    calibrated = parts.of("calibrate")
    scores = np.stack([_largest(members, calibrated) for members in channels])
    meant = np.stack([_meant(parts, members[0].task, calibrated) for members in channels])
    settings = channels[0][0].task.settings
    limits, promise = _limits(parts, calibrated, scores, meant, settings)
    fired = _honest(parts, calibrated, scores, meant, settings)
    members: list[Member] = []
    written: list[float] = []
    for channel, limit in zip(channels, limits, strict=True):
        less = min(1.0, MOST_ODDS / abs(limit))
        members += [_moved(m, less, 0.0) for m in channel]
        written += [less * limit] * len(channel)
    return Guard(tuple(members), tuple(written), fired, promise)


def _channels(
    parts: Parts, found: Mapping[str, tuple[Task, SearchResult]]
) -> list[tuple[str, ...]]:
    """The names of probes, those together that are to catch the same prompts."""
    everything = np.arange(len(parts.examples))
    channels: list[tuple[tuple[str, ...], NDArray[np.bool_]]] = []
    for name, (task, _) in found.items():
        mine = _meant(parts, task, everything)
        shared = [c for c in channels if (c[1] & mine).any()]
        names = (*(other for c in shared for other in c[0]), name)
        caught = np.any([mine, *(c[1] for c in shared)], axis=0)
        channels = [c for c in channels if c not in shared] + [(names, caught)]
    return [names for names, _ in channels]


def _meant(parts: Parts, task: Task, index: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the prompts a probe is to catch."""
    return np.asarray(parts.harmful[index] & (task.weights[index] > 0))


def _channel(parts: Parts, found: Mapping[str, tuple[Task, SearchResult]]) -> tuple[Member, ...]:
    """The probes of a channel, the largest of whose scores is log-odds."""
    index = parts.of("search")
    on_scale = {name: _on_scale(task, result, parts) for name, (task, result) in found.items()}
    shift = dict.fromkeys(found, 0.0)
    if {"harm", "whole"} == set(found):
        alone = {name: member.scores(index) for name, member in on_scale.items()}
        shift = _useful(parts, index, alone["harm"], alone["whole"], found["harm"][0])
        on_scale = {name: on_scale[name] for name in shift}
    raised = [_moved(m, 1.0, shift[m.probe]) for m in on_scale.values()]
    slope, base = _odds(parts, index, raised)
    return tuple(_moved(m, slope, base) for m in raised)


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
    chosen = index[_meant(parts, members[0].task, index) | calm_of(parts, index)]
    harmful = parts.harmful[chosen]
    return probes.platt(_largest(members, chosen), harmful, np.ones(len(chosen)))


def _limits(
    parts: Parts,
    index: NDArray[np.int64],
    scores_CN: Scores,
    meant_CN: NDArray[np.bool_],
    settings: TrainSettings,
) -> tuple[list[float], dict[str, Any]]:
    """The threshold of each channel, and what they promise together.

    With too few prompts for the confidence, the rate is that of these prompts alone.
    """
    calm = calm_of(parts, index)
    rate, count, chosen = {"*": settings.target_fpr}, {"traffic": int(calm.sum())}, len(scores_CN)
    confidence: float | None = settings.confidence
    try:
        fire = thresholds.allowed(count, rate, confidence, chosen)
    except DataError:
        confidence, fire = None, thresholds.allowed(count, rate)
    limits = shared_out(scores_CN, meant_CN, calm, fire["traffic"])
    promise = {
        "rate": settings.target_fpr,
        "confidence": confidence,
        "prompts": count["traffic"],
        "may_fire": fire["traffic"],
        "needed": thresholds.needed(settings.target_fpr, settings.confidence, chosen),
    }
    return limits, promise


def shared_out(
    scores_CN: Scores, meant_CN: NDArray[np.bool_], calm: NDArray[np.bool_], fire: int
) -> list[float]:
    """Thresholds by which so many ordinary prompts fire at most: each more goes to the channel that
    detects most with it."""

    def limit(c: int, level: int) -> float:
        harm = [scores_CN[c][meant_CN[c]]]
        return thresholds.choose({"traffic": scores_CN[c][calm]}, {"traffic": level}, harm)

    def gain(c: int, level: int) -> float:
        caught = [(scores_CN[c][meant_CN[c]] > at).mean() for at in (limits[c], limit(c, level))]
        return float(caught[1] - caught[0]) if meant_CN[c].any() else 0.0

    def fires(c: int, level: int) -> int:
        at = [limit(c, level) if k == c else limits[k] for k in range(len(limits))]
        return int((scores_CN[:, calm] > np.array(at)[:, None]).any(axis=0).sum())

    if len(scores_CN) == 1:
        return [limit(0, fire)]
    levels = [0] * len(scores_CN)
    limits = [limit(c, 0) for c in range(len(scores_CN))]
    while True:
        steps = [
            (gain(c, level), c, level)
            for c, old in enumerate(levels)
            for level in range(old + 1, fire + 1)
            if fires(c, level) <= fire
        ]
        best, c, level = max(steps, default=(0.0, 0, 0))
        if best <= 0:
            return limits
        levels[c], limits[c] = level, limit(c, level)


def _honest(
    parts: Parts,
    index: NDArray[np.int64],
    scores_CN: Scores,
    meant_CN: NDArray[np.bool_],
    settings: TrainSettings,
) -> NDArray[np.bool_]:
    """Whether each prompt fires by thresholds that were chosen without it, or one that is like it
    in another form."""
    fifth = parts.prompt[index] % 5
    fired = np.zeros(len(index), np.bool_)
    for k in range(5):
        mine, others = fifth == k, fifth != k
        if mine.any() and calm_of(parts, index[others]).any():
            own = scores_CN[:, others], meant_CN[:, others]
            limits, _ = _limits(parts, index[others], *own, settings)
            fired[mine] = (scores_CN[:, mine] > np.array(limits)[:, None]).any(axis=0)
    return fired
