"""`steerbridge.describe`: a steering package as a sheet of text."""

from __future__ import annotations

from typing import Any

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


def _evidence(package: SteeringPackage) -> list[str]:
    evidence = package.spec.evidence
    if evidence is None:
        return ["evidence   none"]
    lines = []
    probes: Any = evidence.probes or {}
    for id, known in probes.items():
        rates = ", ".join(f"{kind} {rate:.2%}" for kind, rate in known.get("fpr", {}).items())
        lines.append(
            f"evidence   {id}: AUROC {known.get('auroc')}, detection {known.get('detection')}, "
            f"false positives {rates} (out of fold)"
        )
    interventions: Any = evidence.interventions or {}
    lines += [f"evidence   {id}: {known}" for id, known in interventions.items()]
    return lines
