"""From scores to decisions, in torch: which rules hold, their strengths, and the outcome.

Shapes: B requests that are decided together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.plan import rule_probes
from steerbridge.reference import Verdict
from steerbridge.runtime import Outcome
from steerbridge.spec import ConstantStrength, Probe, SteeringSpec


@dataclass(frozen=True, slots=True)
class Judged:
    """What a probe says of B requests.

    Args:
        scores: [B] on the CPU; NaN where a request could not be judged.
        reasons: [B] why it could not, or empty.
    """

    scores: Tensor
    reasons: tuple[str, ...]

    @classmethod
    def of(cls, scores: Tensor, finite: Tensor, reasons: Sequence[str] = ()) -> Judged:
        """Of the results of `kernels.judge`, and reasons that were known before."""
        known = list(reasons) or [""] * len(scores)
        for row, sound in enumerate(finite.tolist()):
            if not sound and not known[row]:
                known[row] = reference.NOT_FINITE
        told = scores.float().cpu()
        if any(known):
            unjudged = torch.tensor([bool(reason) for reason in known], dtype=torch.bool)
            told = told.masked_fill(unjudged, math.nan)
        return cls(told, tuple(known))

    def verdict(self, probe: Probe, row: int) -> Verdict:
        """The verdict on one request."""
        if self.reasons[row]:
            return reference.unjudged(probe, self.reasons[row])
        return reference.verdict(probe, float(self.scores[row]))


def decide(
    spec: SteeringSpec, rule: int, judged: Mapping[int, Judged], requests: int
) -> tuple[Tensor, Tensor]:
    """For which requests a rule holds ([B] bool), and its strength ([B] float32).

    A request that a probe could not judge fires it; a strength that follows such a score takes 1.

    Args:
        rule: its index in the spec.
        judged: of each probe that the rule needs, by index.
        requests: B.
    """
    chosen = spec.rules[rule]
    needed = {spec.probes[i].id: i for i in rule_probes(spec, rule)}
    held = torch.ones(requests, dtype=torch.bool)
    if chosen.condition is not None:
        fired = [
            [reference.fires_at(spec.probes[i], score) for score in judged[i].scores.tolist()]
            for i in map(needed.__getitem__, chosen.condition.probes)
        ]
        combine = any if chosen.condition.type == "any" else all
        held = torch.tensor([combine(row) for row in zip(*fired, strict=True)])
    if isinstance(chosen.strength, ConstantStrength):
        return held, torch.full((requests,), chosen.strength.value, dtype=torch.float32)
    value = judged[needed[chosen.strength.probe]].scores
    finite = torch.where(torch.isfinite(value), value, torch.ones_like(value))
    return held, (chosen.strength.scale * finite).float()


def outcome(
    spec: SteeringSpec, judged: Mapping[int, Judged], held: Mapping[int, Tensor], row: int
) -> Outcome:
    """The outcome of one of the requests, once every probe has judged them."""
    verdicts = tuple(judged[i].verdict(probe, row) for i, probe in enumerate(spec.probes))
    return Outcome(verdicts, tuple(r.id for i, r in enumerate(spec.rules) if bool(held[i][row])))
