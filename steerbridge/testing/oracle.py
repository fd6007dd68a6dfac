"""What a guarded model must say: the tiny model and the reference semantics, nothing else.

`answer` computes one request by itself, row by row, without cache tricks, batches or hooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerbridge import reference
from steerbridge.package import SteeringPackage
from steerbridge.plan import Plan, plan, rule_probes
from steerbridge.reference import Verdict
from steerbridge.running import running_scores
from steerbridge.runtime import Outcome
from steerbridge.spec import Probe, Say, parse_site
from steerbridge.testing.model import EOS, LAYERS, Cache, Float32, TinyModel


@dataclass(frozen=True, slots=True)
class Expected:
    """The right answer to one prompt.

    Args:
        outcome: verdicts and rules, when the last token is chosen; None without a package.
        tokens: greedy tokens.
        logits: of the first token [V], as the program receives them.
        margins: for each token, the gap between the two best logits. A runtime whose logits are
            further off than that may choose another token.
        distance: of scores from their thresholds, relative above 1: the smallest at any row until
            a probe fired.
        told: verdicts and rules when a rule was decided last: at the prompt's end, or where one
            began in the answer.
        settled: whether the row of the last token, which some programs evaluate, changes nothing.
    """

    outcome: Outcome | None
    tokens: tuple[int, ...]
    logits: Float32
    margins: tuple[float, ...]
    distance: float = math.inf
    settled: bool = True
    told: Outcome | None = None

    @property
    def margin(self) -> float:
        """The smallest of the margins."""
        return min(self.margins)

    def certain(self, margin: float) -> tuple[int, ...]:
        """The tokens before the first one with a smaller margin."""
        small = (i for i, gap in enumerate(self.margins) if gap < margin)
        return self.tokens[: next(small, len(self.tokens))]


def answer(
    model: TinyModel,
    package: SteeringPackage | None,
    prompt: Sequence[int],
    new: int,
    guard: Guard | None = None,
) -> Expected:
    """The verdicts on a prompt, and at most `new` greedy tokens.

    Args:
        guard: a fresh one that the caller looks into afterwards.
    """
    ids = list(prompt)
    guard = None if package is None else guard or Guard(model, package, ids)
    cache, tokens, margins = Cache(), list[int](), list[float]()
    first, outcome, told = None, None, None
    rows = ids
    for _ in range(new):
        if guard is not None:
            guard.rows(rows)
        logits = model.forward(rows, cache, guard)[1][-1]
        if guard is not None:
            logits, outcome = guard.said(logits), guard.outcome
            told = outcome if told is None or told.rules != outcome.rules else told
        first = logits if first is None else first
        tokens.append(int(np.argmax(logits)))
        second, best = np.partition(logits, -2)[-2:]
        margins.append(float(best - second))
        if tokens[-1] == EOS:
            break
        rows = tokens[-1:]
    assert first is not None, "new must be at least 1"
    settled = True
    if guard is not None and guard.reads_answers:
        guard.rows(tokens[-1:])
        model.forward(tokens[-1:], cache, guard)
        settled = outcome is not None and guard.outcome.rules == outcome.rules
    distance = math.inf if guard is None else guard.distance
    return Expected(outcome, tuple(tokens), first, tuple(margins), distance, settled, told)


def plain(model: TinyModel, prompt: Sequence[int], new: int) -> Expected:
    """The unsteered model's answer, computed once for each prompt."""
    key = (tuple(prompt), new)
    if key not in model.answers:
        model.answers[key] = answer(model, None, prompt, new)
    known: Expected = model.answers[key]
    return known


def judge(model: TinyModel, package: SteeringPackage, prompt: Sequence[int]) -> Outcome:
    """Verdicts and rules for a prompt, at its end."""
    outcome = answer(model, package, prompt, 1).outcome
    assert outcome is not None
    return outcome


