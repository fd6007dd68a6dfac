"""What must fail closed: states, packages, hooks."""

from __future__ import annotations

from typing import Final

from steerbridge.errors import SteerbridgeError
from steerbridge.fingerprint import text_sha256
from steerbridge.testing import cases
from steerbridge.testing.cases import NEW, Case, linear
from steerbridge.testing.driver import Ability, How
from steerbridge.testing.kit import Guarded, Lacking, Trial, Wrong
from steerbridge.testing.model import NAN, OVERFLOW, TRAP_LAYER, VOCAB
from steerbridge.testing.oracle import plain
from steerbridge.testing.shapes.table import ONE, Table, first

TABLE: Final = Table()


@TABLE.shape("a state that is not a number")
def _(trial: Trial) -> None:
    for which in ("head", "mean"):
        with trial.guarded(which, alone=True) as guard:  # what is in its cache stays there
            quiet = guard.case.quiet[0]
            _unjudged(guard, quiet + NAN)
            if _recovers(trial, quiet, NAN):
                guard.right([quiet])


def _recovers(trial: Trial, prompt: str, trap: str) -> bool:
    """Whether the runtime without a package answers a prompt behind one with a trap in it.
    llama-server and scripts with llama.cpp do not: NaN stays in their cache. One that never runs
    without a package has to."""
    try:
        with trial.driver.open(trial.ground.files, None) as running:
            running.ask([prompt + trap], NEW, How())
            [reply] = running.ask([prompt], NEW, How())
    except SteerbridgeError:
        return True
    want = plain(trial.model, trial.model.encode(prompt), NEW).tokens
    return reply.tokens in (None, want)


@TABLE.shape("an infinite state that a sigmoid would hide")
def _(trial: Trial) -> None:
    """Channel 0 overflows; with a negative weight the logit is minus infinity, its sigmoid 0."""
    site = f"layer_input[{TRAP_LAYER + 1}]"
    case = trial.ground.case("overflow", lambda: _negative(trial, site))
    with trial.guarded(case, alone=True) as guard:
        quiet = case.quiet[0]
        _unjudged(guard, quiet + OVERFLOW)
        if _recovers(trial, quiet, OVERFLOW):
            guard.right([quiet])


def _negative(trial: Trial, site: str) -> Case:
    case = cases.case(trial.model, probes=[linear(readings=[cases.reading(site)])], seed=11)
    weight = case.package.tensors["p.weight"]
    if weight.float32()[0] < 0:
        return case
    return cases.case(trial.model, probes=[linear(readings=[cases.reading(site)])], seed=12)


def _unjudged(guard: Guarded, prompt: str) -> None:
    """Ask a prompt that cannot be judged: its rule must hold. Its tokens mean nothing."""
    [reply] = guard.ask([prompt])
    if reply.outcome is None:
        return
    outcome = reply.outcome
    if not (outcome.fired and outcome.rules):
        raise Wrong(f"{prompt!r} cannot be judged, and did not fire: {outcome}")
    silent = [v.probe for v in outcome.verdicts if not v.unjudged]
    if silent:
        raise Wrong(f"{prompt!r} cannot be judged, and the verdict of {silent} does not say so")


@TABLE.shape("a neighbour of a state that is not a number", Ability.BATCH)
def _(trial: Trial) -> None:
    case = trial.case()
    quiet, want = case.quiet[0], case.expected(case.quiet[0])
    batch = [quiet, case.quiet[1] + NAN, quiet]
    if any(reply.tokens not in (None, want.tokens) for reply in trial.plain(batch)[::2]):
        raise Lacking("without a package, too, NaN reaches the other sequences of a batch")
    with trial.guarded(alone=True) as guard:
        replies = guard.ask(batch)
        for reply in replies[::2]:
            if reply.outcome is not None and reply.outcome.fired:
                raise Wrong(f"{quiet!r} fired beside a prompt that cannot be judged")
            if reply.tokens is not None and reply.tokens != want.tokens:
                raise Wrong(f"{quiet!r} got other tokens beside a prompt that cannot be judged")


@TABLE.shape("a prompt shorter than its reading needs")
def _(trial: Trial) -> None:
    with trial.guarded("earlier") as guard:
        short = first(ONE, lambda p: guard.case.expected(p).margin > 0.02, "one token")
        guard.right([short])
        guard.right(guard.case.quiet[:1])


@TABLE.shape("a package for another model")
def _(trial: Trial) -> None:
    package = trial.case().package
    for change in ({"vocab_size": VOCAB + 1}, {"tokenizer_sha256": "0" * 64}):
        other = package.replace(base_model=package.spec.base_model.replace(**change))
        with (
            trial.refusal(f"a package for a model with another {next(iter(change))}"),
            trial.driver.open(trial.ground.files, other) as running,
        ):
            running.ask(["hello"], 1, How())


@TABLE.shape("a package for another chat template", Ability.TEMPLATE)
def _(trial: Trial) -> None:
    package = trial.case().package
    base = package.spec.base_model
    other = package.replace(base_model=base.replace(chat_template_sha256=text_sha256("another")))
    with (
        trial.refusal("a package for another chat template"),
        trial.driver.open(trial.ground.templated, other) as running,
    ):
        running.ask(["hello"], 1, How())


@TABLE.shape("a hook that was removed", Ability.BREAK)
def _(trial: Trial) -> None:
    for which in ("head", "layers"):
        with trial.guarded(which, alone=True) as guard:
            guard.right(guard.case.fired[:1])
            guard.running.break_hook()
            with trial.refusal("a request without the hook"):
                guard.ask(guard.case.fired[:1])


@TABLE.shape("a restart in the middle", Ability.RESTART)
def _(trial: Trial) -> None:
    for _ in range(2):
        with trial.guarded("mean", alone=True) as guard:
            guard.right(guard.case.fired[:1])
            guard.right(guard.case.quiet[:1])


@TABLE.shape("the unsteered model after the guard")
def _(trial: Trial) -> None:
    """A package leaves no trace on a model that is opened again without it."""
    with trial.guarded() as guard:
        prompt = guard.case.fired[0]
        guard.right([prompt])
    [reply] = trial.plain([prompt])
    want = plain(trial.model, trial.model.encode(prompt), NEW)
    if reply.tokens is not None and reply.tokens != want.tokens:
        raise Wrong(f"{prompt!r}: expected {want.tokens}, found {reply.tokens}")


@TABLE.shape("a probe that acts on nothing")
def _(trial: Trial) -> None:
    """Verdicts alone: no rule, no intervention."""
    name = "a probe that acts on nothing"
    case = trial.ground.case(
        name, lambda: cases.case(trial.model, interventions=[], rules=[], seed=13)
    )
    with trial.guarded(case) as guard:
        for prompt in case.prompts[:4]:
            guard.right([prompt])
