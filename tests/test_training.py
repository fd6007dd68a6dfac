"""Training maths on made-up states, and the whole journey on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from steerbridge import calibration, data, reference, stats  # noqa: E402
from steerbridge.data import Example  # noqa: E402
from steerbridge.encodings import plain  # noqa: E402
from steerbridge.errors import DataError  # noqa: E402
from steerbridge.low_rank import low_rank  # noqa: E402
from steerbridge.package import SteeringPackage, parse  # noqa: E402
from steerbridge.runtime import OutputHead  # noqa: E402
from steerbridge.spec import Reading  # noqa: E402
from steerbridge.training import head as heads  # noqa: E402
from steerbridge.training import probes, recipe, search  # noqa: E402
from steerbridge.training.head import HeadSettings  # noqa: E402
from steerbridge.training.probes import Recipe  # noqa: E402
from steerbridge.training.states import States, all_readings, capture, turn_end  # noqa: E402

pytestmark = pytest.mark.hf

READING = Reading.model_validate(helpers.reading("layer_input[2]"))


def separable(n=200, d=16, seed=0):
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, d)).astype(np.float32)
    x[harmful, 0] += 4
    return x, harmful


@pytest.mark.parametrize("shape", ["linear", "mlp"])
def test_a_probe_learns_and_its_spec_scores_the_same(shape):
    x, harmful = separable()
    rule = Recipe((READING,), shape, 1e-3)
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
        probes.fit(x, harmful, np.ones(len(x)), Recipe((READING,), "mlp", 1e-3), 7) for _ in "ab"
    ]
    for (a, b), (c, d) in zip(fits[0].layers, fits[1].layers, strict=True):
        assert np.array_equal(a, c)
        assert np.array_equal(b, d)


def test_out_of_fold_scores_come_from_probes_that_did_not_see_the_row():
    """Labels are noise: in-sample a probe with more inputs than rows is perfect, out of it not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 100)).astype(np.float32)
    y = rng.random(60) < 0.5
    rule = Recipe((READING,), "linear", 1e-6)
    seen = probes.fit(x, y, np.ones(60), rule, 0).scores(x)
    fresh = probes.out_of_fold(x, y, np.ones(60), np.arange(60) % 5, rule, 0)
    assert stats.auroc(seen[y], seen[~y]) == 1.0
    assert stats.auroc(fresh[y], fresh[~y]) < 0.75


def test_calibration_holds_every_kind_s_target():
    rng = np.random.default_rng(0)
    scores = {"pair": rng.normal(size=300), "borderline": rng.normal(2, 1, size=100)}
    threshold = calibration.threshold(scores, {"*": 0.01, "borderline": 0.05})
    assert (scores["pair"] > threshold).mean() <= 0.01
    assert (scores["borderline"] > threshold).mean() <= 0.05
    below = np.nextafter(threshold, -np.inf)
    assert (scores["borderline"] > below).mean() > 0.05  # the lowest that holds


@pytest.mark.parametrize("shape", ["linear", "mlp"])
def test_platt_calibrates_and_moves_no_decision(shape):
    """Scores seven times too sure: slope and shift give back the true odds."""
    rng = np.random.default_rng(0)
    odds = rng.normal(scale=2, size=20000)
    harmful = rng.random(20000) < 1 / (1 + np.exp(-odds))
    slope, shift = probes.platt(7 * odds + 3, harmful, np.ones(20000))
    assert slope == pytest.approx(1 / 7, rel=0.05)
    assert shift == pytest.approx(-3 / 7, abs=0.1)
    x, labels = separable()
    fitted = probes.fit(x, labels, np.ones(len(x)), Recipe((READING,), shape, 1e-3), 0)
    moved = fitted.rescaled(slope, shift).scores(x)
    assert np.allclose(moved, slope * fitted.scores(x) + shift, atol=1e-5)


def test_the_end_of_the_turn_is_what_the_template_begins_with():
    class Model:
        def __init__(self, template):
            self.facts = FACTS if template else helpers.FACTS

        def render(self, prompt):
            return [1, *map(ord, prompt.text), 90, 10, 91, 92, 10]

    FACTS = replace(helpers.FACTS, chat_template_sha256="0" * 64)
    prompts = [Example(t, False) for t in ("one", "two", "three")]
    assert turn_end(Model(True), prompts) == -4
    assert turn_end(Model(False), prompts) == 0
    offsets = [getattr(r.position, "offset", None) for r in all_readings(3, -4)]
    assert offsets == [0, 0, -4, -4, None, None]


