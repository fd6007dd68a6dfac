"""Running scores: rows that come in any chunks, and go, score as a whole array does."""

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
logits = st.lists(one, max_size=24)


def same(rows, window, values, counted, end):
    whole = running_scores(window, values, counted, end)
    assert rows.scores.tobytes() == whole.tobytes()
    known = whole[~np.isnan(whole)]
    assert (rows.highest is None) == (not known.size)
    if rows.highest is not None:
        assert rows.highest == (known.max(), int(np.flatnonzero(whole == known.max())[0]))


@given(windows, logits, st.data())
def test_rows_may_come_in_any_chunks(window, values, data):
    counted = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    end = (
        data.draw(st.integers(0, len(values) - 1)) if values and data.draw(st.booleans()) else None
    )
    rows, at = Rows(window), 0
    while at < len(values):
        until = data.draw(st.integers(at + 1, len(values)))
        if end is not None and at <= end < until:
            until = end + 1  # a prompt's end is the end of a chunk
        rows.add(values[at:until], counted[at:until])
        if end == until - 1:
            rows.end_prompt()
        at = until
    same(rows, window, values, counted, end)


@given(windows, st.data())
def test_drafts_cuts_copies_and_shifts(window, data):
    """A model of the kept rows: a list, beside which each step is done to both."""
    rows, kept, end = Rows(window), [], None
    for _ in range(data.draw(st.integers(0, 12))):
        step = data.draw(st.sampled_from(["add", "draft", "cut", "copy", "remove", "end"]))
        if step in ("add", "draft"):
            new = data.draw(
                st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), max_size=5)
            )
            rows.add([v for v, _ in new], [c for _, c in new])
            kept += new
            if step == "draft":  # rejected
                kept = kept[: len(kept) - len(new)]
                rows.cut(len(kept))
        elif step == "cut":
            length = data.draw(st.integers(0, len(kept)))
            kept = kept[:length]
            end = None if end is not None and end >= length else end
            rows.cut(length)
        elif step == "copy":
            other = rows.copy()
            rows.add([1.0], [True])  # the copy has its own rows
            rows = other
        elif step == "remove" and kept:
            start = data.draw(st.integers(0, len(kept) - 1))
            stop = data.draw(st.integers(start, len(kept)))
            if end is not None:
                end = None if start <= end < stop else end - (stop - start) * (start < end)
            kept = kept[:start] + kept[stop:]
            rows.remove(start, stop)
        elif step == "end" and kept:
            end = len(kept) - 1
            rows.end_prompt()
        same(rows, window, [v for v, _ in kept], [c for _, c in kept], end)


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
