"""A runtime in numpy that does everything right, and the same one made wrong on purpose."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from steerbridge import reference
from steerbridge.errors import HookLost
from steerbridge.runtime import Outcome
from steerbridge.spec import parse_site
from steerbridge.testing.driver import Ability, Reply
from steerbridge.testing.model import CONTEXT, LAYERS, VOCAB, Cache


class Running:
    """The tiny model with a package. Every way to ask is the ordinary one here."""

    def __init__(self, model, package):
        self.model, self.package, self.broken = model, package, False

    def ask(self, prompts, new, how):
        batch = [self.model.encode(p) for p in prompts]
        if self.broken:
            raise HookLost("the hook is gone")
        outcomes = [self.judge(ids, batch) for ids in batch]
        replies = []
        for ids, outcome in zip(batch, outcomes, strict=True):
            acting = self.acting(outcome, outcomes)
            tokens, logits = self.decode(ids, how.cancel_after or new, acting)
            reply = Reply(tuple(tokens), self.told(outcome), logits)
            replies += [reply] * how.samples
        return replies

    def break_hook(self):
        self.broken = True

    # What mutants change.

    def judge(self, ids, batch):
        if self.package is None:
            return None
        rows = self.rows(ids)
        states, _ = self.model.forward(rows)
        images = self.model.of_picture(rows)
        verdicts = tuple(
            self.verdict(probe, lambda site: states[self.depth(site)], images)
            for probe in self.package.spec.probes
        )
        acting = {a.rule for a in reference.actions(self.package.spec, verdicts)}
        rules = tuple(r.id for r in self.package.spec.rules if r.id in acting)
        return Outcome(verdicts, rules)

    def rows(self, ids):
        return ids

    def depth(self, site):
        return self.package.spec.depth(site)

    def verdict(self, probe, hidden_at, images):
        return reference.judge(probe, self.package.tensors, hidden_at, images)

    def acting(self, outcome, outcomes):
        return () if outcome is None else reference.actions(self.package.spec, outcome.verdicts)

    def told(self, outcome):
        return outcome

    def acts(self, row):
        return True

    def decode(self, ids, new, acting):
        cache, tokens, first, rows = Cache(), [], None, ids
        for step in range(new):
            start = cache.rows

            def edit(depth, x, start=start, step=step):
                return self.edit(depth, x, start, len(ids), acting if self.acts(step) else ())

            logits = self.model.forward(rows, cache, edit if acting else None)[1][-1]
            first = logits if first is None else first
            tokens.append(int(np.argmax(logits)))
            rows = tokens[-1:]
        return tokens, first

    def edit(self, depth, x, start, prompt, acting):
        site = parse_site("head_input" if depth == LAYERS + 1 else f"layer_input[{depth}]")
        out = []
        for number, row in enumerate(x, start):
            now = [
                a
                for a in acting
                if number >= prompt - 1 or a.intervention.position == "all_positions"
            ]
            out.append(reference.steer(now, self.package.tensors, site, row))
        return np.asarray(out, np.float32)


class NumpyDriver:
    """Opens `running` with the package."""

    against = "simulator"
    abilities = frozenset(Ability)
    batch = 16
    context = CONTEXT
    tolerance = 1e-4
    margin = 1e-3
    kept_open = 0

    def __init__(self, name="numpy", running=Running, checks=True):
        self.name, self.running, self.checks = name, running, checks

    @contextmanager
    def open(self, files, package):
        if package is not None and self.checks:
            package.check(files.model.facts)
        yield self.running(files.model, package)


# ---------------------------------------------------------------- wrong on purpose


class JudgesOnlyTheFirst(Running):
    def judge(self, ids, batch):
        self.kept = getattr(self, "kept", None) or super().judge(ids, batch)
        return self.kept


class JudgesOneRowEarly(Running):
    def rows(self, ids):
        return ids[:-1] or ids


class JudgesRowZeroForAll(Running):
    def judge(self, ids, batch):
        return super().judge(batch[0], batch)


class KeepsAVerdict(Running):
    def judge(self, ids, batch):
        outcome = super().judge(ids, batch)
        if outcome is not None and outcome.rules:
            self.kept = outcome
        return getattr(self, "kept", outcome)


class NeverFires(Running):
    def acting(self, outcome, outcomes):
        return ()

    def told(self, outcome):
        if outcome is None:
            return None
        quiet = [
            reference.Verdict(v.probe, v.score, v.threshold, v.comparator, False)
            for v in outcome.verdicts
        ]
        return Outcome(tuple(quiet), ())


class TellsButDoesNotSteer(Running):
    def acting(self, outcome, outcomes):
        return ()


class AlwaysFires(Running):
    def judge(self, ids, batch):
        outcome = super().judge(ids, batch)
        if outcome is None:
            return None
        fired = [
            reference.Verdict(v.probe, v.score, v.threshold, v.comparator, True)
            for v in outcome.verdicts
        ]
        return Outcome(tuple(fired), tuple(r.id for r in self.package.spec.rules))


class SteersNeighbours(Running):
    def acting(self, outcome, outcomes):
        each = [super(SteersNeighbours, self).acting(o, outcomes) for o in outcomes]
        return next((acting for acting in each if acting), ())


class ForgetsAfter64Tokens(Running):
    def acts(self, step):
        return step < 64


class ReadsTheOutput(Running):
    def depth(self, site):
        return min(super().depth(site) + 1, LAYERS)


class DropsPictureRows(Running):
    def rows(self, ids):
        return [i for i in ids if i < VOCAB] or ids


class TakesOnePictureForAnother(Running):
    """Compares prompts by their tokens, in which every row of a picture is the same."""

    def judge(self, ids, batch):
        tokens = tuple(min(i, VOCAB) for i in ids)
        known = self.__dict__.setdefault("known", {})
        if tokens not in known:
            known[tokens] = super().judge(ids, batch)
        return known[tokens]


class HidesInfinity(Running):
    """Tests a score for finiteness after it was squashed."""

    def verdict(self, probe, hidden_at, images):
        x = reference.probe_input(probe, self.package.tensors, hidden_at, images)
        return reference.verdict(probe, float(reference.score(probe, self.package.tensors, x)[0]))


class NanIsQuiet(Running):
    def verdict(self, probe, hidden_at, images):
        verdict = super().verdict(probe, hidden_at, images)
        if not verdict.unjudged:
            return verdict
        return reference.Verdict(verdict.probe, 0.0, verdict.threshold, verdict.comparator, False)


class IgnoresStrength(Running):
    def acting(self, outcome, outcomes):
        import dataclasses

        return [dataclasses.replace(a, strength=1.0) for a in super().acting(outcome, outcomes)]


class SteersThePromptToo(Running):
    def edit(self, depth, x, start, prompt, acting):
        return super().edit(depth, x, start, 0, acting)


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
    SteersThePromptToo: ("vector",),
    SurvivesABrokenHook: ("hook that was removed",),
    FailsUntyped: ("batch",),
}
