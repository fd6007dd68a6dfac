"""Prompts with pictures, in the first turn and in later ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

from steerbridge.testing import cases, vision
from steerbridge.testing.cases import Case
from steerbridge.testing.driver import Ability
from steerbridge.testing.kit import Guarded, Trial
from steerbridge.testing.shapes.table import KINDS, Table, first, sound
from steerbridge.testing.vision import PICTURES

TABLE: Final = Table()


def _each(
    name: str, *needs: Ability, kinds: Sequence[str] = ("head", "mean", "pictures")
) -> Callable[[Callable[[Guarded], None]], None]:
    """Add a shape for each kind of package; it is given a running guard."""

    def add(run: Callable[[Guarded], None]) -> None:
        for kind in kinds:

            @TABLE.shape(name + KINDS[kind], Ability.PICTURES, *needs)
            def _(trial: Trial, kind: str = kind) -> None:
                with trial.guarded(trial.ground.pictured[kind]) as guard:
                    run(guard)

    return add


def _fires(case: Case, prompt: str) -> bool:
    outcome = case.expected(prompt, 1).outcome
    assert outcome is not None
    return bool(outcome.rules)


def _of_both_kinds(case: Case, prompts: Iterable[str], what: str) -> list[str]:
    """A sound prompt that fires, and a quiet one."""
    texts = list(prompts)
    return [first(texts, partial(sound, case, fired=fired), what) for fired in (True, False)]


def _ask(guard: Guarded, *forms: str) -> None:
    """One prompt of each form that fires, and a quiet one; `p` is a picture and `t` a text."""
    for form in forms:
        texts = cases.prompts_of(11)
        made = (_made(form, pictures, text) for text in texts for pictures in _ORDERS)
        for prompt in _of_both_kinds(guard.case, made, form):
            guard.right([prompt])


def _made(form: str, pictures: Sequence[str], text: str) -> str:
    left = itertools.cycle(pictures)
    return "".join(next(left) if part == "p" else text for part in form)


_ORDERS: Final = list(itertools.permutations(PICTURES))


@_each("a picture before the text", kinds=("head", "mean", "pictures", "layers"))
def _(guard: Guarded) -> None:
    _ask(guard, "pt")


@_each("a picture behind the text", kinds=("head", "pictures"))
def _(guard: Guarded) -> None:
    _ask(guard, "tp")


@_each("a picture alone")
def _(guard: Guarded) -> None:
    alone = [p for p in guard.case.prompts if not set(p) - set(PICTURES)]
    assert alone, "the tiny model has no sound prompt of pictures alone"
    for prompt in alone[:4]:
        guard.right([prompt])


@_each("several pictures")
def _(guard: Guarded) -> None:
    _ask(guard, "ptp", "ppt")


@_each("a text without a picture, for a model that sees", kinds=("head", "pictures"))
def _(guard: Guarded) -> None:
    texts = [p for p in guard.case.prompts if not set(p) & set(PICTURES)]
    assert texts, "the tiny model has no sound text"
    for prompt in texts[:4]:
        guard.right([prompt])


@_each("another picture with the same words", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    """Rows of pictures are no tokens: a cache must not take one picture for another."""
    case = guard.case
    for text in cases.prompts_of(12):
        prompts = [p + text for p in PICTURES if case.sound(p + text)]
        sides = {_fires(case, p): p for p in prompts}
        if len(sides) == 2:
            for fired in (False, True, False):
                guard.right([sides[fired]], keep=True)
            return
    raise AssertionError("the tiny model has no such prompts")


@_each("the same picture with other words", Ability.CONVERSATION, kinds=("head", "mean"))
def _(guard: Guarded) -> None:
    for picture in PICTURES[:2]:
        made = (picture + text for text in cases.prompts_of(13))
        fired, quiet = _of_both_kinds(guard.case, made, "the same picture")
        for prompt in (quiet, fired, quiet):
            guard.right([prompt], keep=True)


def _turn(guard: Guarded, starts: Sequence[str], more: Sequence[str]) -> None:
    """A prompt that fires and a quiet one, each with one that goes on behind its answer.

    The second verdict is another one than the first where the tiny model has such a prompt.
    """
    case = guard.case
    sides = {_fires(case, start): start for start in starts}
    for fires, start in sides.items():
        said = bytes(case.expected(start).tokens).decode()
        turns = [start + said + vision.END + text for text in more]
        other = (p for p in turns if _fires(case, p) != fires and case.sound(p))
        turn = next(other, None) or first(turns, case.sound, "a later turn")
        for prompt in (start, turn):
            guard.right([prompt], keep=True)


@_each("a picture in a later turn", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    starts = [p for p in guard.case.prompts if not set(p) & set(PICTURES)]
    _turn(guard, starts, [p + text for text in cases.prompts_of(14, 16) for p in PICTURES])


@_each("a turn of text behind a picture", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    starts = [p for p in guard.case.prompts if p[0] in PICTURES and p[-1] not in PICTURES]
    _turn(guard, starts, cases.prompts_of(15, 16))


@_each("a batch of prompts with pictures", Ability.BATCH)
def _(guard: Guarded) -> None:
    one = [p for p in guard.case.prompts if sum(c in PICTURES for c in p) == 1]
    sides = [[p for p in one if (p in guard.case.fired) == fired][:2] for fired in (True, False)]
    guard.right([*sides[0], *sides[1]])
