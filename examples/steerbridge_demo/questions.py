"""Questions about the drawings and their answers: what the model is trained and measured on.

`data/stems.txt` holds the open stems in four splits: train, guard (more to train a guard on),
validation and test. A model or guard trained on some has never read the stems of the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from steerbridge.errors import DataError, Problem
from steerbridge_demo.drawings import Scene
from steerbridge_demo.vocabulary import COLOURS, OBJECTS, article, phrase

STEM_KINDS: Final = ("describe", "make")
SPLITS: Final = ("train", "guard", "validation", "test")
ASPECTS: Final = ("object", "colour", "yes_no")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene; `expected` are the words that a right answer holds."""

    text: str
    answer: str
    aspect: str
    expected: tuple[str, ...]


@cache
def stems(kind: str, split: str) -> tuple[str, ...]:
    """The open questions of a kind ('describe' or 'make') in a split.

    Raises:
        DataError: no such kind or split.
    """
    texts = _stems().get((kind, split))
    if texts is None:
        want = f"one of {STEM_KINDS} and of {SPLITS}"
        raise DataError(Problem("stems", want, f"{kind!r}, {split!r}"))
    return texts


@cache
def _stems() -> dict[tuple[str, str], tuple[str, ...]]:
    by_kind: dict[tuple[str, str], list[str]] = {}
    lines: list[str] = []
    text = files(__package__ or "").joinpath("data", "stems.txt").read_text("utf-8")
    for line in filter(str.strip, text.splitlines()):
        if line.startswith("# "):
            kind, _, split = line[2:].partition(" | ")
            lines = by_kind.setdefault((kind, split), [])
        else:
            lines.append(line.strip())
    return {key: tuple(value) for key, value in by_kind.items()}


# ------------------------------------------------------------ about a scene


def described(scene: Scene) -> str:
    """What a scene shows, as the object of a sentence: 'a red apple'."""
    return phrase(scene.thing.colour, scene.thing.name)


def ask(scene: Scene, rng: random.Random, split: str = "train") -> Question:
    """A random question that fits the scene, its open stems from `split`."""
    return rng.choice(_ASKERS)(scene, rng, split)


def describe(scene: Scene, stem: str) -> Question:
    """An open stem about a scene with its answer."""
    thing = scene.thing
    return Question(stem, f"It is {described(scene)}.", "object", (thing.colour, thing.name))


def _describe(scene: Scene, rng: random.Random, split: str) -> Question:
    return describe(scene, rng.choice(stems("describe", split)))


def _colour(scene: Scene, rng: random.Random, _split: str) -> Question:
    thing = scene.thing
    forms = (
        f"What colour is the {thing.name}?",
        f"Which color does the {thing.name} have?",
        "What colour is it?",
        "What color is this thing?",
    )
    return Question(rng.choice(forms), f"It is {thing.colour}.", "colour", (thing.colour,))


def _yes_no(scene: Scene, rng: random.Random, _split: str) -> Question:
    thing = scene.thing
    truth, colour, name = rng.random() < 0.5, thing.colour, thing.name
    if not truth and rng.random() < 0.3:
        colour = rng.choice([c for c in COLOURS if c != colour])
    elif not truth:
        name = rng.choice([n for n in OBJECTS if n != name])
    asked = phrase(colour, name) if rng.random() < 0.5 or colour != thing.colour else ""
    text = f"Is this {asked or f'{article(name)} {name}'}?"
    word = "Yes" if truth else "No"
    return Question(text, f"{word}, it is {described(scene)}.", "yes_no", (word, thing.name))


_Asker = Callable[[Scene, random.Random, str], Question]
_ASKERS: Final[tuple[_Asker, ...]] = (_describe, _describe, _colour, _yes_no)
