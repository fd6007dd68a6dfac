"""Thresholds: the lowest ones that hold false-positive targets, for any runtime's hidden states.

A guard fires if one of its rules does, so all thresholds move together: by how far, in log-odds, is
the one number that is chosen.

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
from steerbridge.errors import DataError, Problem, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.runtime import LoadedModel, Progress, TrainableModel
from steerbridge.spec import Calibration, Probe
from steerbridge.tensors import Float32
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
    if isinstance(model, TrainableModel):
        return _scores_in_one_pass(model, package, examples, progress)
    of_rows = _scores_of_rows(model, package, examples, progress)
    readings = list(dict.fromkeys(r for p in package.spec.probes for r in p.readings))
    states = np.empty((len(examples), len(readings), model.facts.hidden_size), np.float32)
    if readings:
        model.capture(examples, readings, states, progress)
    by_probe = {}
    for probe in package.spec.probes:
        if probe.id in of_rows:
            by_probe[probe.id] = of_rows[probe.id]
            continue
        x = np.stack([states[:, readings.index(r)] for r in probe.readings], axis=1)
        by_probe[probe.id] = reference.score_readings(probe, package.tensors, x)
    return by_probe


def _scores_in_one_pass(
    model: TrainableModel,
    package: SteeringPackage,
    examples: Sequence[Example],
    progress: Progress | None,
) -> dict[str, Scores]:
    """The same of a model that shows readings and rows together."""
    probes = package.spec.probes
    for probe in probes:
        _require_prompts(probe)
    readings = list(dict.fromkeys(r for p in probes for r in p.readings))
    sites = list(dict.fromkeys(s for p in probes if p.token_reading for s in p.token_reading.sites))
    found = {probe.id: np.zeros(len(examples)) for probe in probes}
    for done, captured in enumerate(model.states(examples, readings, sites), 1):
        if sites and examples[captured.index].images:
            raise UnsupportedFeature(model.runtime, "rows of a prompt with images")
        for probe in probes:
            reading = probe.token_reading
            if reading is None:
                read = captured.readings[[readings.index(r) for r in probe.readings]]
                value = float(reference.score_readings(probe, package.tensors, read[None])[0])
            else:
                at = {site: captured.rows[:, k] for k, site in enumerate(sites)}
                x = reference.row_inputs(reading, lambda site, at=at: at[site])  # type: ignore[misc]
                value = _of_rows(probe, reference.row_logits(probe, package.tensors, x))
            found[probe.id][captured.index] = value
        if progress:
            progress("capture", done, len(examples))
    return found


def _require_prompts(probe: Probe) -> None:
    """Refuse a probe that reads answers alone: of prompts it says nothing."""
    if probe.token_reading is not None and probe.token_reading.scope == "answer":
        raise DataError(Problem(probe.id, "a probe that reads prompts", "scope answer"))


def _of_rows(probe: Probe, logits_T: Float32) -> float:
    """The largest running score of a prompt, squashed; 0 where no row is in scope."""
    assert probe.token_reading is not None
    kinds = reference.counted(probe.token_reading, len(logits_T), None)
    last = len(logits_T) - 1
    verdict = reference.judge_rows(probe, logits_T, ~np.isnan(logits_T), kinds, last)
    return 0.0 if math.isnan(verdict.score) and not verdict.unjudged else verdict.score


def _scores_of_rows(
    model: LoadedModel,
    package: SteeringPackage,
    examples: Sequence[Example],
    progress: Progress | None,
) -> dict[str, Scores]:
    """The same of probes with token readings: the largest running score of a prompt; 0 where no row
    is in scope."""
    probes = [probe for probe in package.spec.probes if probe.token_reading is not None]
    for probe in probes:
        _require_prompts(probe)
    found: dict[str, Scores] = {probe.id: np.zeros(len(examples)) for probe in probes}
    for i, example in enumerate(examples if probes else ()):
        logits = model.trace(example, package).logits
        for probe in probes:
            found[probe.id][i] = _of_rows(probe, logits[probe.id])
        if progress:
            progress("rows", i + 1, len(examples))
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
        target: share of harmless prompts that may fire, by kind (`*`: any other).
        confidence: None: so many of these prompts fire at most. Else the rate of prompts like these
            is at most the target, with this probability over their choice (see
            `steerbridge.thresholds.allowed`).
        baseline: scores of the same prompts elsewhere, to report how far they moved.

    Raises:
        DataError: no harmless prompts, too few for this confidence, a prompt under both labels,
            scores that are not finite, or no rule with a condition.
    """
    checks.check(examples)
    fire = may_fire(examples, target, confidence)
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
    examples: Sequence[Example], target: Mapping[str, float], confidence: float | None = None
) -> dict[str, int]:
    """How many harmless prompts of each kind may fire (`thresholds.allowed`).

    Raises:
        DataError: no harmless prompts, or too few for this confidence.
    """
    counts = Counter(e.kind for e in examples if not e.harmful)
    if not counts:
        raise DataError(Problem("examples", "harmless prompts to calibrate on", "none"))
    return thresholds.allowed(counts, target, confidence)


