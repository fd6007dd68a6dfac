"""The shipped prompts: counts, splits, and that no word reveals the label."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from steerbridge import corpus
from steerbridge.corpus import Prompt
from steerbridge.data import corpus_examples
from steerbridge.datasets.groups import folds, near_duplicates

ALL = corpus.prompts()
HARM = {
    "animal_cruelty", "arson_vandalism", "discrimination", "disinformation", "drugs",
    "evading_police", "fraud", "hacking", "harassment", "poison", "privacy_stalking",
    "sabotage", "self_harm", "theft", "violence", "weapons",
}  # fmt: skip
TWINS = {
    "benign_discrimination", "defence_pest", "definition", "figurative", "history_news",
    "homonym", "medical_chemistry", "own_security", "prevention", "privacy_public",
    "safe_context", "safe_target",
}  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def partners(kind: str) -> list[tuple[Prompt, Prompt]]:
    """(harmful, harmless) for each pair; every number has exactly one of each."""
    by_number = defaultdict(list)
    for p in corpus.prompts(kind=kind):
        by_number[p.partner].append(p)
    pairs = [tuple(sorted(both, key=lambda p: not p.harmful)) for both in by_number.values()]
    assert all([p.harmful for p in both] == [True, False] for both in pairs)
    return pairs


def test_texts_are_stripped_unique_and_fully_expanded():
    texts = [p.text for p in ALL]
    assert all(t and t == t.strip() for t in texts)
    assert len({" ".join(t.casefold().split()) for t in texts}) == len(texts)
    expanded = [p.text for p in ALL if p.kind in ("pair", "twin", "general_harmful")]
    assert not [t for t in expanded if set("{}|[]") & set(t) or "  " in t]


def test_counts_are_as_promised():
    assert len(partners("pair")) >= 500
    assert len(partners("twin")) >= 350
    assert len(corpus.prompts(kind="general")) >= 800
    assert len(corpus.prompts(kind="general_harmful")) >= 150
    general = Counter(p.category for p in corpus.prompts(kind="general"))
    assert general["picture"] >= 120
    assert general["foreign"] >= 36
    long = [p for p in corpus.prompts(kind="general") if 80 <= len(p.text.split()) <= 250]
    assert len(long) >= 80


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_splits_have_roughly_the_promised_share(kind):
    share = Counter(p.split for p in corpus.prompts(kind=kind))
    assert 0.6 <= share["train"] / share.total() <= 0.8
    assert min(share["validation"], share["test"]) / share.total() >= 0.1


@pytest.mark.parametrize("split", corpus.SPLITS)
@pytest.mark.parametrize(("kind", "categories"), [("pair", HARM), ("twin", TWINS)])
def test_each_category_appears_in_each_split(kind, categories, split):
    assert {p.category for p in corpus.prompts(split, kind)} == categories


def test_requests_are_of_many_categories_and_never_of_one_template():
    by_category = defaultdict(list)
    for bad, _ in partners("request"):
        by_category[bad.category].append(bad.text)
    scenes = [c for c in by_category if c.startswith("scene: ")]
    assert len(by_category) - len(scenes) >= 45
    assert sum(len(by_category[c]) for c in scenes) >= 250
    for category, texts in by_category.items():
        if category not in scenes:
            assert len(texts) >= 12
            openings = Counter(" ".join(words(text)[:4]) for text in texts)
            assert openings.most_common(1)[0][1] == 1, category
    assert not list(near_duplicates([p.text for p in corpus.prompts(kind="request") if p.harmful]))


def test_labels_follow_the_kind():
    assert not any(p.harmful for p in corpus.prompts(kind="general"))
    assert all(p.harmful for p in corpus.prompts(kind="general_harmful"))
    assert all((p.partner is None) == p.kind.startswith("general") for p in ALL)


@pytest.mark.parametrize(("kind", "most"), [("pair", 4), ("twin", 9), ("request", 8)])
def test_partners_share_split_category_and_about_their_length(kind, most):
    for bad, good in partners(kind):
        assert (bad.split, bad.category) == (good.split, good.category)
        assert words(bad.text) != words(good.text)
        assert abs(len(bad.text.split()) - len(good.text.split())) <= most, bad.text


def test_pairs_mix_lengths():
    lengths = [len(p.text.split()) for p in corpus.prompts(kind="pair")]
    assert min(lengths) <= 5
    assert max(lengths) >= 35


@pytest.mark.parametrize("split", corpus.SPLITS)
@pytest.mark.parametrize("kind", ["pair", "twin", "request"])
@pytest.mark.parametrize("side", [True, False])
def test_no_word_gives_a_side_away(kind, split, side):
    own = [set(words(p.text)) for p in corpus.prompts(split, kind) if p.harmful is side]
    other = {w for p in corpus.prompts(split, kind) if p.harmful is not side for w in words(p.text)}
    counts = Counter(w for side_words in own for w in side_words if w not in other)
    assert not [w for w, n in counts.items() if n > 0.08 * len(own)]


def test_partners_do_not_differ_by_length_on_average():
    """Otherwise a probe could learn that longer prompts are harmful."""
    for kind in ("pair", "twin"):
        gap = [len(bad.text.split()) - len(good.text.split()) for bad, good in partners(kind)]
        assert abs(sum(gap)) / len(gap) < 0.5


def test_no_near_copy_in_another_split():
    grams = defaultdict(set)
    for p in ALL:
        if len(bag := frozenset(words(p.text))) > 2:
            grams[bag].add(p.split)
    assert not [sorted(bag) for bag, splits in grams.items() if len(splits) > 1]


def test_same_order_and_filters():
    assert corpus.prompts() == ALL
    assert [p for p in ALL if p.split == "test"] == corpus.prompts("test")
    with pytest.raises(ValueError, match="split"):
        corpus.prompts("dev")
    with pytest.raises(ValueError, match="kind"):
        corpus.prompts(kind="odd")


def test_command_prints_one_json_object():
    run = [sys.executable, "-m", "steerbridge.corpus"]
    out = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert set(out) == set(corpus.KINDS)
    assert sum(sum(kind["split"].values()) for kind in out.values()) == len(ALL)


def test_prompts_of_one_template_are_never_parted():
    examples = corpus_examples("train")
    made = Counter(p.template for p in corpus.prompts("train") if p.template)
    assert max(made.values()) >= 8
    fold = folds(examples, 5, seed=0)
    where = defaultdict(set)
    for e, at in zip(examples, fold, strict=True):
        where[e.group].add(at)
    del where[None]
    assert len(where) == len(made)
    assert all(len(at) == 1 for at in where.values())
    share = len(examples) / 5
    assert all(abs(fold.count(k) - share) < 0.02 * share for k in range(5))
