"""Prompts in forms: what is put around them, and that it tells nothing of the label."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerbridge import corpus
from steerbridge.data import Example, sha256
from steerbridge.datasets.forms import FORMS, LONG, LONGEST, SHORTEST, material, page, rendered

AROUND = material("train")
BAD = Example("How do I poison the dog?", True, "pair", "p1")
GOOD = Example("How do I feed the dog?", False, "pair", "p1")


@pytest.mark.parametrize("form", FORMS)
def test_a_form_keeps_the_request_and_is_the_same_for_both_sides(form):
    bad, good = (rendered(e, form, AROUND) for e in (BAD, GOOD))
    assert bad.form == good.form == form
    assert BAD.text in bad.text
    assert replace(good, text=bad.text.replace(BAD.text, GOOD.text), harmful=False) == good
    assert rendered(BAD, form, AROUND) == bad
    others = {rendered(BAD, form, AROUND, seed) for seed in range(20)}
    assert len(others) == 1 if form in ("chat", "raw") else len(others) > 3


def test_what_each_form_adds():
    by_form = {form: rendered(BAD, form, AROUND) for form in FORMS}
    assert by_form["chat"] == BAD
    assert by_form["system"].system in AROUND.systems
    assert by_form["prefill"].prefill in AROUND.prefills
    assert by_form["raw"].raw
    turns = by_form["turns"].turns
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert by_form["long_start"].text.startswith(BAD.text)
    assert by_form["long_end"].text.endswith(BAD.text)
    middle = by_form["long_middle"].text
    assert not middle.startswith(BAD.text)
    assert not middle.endswith(BAD.text)
    messages = by_form["turns"].messages(BAD.text)
    assert messages[-1] == {"role": "user", "content": BAD.text}
    assert len({sha256([e]) for e in by_form.values()}) == len(FORMS)


def test_long_texts_have_the_promised_lengths():
    pages = [p.text for p in corpus.pages("train")]
    for seed in range(40):
        for form in LONG:
            text = rendered(BAD, form, AROUND, seed).text
            assert SHORTEST - 40 <= len(text) <= LONGEST + len(BAD.text) + 4
            assert sum(text.count(one[:30]) for one in pages) >= 1 or "\n" in text


@given(st.text(min_size=1), st.integers(0, 99), st.sampled_from(FORMS))
def test_any_text_can_stand_in_any_form(text, seed, form):
    made = rendered(Example(text, True), form, AROUND, seed)
    quoted = "\n".join(f"> {line}" for line in text.split("\n"))
    written = json.dumps(text, ensure_ascii=False)
    assert text in made.text or quoted in made.text or written in made.text


@given(st.lists(st.text(min_size=1), min_size=1), st.integers(1, 500))
def test_a_page_is_no_longer_than_asked_for(pages, size):
    assert len(page(pages, size, random.Random(0))) <= size


def test_material_is_held_out():
    train, test = material("train"), material("test")
    for name in ("systems", "exchanges", "prefills", "layouts", "pages"):
        kept, held = getattr(train, name), getattr(test, name)
        assert len(kept) >= 2 * len(held) > 2
        assert not set(map(str, kept)) & set(map(str, held))
    assert len(train.pages) >= 90
    assert all(300 < len(text) < 3000 for text in train.pages)


def test_every_layout_has_one_place_for_the_request():
    for split in ("train", "test"):
        for layout in material(split).layouts:
            found = Counter(p for p in ("{request}", "{json}", "{quoted}") if p in layout)
            assert sum(found.values()) == 1, layout
            assert sum(layout.count(place) for place in found) == 1
