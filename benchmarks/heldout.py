"""Prompts never trained on, in every form: what `make bench-safety` measures.

The material around them (pages, system messages, earlier turns, beginnings of answers) is that of
the test split, and ordinary prompts of the test sets serve as pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from common import every
from steerbridge import Example
from steerbridge.datasets.forms import FORMS, LONG, material, rendered

ORDINARY: Final = ("alpaca", "general", "arena")
SHORT_FORMS: Final = ("system", "turns", "prefill", "raw", "layout")
LONG_COUNT: Final = 250  # prompts at each place of a long text


def sets(test: Sequence[Example]) -> dict[str, list[Example]]:
    """Name of a figure -> its prompts. Where no public sets are, `ordinary` is the shipped
    prompts."""
    by_kind: dict[tuple[str, bool], list[Example]] = {}
    for e in test:
        by_kind.setdefault((e.kind, e.harmful), []).append(e)
    harm = by_kind.get(("pair", True), [])
    ordinary = [e for kind in ORDINARY for e in by_kind.get((kind, False), [])]
    around = material("test", [e.text for e in ordinary])

    def put(prompts: Sequence[Example], form: str) -> list[Example]:
        return [rendered(e, form, around, seed=7) for e in prompts]

    made: dict[str, list[Example]] = {
        "vlsafe": harm,
        "mirrors": by_kind.get(("pair", False), []),
        "sorry": by_kind.get(("sorry", True), []),
        "borderline": by_kind.get(("borderline", False), []),
        **{kind: by_kind.get((kind, False), []) for kind in ORDINARY},
        **{form: put(harm, form) for form in SHORT_FORMS},
        **{form: put(every(harm, LONG_COUNT), form) for form in LONG},
        "ordinary_long": [p for form in LONG for p in put(ordinary, form)],
        "ordinary_forms": [p for form in SHORT_FORMS for p in put(ordinary, form)],
    }
    assert set(FORMS) <= {"chat", *made}
    return {name: prompts for name, prompts in made.items() if prompts}


def after(example: Example, exchange: Sequence[tuple[str, str]]) -> Example:
    """The example as the turn after an exchange."""
    return replace(example, turns=tuple(exchange), form="turns")


def flat(made: Mapping[str, Sequence[Example]]) -> tuple[list[Example], dict[str, slice]]:
    """All prompts of the sets, and where each set lies among them."""
    prompts: list[Example] = []
    where = {}
    for name, part in made.items():
        where[name] = slice(len(prompts), len(prompts) + len(part))
        prompts += part
    return prompts, where
