"""`steerbridge.describe`: a steering package as a sheet of text."""

from __future__ import annotations

from typing import Any

from steerbridge import stats
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    Calibration,
    ConstantStrength,
    HeadMatrix,
    Intervention,
    LowRankMatrix,
    Probe,
    Rule,
    Say,
)


def describe(package: SteeringPackage) -> str:
    """A package as text: what it reads, when it fires, what it changes, and its evidence."""
    spec, base = package.spec, package.spec.base_model
    lines = [
        f"{spec.name}  (spec {spec.spec_version}{', ' + spec.created if spec.created else ''})",
        f"made for   {base.name}: {base.model_type}, {base.num_layers} blocks, "
        f"width {base.hidden_size}, vocabulary {base.vocab_size}",
        *(f"probe      {_probe(p)}" for p in spec.probes),
        *(f"acts       {_intervention(i, package)}" for i in spec.interventions),
        *(f"rule       {_rule(r)}" for r in spec.rules),
        *(
            f"calibrated {c.runtime} {c.quantisation}{_weights(c)}: "
            + ", ".join(f"{id} at {t:.6g}" for id, t in c.thresholds.items())
            for c in spec.calibrations
        ),
        *_evidence(package),
    ]
    return "\n".join(lines)


def _weights(calibration: Calibration) -> str:
    return f" (weights {calibration.weights[:12]})" if calibration.weights else ""


def _probe(probe: Probe) -> str:
    where = " + ".join(probe.reads)
    when = f"fires when score {probe.comparator} {probe.threshold:.6g}"
    return f"{probe.id}: {probe.type} on {where}; {when}"


def _intervention(x: Intervention, package: SteeringPackage) -> str:
    if isinstance(x, HeadMatrix):
        low = isinstance(x.weight, LowRankMatrix)
        shape = (
            f"rank {package.tensors[x.weight.u].shape[1]}"
            if isinstance(x.weight, LowRankMatrix)
            else "dense"
        )
        formula = f"h + {x.eps:g} {'U V' if low else 'W'} h"
        return f"{x.id}: head_matrix ({shape}) at head_input, {formula}, {x.position}"
    if isinstance(x, Say):
        return f"{x.id}: say {x.text!r} ({len(x.tokens)} tokens) at logits, {x.position}"
    sign = "+" if isinstance(x, AddVector) else "-"
    what = "v" if isinstance(x, AddVector) else "(v.h) v"
    where = ", ".join(str(t.site) for t in x.targets)
    return f"{x.id}: {x.type} at {where}, h {sign} {x.alpha:g} {what}, {x.position}"


def _rule(rule: Rule) -> str:
    when = (
        "always"
        if rule.condition is None
        else f"if {rule.condition.type} of {', '.join(rule.condition.probes)} fired"
    )
    strength = (
        f"{rule.strength.value:g}"
        if isinstance(rule.strength, ConstantStrength)
        else f"{rule.strength.scale:g} x score of {rule.strength.probe}"
    )
    return f"{rule.id}: {when}, {', '.join(rule.interventions)} at strength {strength}"


def _promise(promise: Any) -> list[str]:
    if not promise:
        return []
    rate = f"{promise['rate']:.1%} of ordinary prompts"
    if promise["confidence"] is None:
        return [
            f"evidence   at most {rate} fire among the {promise['prompts']} that it was chosen on; "
            f"a promise takes {promise['needed']}"
        ]
    sure = f"{promise['confidence']:.0%} confidence, {promise['prompts']} prompts"
    return [f"evidence   at most {rate} fire ({sure})"]


def _rates(rates: Any) -> str:
    """Detection and false positives, each with a 95 % interval and the number of prompts."""
    words = {"detected": "detected", "fpr": "ordinary prompts that fire"}
    parts = []
    for key, (rate, count) in rates.items():
        low, high = stats.wilson_interval(round(rate * count), count)
        parts.append(f"{words[key]} {rate:.1%} ({low:.1%} to {high:.1%}, {count} prompts)")
    return "; ".join(parts)


def _evidence(package: SteeringPackage) -> list[str]:
    evidence = package.spec.evidence
    if evidence is None:
        return ["evidence   none"]
    lines = []
    probes: Any = evidence.probes or {}
    for id, known in probes.items():
        lines.append(
            f"evidence   {id}: AUROC {known.get('auroc')}, detection {known.get('detection')}"
        )
    safety: Any = evidence.safety or {}
    lines += _promise(safety.get("promise"))
    for form, rates in (safety.get("forms") or {}).items():
        lines.append(f"evidence   form {form}: {_rates(rates)}")
    interventions: Any = evidence.interventions or {}
    lines += [f"evidence   {id}: {known}" for id, known in interventions.items()]
    return lines
