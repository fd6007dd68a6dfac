"""The conformance kit on the runtimes in process, on wrong ones, and its own parts."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from steerbridge.testing import SHAPES, Ground, check_runtime
from steerbridge.testing import pins as pinned
from steerbridge.testing.kit import Result

sys.path.append(str(Path(__file__).with_name("conformance")))
import runtimes
import trials
from numpy_driver import MUTANTS, NumpyDriver


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("conformance"))


@pytest.mark.parametrize("name", runtimes.IN_PROCESS)
def test_a_runtime_does_what_is_pinned(name, ground):
    pytest.importorskip("torch" if name == "transformers" else "llama_cpp")
    results = check_runtime(runtimes.RUNTIMES[name].driver(ground), ground)
    pins = pinned.read(runtimes.PINS)[name]
    assert pins.differences(results) == []
    assert pins.counts()["right"] >= 50


def test_a_runtime_that_is_right_is_found_right(ground):
    results = check_runtime(NumpyDriver(), ground)
    assert {n: r for n, r in results.items() if r.status != "right"} == {}


@pytest.mark.parametrize("kind", MUTANTS, ids=lambda kind: kind.__name__)
def test_a_runtime_that_is_wrong_is_found_wrong(kind, ground):
    """By a shape whose name says what is wrong."""
    assert trials.is_caught(kind, ground)


def test_a_runtime_that_takes_any_package_is_found_wrong(ground):
    shapes = [s for s in SHAPES if "another" in s.name and s.name.startswith("a package")]
    results = check_runtime(NumpyDriver(checks=False), ground, shapes)
    assert {result.status for result in results.values()} == {"wrong"}


def test_every_runtime_is_pinned_on_every_shape():
    for name, pins in pinned.read(runtimes.PINS).items():
        assert set(pins.shapes) == {s.name for s in SHAPES}, name
        assert pins.against in ("real", "simulator")
        for shape, result in pins.shapes.items():
            assert result.status == "right" or result.detail, f"{name}: {shape} says no reason"


def test_the_page_of_runtimes_is_the_generated_one():
    assert runtimes.PAGE.read_text("utf-8").splitlines() == list(runtimes.page())


def test_pins_come_back_and_tell_what_is_new(tmp_path):
    pins = pinned.Pins("real", {"a": Result("right"), "b": Result("wrong", "judges late")})
    pinned.write(tmp_path / "p.json", {"x": pins})
    assert pinned.read(tmp_path / "p.json") == {"x": pins}
    news = pins.differences(
        {"a": Result("refused", "no"), "b": Result("right"), "c": Result("right")}
    )
    assert [line.split(":")[0] for line in news] == ["a", "b", "c"]  # a mended fault is news too


def test_answers_of_the_tiny_model_are_varied(ground):
    """Verdicts on both sides of the threshold, and no answer that repeats one token."""
    case = ground.standard["head"]
    tokens = {t for p in case.prompts for t in case.expected(p).tokens}
    assert len(tokens) >= 20
    assert min(len(case.fired), len(case.quiet)) >= 8


def test_the_traps_are_what_they_say(ground):
    from steerbridge.testing.model import NAN, OVERFLOW, TRAP_LAYER

    model = ground.model
    assert np.isnan(model.forward(model.encode("ab" + NAN))[0][1][-1]).all()
    row = model.forward(model.encode("ab" + OVERFLOW))[0][TRAP_LAYER + 1][-1]
    assert np.isinf(row[0])
    assert np.isfinite(row[1:]).all()


def test_both_files_give_the_same_logits_as_numpy(ground):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(ground.files.transformers)
    ids = ground.model.encode("What is this? é")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, ground.model.forward(ids)[1], atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ground.files.transformers)
    assert tokenizer("What is this? é")["input_ids"] == ids


def test_pictures_give_the_same_logits_as_numpy(ground):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from steerbridge.testing import vision

    files = ground.with_tower
    processor = transformers.AutoProcessor.from_pretrained(files.transformers)
    kind = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(files.transformers, dtype=torch.float32).eval()
    prompt = f"a {vision.PICTURES[0]} and {vision.PICTURES[2]}"
    shown = [Image.open(io.BytesIO(file)).convert("RGB") for file in vision.pictures(prompt)]
    inputs = processor(
        text=[vision.marked(prompt, vision.IMAGE)], images=[shown], return_tensors="pt"
    )
    ids = files.model.encode(prompt)
    of_picture = files.model.of_picture(ids)
    assert (inputs["input_ids"][0].numpy() == model.config.image_token_id).tolist() == (
        of_picture.tolist()
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
    np.testing.assert_allclose(logits, files.model.forward(ids)[1], atol=2e-4)
