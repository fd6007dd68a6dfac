"""The numpy oracle against formulas written out by hand, and its properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import helpers
from steerbridge import reference
from steerbridge.spec import parse_site
from steerbridge.tensors import Tensor

vectors = hnp.arrays(np.float32, (3, 16), elements=st.floats(-100, 100, width=32))


def probe_of(package):
    return package.spec.probes[0]


def test_linear_probe_is_a_dot_product():
    package = helpers.package(probes=[helpers.linear_probe(bias=0.5)])
    x = np.arange(16.0)
    w = package.tensors["p.w"].float32().astype(float)
    assert reference.score(probe_of(package), package.tensors, x)[0] == pytest.approx(x @ w + 0.5)


def mlp(**fields):
    layers = [{"weight": f"w{i}", "bias": f"b{i}"} for i in range(2)]
    output = {"type": "softmax", "classes": ["harmful", "harmless"], "harmful": "harmful"}
    return helpers.linear_probe(
        type="mlp", layers=layers, activation="relu", output=output, **fields
    )


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("harmful", ["harmful", "harmless"])
def test_mlp_with_softmax(activation, harmful):
    torch = pytest.importorskip("torch")
    probe = mlp()
    probe |= {"activation": activation, "output": {**probe["output"], "harmful": harmful}}
    package = helpers.package(probes=[probe], rules=[])
    t = {k: torch.from_numpy(v.float32().copy()).double() for k, v in package.tensors.items()}
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)
    hidden = getattr(torch.nn.functional, activation)(t["w0"] @ x + t["b0"])
    want = torch.softmax(t["w1"] @ hidden + t["b1"], 0)[["harmful", "harmless"].index(harmful)]
    got = reference.score(probe_of(package), package.tensors, x.numpy())[0]
    assert got == pytest.approx(float(want), abs=1e-12)


@pytest.mark.parametrize(("side", "sign"), [("high", 1), ("low", -1)])
def test_sigmoid_polarity(side, sign):
    probe = mlp()
    probe |= {
        "output": {"type": "sigmoid", "harmful_when": side},
        "layers": [{"weight": "w", "bias": "b"}],
    }
    package = helpers.package(probes=[probe], rules=[])
    x = np.ones(16)
    y = float(package.tensors["w"].float32().sum() + package.tensors["b"].float32()[0])
    got = reference.score(probe_of(package), package.tensors, x)[0]
    assert got == pytest.approx(1 / (1 + math.exp(-sign * y)))


@given(vectors)
def test_cosine_is_the_projected_cosine_and_zero_for_zero(x):
    probe = helpers.linear_probe(type="cosine", direction="c", squash="tanh")
    package = helpers.package(probes=[probe], rules=[])
    c = package.tensors["c"].float32().astype(float)
    got = reference.score(probe_of(package), package.tensors, x)
    for row, value in zip(x.astype(float), got, strict=True):
        projected = np.tanh(np.outer(c, c) / (c @ c) @ row)
        norms = np.linalg.norm(row) * np.linalg.norm(projected)
        assert value == pytest.approx(row @ projected / norms if norms else 0.0, abs=1e-9)


def test_standardisation_and_missing_images():
    probe = helpers.linear_probe(
        readings=[
            helpers.reading("layer_input[1]"),
            helpers.reading("layer_input[2]", helpers.IMAGE),
        ],
        input_mean="mean",
        input_scale="scale",
    )
    package = helpers.package(probes=[probe])
    hidden = np.random.default_rng(0).normal(size=(5, 16))
    x = reference.probe_input(
        probe_of(package), package.tensors, lambda _: hidden, np.zeros(5, bool)
    )
    z = reference.standardise(probe_of(package), package.tensors, x)[0]
    mean, scale = (package.tensors[n].float32().astype(float) for n in ("mean", "scale"))
    assert np.allclose(z[:16], (hidden[-1] - mean[:16]) / scale[:16])
    assert (z[16:] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("comparator", [">", ">=", "<", "<="])
def test_a_score_that_is_not_finite_fires(value, comparator):
    package = helpers.package(probes=[helpers.linear_probe(comparator=comparator)])
    assert reference.verdict(probe_of(package), value).fired


@pytest.mark.parametrize(
    ("comparator", "fired"), [(">", False), (">=", True), ("<", False), ("<=", True)]
)
def test_the_comparator_decides_at_the_threshold(comparator, fired):
    package = helpers.package(probes=[helpers.linear_probe(comparator=comparator)])
    assert reference.verdict(probe_of(package), 0.0).fired is fired


def test_positions():
    hidden = np.arange(8.0)[:, None] * np.ones(16)
    end = lambda offset: helpers.reading("layer_input[2]", {"type": "prompt_end", "offset": offset})  # noqa: E731
    probes = [
        helpers.linear_probe(
            readings=[end(0), end(-2), helpers.reading("layer_input[2]", helpers.MEAN)]
        )
    ]
    package = helpers.package(probes=probes)
    x = reference.probe_input(probe_of(package), package.tensors, lambda _: hidden)
    assert x[[0, 16, 32]].tolist() == [7, 5, 3.5]
    with pytest.raises(IndexError, match="2 tokens"):
        reference.probe_input(probe_of(package), package.tensors, lambda _: hidden[:2])


def test_rules_any_all_and_strength():
    probes = [helpers.linear_probe("a"), helpers.linear_probe("b", threshold=10.0)]
    by_score = {"type": "score", "probe": "b", "scale": 2.0}
    rules = [
        helpers.rule(["a", "b"], ["h"], id="any"),
        helpers.rule(None, ["h"], id="all", condition={"type": "all", "probes": ["a", "b"]}),
        helpers.rule(None, ["h"], id="always"),
        helpers.rule(["a"], ["h"], id="score", strength=by_score),
    ]
    spec = helpers.package(probes=probes, rules=rules).spec
    verdicts = [reference.verdict(p, s) for p, s in zip(spec.probes, (1.0, 3.0), strict=True)]
    assert [(a.rule, a.strength) for a in reference.actions(spec, verdicts)] == [
        ("any", 1.0),
        ("always", 1.0),
        ("score", 6.0),
    ]
    broken = [verdicts[0], reference.verdict(spec.probes[1], math.nan)]
    assert reference.actions(spec, broken)[-1].strength == 2.0


def test_interventions_are_the_formulas():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(3, 16))
    low = helpers.head("low", weight={"form": "low_rank", "u": "u", "v": "v"})
    target = {"site": helpers.site("layer_output[1]"), "vector": "vec"}
    vector = {"position": "from_prompt_end", "alpha": 2.0, "targets": [target]}
    package = helpers.package(
        interventions=[
            helpers.head(),
            low,
            {"id": "add", "type": "add_vector", **vector},
            {"id": "out", "type": "project_out", **vector},
        ]
    )
    t = {k: v.float32().astype(float) for k, v in package.tensors.items()}
    act = {x.id: x for x in package.spec.interventions}
    head, block = parse_site("head_input"), parse_site("layer_input[2]")  # = layer_output[1]
    apply = lambda id, site: reference.apply(act[id], package.tensors, site, h, 0.5)  # noqa: E731
    assert np.allclose(apply("h", head), h + 0.25 * h @ t["h.W"].T)
    assert np.allclose(apply("low", head), h + 0.25 * h @ (t["u"] @ t["v"]).T)
    assert np.allclose(apply("add", block), h + t["vec"])
    assert np.allclose(apply("out", block), h - np.outer(h @ t["vec"], t["vec"]))
    for id in act:  # elsewhere nothing changes
        assert (apply(id, parse_site("layer_input[3]")) == h).all()


def test_sas_is_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 16))
    d = b - a
    cos = [
        d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j])
        for i, j in itertools.combinations(range(6), 2)
    ]
    assert reference.sas(a, b) == pytest.approx(np.mean(cos))
    assert reference.sas(a, a + 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="two or more"):
        reference.sas(a[:1], b[:1])


@given(hnp.arrays(np.float32, 64, elements=st.floats(width=32)))
def test_bf16_rounds_to_nearest_even_like_torch(values):
    torch = pytest.importorskip("torch")
    got = Tensor.of(values, "BF16").float32()
    want = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    assert np.array_equal(got, want, equal_nan=True)
