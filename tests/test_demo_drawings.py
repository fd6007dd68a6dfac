"""The demo model's drawings, questions about them, and parts of its training."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from steerbridge.errors import DataError

Image = pytest.importorskip("PIL.Image", reason="needs the extra `demo`")
torch = pytest.importorskip("torch", reason="needs the extra `demo`")
transformers = pytest.importorskip("transformers", reason="needs the extra `demo`")
from demo_parts import scene  # noqa: E402
from steerbridge_demo import accuracy, alignment, drawings, questions  # noqa: E402
from steerbridge_demo import vocabulary as words  # noqa: E402

pytestmark = pytest.mark.hf


@pytest.mark.parametrize("style", drawings.STYLES)
def test_a_scene_is_always_drawn_the_same(style):
    one = scene(seed=style, styles=(style,))
    first, second = drawings.draw(one), drawings.draw(one)
    assert first.tobytes() == second.tobytes()
    assert first.size == (one.width, one.height)
    assert np.asarray(first).std() > 5


def test_every_object_has_an_icon_that_shows_its_colour():
    for name in words.OBJECTS:
        thing = drawings.Thing(name, "red", 0.5, 0.5, 0.45, 0)
        picture = drawings.draw(drawings.Scene(thing, "flat", 128, 128, 3))
        near = np.abs(np.asarray(picture).astype(int) - words.COLOURS["red"]).max(-1) < 40
        assert near.mean() > 0.03, name


def test_bad_scenes_are_refused_by_name():
    good = scene()
    bad = replace(good.thing, name="dragon")
    for broken, field in (
        (replace(good, thing=bad), "thing"),
        (replace(good, style="oil"), "style"),
        (replace(good, width=5000), "size"),
    ):
        with pytest.raises(DataError) as caught:
            drawings.draw(broken)
        assert caught.value.problem.field == field
    with pytest.raises(DataError):
        scene(pairs=[])
    with pytest.raises(DataError):
        questions.stems("describe", "dev")
    with pytest.raises(DataError):
        accuracy.question_set("all", 1, 0)


def test_training_never_shows_what_is_held_out():
    rng = random.Random(1)
    for _ in range(300):
        drawn = drawings.sample(rng)
        assert drawn.style != drawings.UNSEEN_STYLE
        assert not words.held_out(drawn.thing.colour, drawn.thing.name)
    splits = {
        split: [t for kind in questions.STEM_KINDS for t in questions.stems(kind, split)]
        for split in questions.SPLITS
    }
    every = [t for texts in splits.values() for t in texts]
    assert len(set(every)) == len(every)
    assert 0.1 < len(words.UNSEEN_PAIRS) / len(words.PAIRS) < 0.25
    for part in (0, 1):  # every colour and every object is learnt
        assert {p[part] for p in words.TRAIN_PAIRS} == {p[part] for p in words.PAIRS}


def test_an_answer_is_right_only_if_it_holds_every_word():
    asked = questions.describe(scene(pairs=[("red", "key")]), "What is it?")
    assert asked.answer == "It is a red key."
    assert accuracy.is_right(asked, "A key, and it is Red.")
    assert not accuracy.is_right(asked, "It is a red car.")


def test_orthogonalised_matrices_have_singular_values_near_one():
    from steerbridge_demo.optimisers import orthogonalised

    for shape in ((6, 6), (4, 10), (10, 4)):
        matrix = orthogonalised(torch.from_numpy(np.random.default_rng(0).normal(size=shape)))
        sizes = torch.linalg.svdvals(matrix)
        assert matrix.shape == shape
        assert 0.6 < sizes.min() <= sizes.max() < 1.3


def test_words_of_tiles_follow_what_they_show():
    cup, blank = ["a", "blue", "cup", "."], list(alignment.BLANK)
    for x, first in ((0.25, cup), (0.42, None), (0.5, blank)):
        thing = drawings.Thing("cup", "blue", x, 0.25, 0.24, 0)
        tile_words = [
            None if row[0] < 0 else [alignment.CANDIDATES[i] for i in row]
            for row in alignment.scene_words(drawings.Scene(thing, "flat", 128, 128, 0))
        ]
        assert tile_words == [first, *[blank] * 3, cup]
