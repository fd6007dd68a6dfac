"""From labelled prompts to a steering package, step by step.

prompts -> capture -> SAS and search -> probes and thresholds -> intervention -> evidence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import environment
from steerbridge.data import Example
from steerbridge.datasets import groups
from steerbridge.package import SteeringPackage, parse
from steerbridge.runtime import Progress, TrainableModel
from steerbridge.spec import SPEC_VERSION, SteeringSpec
from steerbridge.tensors import Tensor
from steerbridge.training import evidence, interventions, probes, search
from steerbridge.training.interventions import Job
from steerbridge.training.search import Awareness, SearchResult
from steerbridge.training.settings import FOLDS, Goal, TrainSettings
from steerbridge.training.states import States, all_readings, capture, turn_end


def run(
    model: TrainableModel,
    examples: Sequence[Example],
    settings: TrainSettings,
    workdir: Path,
    progress: Progress,
) -> SteeringPackage:
    """Train a package; `steerbridge.train` checks the arguments and describes them."""
    readings = all_readings(
        model.facts.num_layers,
        turn_end(model, examples),
        images=any(e.images for e in examples),
    )
    states = capture(model, examples, readings, workdir / "capture", progress)
    awareness = search.awareness(states, examples)
    results = _search(states, awareness, examples, settings, progress)
    fitted, tensors = _probes(states, examples, results, settings)
    spec = SteeringSpec(
        spec_version=SPEC_VERSION,
        name=settings.name,
        created=environment.now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        base_model=model.facts.info(),
        probes=fitted,
        interventions=(),
        rules=(),
    )
    job = Job(model, SteeringPackage(spec, tensors), states, examples, settings, progress)
    package, known = interventions.add(job)
    acting = {package.spec.interventions[0].id: known}
    package = package.replace(
        evidence=evidence.collect(results, awareness, acting, examples, settings)
    )
    # A fresh parse marks exactly the fields that are set, as loading from disk does.
    return SteeringPackage(parse(package.spec.to_json()), package.tensors)


def _labels(examples: Sequence[Example]) -> NDArray[np.bool_]:
    return np.array([e.harmful for e in examples])


def _weights(examples: Sequence[Example], goal: Goal) -> NDArray[np.float64]:
    return np.array([goal.weight(e) for e in examples])


def _search(
    states: States,
    awareness: Awareness,
    examples: Sequence[Example],
    settings: TrainSettings,
    progress: Progress,
) -> dict[str, SearchResult]:
    """For each goal in use, by the name of its probe, where the probe should read."""
    numbers = count(1)
    folds = np.asarray(groups.folds(examples, FOLDS, settings.seed))
    goals = [goal for goal in settings.goals if goal.applies(examples)]
    shares = sum(goal.share for goal in goals)
    results: dict[str, SearchResult] = {}
    for goal in goals:
        part = goal.share / shares
        task = search.Task(
            states,
            examples,
            _labels(examples),
            _weights(examples, goal),
            folds,
            {kind: part * target for kind, target in settings.target_fpr.items()},
            settings.seed,
        )
        results[goal.probe] = search.search(
            task, awareness, settings.probe, lambda _: progress("search", next(numbers), 0)
        )
    return results


def _probes(
    states: States,
    examples: Sequence[Example],
    results: Mapping[str, SearchResult],
    settings: TrainSettings,
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """Every probe fitted on all examples, its threshold on the scale of calibrated odds."""
    harmful, specs = _labels(examples), []
    tensors: dict[str, Tensor] = {}
    for goal in settings.goals:
        if goal.probe not in results:
            continue
        best, weights = results[goal.probe].best, _weights(examples, goal)
        x = states.of(best.design.readings)
        fitted = probes.fit(x, harmful, weights, best.design, settings.seed)
        slope, shift = probes.platt(best.scores, harmful, weights)
        threshold = slope * best.threshold + shift
        spec, parts = probes.to_spec(
            fitted.rescaled(slope, shift), best.design, threshold, goal.probe
        )
        specs.append(spec)
        tensors |= parts
    return tuple(specs), tensors
