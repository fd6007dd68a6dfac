"""What a guarded model must say: the tiny model and the reference semantics, nothing else.

`answer` computes one request by itself, row by row, without cache tricks, batches or hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerbridge import reference
from steerbridge.package import SteeringPackage
from steerbridge.reference import Action
from steerbridge.runtime import Outcome
from steerbridge.spec import parse_site
from steerbridge.testing.model import EOS, LAYERS, Cache, Float32, TinyModel


@dataclass(frozen=True, slots=True)
class Expected:
    """The right answer to one prompt.

    Args:
        outcome: verdicts and rules; None without a package.
        tokens: greedy tokens.
        logits: of the first token [V], as the program receives them.
        margins: for each token, the gap between the two best logits. A runtime whose logits are
            further off than that may choose another token.
    """

    outcome: Outcome | None
    tokens: tuple[int, ...]
    logits: Float32
    margins: tuple[float, ...]

    @property
    def margin(self) -> float:
        """The smallest of the margins."""
        return min(self.margins)

    def certain(self, margin: float) -> tuple[int, ...]:
        """The tokens before the first one with a smaller margin."""
        small = (i for i, gap in enumerate(self.margins) if gap < margin)
        return self.tokens[: next(small, len(self.tokens))]


def answer(
    model: TinyModel, package: SteeringPackage | None, prompt: Sequence[int], new: int
) -> Expected:
    """The verdicts on a prompt, and at most `new` greedy tokens."""
    ids = list(prompt)
    outcome = None if package is None else judge(model, package, ids)
    acting = () if outcome is None or package is None else _acting(package, outcome)
    edit = _Edit(package, acting, len(ids))
    cache, tokens, margins = Cache(), list[int](), list[float]()
    first = None
    rows = ids
    for _ in range(new):
        edit.start = cache.rows
        logits = model.forward(rows, cache, edit if acting else None)[1][-1]
        first = logits if first is None else first
        tokens.append(int(np.argmax(logits)))
        second, best = np.partition(logits, -2)[-2:]
        margins.append(float(best - second))
        if tokens[-1] == EOS:
            break
        rows = tokens[-1:]
    assert first is not None, "new must be at least 1"
    return Expected(outcome, tuple(tokens), first, tuple(margins))


def plain(model: TinyModel, prompt: Sequence[int], new: int) -> Expected:
    """The unsteered model's answer, computed once for each prompt."""
    key = (tuple(prompt), new)
    if key not in model.answers:
        model.answers[key] = answer(model, None, prompt, new)
    known: Expected = model.answers[key]
    return known


def judge(model: TinyModel, package: SteeringPackage, prompt: Sequence[int]) -> Outcome:
    """Verdicts and rules for a prompt."""
    ids = list(prompt)
    states, _ = model.forward(ids)
    depth, images = package.spec.depth, model.of_picture(ids)
    verdicts = tuple(
        reference.judge(probe, package.tensors, lambda site: states[depth(site)], images)
        for probe in package.spec.probes
    )
    rules = {action.rule for action in reference.actions(package.spec, verdicts)}
    held = tuple(rule.id for rule in package.spec.rules if rule.id in rules)
    return Outcome(verdicts, held)


def _acting(package: SteeringPackage, outcome: Outcome) -> tuple[Action, ...]:
    return reference.actions(package.spec, outcome.verdicts)


class _Edit:
    """Applies actions at their sites, to the rows from the prompt end on (or to all)."""

    def __init__(
        self, package: SteeringPackage | None, acting: Sequence[Action], prompt: int
    ) -> None:
        self._package, self._acting, self._prompt = package, acting, prompt
        self._everywhere = [a for a in acting if a.intervention.position == "all_positions"]
        self.start = 0  # number of the first row

    def __call__(self, depth: int, x: Float32) -> Float32:
        assert self._package is not None
        head = depth == LAYERS + 1
        site = parse_site("head_input" if head else f"layer_input[{depth}]")
        before = max(0, min(len(x), self._prompt - 1 - self.start))  # rows of the prompt
        parts = []
        for acting, rows in ((self._everywhere, x[:before]), (self._acting, x[before:])):
            steered = reference.steer(acting, self._package.tensors, site, rows)
            parts.append(np.asarray(steered, np.float32))
        return np.concatenate(parts)
