"""From scores to decisions, in torch: which rules hold, their strengths, and the outcome.

Shapes: B requests that are decided together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steerbridge.plan import rule_probes
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome
from steerbridge.spec import ConstantStrength, SteeringSpec
from steerbridge_hf import kernels


def decide(
    spec: SteeringSpec, rule: int, scores: Mapping[int, Tensor], requests: int
) -> tuple[Tensor, Tensor]:
    """For which requests a rule holds ([B] bool), and its strength ([B] float32).

    Args:
        rule: its index in the spec.
        scores: [B] on the CPU for each probe that the rule needs, by index.
        requests: B.
    """
    chosen = spec.rules[rule]
    needed = rule_probes(spec, rule)
    fired = {spec.probes[i].id: kernels.fires(spec.probes[i], scores[i]) for i in needed}
    held = torch.ones(requests, dtype=torch.bool)
    if chosen.condition is not None:
        stacked = torch.stack([fired[id] for id in chosen.condition.probes])
        held = stacked.any(dim=0) if chosen.condition.type == "any" else stacked.all(dim=0)
    if isinstance(chosen.strength, ConstantStrength):
        return held, torch.full((requests,), chosen.strength.value)
    name = chosen.strength.probe
    value = scores[next(i for i in needed if spec.probes[i].id == name)]
    finite = torch.where(torch.isfinite(value), value, torch.ones_like(value))
    return held, (chosen.strength.scale * finite).float()


def outcome(
    spec: SteeringSpec, scores: Mapping[int, Tensor], held: Mapping[int, Tensor], row: int
) -> Outcome:
    """The outcome of one of the requests, once every probe has its scores."""
    verdicts = tuple(
        Verdict(
            probe.id,
            float(scores[i][row]),
            probe.threshold,
            probe.comparator,
            bool(kernels.fires(probe, scores[i][row])),
        )
        for i, probe in enumerate(spec.probes)
    )
    return Outcome(verdicts, tuple(r.id for i, r in enumerate(spec.rules) if bool(held[i][row])))
