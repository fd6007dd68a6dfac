"""Stored answers: a run resumes, and any change that may affect an answer generates it again."""

from __future__ import annotations

import math

import pytest

import helpers
from scripted import answer
from steerbridge.data import Example
from steerbridge.errors import DataError, EndpointFailed
from steerbridge.evaluation.answers import Asking, Source, Store, same


class Scripted:
    """A model whose answers repeat the question; it fails after a given number of them."""

    def __init__(self, fails_after=10**9):
        self.asked, self._left = [], fails_after

    def generate(self, prompts, package, *, max_new_tokens, ignore=(), progress=None):
        if len(prompts) > self._left:
            raise EndpointFailed("http://nowhere", "gone")
        self._left -= len(prompts)
        self.asked += prompts
        score = None if package is None else math.nan
        return [answer(f"{p.system}: {p.text}", 7, 8, score=score) for p in prompts]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("steerbridge.evaluation.answers.TOGETHER", 4)
    prompts = [Example(f"q{i}", False) for i in range(10)]
    asking = Asking(store=Store(tmp_path, "model"))
    first = Scripted(fails_after=8)
    with pytest.raises(EndpointFailed):
        asking.answers(Source("s", first), prompts)
    assert len(first.asked) == 8
    second = Scripted()
    answers = asking.answers(Source("s", second), prompts)
    assert [p.text for p in second.asked] == ["q8", "q9"]
    assert [a.text for a in answers] == [f"None: q{i}" for i in range(10)]
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_whatever_may_change_an_answer_asks_again(tmp_path):
    prompts = [Example("q", False)]
    model, package = Scripted(), helpers.package()
    store = Store(tmp_path, "model")
    asks = [
        (Asking(store=store), Source("s", model)),
        (Asking(store=store), Source("s", model, system="be kind")),
        (Asking(store=store), Source("s", model, package)),
        (Asking(store=store), Source("s", model, helpers.package(seed=1))),
        (Asking(store=store), Source("s", model, package, ignore=("vocab_size",))),
        (Asking(7, store=store), Source("s", model)),
        (Asking(store=Store(tmp_path, "another")), Source("s", model)),
        (Asking(store=store), Source("s", model, identity="another server")),
    ]
    for turn in range(2):
        for asking, source in asks:
            (generation,) = asking.answers(source, prompts)
            assert (generation.outcome is None) is (source.package is None)
        assert len(model.asked) == len(asks), turn
    (kept,) = asks[2][0].answers(asks[2][1], prompts)
    assert math.isnan(kept.outcome.verdicts[0].score)
    assert kept.outcome.verdicts[0].fired


def test_a_broken_file_of_answers_is_named(tmp_path):
    prompts = [Example("q", False)]
    asking = Asking(store=Store(tmp_path, "model"))
    asking.answers(Source("s", Scripted()), prompts)
    (path,) = tmp_path.iterdir()
    for content, reason in (("[", "kept answers"), ("[]", "1 answers, found 0")):
        path.write_text(content)
        with pytest.raises(DataError, match=f"{path.name}.*{reason}"):
            asking.answers(Source("s", Scripted()), prompts)


def test_answers_of_servers_are_compared_in_words():
    assert same(answer("a"), answer("a", 1))
    assert not same(answer("a"), answer("b"))
    assert not same(answer("a", 1), answer("a", 2))