def test_auroc_counts_pairs_and_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30).astype(float), rng.integers(0, 5, 20).astype(float)
    want = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert stats.auroc(a, b) == pytest.approx(want)


def test_folds_keep_pairs_together_and_do_not_depend_on_the_order():
    examples = [Example(f"t{i}", bool(i % 2), pair=f"p{i // 2}") for i in range(100)]
    fold = data.folds(examples, 5, seed=0)
    assert fold[::2] == fold[1::2]
    assert set(fold) == set(range(5))
    assert data.folds(examples[::-1], 5, seed=0) == fold[::-1]


def head_problem(seed=0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(12, 3, 16)).astype(np.float32) + np.eye(3, 16, dtype=np.float32) * 4
    weight = rng.normal(size=(64, 16)).astype(np.float32)
    return states, np.array([5, 9, 2]), OutputHead(weight, None, None)


def test_the_head_learns_the_exact_loss():
    states, target, head = head_problem()
    settings = HeadSettings(steps=200, batch=12, learning_rate=0.3)
    trained = heads.train_head(states, target, head, settings)
    h = states.reshape(-1, 16).astype(np.float64)
    labels = np.tile(target, 12)

    def loss(w):
        z = (h + trained.eps * h @ w.T) @ head.weight.T.astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]))

    assert trained.loss_before == pytest.approx(loss(np.zeros((16, 16))), rel=1e-4)
    assert trained.loss_after == pytest.approx(loss(trained.matrix.astype(np.float64)), abs=1e-4)
    assert trained.loss_after < 0.05 * trained.loss_before


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [None, np.linspace(-1, 1, 32, dtype=np.float32)])
def test_the_loss_and_its_gradient_are_those_of_autograd(bias, softcap):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=rng)
    loss = heads.HeadLoss(OutputHead(weight.numpy(), bias, softcap))
    for rows in (5, 9, 3):  # one buffer, batches of several sizes
        h = torch.randn(rows, 16, generator=rng).requires_grad_()
        target = torch.randint(0, 32, (rows,), generator=rng)
        z = h @ weight.T + (0 if bias is None else torch.from_numpy(bias))
        z = softcap * torch.tanh(z / softcap) if softcap else z
        want = torch.nn.functional.cross_entropy(z, target)
        (wanted,) = torch.autograd.grad(want, h)
        got = loss(h, target)
        (found,) = torch.autograd.grad(2 * got, h)
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        assert torch.allclose(found, 2 * wanted, atol=1e-6)


def test_low_rank_is_the_best_and_says_what_it_lost():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(16, 3)) @ rng.normal(size=(3, 16))).astype(np.float32)
    cut = low_rank(matrix, 3)
    assert np.allclose(cut.u @ cut.v, matrix, atol=1e-4)
    assert cut.error < 1e-5
    one = low_rank(matrix, 1)
    measured = np.linalg.norm(one.u @ one.v - matrix) / np.linalg.norm(matrix)
    assert one.error == pytest.approx(measured, rel=1e-4)
    with pytest.raises(ValueError, match=r"1\.\.16"):
        low_rank(matrix, 17)


class Tokens:
    """The part of a tokenizer that training uses: words w0..w63 and no template."""

    chat_template = None
    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{i}" for i in ids)

    def get_vocab(self):
        return {f"w{i}": i for i in range(64)}


@pytest.fixture
def model():
    from steerbridge_hf import HfModel

    return HfModel(helpers.tiny(), Tokens())


def made_up(n=120):
    rng = np.random.default_rng(0)
    examples = []
    for i in range(n):
        harmful = i % 2 == 0
        body = rng.integers(10, 60, size=rng.integers(3, 9)).tolist()
        words = [*body, 5 if harmful else 7]
        examples.append(Example(" ".join(f"w{w}" for w in words), harmful, "pair", f"p{i // 2}"))
    return examples


def test_capture_equals_the_oracle_and_resumes(model, tmp_path):
    examples, readings = made_up(20), all_readings(4)
    whole = capture(model, examples, readings, tmp_path / "a").array.copy()
    hidden = model.model(
        torch.tensor([model.render(examples[3])]), output_hidden_states=True
    ).hidden_states
    for k, r in enumerate(readings):
        want = reference.read(r, hidden[r.site.layer][0].detach().numpy())
        assert np.allclose(whole[3, k], want, atol=1e-5)
    again = capture(model, examples, readings, tmp_path / "a")  # nothing left to do
    assert np.array_equal(again.array, whole)
    with pytest.raises(DataError, match="prompts"):
        capture(model, examples[:10], readings, tmp_path / "a")


