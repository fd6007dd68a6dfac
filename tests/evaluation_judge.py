"""Judges that tests name as module:function."""

from __future__ import annotations


def long_answers(questions, answers):
    return [len(answer) > 10 for answer in answers]


def everything(questions, answers):
    return [True] * len(answers)


def one_value(questions, answers):
    return [True]
