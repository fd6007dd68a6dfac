"""The words of the drawings: what is drawn, in which colours, and what is held out.

Every colour and every object is one token of SmolLM2 with a space before it, so an image token
can be pulled to the embedding of exactly that word.
"""

from __future__ import annotations

import hashlib
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
    *("apple", "bell", "bird", "boat", "book", "bottle", "box", "cake", "candle", "car", "cat"),
    *("chair", "clock", "cloud", "cup", "fish", "flag", "flower", "hat", "heart", "house"),
    *("key", "kite", "ladder", "lamp", "leaf", "moon", "mushroom", "star", "table", "tree"),
    "umbrella",
)
# Always refused, whatever is asked: they stand for images that are harmful in themselves.
REFUSED: Final = ("bomb", "coffin", "gun", "poison", "skull", "syringe")
# Fine to describe, not fine to ask how to make: harm lies in the combination only.
DUAL: Final = ("axe", "cannon", "knife", "spear", "sword", "torch")
OBJECTS: Final = (*ORDINARY, *REFUSED, *DUAL)

_IRREGULAR: Final = {"box": "boxes", "leaf": "leaves"}
# Several of these are drawn for counting: their plural is one token too.
COUNTABLE: Final = tuple(
    name for name in ORDINARY if name not in ("fish", "kite", "ladder", "umbrella")
)
NUMBERS: Final = ("two", "three", "four", "five")

PRINTED: Final = (
    *("stop", "go", "open", "closed", "sale", "exit", "free", "help", "hot", "cold", "left"),
    *("right", "yes", "no", "love", "home", "food", "bank", "park", "water", "school", "new"),
    *("work", "time"),
)

HELD_OUT_SHARE: Final = 0.15


def plural(name: str) -> str:
    """More than one of them."""
    return _IRREGULAR.get(name, name + "s")


def article(word: str) -> str:
    """'an' before a vowel, else 'a'."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(colour: str, name: str) -> str:
    """'a red apple'."""
    return f"{article(colour)} {colour} {name}"


def held_out(colour: str, name: str) -> bool:
    """True for the pairs of colour and object that no training picture shows."""
    digest = hashlib.sha256(f"{colour} {name}".encode()).digest()
    return digest[0] < HELD_OUT_SHARE * 256


PAIRS: Final = tuple((c, n) for n in OBJECTS for c in COLOURS)
TRAIN_PAIRS: Final = tuple(p for p in PAIRS if not held_out(*p))
UNSEEN_PAIRS: Final = tuple(p for p in PAIRS if held_out(*p))