def limits(
    package: SteeringPackage,
    scored: Mapping[str, Scores],
    examples: Sequence[Example],
    fire: Mapping[str, int],
) -> dict[str, float]:
    """The threshold of every probe, by its id, from its scores [N] of the examples.

    Raises:
        DataError: scores that are not finite, or no rule with a condition.
    """
    for probe in package.spec.probes:
        if not np.isfinite(scored[probe.id]).all():
            raise DataError(Problem(f"scores of {probe.id}", "finite numbers", "NaN or infinity"))
    kinds, harmful = [e.kind for e in examples], np.array([e.harmful for e in examples])
    above = margins(package, scored)
    calm, harm = (by_kind(above, kinds, chosen) for chosen in (~harmful, harmful))
    shift = thresholds.choose(calm, fire, harm.values())
    return {probe.id: _moved(probe, shift) for probe in package.spec.probes}


def margins(package: SteeringPackage, scored: Mapping[str, Scores]) -> Scores:
    """By how much, in log-odds, each prompt is above the guard's thresholds [N]: a rule fires where
    it is above 0. What cannot be judged (NaN) fires: it is infinitely far above.

    Raises:
        DataError: no rule has a condition.
    """
    of_probe = {p.id: _margin(p, scored[p.id]) for p in package.spec.probes}
    of_rules = []
    for rule in package.spec.rules:
        if rule.condition is not None:
            read = [of_probe[id] for id in rule.condition.probes]
            of_rules.append((np.max if rule.condition.type == "any" else np.min)(read, axis=0))
    if not of_rules:
        raise DataError(Problem("rules", "one with a condition to calibrate", "none"))
    return np.asarray(np.max(of_rules, axis=0))


def _margin(probe: Probe, scores: Scores) -> Scores:
    """The same of one probe. The sign is that of its comparison, also where odds are equal."""
    above = _sign(probe) * (reference.odds(probe, scores) - reference.odds(probe, probe.threshold))
    fires = reference.fires(probe, scores)
    exact = np.where(fires, np.maximum(above, np.finfo(np.float64).tiny), np.minimum(above, 0))
    return np.where(np.isnan(scores), np.inf, exact)


def _sign(probe: Probe) -> int:
    return 1 if probe.comparator in (">", ">=") else -1


def _moved(probe: Probe, shift: float) -> float:
    """The probe's threshold, so much stricter in log-odds."""
    limit = float(reference.odds(probe, probe.threshold)) + _sign(probe) * shift
    score = reference.score_at(probe, limit)
    # In a gap as narrow as two neighbouring numbers the limit is a score; it must not fire.
    return float(np.nextafter(score, _sign(probe) * np.inf)) if "=" in probe.comparator else score


def with_calibration(package: SteeringPackage, fitted: Calibration) -> SteeringPackage:
    """The package with this calibration in the place of an older one for the same runtime,
    quantisation and checkpoint."""
    mine = (fitted.runtime, fitted.quantisation, fitted.weights)
    kept = tuple(
        c for c in package.spec.calibrations if (c.runtime, c.quantisation, c.weights) != mine
    )
    return package.replace(calibrations=(*kept, fitted))


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
