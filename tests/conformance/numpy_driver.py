"""A runtime in numpy that does everything right, and the same one made wrong on purpose."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import numpy as np

from steerbridge import reference
from steerbridge.errors import HookLost
from steerbridge.testing.driver import Ability, Reply
from steerbridge.testing.model import CONTEXT, EOS, LAYERS, VOCAB, Cache
from steerbridge.testing.oracle import Guard


class Running:
    """The tiny model with a package. Every way to ask is the ordinary one here.

    `memory` is what a guard may keep between requests; only wrong ones do.
    """

    guard = Guard

    def __init__(self, model, package):
        self.model, self.package, self.broken, self.memory = model, package, False, {}

    def ask(self, prompts, new, how):
        batch = [self.model.encode(p) for p in prompts]
        if self.broken:
            raise HookLost("the hook is gone")
        guards = [self.guarded(ids) for ids in batch]
        replies = []
        for ids, guard in zip(batch, guards, strict=True):
            tokens, logits, outcome = self.decode(ids, how.cancel_after or new, guard)
            replies += [Reply(tuple(tokens), outcome, logits)] * how.samples
        return replies

    def guarded(self, ids):
        if self.package is None:
            return None
        guard = self.guard(self.model, self.package, ids)
        guard.memory = self.memory
        return guard

    def break_hook(self):
        self.broken = True

    def decode(self, ids, new, guard):
        cache, tokens, first, rows, outcome = Cache(), [], None, ids, None
        for _ in range(new):
            if guard is not None:
                guard.rows(rows)
            logits = self.model.forward(rows, cache, guard)[1][-1]
            if guard is not None:
                logits, outcome = guard.said(logits), guard.outcome
            first = logits if first is None else first
            tokens.append(int(np.argmax(logits)))
            if tokens[-1] == EOS:
                break
            rows = tokens[-1:]
        return tokens, first, outcome


class NumpyDriver:
    """Opens `running` with the package."""

    against = "simulator"
    abilities = frozenset(Ability)
    batch = 16
    context = CONTEXT
    tolerance = 1e-4
    margin = 1e-3
    tells_the_end = True
    kept_open = 0

    def __init__(self, name="numpy", kind=Running, checks=True):
        """`kind` is a way to run, or a guard for the ordinary one."""
        guards = issubclass(kind, Guard)
        self.running = type(name, (Running,), {"guard": kind}) if guards else kind
        self.name, self.checks = name, checks

    @contextmanager
    def open(self, files, package):
        if package is not None and self.checks:
            package.check(files.model.facts)
        yield self.running(files.model, package)


# ---------------------------------------------------------------- wrong on purpose


class JudgesOnlyTheFirst(Guard):
    def of_prompt(self, probe):
        return self.memory.setdefault(probe.id, super().of_prompt(probe))


class JudgesOneRowEarly(Guard):
    def of_prompt(self, probe):
        def hidden(site):
            states = self.hidden(site)
            return states[:-1] if len(states) > 1 else states

        return reference.judge(probe, self.package.tensors, hidden)


class KeepsAVerdict(Guard):
    def decide(self, index):
        super().decide(index)
        if index in self.begun:
            self.memory[index] = self.begun[index][1]
        if index in self.memory:
            self.begun.setdefault(index, (self.end, self.memory[index]))


class NeverFires(Guard):
    def decide(self, index):
        pass

    def of_prompt(self, probe):
        return dataclasses.replace(super().of_prompt(probe), fired=False, fired_in="")


class TellsButDoesNotSteer(Guard):
    def steered(self, depth, x, start):
        return x


class AlwaysFires(Guard):
    def of_prompt(self, probe):
        return dataclasses.replace(super().of_prompt(probe), fired=True, fired_in="prompt")


class ForgetsAfter64Tokens(Guard):
    def steered(self, depth, x, start):
        return x if start - self.end > 64 else super().steered(depth, x, start)


class ReadsTheOutput(Guard):
    def hidden(self, site):
        states, _ = self.model.forward(self.ids)
        return states[min(self.package.spec.depth(site) + 1, LAYERS)]


class DropsPictureRows(Guard):
    def of_prompt(self, probe):
        kept = ~self.model.of_picture(self.ids)
        keep = kept if kept.any() else ~kept
        return reference.judge(probe, self.package.tensors, lambda s: self.hidden(s)[keep])


class TakesOnePictureForAnother(Guard):
    """Compares prompts by their tokens, in which every row of a picture is the same."""

    def of_prompt(self, probe):
        tokens = (probe.id, *(min(i, VOCAB) for i in self.ids))
        return self.memory.setdefault(tokens, super().of_prompt(probe))


class HidesInfinity(Guard):
    """Tests a score for finiteness after it was squashed."""

    def of_prompt(self, probe):
        images = self.model.of_picture(self.ids)
        x = reference.probe_input(probe, self.package.tensors, self.hidden, images)
        return reference.verdict(probe, float(reference.score(probe, self.package.tensors, x)[0]))


class NanIsQuiet(Guard):
    def of_prompt(self, probe):
        verdict = super().of_prompt(probe)
        if not verdict.unjudged:
            return verdict
        return reference.Verdict(verdict.probe, 0.0, verdict.threshold, verdict.comparator, False)


class IgnoresStrength(Guard):
    def strength(self, index):
        return 1.0


class SteersThePromptToo(Guard):
    def decide(self, index):
        super().decide(index)
        if index in self.begun:
            self.begun[index] = (0, self.begun[index][1])


class IgnoresTheAnswer(Guard):
    def of_rows(self, probe):
        return self.verdicts.get(probe.id) or super().of_rows(probe)


class BeginsARowLate(Guard):
    def decide(self, index):
        known = index in self.begun
        super().decide(index)
        if not known and index in self.begun and self.begun[index][0] > self.end:
            self.begun[index] = (self.begun[index][0] + 1, self.begun[index][1])


class BeginsAtThePromptsEnd(Guard):
    """A rule that fires in the answer says its sentence from the middle on."""

    def said(self, logits):
        for index, (_, strength) in self.begun.items():
            self.begun[index] = (self.end, strength)
        return super().said(logits)


class ForgetsTheLastBatch(Guard):
    """Running scores begin anew with every batch of 16 rows."""

    def of_rows(self, probe):
        first = (len(self.ids) - 1) // 16 * 16
        ids, end = self.ids, self.end
        self.hidden = lambda site: Guard.hidden(self, site)[first:]
        self.ids, self.end = ids[first:], end - first
        try:
            return super().of_rows(probe)
        finally:
            del self.hidden
            self.ids, self.end = ids, end


class TellsAnotherRow(Guard):
    def of_rows(self, probe):
        verdict = super().of_rows(probe)
        row = verdict.row
        return verdict if row is None else dataclasses.replace(verdict, row=row + 1)


class FollowsItsScore(Guard):
    """A strength that goes on following the score behind the row where the rule begins."""

    def steered(self, depth, x, start):
        for index, (begin, _) in self.begun.items():
            self.begun[index] = (begin, self.strength(index))
        return super().steered(depth, x, start)


class SaysBesides(Guard):
    """A sentence that is likely, not certain."""

    def said(self, logits):
        forced = super().said(logits)
        return forced if forced is logits else logits + np.where(forced == 0, 3, 0)


class JudgesRowZeroForAll(Running):
    def ask(self, prompts, new, how):
        first = self.model.encode(prompts[0])
        alone = self.guarded(first)
        if alone is not None:
            alone.rows(first)
            self.model.forward(first, Cache(), alone)
            self.verdicts = alone.verdicts
        return super().ask(prompts, new, how)

    def guarded(self, ids):
        guard = super().guarded(ids)
        if guard is not None and hasattr(self, "verdicts"):
            guard.of_prompt = lambda probe: self.verdicts[probe.id]
        return guard


class SteersNeighbours(Running):
    def ask(self, prompts, new, how):
        batch = [self.model.encode(p) for p in prompts]
        guards = [self.guarded(ids) for ids in batch]
        for ids, guard in zip(batch, guards, strict=True):
            if guard is not None:
                guard.rows(ids)
                self.model.forward(ids, Cache(), guard)
        self.begun = next((dict(g.begun) for g in guards if g and g.begun), {})
        return super().ask(prompts, new, how)

    def guarded(self, ids):
        guard = super().guarded(ids)
        if guard is not None:
            for index, (_, strength) in getattr(self, "begun", {}).items():
                guard.begun[index] = (guard.end, strength)
        return guard


class SurvivesABrokenHook(Running):
    def break_hook(self):
        self.package = None


class FailsUntyped(Running):
    def ask(self, prompts, new, how):
        if len(prompts) > 1:
            raise IndexError("list index out of range")
        return super().ask(prompts, new, how)


# Mutant -> words of the shapes of which at least one must find it.
MUTANTS = {
    JudgesOnlyTheFirst: ("one after another", "same prompt again", "batch"),
    JudgesOneRowEarly: ("a prompt that fires", "extends the last by one token"),
    JudgesRowZeroForAll: ("a batch of",),
    KeepsAVerdict: ("one after another", "cancelled"),
    NeverFires: ("a prompt that fires",),
    TellsButDoesNotSteer: ("a prompt that fires",),
    AlwaysFires: ("a quiet prompt",),
    SteersNeighbours: ("a batch of", "neighbour"),
    ForgetsAfter64Tokens: ("many tokens",),
    ReadsTheOutput: ("reading",),
    DropsPictureRows: ("picture",),
    TakesOnePictureForAnother: ("another picture",),
    HidesInfinity: ("infinite",),
    NanIsQuiet: ("not a number",),
    IgnoresStrength: ("strength by score",),
    IgnoresTheAnswer: ("token readings",),
    BeginsARowLate: ("token readings",),
    BeginsAtThePromptsEnd: ("say:",),
    ForgetsTheLastBatch: ("three batches",),
    TellsAnotherRow: ("token reading",),
    FollowsItsScore: ("strength by its score",),
    SaysBesides: ("say:",),
    SteersThePromptToo: ("vector",),
    SurvivesABrokenHook: ("hook that was removed",),
    FailsUntyped: ("batch",),
}
