"""Running scores: rows that come one by one, and go, score as a whole array does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerbridge.running import Rows, Window, running_scores

windows = st.builds(
    Window, st.integers(1, 6), st.integers(0, 4), st.sampled_from(["prompt", "answer", "both"])
)
one = st.floats(-50, 50, width=32)


def same(rows, window, values, counted, end):
    whole = running_scores(window, values, counted, end if end < len(values) else None)
    assert rows.scores().tobytes() == whole.tobytes()
    known = whole[~np.isnan(whole)]
    assert rows.highest == (known.max() if known.size else None)


@given(windows, st.integers(1, 9), st.data())
def test_answers_come_and_are_taken_back(window, size, data):
    """A model of the rows: a list, beside which each step is done to both."""
    drawn = st.tuples(one, st.booleans())
    kept = data.draw(st.lists(drawn, min_size=size, max_size=size))
    rows = Rows(window, [v for v, _ in kept], [c for _, c in kept])
    for _ in range(data.draw(st.integers(0, 9))):
        if data.draw(st.booleans()):
            new = data.draw(st.lists(drawn, max_size=5))
            rows.add([v for v, _ in new], [c for _, c in new])
            kept += new
        else:
            kept = kept[: data.draw(st.integers(0, len(kept)))]
            rows.cut(len(kept))
        assert len(rows) == len(kept)
        same(rows, window, [v for v, _ in kept], [c for _, c in kept], size - 1)


@pytest.mark.parametrize(
    ("window", "end", "expected"),
    [
        # Four rows are needed, or a whole window.
        (Window(16), None, [None, None, None, 2.5, 3.0, 3.5]),
        (Window(2), None, [None, 1.5, 2.5, 3.5, 4.5, 5.5]),
        (Window(1), None, [1, 2, 3, 4, 5, 6]),
        # Attention sinks are left out.
        (Window(2, 3), None, [None, None, None, None, 4.5, 5.5]),
        # A short prompt has the mean of what there is, at its end only.
        (Window(16), 1, [None, 1.5, None, 2.5, 3.0, 3.5]),
        (Window(16, scope="prompt"), 2, [None, None, 2.0, None, None, None]),
        (Window(16, skip=1), 0, [None, None, None, None, 3.5, 4.0]),
        # The answer starts empty at the prompt's end.
        (Window(2, scope="answer"), 2, [None, None, None, None, 4.5, 5.5]),
        (Window(2, scope="answer"), None, [None] * 6),
    ],
)
def test_by_hand(window, end, expected):
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    found = running_scores(window, values, [True] * 6, end)
    assert [None if math.isnan(v) else v for v in found] == expected


def test_sums_go_from_the_oldest_to_the_newest_in_float64():
    values = np.float32([1e8, 1.0, -1e8, 1e-8, 3.0])
    [*_, last] = running_scores(Window(5), values, [True] * 5, None)
    total = 0.0
    for value in values.tolist():
        total += value
    assert last == total / 5


def test_the_end_of_a_short_prompt_may_be_a_row_of_another_kind():
    found = running_scores(Window(8), [1.0, 3, 9], [True, True, False], 2)
    assert [None if math.isnan(v) else v for v in found] == [None, None, 2.0]


def test_other_rows_are_neither_scored_nor_counted():
    counted = [True, False, True, False, True, True]
    found = running_scores(Window(2), [1.0, 9, 3, 9, 5, 7], counted, None)
    assert [None if math.isnan(v) else v for v in found] == [None, None, 2.0, None, 4.0, 6.0]
