"""Which prompts are alike, and folds that never part them.

Two prompts are alike if they share a group, a pair or a picture, or if their texts are
near-duplicates: the Jaccard index of their sets of character 5-grams is at least 0.6. A prompt that
was trained on in nearly the same words measures nothing. Texts beside pictures are not compared:
one question is asked about many, and the harm is in them.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from steerbridge.data import Example

GRAM: Final = 5  # characters
ALIKE: Final = 0.6  # Jaccard index of two near-duplicates, at least


def groups(examples: Sequence[Example]) -> list[str]:
    """A name for each example; those that are alike, or alike with others that are, share it.

    The name is the smallest of what they share, whatever their order.
    """
    union = _Union(len(examples))
    first: dict[tuple[str, str], int] = {}
    for i, e in enumerate(examples):
        for key in _keys(e):
            union.join(first.setdefault(key, i), i)
    texts = {text: i for (kind, text), i in first.items() if kind == "text"}
    at = list(texts.values())
    for a, b in near_duplicates(list(texts)):
        union.join(at[a], at[b])
    names: dict[int, str] = {}
    for i, e in enumerate(examples):
        root, name = union.root(i), min("\0".join(key) for key in _keys(e))
        names[root] = min(names.get(root, name), name)
    return [names[union.root(i)] for i in range(len(examples))]


def _keys(e: Example) -> Iterator[tuple[str, str]]:
    """What an example shares with those that are alike, near-duplicates apart."""
    if e.group is not None:
        yield "group", e.group
    if e.pair is not None:
        yield "pair", e.pair
    for image in e.images:
        yield "image", hashlib.sha256(image.read_bytes()).hexdigest()
    if not e.images:
        yield "text", plain(e.text)


def folds(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """A fold 0..count-1 for each example; prompts that are alike (see `groups`) share one.

    Every fold gets about the same share of either label of every kind: large groups first, each
    into the fold that has least of what is in it, and by a hash where several have.
    """
    names = groups(examples)
    sizes: dict[str, Counter[tuple[str, bool]]] = defaultdict(Counter)
    for e, name in zip(examples, names, strict=True):
        sizes[name][e.kind, e.harmful] += 1
    totals = sum(sizes.values(), Counter[tuple[str, bool]]())
    filled: list[Counter[tuple[str, bool]]] = [Counter() for _ in range(count)]
    fold_of: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name].total(), _hash(seed, name))):
        first = _hash(seed, name) % count

        def load(fold: int, name: str = name, first: int = first) -> tuple[float, int]:
            share = math.fsum(filled[fold][part] / totals[part] for part in sizes[name])
            return share, (fold - first) % count

        fold_of[name] = fold = min(range(count), key=load)
        filled[fold] += sizes[name]
    return [fold_of[name] for name in names]


def _hash(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")


def plain(text: str) -> str:
    """A text as it is compared: without differences of case and of white space."""
    return " ".join(text.casefold().split())


def near_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Every pair of texts with a Jaccard index of at least `ALIKE`, as (i, j) in no order.

    An exact join with a prefix filter (Bayardo, Ma and Srikant 2007): two sets that overlap enough
    share one of their rarest members.
    """
    sets = _ranked([grams(text) for text in texts])
    index: dict[int, list[int]] = {}
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        mine = sets[i]
        ordered = sorted(mine)
        rarest = ordered[: len(ordered) - math.ceil(ALIKE * len(ordered)) + 1]
        close = {j for gram in rarest for j in index.get(gram, ())}
        for j in close:
            other = sets[j]
            if len(other) < ALIKE * len(mine):
                continue
            both = len(mine & other)
            if both >= ALIKE * (len(mine) + len(other) - both):
                yield j, i
        for gram in rarest:
            index.setdefault(gram, []).append(i)


def grams(text: str) -> frozenset[str]:
    """The 5-grams of characters of a text; a shorter one is its own."""
    return frozenset(text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1)))


def _ranked(sets: Sequence[frozenset[str]]) -> list[frozenset[int]]:
    """The same sets as numbers, rare members first."""
    counts = Counter(gram for one in sets for gram in one)
    rank = {gram: i for i, (gram, _) in enumerate(reversed(counts.most_common()))}
    return [frozenset(rank[gram] for gram in one) for one in sets]


class _Union:
    """Disjoint sets of 0..n-1."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = i = self._parent[self._parent[i]]
        return i

    def join(self, a: int, b: int) -> None:
        self._parent[self.root(b)] = self.root(a)
