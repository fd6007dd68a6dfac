"""Probes for different prompts: a threshold each, and one promise."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
from steerbridge import thresholds
from steerbridge.training.together import shared_out

POPULATION = 20_000


def drawn(rng, count: int):
    """Scores [2, N] of ordinary prompts: the first channel knows them, the second does not."""
    return np.stack([rng.normal(-4.0, 0.5, count), rng.standard_t(3, count)])


def test_a_weak_channel_does_not_raise_the_threshold_of_another():
    rng = np.random.default_rng(0)
    calm = drawn(rng, 300)
    harm = np.stack([rng.normal(2.0, 0.5, 100), rng.normal(2.0, 1.0, 100)])
    scores = np.concatenate([calm, harm, harm], axis=1)
    meant = np.zeros(scores.shape, np.bool_)
    meant[0, 300:400] = meant[1, 400:] = True
    ordinary = np.arange(500) < 300
    strong, weak = shared_out(scores, meant, ordinary, 2)
    assert (harm[0] > strong).mean() >= 0.97
    assert -2.0 < strong < 1.5
    fires = (calm > np.array([[strong], [weak]])).any(axis=0)
    assert fires.sum() <= 2
    assert (harm[1] > weak).mean() > 0.0 or weak > harm[1].max()
    # What may fire goes where it detects something.
    assert (calm[1] > weak).sum() == fires.sum()


def test_several_thresholds_keep_the_promise():
    """Of 300 choices on 400 prompts, at most about 5 % let more than 2 % of all fire."""
    rng = np.random.default_rng(1)
    everything = rng.standard_t(3, (3, POPULATION))
    fire = thresholds.allowed({"a": 400}, {"*": 0.02}, 0.95, 3)["a"]
    assert fire < thresholds.allowed({"a": 400}, {"*": 0.02}, 0.95)["a"]
    harm = rng.normal(3.0, 1.5, (3, 60))
    meant = np.concatenate([np.zeros((3, 400), np.bool_), np.ones((3, 60), np.bool_)], axis=1)
    broken = 0
    for _ in range(300):
        calm = everything[:, rng.choice(POPULATION, 400, replace=False)]
        limits = shared_out(np.concatenate([calm, harm], axis=1), meant, np.arange(460) < 400, fire)
        broken += (everything > np.array(limits)[:, None]).any(axis=0).mean() > 0.02
    assert broken / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_more_thresholds_take_more_prompts(chosen):
    binom = pytest.importorskip("scipy.stats").binom
    needed = thresholds.needed(0.02, 0.95, chosen)
    assert binom.cdf(chosen - 1, needed, 0.02) <= 0.05 < binom.cdf(chosen - 1, needed - 1, 0.02)
    assert thresholds.allowed({"a": needed}, {"*": 0.02}, 0.95, chosen) == {"a": 0}
