"""Prompts that go on from a kept cache, and answers that are given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from steerbridge.testing import cases
from steerbridge.testing.cases import Case
from steerbridge.testing.driver import Ability
from steerbridge.testing.kit import Guarded, Trial
from steerbridge.testing.model import END
from steerbridge.testing.shapes.table import ONE, Table, first, sound

TABLE: Final = Table()
MORE: Final = 400  # texts to go on with, where those that are tried first do not do


def _in_turn(guard: Guarded, prompts: Sequence[str]) -> None:
    """One prompt after another on the same cache."""
    for prompt in prompts:
        guard.right([prompt], keep=True)


@TABLE.each("the same prompt again", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    for prompts in (guard.case.fired, guard.case.quiet):
        _in_turn(guard, [prompts[0]] * 3)


def _longer(case: Case, prompt: str, more: Sequence[str], fired: bool) -> str:
    texts = (prompt + text for text in (*more, *cases.prompts_of(11, MORE)))
    return first(texts, lambda p: sound(case, p, fired), f"an extension of {prompt!r}")


def with_one_beginning(case: Case) -> tuple[str, str]:
    """A prompt that fires and one that does not, whose beginnings are the same."""
    ends = cases.prompts_of(10)
    for stem in case.quiet:
        texts = [stem + end for end in ends]
        one, other = (next((p for p in texts if sound(case, p, f)), None) for f in (True, False))
        if one is not None and other is not None:
            return one, other
    raise AssertionError("the tiny model has no such prompts")


@TABLE.each("a prompt that extends the last by one token", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    case, pairs = guard.case, 0
    for fired, prompts in ((True, case.quiet), (False, case.fired)):
        for prompt in prompts:
            texts = (prompt + c for c in ONE)
            more = next((p for p in texts if sound(case, p, fired)), None)
            if more is not None:
                _in_turn(guard, [prompt, more])
                pairs += 1
                break
    assert pairs, "the tiny model has no such prompts"


@TABLE.shape("a prompt that grows token by token", Ability.CONVERSATION)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        whole = first(guard.case.fired, lambda p: len(p) > 12, "a longer prompt")
        for length in range(len(whole) - 6, len(whole) + 1):
            if guard.case.sound(whole[:length]):
                guard.right([whole[:length]], keep=True)


def _further(guard: Guarded, between: str) -> None:
    """A prompt that fires and a quiet one, each with such ones that go on behind its answer."""
    case = guard.case
    for start in (case.quiet[0], case.fired[0]):
        said = bytes(case.expected(start).tokens).decode()
        turns = cases.prompts_of(8)
        for fired in (True, False):
            _in_turn(guard, [start, _longer(case, start + said + between, turns, fired)])


@TABLE.each(
    "a further turn, behind the answer",
    Ability.CONVERSATION,
    kinds=("head", "mean", "layers", "earlier"),
)
def _(guard: Guarded) -> None:
    _further(guard, END)


@TABLE.each("a further turn, behind an answer that no token ends", Ability.UNENDED)
def _(guard: Guarded) -> None:
    _further(guard, "")


@TABLE.each("a prompt that is a prefix of the last", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    case = guard.case
    for fired in (True, False):
        start = (case.fired if fired else case.quiet)[0]
        longer = _longer(case, start, cases.prompts_of(9), not fired)
        _in_turn(guard, [longer, start])


@TABLE.each("prompts that share their beginning", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    a, b = with_one_beginning(guard.case)
    _in_turn(guard, [a, b, a, b])


@TABLE.each("two conversations in turn on one cache", Ability.SEQUENCES)
def _(guard: Guarded) -> None:
    for a, b in zip(guard.case.fired[:3], guard.case.quiet[:3], strict=True):
        guard.right([a], keep=True, sequence=0)
        guard.right([b], keep=True, sequence=1)


@TABLE.each("a cancelled answer, then another prompt", Ability.CANCEL)
def _(guard: Guarded) -> None:
    case = guard.case
    guard.right(case.fired[:1], cancel_after=3)
    guard.right(case.quiet[:1])
    guard.right(case.quiet[1:2], cancel_after=3)
    guard.right(case.fired[1:2])


@TABLE.each("a cancelled answer, then the same prompt", Ability.CANCEL)
def _(guard: Guarded) -> None:
    for prompt in (guard.case.fired[0], guard.case.quiet[0]):
        guard.right([prompt], cancel_after=2)
        guard.right([prompt])
