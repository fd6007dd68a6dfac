"""What was written is read again before it is put into place, and must act as the package does.

The numpy oracle runs both on random states: vectors, projections and head matrices at every depth,
and probes on inputs around their mean. So a writer that puts a vector at another layer, forgets a
factor or turns a matrix around writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steerbridge import reference
from steerbridge.errors import NotReadBack, SteerbridgeError
from steerbridge.format import Answers, Format, Holds, Loss
from steerbridge.package import SteeringPackage
from steerbridge.reference import Action
from steerbridge.spec import CosineProbe, HeadInput, Probe
from steerbridge.spec import sites as sites_of
from steerbridge_convert import heads, vectors

Float64 = NDArray[np.float64]
ROWS: Final = 4  # random states of each depth
ROUNDED: Final = 1e-5  # relative to the change: stored as float32
FITTED: Final = 1e-3  # a head that is recovered by least squares, or a probe with folded terms


def check(
    format: Format, package: SteeringPackage, path: Path, answers: Answers, losses: Sequence[Loss]
) -> None:
    """Read `path` with the format's reader and compare.

    Args:
        losses: of the conversion; what they name may differ.

    Raises:
        NotReadBack: the reader refuses it, or it acts differently.
    """
    written = {option.name for option in format.write_options} & set(answers.values)
    values = {name: answers.values[name] for name in written} | dict(format.whole(package))
    given = Answers(format.name, values, answers.base, answers.model)
    try:
        again = format.read(path, given)
    except SteerbridgeError as error:
        raise NotReadBack(format.name, str(error)) from error
    wrong = [*_moved(format, package, again, given), *_judged(format.holds, package, again, losses)]
    if wrong:
        raise NotReadBack(format.name, "; ".join(wrong))


# ---------------------------------------------------------------- what acts


def _moved(
    format: Format, package: SteeringPackage, again: SteeringPackage, answers: Answers
) -> Iterator[str]:
    spec = package.spec
    wanted, found = _acting(package, format.holds), _acting(again, format.holds)
    if format.holds.gates and _gated(package, wanted) != _gated(again, found):
        yield "what acts depends on a probe in one of the two alone"
    sites = {
        spec.depth(site): site
        for action in (*wanted, *found)
        for site in sites_of(action.intervention)
    }
    states = np.random.default_rng(0).normal(size=(ROWS, spec.base_model.hidden_size))
    for depth, site in sorted(sites.items()):
        if depth in format.omits:
            continue
        want, got = (
            reference.steer(acting, one.tensors, site, states) - states
            for acting, one in ((wanted, package), (found, again))
        )
        most = ROUNDED
        if isinstance(site, HeadInput) and format.needs_model:
            want, got = np.split(_logits(np.concatenate([want, got]), answers), 2)
            most = FITTED
        size, off = np.linalg.norm(want), np.linalg.norm(got - want)
        if not off <= most * size:
            yield f"a change of {size:.4g} at {site} is off by {off:.4g}"


def _acting(package: SteeringPackage, holds: Holds) -> tuple[Action, ...]:
    """What the rules switch on if all of them hold, of what the format holds."""
    return tuple(
        Action(rule.id, act, vectors.strength(rule))
        for rule in package.spec.rules
        for act in map(package.spec.intervention, rule.interventions)
        if act.type in holds.interventions
    )


def _gated(package: SteeringPackage, acting: Sequence[Action]) -> bool:
    rules = {action.rule for action in acting}
    return any(rule.condition is not None for rule in package.spec.rules if rule.id in rules)


def _logits(change: Float64, answers: Answers) -> Float64:
    """What a change of the head's input makes of the logits [N, V]."""
    parts = [
        rows.astype(np.float64) @ change.T for _, rows in heads.output_embedding(answers).rows()
    ]
    return np.concatenate(parts).T


# ---------------------------------------------------------------- what decides


def _judged(
    holds: Holds, package: SteeringPackage, again: SteeringPackage, losses: Sequence[Loss]
) -> Iterator[str]:
    kept = [probe for probe in package.spec.probes if probe.type in holds.probes]
    found = list(again.spec.probes)
    for probe in found:
        if not any(_alike(package, one, again, probe) for one in kept):
            yield f"probe {probe.id} decides as none of the package does"
    named = {one.id for one in kept if any(f"probe {one.id}" in loss.what for loss in losses)}
    for one in kept:
        if one.id not in named and not any(_alike(package, one, again, p) for p in found):
            yield f"probe {one.id} is not there"
    if kept and not found:
        yield "no probe is there"


def _alike(package: SteeringPackage, one: Probe, again: SteeringPackage, other: Probe) -> bool:
    """True if two probes read the same depths and are as far from their thresholds."""
    depths = [
        [owner.spec.depth(reading.site) for reading in probe.readings]
        for owner, probe in ((package, one), (again, other))
    ]
    if one.type != other.type or depths[0] != depths[1]:
        return False
    inputs = np.random.default_rng(0).normal(
        size=(ROWS, len(one.readings) * package.spec.base_model.hidden_size)
    )
    if one.input_scale is not None:
        inputs *= package.tensors[one.input_scale].float32()
    if one.input_mean is not None:
        inputs += package.tensors[one.input_mean].float32()
    margins = _margins(package, one, inputs), _margins(again, other, inputs)
    return bool(np.allclose(*margins, rtol=FITTED, atol=FITTED))


def _margins(package: SteeringPackage, probe: Probe, inputs: Float64) -> Any:
    """How far inputs [N, I] are on the side on which the probe fires, as log-odds where scores are
    probabilities. Of a condition the files hold the direction alone: its scores."""
    scores = reference.row_logits(probe, package.tensors, inputs).astype(np.float64)
    if isinstance(probe, CosineProbe):
        return scores
    over = scores - reference.odds(probe, probe.threshold)
    return over if probe.comparator in (">", ">=") else -over
