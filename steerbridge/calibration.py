"""Thresholds: the lowest ones that hold false-positive targets, for any runtime's hidden states.

A quantised model computes other hidden states than the one a probe was trained on, so a
threshold can be fitted again on what the runtime itself computes for harmless prompts that
were not trained on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import data, reference, thresholds
from steerbridge.data import Example
from steerbridge.datasets import checks
from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage
from steerbridge.runtime import LoadedModel, Progress
from steerbridge.spec import Calibration, Probe
from steerbridge.thresholds import Scores


def by_kind(scores: Scores, kinds: Sequence[str], chosen: NDArray[np.bool_]) -> dict[str, Scores]:
    """The chosen scores split by kind of prompt."""
    names = np.asarray(kinds)
    return {kind: scores[chosen & (names == kind)] for kind in sorted(set(names[chosen]))}


def scores(
    model: LoadedModel,
    package: SteeringPackage,
    examples: Sequence[Example],
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """Scores [N] of every probe on what the runtime computes, by probe id.

    Raises:
        DataError: a probe that reads answers alone: of prompts it says nothing.
        UnsupportedFeature: a token reading, and prompts with images.
    """
    of_rows = _scores_of_rows(model, package, examples)
    readings = list(dict.fromkeys(r for p in package.spec.probes for r in p.readings))
    states = np.empty((len(examples), len(readings), model.facts.hidden_size), np.float32)
    model.capture(examples, readings, states, progress)
    by_probe = {}
    for probe in package.spec.probes:
        if probe.id in of_rows:
            by_probe[probe.id] = of_rows[probe.id]
            continue
        x = np.stack([states[:, readings.index(r)] for r in probe.readings], axis=1)
        by_probe[probe.id] = reference.score_readings(probe, package.tensors, x)
    return by_probe


def _scores_of_rows(
    model: LoadedModel, package: SteeringPackage, examples: Sequence[Example]
) -> dict[str, Scores]:
    """The same of probes with token readings: the largest running score of a prompt; 0 where no row
    is in scope."""
    probes = [probe for probe in package.spec.probes if probe.token_reading is not None]
    for probe in probes:
        assert probe.token_reading is not None
        if probe.token_reading.scope == "answer":
            raise DataError(Problem(probe.id, "a probe that reads prompts", "scope answer"))
    found: dict[str, Scores] = {probe.id: np.zeros(len(examples)) for probe in probes}
    for i, example in enumerate(examples if probes else ()):
        logits = model.trace(example, package).logits
        for probe in probes:
            assert probe.token_reading is not None
            rows = logits[probe.id]
            kinds = reference.counted(probe.token_reading, len(rows), None)
            verdict = reference.judge_rows(probe, rows, ~np.isnan(rows), kinds, len(rows) - 1)
            missing = math.isnan(verdict.score) and not verdict.unjudged
            found[probe.id][i] = 0.0 if missing else verdict.score
    return found


def fit(
    model: LoadedModel,
    package: SteeringPackage,
    examples: Sequence[Example],
    target: Mapping[str, float],
    *,
    confidence: float | None = None,
    baseline: Mapping[str, Scores] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the threshold of every probe to harmless prompts as this runtime computes them.

    Args:
        examples: prompts that were not trained on; harmful ones are only measured.
        target: share of harmless prompts that may fire, by kind (`*`: any other). Each of
            several probes gets an equal part, since any of them may fire.
        confidence: None: so many of these prompts fire at most. Else the rate of prompts like these
            is at most the target, with this probability over their choice (see
            `steerbridge.thresholds.allowed`); of several probes each has a part of the rest.
        baseline: scores of the same prompts elsewhere, to report how far they moved.

    Raises:
        DataError: no harmless prompts, too few for this confidence, a prompt under both labels, or
            scores that are not finite.
    """
    checks.check(examples)
    fire = may_fire(package, examples, target, confidence)
    scored = scores(model, package, examples, progress)
    fitted = limits(package, scored, examples, fire)
    kinds, harmful = [e.kind for e in examples], np.array([e.harmful for e in examples])
    evidence: dict[str, Any] = {}
    for probe in package.spec.probes:
        values, after = scored[probe.id], probe.replace(threshold=fitted[probe.id])
        evidence[probe.id] = {
            "before": _rates(probe, values, kinds, harmful),
            "after": _rates(after, values, kinds, harmful),
        }
        if baseline is not None:
            evidence[probe.id]["shift"] = _shift(probe, after, baseline[probe.id], values)
    known: dict[str, Any] = {
        "target_fpr": dict(target),
        "confidence": confidence,
        "may_fire": fire,
        "data_sha256": data.sha256(examples),
        "prompts": len(examples),
        "probes": evidence,
    }
    return Calibration(
        runtime=model.runtime,
        quantisation=model.quantisation,
        weights=model.weights_sha256,
        thresholds=fitted,
        evidence=known,
    )


