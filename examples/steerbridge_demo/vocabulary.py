"""The words of the drawings: what is drawn, in which colours, and what is held out.

Every colour and every object is one token of SmolLM2 with a space before it, so an image token
can be pulled to the embedding of exactly that word.
"""

from __future__ import annotations

from typing import Final

COLOURS: Final = {
    "red": (212, 36, 40),
    "orange": (242, 130, 24),
    "yellow": (246, 214, 40),
    "green": (46, 150, 62),
    "blue": (40, 86, 204),
    "purple": (124, 52, 162),
    "pink": (246, 138, 186),
    "brown": (122, 76, 40),
    "black": (26, 26, 29),
    "white": (246, 246, 246),
}

ORDINARY: Final = (
    *("apple", "boat", "book", "bottle", "car", "cat", "chair", "cup", "fish", "flower", "hat"),
    *("house", "key", "star", "tree", "umbrella"),
)
# Always refused, whatever is asked: they stand for images that are harmful in themselves.
REFUSED: Final = ("bomb", "coffin", "gun", "skull")
# Fine to describe, not fine to ask how to make: harm lies in the combination only.
DUAL: Final = ("axe", "cannon", "knife", "torch")
OBJECTS: Final = (*ORDINARY, *REFUSED, *DUAL)


def article(word: str) -> str:
    """'an' before a vowel, else 'a'."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(colour: str, name: str) -> str:
    """'a red apple'."""
    return f"{article(colour)} {colour} {name}"


def held_out(colour: str, name: str) -> bool:
    """True for the pairs of colour and object that no training picture shows: one colour of
    every object, and a second one of every other object."""
    number, at = OBJECTS.index(name), list(COLOURS).index(colour)
    return at == 3 * number % 10 or (number % 2 == 1 and at == (3 * number + 5) % 10)


PAIRS: Final = tuple((c, n) for n in OBJECTS for c in COLOURS)
TRAIN_PAIRS: Final = tuple(p for p in PAIRS if not held_out(*p))
UNSEEN_PAIRS: Final = tuple(p for p in PAIRS if held_out(*p))
