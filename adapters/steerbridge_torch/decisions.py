"""From scores to decisions, in torch: where rules begin, their strengths, and the outcome.

Shapes: B requests that are decided together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.reference import Verdict
from steerbridge.spec import ConstantStrength, Probe, SteeringSpec
from steerbridge_torch.tokens import NEVER


@dataclass(frozen=True, slots=True)
class Judged:
    """What a probe says of B requests.

    Args:
        scores: [B] on the CPU; NaN where a request could not be judged, or has no score yet.
        fired: [B] columns at which it fired, `NEVER` where it did not.
        reasons: [B] why a request could not be judged, or empty.
        rows: of a token reading: [B] the rows of the columns in `fired`.
    """

    scores: Tensor
    fired: Tensor
    reasons: tuple[str, ...]
    rows: Tensor | None = None

    @classmethod
    def of(
        cls,
        probe: Probe,
        scores: Tensor,
        finite: Tensor,
        ends: Tensor,
        reasons: Sequence[str] = (),
    ) -> Judged:
        """Of the results of `kernels.judge`, and reasons that were known before.

        Args:
            ends: [B] columns of the prompts' ends, where a pooled reading fires.
        """
        known = list(reasons) or [""] * len(scores)
        for row, sound in enumerate(finite.tolist()):
            if not sound and not known[row]:
                known[row] = reference.NOT_FINITE
        told = scores.float().cpu()
        if any(known):
            unjudged = torch.tensor([bool(reason) for reason in known], dtype=torch.bool)
            told = told.masked_fill(unjudged, math.nan)
        fires = torch.tensor([reference.fires_at(probe, score) for score in told.tolist()])
        return cls(told, torch.where(fires, ends, NEVER), tuple(known))

    def verdict(self, probe: Probe, request: int, end: int) -> Verdict:
        """The verdict on one request.

        Args:
            end: the column of its prompt's end.
        """
        fired = int(self.fired[request])
        place: Literal["", "prompt", "answer"] = "prompt" if fired <= end else "answer"
        return Verdict(
            probe.id,
            float(self.scores[request]),
            probe.threshold,
            probe.comparator,
            fired < NEVER,
            self.reasons[request],
            place if fired < NEVER else "",
            int(self.rows[request]) if self.rows is not None and fired < NEVER else None,
        )


def begins(spec: SteeringSpec, rule: int, fired: Mapping[int, Tensor], ends_B: Tensor) -> Tensor:
    """The first column [B] that a rule changes; `NEVER` where it does not hold.

    Args:
        rule: its index in the spec.
        fired: [B] columns at which each probe fired that the rule needs, by index.
        ends_B: columns of the prompts' ends.
    """
    condition = spec.rules[rule].condition
    if condition is None:
        return ends_B
    index = {probe.id: i for i, probe in enumerate(spec.probes)}
    columns = torch.stack([fired[index[id]] for id in condition.probes])
    found = columns.amin(dim=0) if condition.type == "any" else columns.amax(dim=0)
    return torch.maximum(found, ends_B)


def strengths(spec: SteeringSpec, rule: int, scores: Mapping[int, Tensor], requests: int) -> Tensor:
    """How strongly a rule acts [B] (float32); a score that is not finite counts as 1.

    Args:
        scores: [B] of the probe that the strength follows, by its index.
    """
    strength = spec.rules[rule].strength
    if isinstance(strength, ConstantStrength):
        return torch.full((requests,), strength.value, dtype=torch.float32)
    index = {probe.id: i for i, probe in enumerate(spec.probes)}
    value = scores[index[strength.probe]]
    return (strength.scale * torch.where(torch.isfinite(value), value, 1.0)).float()
