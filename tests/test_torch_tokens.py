"""Token readings in torch: the numbers of the reference, bit for bit where logits are given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
from steerbridge import reference
from steerbridge.running import Window, running_scores

torch = pytest.importorskip("torch")

from steerbridge_torch import NEVER, RowLogits, RowScores, Weights, rounded  # noqa: E402

SITES = [helpers.site("layer_input[1]"), helpers.site("layer_input[3]")]


def reading(**fields):
    return {"sites": SITES, "scope": "both", "window": 4, "skip": 0, "rows": "all"} | fields


def probe(threshold=0.5, comparator=">", **fields):
    made = helpers.linear_probe(
        link="sigmoid",
        threshold=threshold,
        comparator=comparator,
        token_reading=reading(**fields),
    )
    return helpers.package(probes=[made]).spec.probes[0]


one = st.floats(-30, 30, width=32)


@given(st.integers(1, 5), st.integers(0, 5), st.data())
def test_scores_equal_the_reference_whatever_the_passes(window, skip, data):
    """Two rows of a batch with scopes and ends of their own, in any passes, some taken back."""
    length = data.draw(st.integers(1, 14))
    logits = np.float32(
        data.draw(st.lists(st.tuples(one, one), min_size=length, max_size=length))
    ).T
    counted = np.array(
        data.draw(
            st.lists(st.tuples(st.booleans(), st.booleans()), min_size=length, max_size=length)
        )
    ).T
    ends = [data.draw(st.integers(0, length - 1)) for _ in range(2)]
    over = Window(window, skip)
    inside = np.stack([over.in_scope(c, e) for c, e in zip(counted, ends, strict=True)])
    at_end = np.arange(length) == np.array(ends)[:, None]
    scores = RowScores(probe(window=window, skip=skip), 2, torch.device("cpu"))
    at = 0
    while at < length:
        until = data.draw(st.integers(at + 1, length))
        part = slice(at, until)
        given = (logits[:, part], np.ones_like(inside[:, part]), inside[:, part], at_end[:, part])
        scores.add(at, *map(torch.tensor, given))
        at = until
        if data.draw(st.booleans()):  # drafts that are rejected come again
            at = data.draw(st.integers(0, at))
    for row in range(2):
        whole = running_scores(over, logits[row], counted[row], ends[row])
        known = ~np.isnan(whole)
        for column in range(length):
            best = whole[: column + 1][known[: column + 1]]
            found = scores.scores_at(torch.tensor([column, column]))[row].item()
            expected = reference.running_score(best.max()) if best.size else np.nan
            # tanh of numpy and of torch may differ in the last place
            assert found == pytest.approx(float(expected), rel=1e-15, nan_ok=True)
        crossed = known & (reference.running_score(whole) > 0.5)
        first = int(np.flatnonzero(crossed)[0]) if crossed.any() else NEVER
        assert scores.fired()[row] == first


def test_running_scores_are_bit_equal():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=700).astype(np.float32) * 9
    over = Window(16)
    scores = RowScores(probe(window=16), 1, torch.device("cpu"))
    whole = running_scores(over, logits, np.ones(700, bool), None)
    yes = torch.ones(1, 700, dtype=torch.bool)
    scores.add(0, torch.tensor(logits)[None], yes, yes, ~yes)
    best = np.maximum.accumulate(np.where(np.isnan(whole), -np.inf, whole))
    assert scores._best[0, :700].numpy().tobytes() == best.tobytes()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"link": "sigmoid"}, "linear"),
        ({"output": {"type": "sigmoid", "harmful_when": "low"}}, "mlp"),
        ({"output": {"type": "sigmoid", "harmful_when": "high"}, "activation": "gelu"}, "mlp"),
        (
            {"output": {"type": "softmax", "classes": ["a", "b", "c"], "harmful": "b"}},
            "mlp",
        ),
    ],
)
def test_logits_of_rows_equal_the_reference(fields, kind):
    if kind == "mlp":
        layers = [{"weight": f"w{i}", "bias": f"b{i}"} for i in range(2)]
        fields = {"activation": "relu", "layers": layers} | fields
    made = helpers.linear_probe(
        type=kind, input_mean="m", input_scale="s", token_reading=reading(), **fields
    )
    package = helpers.package(probes=[made])
    [known] = package.spec.probes
    rng = np.random.default_rng(1)
    states = [rng.normal(size=(2, 7, 16)).astype(np.float32) for _ in SITES]
    row_logits = RowLogits(known, Weights(package))
    parts = [row_logits.part(i, torch.tensor(h)) for i, h in enumerate(states)]
    found, sound = row_logits.logits(sum(part for part, _ in parts))
    want = reference.row_logits(
        known, package.tensors, np.concatenate(states, axis=2).reshape(14, -1)
    )
    np.testing.assert_allclose(found.numpy().reshape(-1), want, rtol=1e-4, atol=1e-4)
    assert bool(sound.all())
    assert all(bool(s.all()) for _, s in parts)


def test_a_row_that_is_not_sound_fires_and_takes_no_neighbour_along():
    scores = RowScores(probe(0.9), 2, torch.device("cpu"))
    logits = torch.zeros(2, 6)
    logits[0, 3] = torch.nan
    sound = ~torch.isnan(logits)
    yes = torch.ones(2, 6, dtype=torch.bool)
    scores.add(0, logits, sound, yes, ~yes)
    assert scores.fired().tolist() == [3, NEVER]
    at = torch.tensor([5, 5])
    assert scores.sound_at(at).tolist() == [False, True]
    assert scores.scores_at(at)[1] == 0.5
    assert scores.scores_at(at)[0].isnan()
    # Out of scope it is nobody's.
    scores.add(0, logits, sound, yes & sound, ~yes)
    assert scores.fired().tolist() == [NEVER, NEVER]


def test_rows_change_places():
    scores = RowScores(probe(0.9, window=1), 2, torch.device("cpu"))
    yes = torch.ones(2, 1, dtype=torch.bool)
    scores.add(0, torch.tensor([[9.0], [-9.0]]), yes, yes, ~yes)
    scores.reorder(torch.tensor([1, 1]))
    assert scores.fired().tolist() == [NEVER, NEVER]
    scores.add(1, torch.tensor([[-9.0], [9.0]]), yes, yes, ~yes)
    assert scores.fired().tolist() == [NEVER, 1]


def test_what_is_not_to_be_rounded_keeps_the_callers_autocast():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), rounded(a.device, wanted=False):
        assert (a @ a).dtype == torch.bfloat16
    with rounded(a.device, wanted=False):
        assert (a @ a).dtype == torch.float32
