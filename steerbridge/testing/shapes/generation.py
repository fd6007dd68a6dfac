"""Ways to generate: streams, samples, beams, threads, drafts."""

from __future__ import annotations

from typing import Final

from steerbridge.testing.cases import NEW
from steerbridge.testing.driver import Ability
from steerbridge.testing.kit import Trial, Wrong
from steerbridge.testing.shapes.table import Table

TABLE: Final = Table()


@TABLE.shape("streaming", Ability.STREAM)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.fired[:1], stream=True)
        guard.right(guard.case.quiet[:1], stream=True)


@TABLE.shape("sampling at a very low temperature", Ability.SAMPLING)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for prompts in (guard.case.fired, guard.case.quiet):
            for prompt in prompts[:2]:
                guard.right([prompt], temperature=1e-3)


@TABLE.shape("several answers to one prompt", Ability.SAMPLES)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.fired[:1], samples=3, temperature=1e-3)
        guard.right(guard.case.quiet[:1], samples=2, temperature=1e-3)


@TABLE.shape("beam search", Ability.BEAMS)
def _(trial: Trial) -> None:
    """Which beam wins is the runtime's choice; the verdict is not, nor a quiet prompt's beams."""
    case = trial.case()
    quiet, fired = case.quiet[:1], case.fired[:1]
    plain = [trial.plain(prompts, beams=3)[0].tokens for prompts in (quiet, fired)]
    with trial.guarded() as guard:
        if guard.right(quiet, beams=3)[0].tokens != plain[0]:
            raise Wrong("a quiet prompt has other beams than without the package")
        if guard.right(fired, beams=3)[0].tokens == plain[1]:
            raise Wrong("a prompt that fires has the beams of the unsteered model")


@TABLE.shape("requests from several threads", Ability.THREADS)
def _(trial: Trial) -> None:
    with trial.guarded("both") as guard:
        mixed = [p for pair in zip(guard.case.fired, guard.case.quiet, strict=False) for p in pair]
        guard.right(mixed[:8], threads=True)


@TABLE.shape("drafts from n-grams", Ability.NGRAM_DRAFTS)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for prompt in (guard.case.fired[0], guard.case.quiet[0], guard.case.fired[1]):
            repeated = prompt + prompt
            text = repeated if guard.case.sound(repeated, 16) else prompt
            guard.right([text], 16 if text is repeated else NEW, drafts="ngram")


@TABLE.shape("drafts from a smaller model", Ability.MODEL_DRAFTS)
def _(trial: Trial) -> None:
    """The drafting model has other weights, so most of its drafts are rejected."""
    with trial.guarded() as guard:
        for prompt in (guard.case.fired[0], guard.case.quiet[0], guard.case.fired[1]):
            guard.right([prompt], drafts="model")
