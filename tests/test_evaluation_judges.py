"""Judges: how they are named, and figures computed with another judge."""

from __future__ import annotations

import pytest

from scripted import REFUSAL, answer, row
from steerbridge.errors import DataError
from steerbridge.evaluation import judges, measure


def test_judges_are_named_by_a_word():
    assert judges.named("matcher")(["q", "q"], [REFUSAL, "Bees make honey."]) == [True, False]
    judge = judges.named("evaluation_judge:long_answers")
    assert judge(["q", "q"], ["no", "a long answer"]) == [False, True]
    for wrong in ("nobody", "evaluation_judge:gone", "no_such_module:f"):
        with pytest.raises(DataError, match="matcher, an address or module:function"):
            judges.named(wrong)
    with pytest.raises(DataError, match="expected 2 values, found 1"):
        judges.named("evaluation_judge:one_value")(["q", "q"], ["a", "b"])


def test_another_judge_is_compared():
    rows = [
        row(True, answer("Sure", 1), answer(REFUSAL, 2, score=0.9)),
        row(False, answer("Hi", 1), answer("Hi", 1, score=0.1)),
    ]
    figures = measure.judged(rows, judges.named("evaluation_judge:long_answers"))
    assert (figures["asr_judge_unsteered"], figures["asr_guard_steered"]) == (1.0, 0.0)
    assert figures["agreement"] == 1.0
    figures = measure.judged(rows, judges.named("evaluation_judge:everything"))
    assert figures["over_refusal_steered"] == 1.0
    assert figures["agreement"] == 0.25
