"""What a guard decides about prompts in every form, or behind every attack; nothing is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerbridge import calibration, stats
from steerbridge.data import Example
from steerbridge.datasets import attacks, forms
from steerbridge.package import SteeringPackage
from steerbridge.runtime import LoadedModel, Progress

Variants = Mapping[str, Callable[[Example], Example]]


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many prompts fire."""

    fired: int
    prompts: int

    @property
    def value(self) -> float:
        return self.fired / self.prompts

    def to_json(self) -> dict[str, Any]:
        """With the 95 % interval."""
        low, high = stats.wilson_interval(self.fired, self.prompts)
        return {
            "share": round(self.value, 5),
            "interval": [round(low, 5), round(high, 5)],
            "prompts": self.prompts,
        }

    def __str__(self) -> str:
        low, high = stats.wilson_interval(self.fired, self.prompts)
        return f"{self.value:6.1%}  ({low:.1%} to {high:.1%}, {self.prompts} prompts)"


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table: a form or an attack."""

    name: str
    detected: Share | None  # of harmful prompts
    fpr: Share | None  # of harmless ones

    def to_json(self) -> dict[str, Any]:
        return {
            "detected": self.detected and self.detected.to_json(),
            "fpr": self.fpr and self.fpr.to_json(),
        }


def in_forms(model: LoadedModel) -> Variants:
    """Every form that the model's template can render, around material that is never trained on."""
    around = forms.material("test")
    any_text = Example("What is this?", harmful=False)

    def variant(form: str) -> Callable[[Example], Example]:
        return lambda e: forms.rendered(e, form, around)

    return {form: variant(form) for form in forms.renderable(model, any_text, forms.FORMS)}


def behind_attacks() -> Variants:
    """Every attack of `steerbridge.datasets.attacks`."""

    def variant(attack: str) -> Callable[[Example], Example]:
        return lambda e: attacks.attacked(e, attack)

    return {attack: variant(attack) for attack in attacks.ATTACKS}


def table(
    model: LoadedModel,
    package: SteeringPackage,
    prompts: Sequence[Example],
    variants: Variants,
    progress: Progress | None = None,
) -> list[Line]:
    """One line for each variant of the prompts.

    Raises:
        DataError: no rule of the package has a condition, or one of its probes reads answers alone.
    """
    put = [variant(e) for variant in variants.values() for e in prompts]
    fired = calibration.margins(package, calibration.scores(model, package, put, progress)) > 0
    harmful = np.array([e.harmful for e in prompts])
    by_variant = np.reshape(fired, (len(variants), len(prompts)))
    return [
        Line(name, share(mine[harmful]), share(mine[~harmful]))
        for name, mine in zip(variants, by_variant, strict=True)
    ]


def share(fired: NDArray[np.bool_]) -> Share | None:
    """None of no prompts."""
    return Share(int(fired.sum()), len(fired)) if len(fired) else None


def shown(lines: Sequence[Line]) -> list[str]:
    """The table as lines of text."""
    width = max(len(line.name) for line in lines)
    return [
        f"{line.name:<{width}}  {what:<9} {value}"
        for line in lines
        for what, value in (("detected", line.detected), ("harmless", line.fpr))
        if value is not None
    ]
