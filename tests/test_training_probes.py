"""The maths of probes on synthetic states: fits, folds, calibration, thresholds."""

from __future__ import annotations

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from steerbridge import reference, stats, thresholds  # noqa: E402
from steerbridge.errors import DataError  # noqa: E402
from steerbridge.package import SteeringPackage, parse  # noqa: E402
from steerbridge.spec import Reading  # noqa: E402
from steerbridge.training import probes  # noqa: E402
from steerbridge.training.probes import ProbeDesign  # noqa: E402
from steerbridge.training.states import Rows, States  # noqa: E402

pytestmark = pytest.mark.hf

READING = Reading.model_validate(helpers.reading("layer_input[2]"))
NO_ROWS = Rows(np.empty((0, 0, 4), np.float16), np.zeros(1, np.int64), ())
IMAGE_READING = Reading.model_validate(helpers.reading("layer_input[2]", helpers.IMAGE))


def separable(n=200, d=16, seed=0):
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, d)).astype(np.float32)
    x[harmful, 0] += 4
    return x, harmful


@pytest.mark.parametrize("shape", ["linear", "mlp"])
def test_a_probe_learns_and_its_spec_scores_the_same(shape):
    x, harmful = separable()
    rule = ProbeDesign((READING,), shape, 1e-3)
    fitted = probes.fit(x, harmful, np.ones(len(x)), rule, seed=0)
    scores = fitted.scores(x)
    assert stats.auroc(scores[harmful], scores[~harmful]) > 0.98
    probe, tensors = probes.to_spec(fitted, rule, 0.5, "harm")
    spec = parse(helpers.raw_spec(probes=[probe.model_dump(exclude_unset=True)], rules=[]))
    package = SteeringPackage(spec, {**tensors, "h.W": helpers.package().tensors["h.W"]})
    got = reference.score(package.spec.probes[0], package.tensors, x)
    assert np.allclose(got, 1 / (1 + np.exp(-scores)), atol=1e-6)
    assert (reference.fires(package.spec.probes[0], got) == (scores > 0.5)).all()


def test_fits_are_deterministic():
    x, harmful = separable()
    fits = [
        probes.fit(x, harmful, np.ones(len(x)), ProbeDesign((READING,), "mlp", 1e-3), 7)
        for _ in "ab"
    ]
    for (a, b), (c, d) in zip(fits[0].layers, fits[1].layers, strict=True):
        assert np.array_equal(a, c)
        assert np.array_equal(b, d)


def test_calibration_holds_every_kind_s_target():
    rng = np.random.default_rng(0)
    scores = {"pair": rng.normal(size=300), "borderline": rng.normal(2, 1, size=100)}
    counts = {kind: len(s) for kind, s in scores.items()}
    fire = thresholds.allowed(counts, {"*": 0.01, "borderline": 0.05})
    assert fire == {"pair": 3, "borderline": 5}
    threshold = thresholds.choose(scores, fire)
    assert (scores["pair"] > threshold).sum() <= 3
    assert (scores["borderline"] > threshold).sum() == 5
    every = np.sort(np.concatenate(list(scores.values())))
    at = np.searchsorted(every, threshold)
    assert threshold == pytest.approx((every[at - 1] + every[at]) / 2)  # on no score


@pytest.mark.parametrize("shape", ["linear", "mlp"])
def test_platt_calibrates_and_moves_no_decision(shape):
    """The scores are seven times too large; slope and shift restore the true log-odds."""
    rng = np.random.default_rng(0)
    odds = rng.normal(scale=2, size=20000)
    harmful = rng.random(20000) < 1 / (1 + np.exp(-odds))
    slope, shift = probes.platt(7 * odds + 3, harmful, np.ones(20000))
    assert slope == pytest.approx(1 / 7, rel=0.05)
    assert shift == pytest.approx(-3 / 7, abs=0.1)
    x, labels = separable()
    fitted = probes.fit(x, labels, np.ones(len(x)), ProbeDesign((READING,), shape, 1e-3), 0)
    moved = fitted.rescaled(slope, shift).scores(x)
    assert np.allclose(moved, slope * fitted.scores(x) + shift, atol=1e-5)


def test_auroc_counts_pairs_and_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 20).astype(float)
    want = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert stats.auroc(a, b) == pytest.approx(want)


def test_a_missing_image_is_fitted_and_scored_as_the_mean():
    x, harmful = separable()
    holes = x.copy()
    holes[::3] = np.nan
    rule = ProbeDesign((IMAGE_READING,), "linear", 1e-2)
    fitted = probes.fit(holes, harmful, np.ones(len(x)), rule, seed=0)
    assert np.allclose(fitted.mean, np.nanmean(holes, axis=0), atol=1e-6)
    probe, tensors = probes.to_spec(fitted, rule, 0.0, "p")
    got = reference.score_readings(probe, tensors, holes[:, None])
    assert np.allclose(got, 1 / (1 + np.exp(-fitted.scores(holes))), atol=1e-6)
    bias = 1 / (1 + np.exp(-probe.bias))
    assert got[0] == pytest.approx(bias, abs=1e-6)  # nothing but the bias is left
    end = probes.to_spec(fitted, ProbeDesign((READING,), "linear", 1e-2), 0.0, "p")[0]
    assert np.isnan(reference.score_readings(end, tensors, holes[:, None])[0])  # a broken state


def test_a_probe_takes_no_broken_states():
    array = np.zeros((3, 1, 4), np.float32)
    array[1, 0, 2] = np.nan
    with pytest.raises(DataError, match="prompt 1"):
        States(array, (READING,), NO_ROWS).of([READING])
    array[1] = np.nan
    assert np.isnan(States(array, (IMAGE_READING,), NO_ROWS).of([IMAGE_READING])[1]).all()
    array[1, 0, 0] = 0.0  # half a reading is no missing image
    with pytest.raises(DataError, match="prompt 1"):
        States(array, (IMAGE_READING,), NO_ROWS).of([IMAGE_READING])


def test_a_threshold_moves_up_in_a_gap_and_nowhere_else():
    calm, near, far = np.array([1.0, 2.0]), np.linspace(0, 10, 1001), np.linspace(6, 10, 1001)
    assert thresholds.choose({"a": calm}, {"a": 0}, [far]) == pytest.approx(4.02, abs=0.001)
    assert thresholds.choose({"a": calm}, {"a": 0}, [far, near]) == pytest.approx(2.005)
    assert thresholds.choose({"a": calm}, {"a": 1}) == 1.5
    assert thresholds.choose({"a": calm}, {"a": 0}) == 2.5  # nothing above
    assert thresholds.choose({"a": calm, "b": calm + 1}, {"a": 0, "b": 1}) == 2.5