@pytest.mark.parametrize("kind", ["head_matrix", "add_vector", "project_out"])
def test_the_journey_on_a_tiny_model_is_deterministic(model, tmp_path, kind):
    settings = recipe.TrainSettings(
        refusal="w5 w9 w11",
        intervention=kind,
        rank=2 if kind == "head_matrix" else None,
        head=HeadSettings(steps=30, batch=8),
        target_fpr={"*": 0.05},
        validation_prompts=4,
    )
    examples = made_up()
    made = [recipe.train(model, examples, settings, tmp_path / name) for name in "ab"]
    one, two = (plain(p.spec) for p in made)
    assert one.pop("created") <= two.pop("created")
    assert one == two
    assert dict(made[0].tensors) == dict(made[1].tensors)
    found = made[0].spec.evidence.probes["harm"]
    assert found["auroc"] > 0.9
    assert set(made[0].spec.evidence.sas) == {str(r) for r in all_readings(4)}
    answers = model.generate(examples[:10], made[0], max_new_tokens=2)
    assert [a.outcome.fired for a in answers] == [e.harmful for e in examples[:10]]


def test_too_few_prompts_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="harmful prompts"):
        recipe.train(model, made_up(20), recipe.TrainSettings(), tmp_path)


def test_awareness_needs_pairs():
    examples = [Example("a", True), Example("b", False)]
    states = States(np.zeros((2, 1, 4), np.float32), (READING,))
    found = search.awareness(states, examples)
    assert found == search.Awareness({str(READING): 0.0}, {str(READING): {}})


def test_awareness_by_kind_leaves_out_prompts_without_the_image():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 2, 4)).astype(np.float32)
    array[:4, 1] = np.nan  # the first two pairs have no image
    image = replace_position(READING, "image_mean")
    examples = [
        Example(f"t{i}", i % 2 == 0, "text" if i < 4 else "image", f"p{i // 2}") for i in range(8)
    ]
    found = search.awareness(States(array, (READING, image)), examples)
    whole, kinds = found.whole, found.by_kind
    assert kinds[str(READING)].keys() == {"text", "image"}
    assert kinds[str(image)]["text"] == 0.0
    assert whole[str(image)] == kinds[str(image)]["image"] != 0.0


def replace_position(reading, kind):
    return Reading.model_validate({**reading.model_dump(), "position": {"type": kind}})


def test_a_missing_image_is_fitted_and_scored_as_the_mean():
    x, harmful = separable()
    holes = x.copy()
    holes[::3] = np.nan
    image = replace_position(READING, "image_mean")
    rule = Recipe((image,), "linear", 1e-2)
    fitted = probes.fit(holes, harmful, np.ones(len(x)), rule, seed=0)
    assert np.allclose(fitted.mean, np.nanmean(holes, axis=0), atol=1e-6)
    probe, tensors = probes.to_spec(fitted, rule, 0.0, "p")
    got = reference.score_readings(probe, tensors, holes[:, None])
    assert np.allclose(got, 1 / (1 + np.exp(-fitted.scores(holes))), atol=1e-6)
    bias = 1 / (1 + np.exp(-probe.bias))
    assert got[0] == pytest.approx(bias, abs=1e-6)  # nothing but the bias is left
    end = probes.to_spec(fitted, Recipe((READING,), "linear", 1e-2), 0.0, "p")[0]
    assert np.isnan(reference.score_readings(end, tensors, holes[:, None])[0])  # a broken state


def test_a_probe_takes_no_broken_states():
    array = np.zeros((3, 1, 4), np.float32)
    array[1, 0, 2] = np.nan
    with pytest.raises(DataError, match="prompt 1"):
        States(array, (READING,)).of([READING])
    image = replace_position(READING, "image_mean")
    array[1] = np.nan
    assert np.isnan(States(array, (image,)).of([image])[1]).all()
    array[1, 0, 0] = 0.0  # half a reading is no missing image
    with pytest.raises(DataError, match="prompt 1"):
        States(array, (image,)).of([image])


