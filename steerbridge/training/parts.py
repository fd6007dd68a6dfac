"""Which prompts are trained on, searched on and calibrated on, and in which forms.

Everything is fixed by hashes before anything is fitted. Prompts that are alike are never in two
parts (see `steerbridge.datasets.groups`), whatever form they stand in.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from steerbridge.data import Example
from steerbridge.datasets import groups
from steerbridge.datasets.forms import CHAT, LONGEST, Material, material, renderable, rendered
from steerbridge.runtime import LoadedModel

Part = Literal["train", "search", "calibrate"]

IN_PICTURES: Final = ("image", "both")  # kinds of pairs that share their text
FOLDS: Final = 10
_OFTENER: Final = 3  # an ordinary prompt stands in other forms: there it is taken for harm first
_CALIBRATED: Final = 2  # folds
_MORE_TRAFFIC: Final = 1  # folds of ordinary prompts, beside: a promise takes hundreds of them
CHARACTERS_PER_TOKEN: Final = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """Prompts in their forms, with what is done with each: `examples`, and arrays [N]."""

    examples: tuple[Example, ...]
    part: NDArray[np.str_]
    prompt: NDArray[np.int64]  # number of the prompt that stands in this form
    forms: tuple[str, ...]  # that the model can render

    @property
    def harmful(self) -> NDArray[np.bool_]:
        """Labels [N]."""
        return np.array([e.harmful for e in self.examples])

    @property
    def traffic(self) -> NDArray[np.bool_]:
        """Which of them the promise is about [N]."""
        return np.array([is_traffic(e) for e in self.examples])

    def of(self, part: Part) -> NDArray[np.int64]:
        """Numbers of the prompts of a part."""
        return np.flatnonzero(self.part == part)


def is_traffic(e: Example) -> bool:
    """Harmless and ordinary: neither a mirror of a harmful text nor one that only sounds so."""
    mirrors_text = e.pair is not None and e.kind not in IN_PICTURES
    return not e.harmful and e.kind != "borderline" and not mirrors_text


def divide(
    model: LoadedModel, examples: Sequence[Example], shares: Mapping[str, float], seed: int
) -> Parts:
    """Parts and forms of the prompts.

    Every prompt stands in `chat`, and in other forms as often as `shares` says, an ordinary one
    three times as often. An ordinary one to calibrate on stands in one form alone, each as likely:
    a promise counts prompts. One to search on stands in a third of them: what is chosen has to keep
    that promise in every form.
    """
    forms = renderable(model, examples[0], list(shares))
    fold = groups.folds(examples, FOLDS, seed)
    part_of = [_part(e, k) for e, k in zip(examples, fold, strict=True)]
    around = {part: _around(part, examples, part_of, seed) for part in set(part_of)}
    longest = min((model.facts.context_length or 2048) * CHARACTERS_PER_TOKEN // 2, LONGEST)
    made: list[tuple[Example, Part, int]] = []
    for i, (e, part) in enumerate(zip(examples, part_of, strict=True)):
        draw = random.Random(f"{seed}\0{e.pair or e.text}")
        if e.images:
            chosen = [CHAT]
        elif part == "calibrate" and is_traffic(e):
            chosen = [draw.choice(forms)]
        elif part == "search" and is_traffic(e):
            chosen = draw.sample(forms, (len(forms) + 2) // 3)
        else:
            often = _OFTENER if is_traffic(e) else 1
            others = [f for f in forms if draw.random() < often * shares[f]]
            chosen = list(dict.fromkeys([CHAT, *others]))
        made += [(rendered(e, form, around[part], seed, longest), part, i) for form in chosen]
    return Parts(
        tuple(e for e, _, _ in made),
        np.array([part for _, part, _ in made]),
        np.array([i for _, _, i in made]),
        tuple(forms),
    )


def _around(
    part: Part, examples: Sequence[Example], part_of: Sequence[Part], seed: int
) -> Material:
    """What is put around the prompts of a part. Its pages are in no other: ordinary text that was
    trained on says nothing about that which was not."""
    shipped = material("train")
    pages = [p for p in shipped.pages if _part_of_page(p, seed) == part] or shipped.pages
    own = [
        e.text
        for e, mine in zip(examples, part_of, strict=True)
        if mine == part and is_traffic(e) and not e.images
    ]
    return replace(shipped, pages=[*pages, *own])


def _part_of_page(page: str, seed: int) -> Part:
    digest = hashlib.sha256(f"{seed}\0{page}".encode()).digest()
    return _part(Example(page, harmful=True), digest[0] % FOLDS)


def _part(e: Example, fold: int) -> Part:
    if fold < _CALIBRATED + _MORE_TRAFFIC * is_traffic(e):
        return "calibrate"
    return "search" if fold == FOLDS - 1 else "train"
