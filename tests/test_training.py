"""Training: states, awareness, goals, and a whole training run on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from steerbridge import reference  # noqa: E402
from steerbridge.data import Example  # noqa: E402
from steerbridge.errors import DataError  # noqa: E402
from steerbridge.spec import Reading  # noqa: E402
from steerbridge.training import search  # noqa: E402
from steerbridge.training.settings import (  # noqa: E402
    GOALS,
    Goal,
    HeadSettings,
    TrainSettings,
)
from steerbridge.training.states import States, all_readings, capture, turn_end  # noqa: E402
from steerbridge.training.train import train  # noqa: E402

pytestmark = pytest.mark.hf

READING = Reading.model_validate(helpers.reading("layer_input[2]"))
IMAGE_READING = Reading.model_validate(helpers.reading("layer_input[2]", helpers.IMAGE))


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


class Tokens:
    """The tokenizer methods that training uses: words w0..w63, no chat template."""

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
    with torch.no_grad():  # another checkpoint of the same shape
        model.model.lm_head.weight.mul_(1.01)
    with pytest.raises(DataError, match="weights"):
        capture(model, examples, readings, tmp_path / "a")


@pytest.mark.parametrize(
    "kind", [pytest.param("head_matrix", marks=pytest.mark.slow), "add_vector", "project_out"]
)
def test_the_journey_on_a_tiny_model_is_deterministic(model, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    settings = TrainSettings(
        refusal="w5 w9 w11",
        intervention=kind,
        rank=2 if kind == "head_matrix" else None,
        head=HeadSettings(steps=30, batch=8),
        target_fpr={"*": 0.05},
        validation_prompts=4,
    )
    examples = made_up()
    made = [train(model, examples, settings, workdir=tmp_path / name) for name in "ab"]
    assert made[0].spec.created == "2023-11-14T22:13:20Z"
    files = [p.save(tmp_path / f"{i}.gguf").read_bytes() for i, p in enumerate(made)]
    assert files[0] == files[1]
    assert made[0].replace(created="2020-01-01T00:00:00Z").sha256 == made[0].sha256
    evidence = made[0].spec.evidence.probes["harm"]
    assert evidence["auroc"] > 0.9
    assert set(made[0].spec.evidence.sas) == {str(r) for r in all_readings(4)}
    answers = model.generate(examples[:10], made[0], max_new_tokens=2)
    assert [a.outcome.fired for a in answers] == [e.harmful for e in examples[:10]]


def test_too_few_prompts_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="harmful prompts"):
        train(model, made_up(20), TrainSettings(), workdir=tmp_path)


def test_awareness_needs_pairs():
    examples = [Example("a", True), Example("b", False)]
    states = States(np.zeros((2, 1, 4), np.float32), (READING,))
    awareness = search.awareness(states, examples)
    assert awareness == search.Awareness({str(READING): 0.0}, {str(READING): {}})


def test_awareness_by_kind_leaves_out_prompts_without_the_image():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 2, 4)).astype(np.float32)
    array[:4, 1] = np.nan  # the first two pairs have no image
    examples = [
        Example(f"t{i}", i % 2 == 0, "text" if i < 4 else "image", f"p{i // 2}") for i in range(8)
    ]
    awareness = search.awareness(States(array, (READING, IMAGE_READING)), examples)
    whole, kinds = awareness.whole, awareness.by_kind
    assert kinds[str(READING)].keys() == {"text", "image"}
    assert kinds[str(IMAGE_READING)]["text"] == 0.0
    assert whole[str(IMAGE_READING)] == kinds[str(IMAGE_READING)]["image"] != 0.0


def test_goals_weigh_both_sides_of_a_kind_apart():
    goal = Goal("p", 1.0, {"pair": 0.0}, {"pair": 3.0})
    sides = [goal.weight(Example("t", harmful, "pair")) for harmful in (True, False)]
    assert sides == [0.0, 3.0]
    assert goal.weight(Example("t", True, "other")) == 1.0
    channel = Goal("p", 1.0, {"*": 0.0, "image": 2.0}, needs="image")
    harm = [Example("t", True, kind) for kind in ("image", "pair")]
    assert [channel.weight(e) for e in harm] == [2.0, 0.0]
    assert channel.weight(Example("t", False, "pair")) == 1.0
    assert channel.applies(harm)
    assert not channel.applies(harm[1:])
    assert not channel.applies([Example("t", False, "image")])


def test_every_kind_of_harm_is_covered_by_a_goal():
    for kind in ("pair", "general_harmful", "twin", "text", "image", "both", "any other"):
        harm = [Example("t", True, kind)]
        mine = [goal for goal in GOALS if goal.applies(harm)]
        assert any(goal.weight(harm[0]) > 0 for goal in mine), kind


@pytest.mark.slow
def test_a_goal_without_its_prompts_makes_no_probe(model, tmp_path):
    settings = TrainSettings(
        refusal="w5 w9", head=HeadSettings(steps=5, batch=8), validation_prompts=4
    )
    package = train(model, made_up(), settings, workdir=tmp_path)
    assert [p.id for p in package.spec.probes] == ["harm"]
    assert package.spec.rules[0].condition.probes == ("harm",)
    twins = [replace(e, kind="twin" if e.harmful else "borderline") for e in made_up()]
    package = train(model, [*made_up(), *twins], settings, workdir=tmp_path / "b")
    assert [p.id for p in package.spec.probes] == ["harm", "twins"]
    assert package.spec.rules[0].condition.probes == ("harm", "twins")
    image = [replace(e, kind="image", pair=None) for e in made_up()]
    package = train(model, image, settings, workdir=tmp_path / "c")
    assert [p.id for p in package.spec.probes] == ["image"]
    package = train(model, [*made_up(), *image], settings, workdir=tmp_path / "d")
    assert [p.id for p in package.spec.probes] == ["harm", "image"]
    auroc = package.spec.evidence.safety["auroc_per_reading"]
    assert {kind for kinds in auroc.values() for kind in kinds} == {"*", "pair", "image"}
    assert set(package.spec.evidence.safety) == {
        *("out_of_fold", "auroc_per_reading", "sas_per_reading"),
    }


@pytest.mark.slow
def test_the_evidence_is_plotted(model, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    from PIL import Image

    from steerbridge.evaluation import plots

    settings = TrainSettings(
        refusal="w5 w9", head=HeadSettings(steps=5, batch=8), validation_prompts=4
    )
    package = train(model, made_up(), settings, workdir=tmp_path / "states")
    path = plots.readings(package, tmp_path / "plot.png")
    with Image.open(path) as picture:
        assert picture.size[0] > 300
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(DataError, match=r"evidence\.safety"):
        plots.readings(helpers.package(), tmp_path / "other.png")
