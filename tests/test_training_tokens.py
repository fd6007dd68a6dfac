"""Fitting probes that read rows: running scores as the reference has them, and what is learnt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from steerbridge import reference  # noqa: E402
from steerbridge.running import Window, running_scores  # noqa: E402
from steerbridge.spec import LayerInput  # noqa: E402
from steerbridge.training import tokens  # noqa: E402
from steerbridge.training.states import Rows  # noqa: E402
from steerbridge.training.tokens import NO_SCORE, Prompts, TokenDesign  # noqa: E402

SITES = tuple(LayerInput(stream="layer_input", layer=layer) for layer in (2, 5))


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_running_scores_equal_those_of_the_reference(lengths, window, seed):
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=n).astype(np.float32) for n in lengths]
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    flat = torch.from_numpy(np.concatenate(logits))
    found = tokens.running(flat, starts, window)
    largest = tokens._largest(found, starts)
    for i, rows in enumerate(logits):
        mine = found[starts[i] : starts[i + 1]].numpy()
        want = running_scores(Window(window), rows, np.ones(len(rows), bool), len(rows) - 1)
        assert np.array_equal(mine == NO_SCORE, np.isnan(want))
        known = ~np.isnan(want)
        assert np.allclose(mine[known], want[known], atol=1e-5)
        assert float(largest[i]) == (mine.max() if known.any() else NO_SCORE)


def made_up(count, seed, width=8):
    """Rows of noise; in a harmful prompt four rows somewhere carry a mark."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(12, 60, count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    array = rng.normal(size=(starts[-1], 2, width)).astype(np.float16)
    harmful = np.arange(count) % 2 == 0
    for i in np.flatnonzero(harmful):
        at = rng.integers(starts[i] + 4, starts[i + 1] - 4)
        array[at : at + 4, 1, 3] += 4
    return Rows(array, starts, SITES), harmful


@pytest.mark.parametrize("hidden", [0, 32])
def test_a_mark_in_a_few_rows_is_learnt_wherever_it_stands(hidden):
    rows, harmful = made_up(400, 0)
    index, ones = np.arange(400), np.ones(400)
    train, held = (Prompts(part, harmful[part], ones[part]) for part in (index[:300], index[300:]))
    design = TokenDesign(SITES, 4, hidden)
    told = []
    fit = tokens.fit(rows, train, held, design, 0, epochs=30, told=lambda *x: told.append(x))
    scores = tokens.scores(fit.probe, rows, held.index, design)
    assert np.mean(scores[held.harmful, None] > scores[~held.harmful]) > 0.97
    assert fit.losses[fit.epochs - 1][1] == min(loss for _, loss in fit.losses)
    assert [epoch for epoch, _ in told] == list(range(1, len(fit.losses) + 1))
    again = tokens.fit(rows, train, held, design, 0, epochs=30)
    assert np.array_equal(again.probe.layers[0][0], fit.probe.layers[0][0])


def test_what_is_written_scores_as_it_was_fitted():
    rows, harmful = made_up(80, 1)
    index = np.arange(80)
    prompts = Prompts(index, harmful, np.ones(80))
    design = TokenDesign(SITES, 6, 16)
    fit = tokens.fit(rows, prompts, prompts, design, 0, epochs=3).probe.rescaled(0.5, -1.0)
    probe, tensors = tokens.to_spec(fit, design, 0.3, "p")
    assert probe.threshold == pytest.approx(1 / (1 + np.exp(-0.3)))
    scores = tokens.scores(fit, rows, index, design)
    for i in range(0, 80, 9):
        states = rows.array[rows.starts[i] : rows.starts[i + 1]].astype(np.float32)
        at = {site: states[:, k] for k, site in enumerate(SITES)}
        x = reference.row_inputs(probe.token_reading, at.__getitem__)
        logits = reference.row_logits(probe, tensors, x)
        all_rows = np.ones(len(logits), bool)
        verdict = reference.judge_rows(probe, logits, all_rows, all_rows, len(logits) - 1)
        assert np.log(verdict.score / (1 - verdict.score)) == pytest.approx(scores[i], abs=1e-3)


