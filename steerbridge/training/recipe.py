"""From labelled prompts to a steering package, step by step.

prompts -> parts and forms -> capture -> SAS and search -> probes and threshold -> refusal ->
evidence
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from steerbridge import environment
from steerbridge.data import Example
from steerbridge.package import SteeringPackage, parse
from steerbridge.runtime import Progress, TrainableModel
from steerbridge.spec import SPEC_VERSION, SteeringSpec
from steerbridge.tensors import Tensor
from steerbridge.training import (
    answers,
    evidence,
    interventions,
    parts,
    probes,
    search,
    together,
    tokens,
)
from steerbridge.training.interventions import Job
from steerbridge.training.search import SearchResult, Task
from steerbridge.training.settings import TrainSettings
from steerbridge.training.states import all_readings, capture, turn_end
from steerbridge.training.together import Guard
from steerbridge.training.tokens import TokenDesign


def run(
    model: TrainableModel,
    examples: Sequence[Example],
    settings: TrainSettings,
    workdir: Path,
    progress: Progress,
) -> SteeringPackage:
    """Train a package; `steerbridge.train` checks the arguments and describes them."""
    divided = parts.divide(model, examples, settings.forms, settings.seed)
    goals = settings.goals_in_use(examples)
    if settings.answers:
        divided = answers.added(model, divided, settings.answers, workdir, progress)
    readings = all_readings(
        model.facts.num_layers,
        turn_end(model, divided.examples),
        images=any(e.images for e in examples),
    )
    of_rows = any(goal.reads == "rows" for goal in goals)
    sites = search.row_sites(model.facts.num_layers) if of_rows else ()
    states = capture(
        model,
        divided.examples,
        readings,
        sites,
        workdir / "capture",
        progress,
        rough=~(divided.traffic & (divided.part == "calibrate")),  # what the promise counts
    )
    awareness = search.awareness(states, divided.examples)
    numbers = count(1)
    found: dict[str, tuple[Task, SearchResult]] = {}
    for goal in goals:
        task = Task(states, divided, goal, settings)
        result = search.search(task, awareness, lambda: progress("search", next(numbers), 0))
        found[goal.probe] = task, result
    guard = together.guard(divided, found)
    fitted, tensors = _written(guard)
    spec = SteeringSpec(
        spec_version=SPEC_VERSION,
        name=settings.name,
        created=environment.now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        base_model=model.facts.info(),
        probes=fitted,
        interventions=(),
        rules=(),
    )
    job = Job(model, SteeringPackage(spec, tensors), states, divided, settings, progress)
    package, known = interventions.add(job)
    acting = {package.spec.interventions[0].id: known}
    package = package.replace(
        evidence=evidence.collect(found, guard, awareness, acting, examples, divided, settings)
    )
    # A fresh parse marks exactly the fields that are set, as loading from disk does.
    return SteeringPackage(parse(package.spec.to_json()), package.tensors)


def _written(guard: Guard) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """The probes as spec and tensors."""
    specs: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for member, threshold in zip(guard.members, guard.thresholds, strict=True):
        best = member.result.best
        fitted = best.fitted.rescaled(member.slope, member.shift)
        write: Any = tokens.to_spec if isinstance(best.design, TokenDesign) else probes.to_spec
        spec, parts_of_it = write(fitted, best.design, threshold, member.probe)
        specs.append(spec)
        tensors |= parts_of_it
    return tuple(specs), tensors
