"""The demo model in transformers: weights, answers, templates, tiles."""

from __future__ import annotations

import random

import numpy as np
import pytest

from steerbridge.errors import BrokenPackage, DataError
from steerbridge.runtime import smollm2

Image = pytest.importorskip("PIL.Image", reason="needs the extra `demo`")
torch = pytest.importorskip("torch", reason="needs the extra `demo`")
transformers = pytest.importorskip("transformers", reason="needs the extra `demo`")
from demo_parts import MESSAGES, SIZES, TALL, plain_tokenizer, processor, scene  # noqa: E402
from steerbridge_demo import (  # noqa: E402
    accuracy,
    alignment,
    drawings,
    layout,
    pictures,
    questions,
    tuning,
    weights,
)
from steerbridge_demo import model as demo  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]


def test_weights_are_small_half_precision_and_ours(tmp_path):
    data = weights.shipped_bytes()
    assert len(data) < 4_000_000
    stored = weights.read_shipped()
    assert sum(t.size for t in stored.values()) < 2_000_000
    weights.write(tmp_path / "copy.safetensors", stored)
    assert (tmp_path / "copy.safetensors").read_bytes() == data


@torch.inference_mode()
def test_the_model_answers_questions_about_new_drawings(demo_model):
    asked = [
        (drawings.sample(random.Random(seed)), stem)
        for seed, stem in enumerate(questions.stems("describe", "test") * 3)
    ]
    said = accuracy.answers(
        demo_model, processor(), [(drawings.draw(s), stem) for s, stem in asked]
    )
    right = [
        accuracy.is_right(questions.describe(*pair), answer)
        for pair, answer in zip(asked, said, strict=True)
    ]
    assert np.mean(right) >= 0.75


def test_damaged_weights_are_refused(tmp_path, demo_model):
    stored = weights.read_shipped()
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(BrokenPackage):
        demo.load_weights(demo_model, path)
    name = next(iter(stored))
    for changed in (
        {k: v for k, v in stored.items() if k != name},
        {**stored, name: stored[name][..., :1]},
    ):
        weights.write(path, changed)
        with pytest.raises(DataError):
            demo.load_weights(demo_model, path)
    with pytest.raises(DataError):
        weights.write(path, {**stored, name: np.full_like(stored[name], 1e6)})
    with pytest.raises(FileNotFoundError):
        demo.load_weights(demo_model, tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("messages", MESSAGES)
def test_text_prompts_are_those_of_smollm2(messages):
    plain = plain_tokenizer()
    want = plain.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for renderer in (processor(), processor().tokenizer):
        assert (
            renderer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            == want
        )
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert processor().apply_chat_template(parts, add_generation_prompt=True) == want
    ids = processor().tokenizer(want, add_special_tokens=False)["input_ids"]
    assert ids == plain(want, add_special_tokens=False)["input_ids"]


def test_the_template_refuses_parts_it_does_not_know():
    import jinja2

    messages = [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]
    with pytest.raises(jinja2.TemplateError):
        processor().tokenizer.apply_chat_template(messages, tokenize=False)
    with pytest.raises(DataError):
        layout.chat_template("{{ messages }}")


@torch.inference_mode()
def test_text_prompts_answer_as_smollm2_does(demo_model):
    path = smollm2()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    for messages in MESSAGES:
        inputs = plain_tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        want = plain(**inputs).logits
        got = demo_model(**inputs).logits
        assert torch.equal(got[..., : want.shape[-1]], want)
        answers = [
            net.generate(**inputs, max_new_tokens=16, do_sample=False)
            for net in (plain, demo_model)
        ]
        assert torch.equal(*answers)


@pytest.mark.parametrize("size", [*SIZES, TALL])
def test_tiles_are_those_of_the_processor(size):
    picture = drawings.draw(scene(size=size))
    inputs = processor()(images=[picture], text=["<image>"], return_tensors="pt")
    mine = demo.pixels(pictures.tiles(picture))
    assert inputs["pixel_values"][0].shape == mine.shape
    assert torch.allclose(inputs["pixel_values"][0], mine, atol=1e-6, rtol=0)
    assert torch.equal(mine, mine.half().float())
    assert (mine != 0).all()


@torch.inference_mode()
def test_the_model_survives_save_pretrained(tmp_path, demo_model):
    demo_model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    reader = transformers.AutoProcessor.from_pretrained(tmp_path)
    picture = drawings.draw(scene(size=(150, 110)))
    before = accuracy.inputs_for(processor(), [(picture, "What is it?")])
    after = accuracy.inputs_for(reader, [(picture, "What is it?")])
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(demo_model(**before).logits, again(**after).logits)


@torch.inference_mode()
def test_shared_prompts_and_block_masks_change_no_answer(demo_model):
    """The stage-two loss for three questions equals the mean loss of the plain model."""
    rng = random.Random(2)
    drawn = [scene((128, 128), 1), scene((128, 128), 2)]
    tuner = tuning.Tuner(demo_model, processor())
    asked = [tuning.exchanges(s, {}, 3, processor().tokenizer, rng) for s in drawn]
    pool = alignment.pool_of(drawn)
    features = tuner.aligner.features(pool.tiles.reshape(-1, *pool.tiles.shape[2:]))
    got = tuner.loss(tuner.batch(asked), features)
    losses = []
    for one, questions_of in zip(drawn, asked, strict=True):
        for exchange in questions_of:
            inputs = accuracy.inputs_for(processor(), [(drawings.draw(one), exchange.text)])
            answer = torch.tensor([exchange.answer])
            start = inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            logits = demo_model(**inputs).logits[0, start - 1 : -1]
            losses += torch.nn.functional.cross_entropy(
                logits, answer[0], reduction="none"
            ).tolist()
    assert float(got) == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.slow
def test_training_twice_gives_the_same_weights(tmp_path):
    from steerbridge_demo.train import Plan, train

    lessons = alignment.Lessons(steps=4, pictures=8, quarters=4, grey=2)
    plan = Plan(lessons=lessons, taught=0, tuning=tuning.Settings(steps=2), measured=1)
    logs = [train(plan, tmp_path / f"{i}.safetensors") for i in range(2)]
    assert logs[0]["sha256"] == logs[1]["sha256"]
    assert logs[0]["tuning"] == logs[1]["tuning"]
