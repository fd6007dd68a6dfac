"""How many harmless prompts may fire, and what is promised with a confidence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerbridge import thresholds
from steerbridge.errors import DataError

binom = pytest.importorskip("scipy.stats").binom


def test_one_percent_with_95_percent_takes_299_prompts():
    assert thresholds.needed(0.01, 0.95) == 299
    assert thresholds.allowed({"a": 299}, {"*": 0.01}, 0.95) == {"a": 0}
    with pytest.raises(DataError, match=r"kind a: expected 299 or more harmless .* found 298"):
        thresholds.allowed({"a": 298}, {"*": 0.01}, 0.95)
    with pytest.raises(DataError, match="above 0 with a confidence"):
        thresholds.allowed({"a": 298}, {"*": 0.0}, 0.95)


@given(
    st.integers(1, 3000), st.sampled_from([0.005, 0.01, 0.02, 0.1]), st.sampled_from([0.8, 0.95])
)
def test_as_many_may_fire_as_the_binomial_tail_allows(count, rate, confidence):
    if count < thresholds.needed(rate, confidence):
        return
    fire = thresholds.allowed({"a": count}, {"*": rate}, confidence)["a"]
    assert binom.cdf(fire, count, rate) <= 1 - confidence + 1e-9
    assert binom.cdf(fire + 1, count, rate) > 1 - confidence
    assert fire <= thresholds.allowed({"a": count}, {"*": rate})["a"]


def test_the_promise_is_kept():
    """Of 400 calibrations on 500 prompts, at most about 5 % let more than 2 % of all fire."""
    rng = np.random.default_rng(0)
    population = np.sort(rng.normal(size=100_000))
    fire = thresholds.allowed({"a": 500}, {"*": 0.02}, 0.95)
    broken = plain = 0
    for _ in range(400):
        drawn = {"a": rng.choice(population, 500)}
        for name, may in (("kept", fire), ("plain", thresholds.allowed({"a": 500}, {"*": 0.02}))):
            above = (population > thresholds.choose(drawn, may)).mean() > 0.02
            broken += above and name == "kept"
            plain += above and name == "plain"
    assert broken / 400 <= 0.05 + 2 * (0.05 * 0.95 / 400) ** 0.5
    assert plain / 400 > 0.25  # without a confidence nothing is promised
