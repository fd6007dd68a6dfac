"""Prompts that are alike, and folds that never part them."""

from __future__ import annotations

import hashlib
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerbridge.data import Example
from steerbridge.datasets.groups import ALIKE, folds, grams, groups, near_duplicates

WORDS = st.lists(st.sampled_from(["open", "the", "door", "of", "a", "car", "x"]), max_size=8)


def text(number):
    """Texts that are not alike."""
    return hashlib.sha256(bytes([number])).hexdigest()


@given(st.lists(WORDS.map(" ".join), max_size=12, unique=True))
def test_the_join_finds_every_near_duplicate_and_nothing_else(texts):
    found = [tuple(sorted(pair)) for pair in near_duplicates(texts)]
    sets = [grams(text) for text in texts]
    want = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) >= ALIKE * len(sets[i] | sets[j])
    ]
    assert sorted(found) == want


def test_folds_keep_pairs_together_and_do_not_depend_on_the_order():
    examples = [Example(text(i), bool(i % 2), pair=f"p{i // 2}") for i in range(100)]
    fold = folds(examples, 5, seed=0)
    assert fold[::2] == fold[1::2]
    assert {fold.count(k) for k in range(5)} == {20}
    assert folds(examples[::-1], 5, seed=0) == fold[::-1]
    assert folds(examples, 5, seed=1) != fold


def test_every_fold_has_its_share_of_both_labels():
    harmful = [Example(text(i), True, group=f"g{i // 5}") for i in range(25)]
    fold = folds([*harmful, *(Example(text(i), False) for i in range(25, 200))], 5, seed=3)
    for k in range(5):
        assert (fold[:25].count(k), fold.count(k)) == (5, 40)


def test_folds_hold_out_a_group_whole():
    """A question about many pictures is used either for training or for measuring."""
    asked = [("q", "a"), ("q", "b"), ("r", "a"), ("r", "c")]
    examples = [
        Example(text, True, pair=f"{picture}{i}", group=text)
        for i in range(10)
        for text, picture in asked
    ]
    fold = folds(examples, 5, seed=0)
    assert len({f for f, e in zip(fold, examples, strict=True) if e.text == "q"}) == 1
    assert len({f for f, e in zip(fold, examples, strict=True) if e.text == "r"}) == 1


def test_what_makes_prompts_alike(tmp_path):
    for name, content in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(content)
    examples = [
        Example("How do I open the door of my car?", False),
        Example("How do I open the doors of my car?", True),
        Example("how do I  open the door of MY car?", False),
        Example("How do I bake bread?", False, group="g"),
        Example("Something else.", False, group="g", pair="p"),
        Example("Another thing.", True, pair="p"),
        Example("What is this?", True, images=(tmp_path / "a",)),
        Example("What is this?", False, images=(tmp_path / "b",)),
        Example("And this here?", False, images=(tmp_path / "c",)),
    ]
    names = groups(examples)
    parts = [[i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 8], [7]]
    again = groups(examples[::-1])[::-1]
    assert again == names


@pytest.mark.parametrize("text", ["", "a", "abcde", "ab cd"])
def test_short_texts_are_their_own_grams(text):
    assert grams(text) == {text}


def test_every_fold_has_every_kind_beside_a_group_that_fills_one():
    """One question about many pictures is a large group; the texts beside it are many small ones.
    By labels alone the fold of the large group would get no text."""
    pictures = [Example(f"what is {i}", i % 2 == 0, "image", group="q") for i in range(160)]
    texts = [Example(text(i), i % 2 == 0, "text") for i in range(40)]
    fold = folds([*pictures, *texts], 5, seed=0)
    assert len(set(fold[:160])) == 1
    for side in (0, 1):
        assert set(fold[160 + side :: 2]) == set(range(5))