class Guard:
    """An edit of `TinyModel.forward` that judges and steers one sequence as it is computed."""

    def __init__(self, model: TinyModel, package: SteeringPackage, prompt: Sequence[int]) -> None:
        self.model, self.package = model, package
        self._plan: Plan = plan(package.spec)
        self._stops = {stop.depth: stop for stop in self._plan.stops}
        self.ids, self.end = list[int](), len(prompt) - 1
        self._states: dict[int, Float32] = {}  # by depth, of all rows
        self.verdicts: dict[str, Verdict] = {}
        self.begun = {rule: (self.end, self.strength(rule)) for rule in self._plan.unconditional}
        self.distance = math.inf
        self.highest: dict[str, float] = {}
        """The largest running score so far by probe, before it is squashed."""

    @property
    def reads_answers(self) -> bool:
        """Whether some probe reads rows behind the prompt."""
        readings = [probe.token_reading for probe in self.package.spec.probes]
        return any(reading is not None and reading.scope != "prompt" for reading in readings)

    @property
    def outcome(self) -> Outcome:
        """What is known after the last pass."""
        spec = self.package.spec
        verdicts = tuple(self.verdicts[probe.id] for probe in spec.probes)
        return Outcome(verdicts, tuple(r.id for i, r in enumerate(spec.rules) if i in self.begun))

    def rows(self, ids: Sequence[int]) -> None:
        """The next pass evaluates these."""
        self.ids += ids

    def __call__(self, depth: int, x: Float32) -> Float32:
        """Rows of the pass at a depth: read, judged, and changed."""
        stop = self._stops.get(depth)
        if stop is None:
            return x
        before = self._states.get(depth, x[:0])
        self._states[depth] = np.concatenate([before, x])
        for probe in stop.probes:
            self.judge(probe)
        for rule in stop.rules:
            self.decide(rule)
        return self.steered(depth, x, len(before))

    def hidden(self, site: object) -> Float32:
        """States [T, D] of all rows so far at a site."""
        return self._states[self.package.spec.depth(site)]  # type: ignore[arg-type]

    def judge(self, index: int) -> None:
        """The verdict of a probe whose sites were reached."""
        probe = self.package.spec.probes[index]
        if probe.token_reading is not None:
            self.verdicts[probe.id] = self.of_rows(probe)
        elif probe.id not in self.verdicts:
            self.verdicts[probe.id] = verdict = self.of_prompt(probe)
            self._note(verdict.score, verdict.threshold)

    def of_prompt(self, probe: Probe) -> Verdict:
        """The verdict of a pooled reading."""
        images = self.model.of_picture(self.ids)
        return reference.judge(probe, self.package.tensors, self.hidden, images)

    def of_rows(self, probe: Probe) -> Verdict:
        """The verdict of a token reading on the rows so far."""
        reading = probe.token_reading
        assert reading is not None
        x = reference.row_inputs(reading, self.hidden)
        logits = reference.row_logits(probe, self.package.tensors, x)
        sound = np.isfinite(x).all(axis=1) & np.isfinite(logits)
        counted = reference.counted(reading, len(x), self.model.of_picture(self.ids))
        verdict = reference.judge_rows(probe, logits, sound, counted, self.end)
        scores = running_scores(reference.window(reading), logits, counted, self.end)
        if not np.isnan(scores).all():
            self.highest[probe.id] = float(np.nanmax(scores))
        for score in scores[: None if verdict.row is None else verdict.row + 1]:
            self._note(float(reference.running_score(score)), probe.threshold)
        return verdict

    def _note(self, score: float, threshold: float) -> None:
        if math.isfinite(score):
            gap = abs(score - threshold) / max(1.0, abs(threshold))
            self.distance = min(self.distance, gap)

    def decide(self, index: int) -> None:
        """Whether a rule begins at one of the rows so far."""
        needed = rule_probes(self.package.spec, index)
        if index in self.begun or not needed:
            return
        begin = reference.begins(self.package.spec.rules[index], self.verdicts, self.end)
        if begin is not None:
            self.begun[index] = (begin, self.strength(index))

    def strength(self, index: int) -> float:
        """How strongly a rule acts that begins now."""
        return reference.strength(self.package.spec.rules[index], self.verdicts)

    def steered(self, depth: int, x: Float32, start: int) -> Float32:
        """Rows from number `start` on after the rules acted at a depth."""
        spec, numbers = self.package.spec, np.arange(start, start + len(x))
        site = parse_site("head_input" if depth == LAYERS + 1 else f"layer_input[{depth}]")
        for index, rule in enumerate(spec.rules):
            for id in rule.interventions if index in self.begun else ():
                begin, strength = self.begun[index]
                act = spec.intervention(id)
                rows = numbers >= (0 if act.position == "all_positions" else begin)
                if rows.any():
                    changed = reference.apply(act, self.package.tensors, site, x[rows], strength)
                    x = x.copy()
                    x[rows] = changed
        return x

    def said(self, logits: Float32) -> Float32:
        """The logits [V] of the last row, as the program receives them."""
        spec, row = self.package.spec, len(self.ids) - 1
        acts = [
            (self.begun[i][0], act)
            for i, rule in enumerate(spec.rules)
            for act in map(spec.intervention, rule.interventions)
            if i in self.begun and isinstance(act, Say)
        ]
        if not acts:
            return logits
        begin, say = min(acts, key=lambda known: known[0])
        script = reference.script(say, self.ids[: begin + 1], self.end)
        return reference.said(script, row - begin, len(logits))
