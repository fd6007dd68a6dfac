"""One prompt at a time: lengths, long answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from steerbridge.testing import cases
from steerbridge.testing.cases import Case
from steerbridge.testing.driver import Driver
from steerbridge.testing.kit import Guarded, Trial
from steerbridge.testing.shapes.table import Table, first, sound

TABLE: Final = Table()

LONG: Final = 150  # tokens of a long answer


@TABLE.shape("a quiet prompt")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.quiet[:1])


@TABLE.shape("a prompt that fires")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.fired[:1])


@TABLE.shape("many prompts, one after another")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for pair in zip(guard.case.fired[:8], guard.case.quiet[:8], strict=True):
            for prompt in pair:
                guard.right([prompt])


def _of_length(case: Case, length: int) -> Iterator[str]:
    """Sound prompts of a length, quiet ones and ones that fire in turn."""
    stem = "".join(cases.prompts_of(5, count=2 + length // 3))
    sides: dict[bool, str] = {}
    for start in range(min(len(stem), max(4, 2048 // length))):  # long ones take their time
        prompt = (stem[start:] + stem[:start])[:length]
        if case.sound(prompt):
            sides.setdefault(bool(case.expected(prompt, 1).outcome.rules), prompt)  # type: ignore[union-attr]
        if len(sides) == 2:
            break
    assert sides, f"the tiny model has no sound prompt of {length} tokens"
    return iter(sides.values())


def _length_shape(name: str, length: Callable[[Driver], int]) -> None:
    @TABLE.each(name, kinds=("head", "mean"))
    def _(guard: Guarded) -> None:
        for prompt in _of_length(guard.case, length(guard.driver)):
            guard.right([prompt])


_length_shape("prompts of one token", lambda _: 1)
_length_shape("prompts of two tokens", lambda _: 2)
_length_shape("prompts of exactly one batch", lambda driver: driver.batch)
_length_shape("prompts of one batch and a token", lambda driver: driver.batch + 1)
_length_shape("prompts of two batches and a token", lambda driver: 2 * driver.batch + 1)


@TABLE.shape("a prompt longer than the context")
def _(trial: Trial) -> None:
    """A runtime without a limit answers it; one with a limit refuses it before a token."""
    with trial.guarded() as guard:
        guard.right(["ab" * (trial.driver.context // 2 + 1)], new=1)


@TABLE.shape("a prompt of characters of several bytes")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        texts = [f"{p}é€\N{SNOWMAN}{p[:4]}" for p in cases.prompts_of(6)]
        for fired in (True, False):
            wanted = partial(sound, guard.case, fired=fired)
            guard.right([first(texts, wanted, "several bytes")])


@TABLE.shape("an answer of many tokens")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for prompts in (guard.case.fired, guard.case.quiet):
            best = max(prompts[:6], key=lambda p: guard.case.expected(p, LONG).margin)
            guard.right([best], LONG)
