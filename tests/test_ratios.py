"""The statistics of the benchmarks: ratios of times and their plain-against-plain controls."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ratios

SLOWER = 1.05  # steered over plain


def times(rounds, seed=0, noise=0.02):
    """Plain, control and steered seconds; every round has a pace of its own."""
    rng = np.random.default_rng(seed)
    pace = rng.uniform(1, 3, rounds)
    plain, control, steered = pace * rng.lognormal(0, noise, (3, rounds))
    return plain, control, SLOWER * steered


def test_equal_times_give_one_without_width():
    seconds = [1.5, 2.0, 0.25, 3.0]
    ratio = ratios.of_times(seconds, seconds, seconds)
    assert ratio == ratios.Ratio(1.0, 0.0, 1.0, 0.0)
    assert ratio.idle


def test_unbiased():
    many = [ratios.of_times(*times(8, seed)) for seed in range(300)]
    assert np.mean([r.value for r in many]) == pytest.approx(1 / SLOWER, abs=0.002)
    assert np.mean([r.control for r in many]) == pytest.approx(1, abs=0.002)


def test_interval_holds_the_truth():
    many = [ratios.of_times(*times(12, seed)) for seed in range(300)]
    held = np.mean([abs(r.control - 1) <= r.control_half_width for r in many])
    assert 0.88 <= held <= 1


def test_half_width_shrinks_with_rounds():
    widths = [
        np.mean([ratios.of_times(*times(n, seed)).control_half_width for seed in range(40)])
        for n in (6, 24, 96)
    ]
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_same_times_give_the_same_figures():
    assert ratios.of_times(*times(8)) == ratios.of_times(*times(8))


def test_few_rounds_say_nothing_about_noise():
    ratio = ratios.of_times([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0])
    assert ratio == ratios.Ratio(0.5, None, 1.0, None)
    assert not ratio.idle
    assert ratio.to_json("decode_ratio")["decode_half_width"] is None


def test_noise_is_not_idle():
    assert not ratios.of_times(*times(8, noise=0.1)).idle
    assert ratios.of_times(*times(8, noise=0.002)).idle


def test_report():
    rounds = [{"plain": 2.0, "control": 2.0, "quiet": 4.0, "fired": 1.0}] * 4
    figures = ratios.report(
        {
            "ttft_ratio": ratios.of_rounds(rounds, "quiet"),
            "speedup": ratios.of_rounds(rounds, "fired"),
        }
    )
    assert figures == {
        "ttft_ratio": 0.5,
        "ttft_half_width": 0.0,
        "ttft_control": 1.0,
        "ttft_control_half_width": 0.0,
        "speedup": 2.0,
        "speedup_half_width": 0.0,
        "speedup_control": 1.0,
        "speedup_control_half_width": 0.0,
        "idle": True,
    }


@pytest.mark.parametrize("names", ["ab", "abc", "abcdef"])
def test_turns_rotate_in_both_directions(names):
    orders = [ratios.order(i, names) for i in range(2 * len(names))]
    for place in range(len(names)):
        assert set(Counter(o[place] for o in orders).values()) == {2}
    after = Counter(pair for o in orders for pair in pairwise(o))
    assert all(after[a, b] == after[b, a] for a, b in after)


def test_alternate_takes_the_fastest_of_three():
    seen = []
    left = {"plain": [3.0, 1.0, 2.0], "control": [5.0, 4.0, 6.0], "steered": [9.0, 8.0, 7.0]}

    def run(name):
        seen.append(name)
        return left[name].pop()

    fastest = ratios.alternate(0, {name: lambda name=name: run(name) for name in left})
    assert fastest == {"plain": 1.0, "control": 4.0, "steered": 7.0}
    assert [seen[i] for i in (0, 3, 6)] == ["plain", "control", "steered"]
