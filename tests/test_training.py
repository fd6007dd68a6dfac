"""Training: states, awareness, goals, and a whole training run on a tiny model."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
import steerbridge  # noqa: E402
from steerbridge import reference  # noqa: E402
from steerbridge.data import Example  # noqa: E402
from steerbridge.errors import DataError  # noqa: E402
from steerbridge.spec import Reading  # noqa: E402
from steerbridge.training import search  # noqa: E402
from steerbridge.training.parts import divide, is_traffic  # noqa: E402
from steerbridge.training.settings import (  # noqa: E402
    GOALS,
    Goal,
    HeadSettings,
    TrainSettings,
)
from steerbridge.training.states import (  # noqa: E402
    Rows,
    States,
    all_readings,
    capture,
    turn_end,
)
from steerbridge.training.train import train  # noqa: E402

pytestmark = pytest.mark.hf

READING = Reading.model_validate(helpers.reading("layer_input[2]"))
NO_ROWS = Rows(np.empty((0, 0, 4), np.float16), np.zeros(1, np.int64), ())
IMAGE_READING = Reading.model_validate(helpers.reading("layer_input[2]", helpers.IMAGE))


def test_the_end_of_the_turn_is_what_the_template_begins_with():
    class Model:
        def __init__(self, template):
            self.facts = FACTS if template else helpers.FACTS

        def render(self, prompt):
            template = [] if prompt.raw else [90, 10, 91, 92, 10]
            return [1, *map(ord, prompt.text), *template]

    FACTS = replace(helpers.FACTS, chat_template_sha256="0" * 64)
    prompts = [Example(t, False) for t in ("one", "two", "three")]
    assert turn_end(Model(True), prompts) == -4
    assert turn_end(Model(False), prompts) == 0
    short = replace(prompts[0], text="two", raw=True, form="raw")
    assert turn_end(Model(True), [*prompts, short]) == 0
    offsets = [getattr(r.position, "offset", None) for r in all_readings(3, -4)]
    assert offsets == [0, 0, -4, -4, None, None]


class Tokens:
    """The tokenizer methods that training uses: words w0..w63, other words by length; no chat
    template."""

    chat_template = None
    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text, add_special_tokens=True):
        own = re.compile(r"w\d+")
        words = text.split()
        return {"input_ids": [int(w[1:]) if own.fullmatch(w) else 40 + len(w) % 20 for w in words]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{i}" for i in ids if i != self.eos_token_id)

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
    examples, readings, sites = made_up(20), all_readings(4), search.row_sites(4)
    states = capture(model, examples, readings, sites, tmp_path / "a")
    whole, rows = states.array.copy(), states.rows
    hidden = model.model(
        torch.tensor([model.render(examples[3])]), output_hidden_states=True
    ).hidden_states
    for k, r in enumerate(readings):
        want = reference.read(r, hidden[r.site.layer][0].detach().numpy())
        assert np.allclose(whole[3, k], want, atol=1e-5)
    mine = rows.array[rows.starts[3] : rows.starts[4]]
    for k, site in enumerate(sites):
        want = hidden[site.layer][0].detach().numpy()
        assert np.allclose(mine[:, k], want, atol=1e-2)
    again = capture(model, examples, readings, sites, tmp_path / "a")  # nothing left to do
    assert np.array_equal(again.array, whole)
    assert np.array_equal(again.rows.array, rows.array)
    with pytest.raises(DataError, match="prompts"):
        capture(model, examples[:10], readings, sites, tmp_path / "a")
    with torch.no_grad():  # another checkpoint of the same shape
        model.model.lm_head.weight.mul_(1.01)
    with pytest.raises(DataError, match="weights"):
        capture(model, examples, readings, sites, tmp_path / "a")


def test_a_disk_that_is_too_small_is_told_before_the_start(model, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(DataError, match=r"GB of room"):
        capture(model, made_up(20), all_readings(4), search.row_sites(4), tmp_path / "a")


@pytest.mark.parametrize(
    "refuse",
    ["say", pytest.param("head_matrix", marks=pytest.mark.slow), "add_vector", "project_out"],
)
def test_the_journey_on_a_tiny_model_is_deterministic(model, tmp_path, monkeypatch, refuse):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    settings = TrainSettings(
        sentence="w5 w9 w11",
        refuse=refuse,
        rank=2 if refuse == "head_matrix" else None,
        head=HeadSettings(steps=30, batch=8),
        target_fpr=0.05,
        forms={"chat": 1.0, "raw": 0.3, "long_end": 0.1},
        validation_prompts=4,
    )
    examples = made_up()
    made = [train(model, examples, settings, workdir=tmp_path / name) for name in "ab"]
    assert made[0].spec.created == "2023-11-14T22:13:20Z"
    files = [p.save(tmp_path / f"{i}.gguf").read_bytes() for i, p in enumerate(made)]
    assert files[0] == files[1]
    assert made[0].replace(created="2020-01-01T00:00:00Z").sha256 == made[0].sha256
    evidence = made[0].spec.evidence
    assert max(known["auroc"] for known in evidence.probes.values()) > 0.9
    assert set(evidence.sas) == {str(r) for r in all_readings(4)}
    assert evidence.forms == ("chat", "raw", "long_end")
    assert set(evidence.safety["forms"]) == {"chat", "raw", "long_end"}
    answers = model.generate(examples[:10], made[0], max_new_tokens=2)
    assert [a.outcome.fired for a in answers] == [e.harmful for e in examples[:10]]
    if refuse == "say":
        said = [model.generate([e], made[0], max_new_tokens=9)[0].text for e in examples[:2]]
        assert said[0] == "w5 w9 w11" != said[1]


def test_a_promise_that_cannot_be_kept_is_told(model):
    settings = TrainSettings(sentence="w5", forms={"chat": 1.0}, target_fpr=0.2)
    ordinary = [replace(e, pair=None) for e in made_up(300)]
    evidence = train(model, ordinary, settings).spec.evidence
    assert evidence.safety["promise"]["confidence"] == 0.95
    assert evidence.safety["promise"]["prompts"] >= evidence.safety["promise"]["needed"] == 14
    few = train(model, ordinary[:100], replace(settings, target_fpr=0.05))
    promise = few.spec.evidence.safety["promise"]
    assert promise["confidence"] is None
    assert f"a promise takes {promise['needed']}" in steerbridge.describe(few)


def test_too_few_prompts_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="harmful prompts"):
        train(model, made_up(20), TrainSettings(), workdir=tmp_path)


def test_a_rank_needs_a_head_matrix(model, tmp_path):
    with pytest.raises(DataError, match="rank: expected refuse=head_matrix"):
        train(model, made_up(), TrainSettings(rank=4), workdir=tmp_path)


def test_awareness_needs_pairs():
    examples = [Example("a", True), Example("b", False)]
    states = States(np.zeros((2, 1, 4), np.float32), (READING,), NO_ROWS)
    awareness = search.awareness(states, examples)
    assert awareness == search.Awareness({str(READING): 0.0}, {str(READING): {}})


def test_awareness_by_kind_leaves_out_prompts_without_the_image():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 2, 4)).astype(np.float32)
    array[:4, 1] = np.nan  # the first two pairs have no image
    examples = [
        Example(f"t{i}", i % 2 == 0, "text" if i < 4 else "image", f"p{i // 2}") for i in range(8)
    ]
    awareness = search.awareness(States(array, (READING, IMAGE_READING), NO_ROWS), examples)
    whole, kinds = awareness.whole, awareness.by_kind
    assert kinds[str(READING)].keys() == {"text", "image"}
    assert kinds[str(IMAGE_READING)]["text"] == 0.0
    assert whole[str(IMAGE_READING)] == kinds[str(IMAGE_READING)]["image"] != 0.0


def test_goals_weigh_both_sides_of_a_kind_apart():
    goal = Goal("p", "whole", {"pair": 0.0}, {"pair": 3.0})
    sides = [goal.weight(Example("t", harmful, "pair")) for harmful in (True, False)]
    assert sides == [0.0, 3.0]
    assert goal.weight(Example("t", True, "other")) == 1.0
    channel = Goal("p", "whole", {"*": 0.0, "image": 2.0}, needs="image")
    harm = [Example("t", True, kind) for kind in ("image", "pair")]
    assert [channel.weight(e) for e in harm] == [2.0, 0.0]
    assert channel.weight(Example("t", False, "pair")) == 1.0
    assert channel.applies(harm)
    assert not channel.applies(harm[1:])
    assert not channel.applies([Example("t", False, "image")])
    rows = Goal("p", "rows")
    assert rows.applies(harm)
    assert not rows.applies([*harm, Example("t", True, images=(Path("a.png"),))])


def test_every_kind_of_harm_is_covered_by_a_goal():
    for kind in ("pair", "general_harmful", "twin", "text", "image", "both", "any other"):
        for images in ((), (Path("a.png"),)):
            harm = [Example("t", True, kind, images=images)]
            mine = [goal for goal in GOALS if goal.applies(harm)]
            assert any(goal.weight(harm[0]) > 0 for goal in mine), kind


def test_parts_never_part_what_is_alike(model):
    examples = [*made_up(200), *[replace(e, pair=None, harmful=False) for e in made_up(100)[1::2]]]
    made = divide(model, examples, {"chat": 1.0, "raw": 0.5, "long_end": 0.5}, 0)
    part = dict(zip(made.prompt.tolist(), made.part.tolist(), strict=True))
    for i, e in enumerate(examples):
        for j, other in enumerate(examples):
            if e.pair is not None and e.pair == other.pair:
                assert part[i] == part[j]
    assert {"train", "search", "calibrate"} == set(part.values())
    counts = Counter(zip(made.prompt.tolist(), made.part.tolist(), strict=True))
    for (i, where), count in counts.items():
        if where == "calibrate" and is_traffic(examples[i]):
            assert count == 1
        if where == "search" and is_traffic(examples[i]):
            assert count == (len(made.forms) + 2) // 3
    searched = {made.examples[i].form for i in made.of("search") if made.traffic[i]}
    assert searched == set(made.forms)
    chats = {
        i for i, e in zip(made.prompt.tolist(), made.examples, strict=True) if e.form == "chat"
    }
    assert {i for i in part if part[i] == "train"} <= chats
    again = divide(model, examples, {"chat": 1.0, "raw": 0.5, "long_end": 0.5}, 0)
    assert again.examples == made.examples


def test_ordinary_prompts_stand_in_other_forms_oftener(model):
    pairs = made_up(600)
    ordinary = [replace(e, text=f"{e.text} o", pair=None) for e in pairs if not e.harmful]
    made = divide(model, [*pairs, *ordinary], {"chat": 1.0, "raw": 0.2}, 0)

    def share(calm: bool) -> float:
        mine = [
            e
            for e, part in zip(made.examples, made.part, strict=True)
            if part == "train" and is_traffic(e) == calm
        ]
        return sum(e.form == "raw" for e in mine) / sum(e.form == "chat" for e in mine)

    assert share(calm=False) == pytest.approx(0.2, abs=0.1)
    assert share(calm=True) == pytest.approx(0.6, abs=0.15)


def test_forms_that_a_model_cannot_render_are_left_out(model):
    from steerbridge.datasets.forms import renderable

    BAD = Example("w3 w4", True)
    assert renderable(model, BAD, ["chat", "system", "turns", "raw", "prefill"]) == [
        *("chat", "raw", "prefill"),
    ]


@pytest.mark.slow
def test_a_goal_without_its_prompts_makes_no_probe(model, tmp_path):
    settings = TrainSettings(sentence="w5 w9", forms={"chat": 1.0}, target_fpr=0.1)
    image = [replace(e, kind="image", pair=None) for e in made_up()]
    package = train(model, [*made_up(), *image], settings, workdir=tmp_path / "d")
    known = package.spec.evidence
    assert set(known.probes) == {"harm", "whole", "image"}
    used = [p for p, evidence in known.probes.items() if evidence["used"]]
    assert [p.id for p in package.spec.probes] == used
    assert list(package.spec.rules[0].condition.probes) == used
    assert len({p.threshold for p in package.spec.probes}) == 1
    auroc = known.safety["auroc_per_reading"]
    assert {kind for kinds in auroc.values() for kind in kinds} == {"*", "pair", "image"}
    assert set(known.safety) == {
        *("promise", "kinds", "forms", "auroc_per_reading", "sas_per_reading"),
    }


@pytest.mark.slow
def test_the_evidence_is_plotted(model, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    from PIL import Image

    from steerbridge.evaluation import plots

    settings = TrainSettings(sentence="w5 w9", forms={"chat": 1.0})
    package = train(model, made_up(), settings, workdir=tmp_path / "states")
    path = plots.readings(package, tmp_path / "plot.png")
    with Image.open(path) as picture:
        assert picture.size[0] > 300
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(DataError, match=r"evidence\.safety"):
        plots.readings(helpers.package(), tmp_path / "other.png")