def may_fire(
    package: SteeringPackage,
    examples: Sequence[Example],
    target: Mapping[str, float],
    confidence: float | None = None,
) -> dict[str, int]:
    """How many harmless prompts of each kind each probe may fire on: `thresholds.allowed` for its
    part of the rate and of the risk.

    Raises:
        DataError: no harmless prompts, or too few for this confidence.
    """
    counts = Counter(e.kind for e in examples if not e.harmful)
    if not counts:
        raise DataError(Problem("examples", "harmless prompts to calibrate on", "none"))
    parts = max(1, len(package.spec.probes))
    part = {kind: share / parts for kind, share in target.items()}
    return thresholds.allowed(counts, part, confidence and 1 - (1 - confidence) / parts)


def limits(
    package: SteeringPackage,
    scored: Mapping[str, Scores],
    examples: Sequence[Example],
    fire: Mapping[str, int],
) -> dict[str, float]:
    """The threshold of every probe, by its id, from its scores [N] of the examples.

    Raises:
        DataError: scores that are not finite.
    """
    kinds, harmful = [e.kind for e in examples], np.array([e.harmful for e in examples])
    fitted = {}
    for probe in package.spec.probes:
        values = scored[probe.id]
        if not np.isfinite(values).all():
            raise DataError(Problem(f"scores of {probe.id}", "finite numbers", "NaN or infinity"))
        calm, harm = (by_kind(values, kinds, chosen) for chosen in (~harmful, harmful))
        fitted[probe.id] = _limit(probe, calm, harm, fire)
    return fitted


def with_calibration(package: SteeringPackage, fitted: Calibration) -> SteeringPackage:
    """The package with this calibration in the place of an older one for the same runtime,
    quantisation and checkpoint."""
    mine = (fitted.runtime, fitted.quantisation, fitted.weights)
    kept = tuple(
        c for c in package.spec.calibrations if (c.runtime, c.quantisation, c.weights) != mine
    )
    return package.replace(calibrations=(*kept, fitted))


def _limit(
    probe: Probe,
    harmless: Mapping[str, Scores],
    harmful: Mapping[str, Scores],
    fire: Mapping[str, int],
) -> float:
    """The threshold for the probe's own comparator, chosen in log-odds."""
    sign = 1 if probe.comparator in (">", ">=") else -1
    limit = sign * thresholds.choose(
        {kind: sign * reference.odds(probe, s) for kind, s in harmless.items()},
        fire,
        [sign * reference.odds(probe, s) for s in harmful.values()],
    )
    score = reference.score_at(probe, limit)
    # In a gap as narrow as two neighbouring numbers the limit is a score; it must not fire.
    return float(np.nextafter(score, sign * np.inf)) if "=" in probe.comparator else score


def _rates(
    probe: Probe, values: Scores, kinds: Sequence[str], harmful: NDArray[np.bool_]
) -> dict[str, Any]:
    """Threshold, share of harmless prompts that fire and of harmful ones, by kind."""
    fired = reference.fires(probe, values).astype(np.float64)

    def shares(chosen: NDArray[np.bool_]) -> dict[str, float]:
        return {k: round(float(v.mean()), 5) for k, v in by_kind(fired, kinds, chosen).items()}

    return {
        "threshold": probe.threshold,
        "fpr": shares(~harmful),
        "detection": shares(harmful) if harmful.any() else {},
    }


def _shift(before: Probe, after: Probe, old: Scores, new: Scores) -> dict[str, float]:
    """How far the scores moved, and the share of verdicts that agree with the baseline's."""
    want = reference.fires(before, old)
    return {
        "score_mean_abs": float(np.abs(new - old).mean()),
        "score_max_abs": float(np.abs(new - old).max()),
        "score_mean": float((new - old).mean()),
        "verdicts_equal_before": float((reference.fires(before, new) == want).mean()),
        "verdicts_equal_after": float((reference.fires(after, new) == want).mean()),
    }