def test_goals_weigh_both_sides_of_a_kind_apart():
    goal = recipe.Goal("p", 1.0, {"pair": 0.0}, {"pair": 3.0})
    sides = [goal.weight(Example("t", harmful, "pair")) for harmful in (True, False)]
    assert sides == [0.0, 3.0]
    assert goal.weight(Example("t", True, "other")) == 1.0
    channel = recipe.Goal("p", 1.0, {"*": 0.0, "image": 2.0}, needs="image")
    harm = [Example("t", True, kind) for kind in ("image", "pair")]
    assert [channel.weight(e) for e in harm] == [2.0, 0.0]
    assert channel.weight(Example("t", False, "pair")) == 1.0
    assert channel.applies(harm)
    assert not channel.applies(harm[1:])
    assert not channel.applies([Example("t", False, "image")])


def test_every_kind_of_harm_is_some_goal_s_business():
    for kind in ("pair", "general_harmful", "twin", "text", "image", "both", "any other"):
        harm = [Example("t", True, kind)]
        mine = [goal for goal in recipe.GOALS if goal.applies(harm)]
        assert any(goal.weight(harm[0]) > 0 for goal in mine), kind


def test_a_goal_without_its_prompts_makes_no_probe(model, tmp_path):
    settings = recipe.TrainSettings(
        refusal="w5 w9", head=HeadSettings(steps=5, batch=8), validation_prompts=4
    )
    package = recipe.train(model, made_up(), settings, tmp_path)
    assert [p.id for p in package.spec.probes] == ["harm"]
    assert package.spec.rules[0].condition.probes == ("harm",)
    twins = [replace(e, kind="twin" if e.harmful else "borderline") for e in made_up()]
    package = recipe.train(model, [*made_up(), *twins], settings, tmp_path / "b")
    assert [p.id for p in package.spec.probes] == ["harm", "twins"]
    assert package.spec.rules[0].condition.probes == ("harm", "twins")
    image = [replace(e, kind="image", pair=None) for e in made_up()]
    package = recipe.train(model, image, settings, tmp_path / "c")
    assert [p.id for p in package.spec.probes] == ["image"]
    package = recipe.train(model, [*made_up(), *image], settings, tmp_path / "d")
    assert [p.id for p in package.spec.probes] == ["harm", "image"]
    auroc = package.spec.evidence.safety["auroc_per_reading"]
    assert {kind for kinds in auroc.values() for kind in kinds} == {"*", "pair", "image"}
    assert set(package.spec.evidence.safety) == {
        *("out_of_fold", "auroc_per_reading", "sas_per_reading"),
    }


def test_the_evidence_is_plotted(model, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    from PIL import Image

    from steerbridge.evaluation import plots

    settings = recipe.TrainSettings(
        refusal="w5 w9", head=HeadSettings(steps=5, batch=8), validation_prompts=4
    )
    package = recipe.train(model, made_up(), settings, tmp_path / "states")
    path = plots.readings(package, tmp_path / "plot.png")
    with Image.open(path) as picture:
        assert picture.size[0] > 300
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(DataError, match=r"evidence\.safety"):
        plots.readings(helpers.package(), tmp_path / "other.png")


def test_folds_hold_out_a_group_whole():
    """One question about many pictures is either learnt from or measured on."""
    asked = [("q", "a"), ("q", "b"), ("r", "a"), ("r", "c")]
    examples = [
        Example(text, True, pair=f"{picture}{i}", group=text)
        for i in range(10)
        for text, picture in asked
    ]
    fold = data.folds(examples, 5, seed=0)
    assert len({f for f, e in zip(fold, examples, strict=True) if e.text == "q"}) == 1
    assert len({f for f, e in zip(fold, examples, strict=True) if e.text == "r"}) == 1


def test_a_threshold_moves_up_in_a_gap_and_nowhere_else():
    near, far = np.linspace(0, 10, 1001), np.linspace(6, 10, 1001)
    assert search.within_gap(2.0, [far]) == pytest.approx(4.02, abs=0.001)
    assert search.within_gap(2.0, [far, near]) == 2.0


def test_images_in_folders_are_examples(tmp_path):
    with pytest.raises(DataError, match="harmful and harmless"):
        data.read_images(tmp_path)
    for name in ("harmful/b.png", "harmful/a.JPG", "harmless/c.png", "harmless/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = data.read_images(tmp_path)
    assert [(e.images[0].name, e.harmful) for e in found] == [
        ("a.JPG", True),
        ("b.png", True),
        ("c.png", False),
    ]
    assert {e.kind for e in found} == {"image"}
    assert all(e.text for e in found)