def test_a_prompt_without_rows_in_scope_has_no_score():
    rows, harmful = made_up(10, 2)
    rows = Rows(rows.array, np.minimum(rows.starts, 3), rows.sites)
    prompts = Prompts(np.arange(10), harmful, np.ones(10))
    design = TokenDesign(SITES[:1], 4, 0)
    probe = tokens.Fitted(
        np.zeros(8, np.float32),
        np.ones(8, np.float32),
        ((np.ones((1, 8), np.float32), np.zeros(1, np.float32)),),
    )
    assert set(tokens.scores(probe, rows, prompts.index, design)) == {NO_SCORE}


@pytest.mark.parametrize("hidden", [0, 16])
def test_a_blend_scores_as_the_sum_of_its_probes(hidden):
    """Of probes that standardise their inputs differently."""
    rng = np.random.default_rng(0)

    def probe(seed):
        draw = np.random.default_rng(seed)
        sizes = [8, *([hidden] if hidden else []), 1]
        layers = tuple(
            (draw.normal(size=(o, i)).astype("f4"), draw.normal(size=o).astype("f4"))
            for i, o in itertools.pairwise(sizes)
        )
        scale = draw.uniform(0.5, 2, 8).astype("f4")
        return tokens.Fitted(draw.normal(size=8).astype("f4"), scale, layers)

    x = rng.normal(size=(50, 8)).astype("f4")
    parts = [(probe(1), 0.5), (probe(2), 2.0), (probe(3), -0.25)]
    want = sum(factor * one.scores(x) for one, factor in parts)
    blend = tokens.blended(parts)
    np.testing.assert_allclose(blend.scores(x), want, rtol=1e-4, atol=1e-4)
    assert len(blend.layers) == len(parts[0][0].layers)


def task_of(count=400):
    """A task on made-up rows."""
    from steerbridge import Example, TrainSettings
    from steerbridge.training.parts import Parts
    from steerbridge.training.search import Task
    from steerbridge.training.states import States

    rows, harmful = made_up(count, 3)
    kinds = ["a" if harm else "general" for harm in harmful]
    examples = tuple(Example(f"text {i}", bool(harmful[i]), kinds[i]) for i in range(count))
    part = np.array(["train", "train", "search", "search"])[np.arange(count) // 2 % 4]
    whole = States(np.zeros((count, 0, 8), np.float16), (), rows)
    parts = Parts(examples, part, np.arange(count), ("chat",))
    settings = TrainSettings(name="made up")
    goal = next(goal for goal in settings.goals if goal.reads == "rows")
    return Task(whole, parts, goal, settings)


def test_a_probe_is_the_mean_of_several_fits_of_the_best_design(monkeypatch):
    from steerbridge.training import search

    monkeypatch.setattr(tokens, "HIDDEN", 8)
    task, steps = task_of(), []
    result = search.search(task, search.Awareness({}, {}), lambda: steps.append(1))
    design = result.best.design
    assert len(steps) == len(result.tried) + search.FITS
    assert design in [c.design for c in result.tried]
    assert {c.design.window for c in result.tried} == {4, 8, 16}
    first, *others = (task.fit(design, run=run) for run in range(search.FITS))
    assert not np.array_equal(first.layers[0][0], others[0].layers[0][0])
    index = task.parts.of("search")
    rows = task.states.rows.array[task.states.rows.starts[index[0]] :][:20]
    x = rows[:, [SITES.index(s) for s in design.sites]].reshape(20, -1).astype("f4")
    want = np.mean([probe.scores(x) for probe in (first, *others)], axis=0)
    np.testing.assert_allclose(result.best.fitted.scores(x), want, atol=1e-3)
    assert result.best.detection > 0.8
