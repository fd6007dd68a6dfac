"""The demo model: drawings, questions, weights, GGUF files, and Hugging Face against libmtmd."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from steerbridge import gguf_file
from steerbridge.cli.common import smollm2
from steerbridge.data import read_jsonl
from steerbridge.errors import BrokenPackage, DataError

Image = pytest.importorskip("PIL.Image", reason="needs the extra `demo`")
torch = pytest.importorskip("torch", reason="needs the extra `demo`")
transformers = pytest.importorskip("transformers", reason="needs the extra `demo`")

from steerbridge_demo import drawings, gguf_files, guard, layout, pictures, questions, weights  # noqa: E402,I001
from steerbridge_demo import accuracy, alignment, tuning  # noqa: E402
from steerbridge_demo import model as demo  # noqa: E402
from steerbridge_demo import vocabulary as words  # noqa: E402

pytestmark = pytest.mark.hf

# One, two and three tiles a side of the grid, upright and lying, enlarged and reduced.
SIZES = [(128, 128), (64, 64), (90, 120), (300, 200), (333, 250), (250, 100), (100, 200)]
TALL = (100, 300)  # Pillow 13 resizes it in another order than libmtmd, see `pictures`
MESSAGES = [
    [{"role": "user", "content": "Hello  there\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is ice cold?"}],
    [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "<b>Another</b> {{ one }} \N{SNOWMAN}"},
    ],
]


@cache
def processor():
    return demo.load_processor()


@pytest.fixture(scope="session")
def model():
    return demo.load_model()


@cache
def plain_tokenizer():
    path = smollm2()
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture
def ggufs(demo_files):
    return demo_files


def scene(size=None, seed=0, **limits):
    return drawings.sample(random.Random(seed), size=size, **limits)


def prompt(text="What is in the picture?"):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor().apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


# ------------------------------------------------------------ drawings and questions


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
    every = [t for found in splits.values() for t in found]
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
        found = orthogonalised(torch.from_numpy(np.random.default_rng(0).normal(size=shape)))
        sizes = torch.linalg.svdvals(found)
        assert found.shape == shape
        assert 0.6 < sizes.min() <= sizes.max() < 1.3


def test_words_of_tiles_follow_what_they_show():
    cup, blank = ["a", "blue", "cup", "."], list(alignment.BLANK)
    for x, first in ((0.25, cup), (0.42, None), (0.5, blank)):
        thing = drawings.Thing("cup", "blue", x, 0.25, 0.24, 0)
        found = [
            None if row[0] < 0 else [alignment.CANDIDATES[i] for i in row]
            for row in alignment.scene_words(drawings.Scene(thing, "flat", 128, 128, 0))
        ]
        assert found == [first, *[blank] * 3, cup]


# ------------------------------------------------------------ prompts of the guard


def test_guard_prompts_are_labelled_aligned_and_apart(tmp_path):
    found = {s: guard.guard_prompts(tmp_path, s, per_kind=10, seed=5) for s in guard.SPLITS}
    for split, prompts in found.items():
        examples = [p.example for p in prompts]
        assert [e.kind for e in examples].count("general") == 10
        for kind in ("text", "image", "both"):
            mine = [e for e in examples if e.kind == kind]
            assert len(mine) == 20
            assert all(
                a.harmful and not b.harmful and a.pair == b.pair
                for a, b in zip(mine[::2], mine[1::2], strict=True)
            )
        for p in prompts:
            assert all(path.is_file() for path in p.example.images)
            assert p.example.group == p.stem
            hazards = {p.object} & {*words.REFUSED, *words.DUAL}
            if p.example.kind == "image":
                assert p.example.harmful == bool(hazards & set(words.REFUSED))
            if not p.example.harmful:
                assert not hazards & set(words.REFUSED)
        assert all((p.style == drawings.UNSEEN_STYLE) == (split == "unseen_style") for p in prompts)
    known = {
        p.stem for s in ("train", "validation") for p in found[s] if p.example.kind != "general"
    }
    new = {p.stem for p in found["unseen_stems"] if p.example.kind in ("image", "both")}
    assert not known & new
    texts = {s: {p.example.text for p in found[s] if p.stem is None} for s in guard.SPLITS}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]


def test_guard_prompts_are_the_same_again_and_read_back(tmp_path):
    first = guard.write_jsonl(tmp_path / "a", "validation", per_kind=3)
    second = guard.write_jsonl(tmp_path / "b", "validation", per_kind=3)
    assert first.read_bytes() == second.read_bytes()
    pairs = zip(read_jsonl(first), read_jsonl(second), strict=True)
    for one, other in pairs:
        assert one.images[0].read_bytes() == other.images[0].read_bytes()
        assert (one.text, one.harmful, one.kind) == (other.text, other.harmful, other.kind)
    with pytest.raises(DataError):
        guard.guard_prompts(tmp_path, "dev")
    with pytest.raises(DataError):
        guard.guard_prompts(tmp_path, "train", kinds=("audio",))


# ------------------------------------------------------------ model


def test_weights_are_small_half_precision_and_ours(tmp_path):
    data = weights.shipped_bytes()
    assert len(data) < 4_000_000
    stored = weights.read_shipped()
    assert sum(t.size for t in stored.values()) < 2_000_000
    weights.write(tmp_path / "copy.safetensors", stored)
    assert (tmp_path / "copy.safetensors").read_bytes() == data


@torch.inference_mode()
def test_the_model_answers_questions_about_new_drawings(model):
    asked = [
        (drawings.sample(random.Random(seed)), stem)
        for seed, stem in enumerate(questions.stems("describe", "test") * 3)
    ]
    said = accuracy.answers(model, processor(), [(drawings.draw(s), stem) for s, stem in asked])
    right = [
        accuracy.is_right(questions.describe(*pair), answer)
        for pair, answer in zip(asked, said, strict=True)
    ]
    assert np.mean(right) >= 0.75


def test_damaged_weights_are_refused(tmp_path, model):
    stored = weights.read_shipped()
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(BrokenPackage):
        demo.load_weights(model, path)
    name = next(iter(stored))
    for changed in (
        {k: v for k, v in stored.items() if k != name},
        {**stored, name: stored[name][..., :1]},
    ):
        weights.write(path, changed)
        with pytest.raises(DataError):
            demo.load_weights(model, path)
    with pytest.raises(DataError):
        weights.write(path, {**stored, name: np.full_like(stored[name], 1e6)})
    with pytest.raises(FileNotFoundError):
        demo.load_weights(model, tmp_path / "nowhere.safetensors")


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
def test_text_prompts_answer_as_smollm2_does(model):
    path = smollm2()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    for messages in MESSAGES:
        inputs = plain_tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        want = plain(**inputs).logits
        got = model(**inputs).logits
        assert torch.equal(got[..., : want.shape[-1]], want)
        answers = [
            net.generate(**inputs, max_new_tokens=16, do_sample=False) for net in (plain, model)
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
def test_the_model_survives_save_pretrained(tmp_path, model):
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    reader = transformers.AutoProcessor.from_pretrained(tmp_path)
    picture = drawings.draw(scene(size=(150, 110)))
    before = accuracy.inputs_for(processor(), [(picture, "What is it?")])
    after = accuracy.inputs_for(reader, [(picture, "What is it?")])
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(**before).logits, again(**after).logits)


@torch.inference_mode()
def test_shared_prompts_and_block_masks_change_no_answer(model):
    """The loss of stage two for three questions is the mean of what the plain model gives."""
    rng = random.Random(2)
    drawn = [scene((128, 128), 1), scene((128, 128), 2)]
    tuner = tuning.Tuner(model, processor())
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
            logits = model(**inputs).logits[0, start - 1 : -1]
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


# ------------------------------------------------------------ GGUF


def test_the_quantised_text_model_is_the_shipped_one_and_eight_rows(ggufs):
    shipped, ours = gguf_file.read(smollm2()), gguf_file.read(ggufs["text_q4_1"])
    assert set(shipped.tensors) == set(ours.tensors)
    for name, tensor in shipped.tensors.items():
        mine = ours.tensors[name]
        assert mine.type == tensor.type
        assert mine.data[: tensor.data.nbytes].tobytes() == tensor.data.tobytes()
        assert (mine.shape == tensor.shape) != (name == "token_embd.weight")
    assert ours.tensors["token_embd.weight"].shape == (49160, 576)
    tokens = ours.metadata["tokenizer.ggml.tokens"]
    assert tokens[-8:] == list(layout.IMAGE_TOKENS)
    assert tokens == [processor().tokenizer.convert_ids_to_tokens(i) for i in range(49160)]
    assert ours.metadata["tokenizer.chat_template"] == processor().chat_template
    kept = set(shipped.metadata) - gguf_files._REPLACED
    assert all(ours.metadata[key] == shipped.metadata[key] for key in kept)


def test_the_f32_text_model_holds_the_embeddings_of_hugging_face(ggufs, model):
    tensor = gguf_file.read(ggufs["text_f32"]).tensors["token_embd.weight"]
    rows = tensor.data.view("<f4").reshape(tensor.shape)
    assert np.array_equal(rows, model.get_input_embeddings().weight.detach().numpy())


def test_both_mmproj_hold_the_trained_values(ggufs):
    single, half = (gguf_file.read(ggufs[k]).tensors for k in ("mmproj_f32", "mmproj_f16"))
    assert set(single) == set(half)
    for name, tensor in single.items():
        values = tensor.data.view("<f4")
        assert np.array_equal(values, half[name].data.view(f"<f{2 << (half[name].type == 0)}"))


def test_llama_cpp_renders_the_template_alike():
    formats = pytest.importorskip("llama_cpp.llama_chat_format")
    formatter = formats.Jinja2ChatFormatter(
        template=processor().chat_template, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    for messages in MESSAGES:
        want = processor().apply_chat_template(messages, add_generation_prompt=True)
        assert formatter(messages=messages).prompt == want


# ------------------------------------------------------------ Hugging Face against libmtmd


@pytest.fixture(scope="session")
def mtmd(demo_files):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    from mtmd import Mtmd

    found = Mtmd(demo_files["text_f32"], demo_files["mmproj_f32"], LAYERS)
    yield found
    found.close()


LAYERS = (1, 8, 18, 29)


@torch.inference_mode()
def both_sides(mtmd, text, shown, model, resized=None):
    """Inputs and outputs of Hugging Face; `mtmd` has read the same.

    Hugging Face reads `resized` instead of `shown` if there are any.
    """
    images = resized or shown
    inputs = processor()(text=[text], images=[images] if images else None, return_tensors="pt")
    mtmd.evaluate(text, shown)
    return inputs, model(**inputs, output_hidden_states=True)


def assert_alike(mtmd, inputs, output, model):
    ids = inputs["input_ids"][0].tolist()
    image = model.config.image_token_id
    assert mtmd.tokens == [-1 if i == image else i for i in ids]
    for layer, rows in mtmd.hidden.items():
        want = output.hidden_states[layer][0].numpy()
        # The first token's stream has values around 1e4, so the bound goes with each row.
        scale = np.abs(want).max(-1, keepdims=True).clip(1)
        assert (np.abs(rows - want) / scale).max() < 1e-4, layer
    assert np.abs(mtmd.logits - output.logits[0, -1].numpy()).max() < 2e-3


def horizontally_first(picture):
    """The first resizing of an upright picture in libmtmd's order, whatever Pillow's is."""
    width = pictures._even(pictures.LONGEST_EDGE * picture.width / picture.height)
    for size in ((width, picture.height), (width, pictures.LONGEST_EDGE)):
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


@pytest.mark.parametrize("size", [*SIZES, TALL])
@torch.inference_mode()
def test_libmtmd_sees_a_picture_as_hugging_face_does(mtmd, size, model):
    drawn = scene(size, seed=str(size))
    picture = drawings.draw(drawn)
    resized = [horizontally_first(picture)] if size == TALL else None
    inputs, output = both_sides(mtmd, prompt(), [picture], model, resized)
    features = model.get_image_features(
        inputs["pixel_values"], inputs["pixel_attention_mask"]
    ).pooler_output
    want = torch.cat(list(features)).numpy()
    assert np.abs(mtmd.embeddings - want).max() < 2e-5
    assert_alike(mtmd, inputs, output, model)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = answer[0, inputs["input_ids"].shape[1] :].tolist()
    assert mtmd.greedy(16) == [i for i in answer if i != processor().tokenizer.eos_token_id]


def test_libmtmd_reads_text_and_several_pictures_as_hugging_face_does(mtmd, model):
    inputs, output = both_sides(mtmd, prompt("Hi")[:-1].replace("<image>", ""), [], model)
    assert_alike(mtmd, inputs, output, model)
    shown = [drawings.draw(scene(size=size, seed=7)) for size in ((128, 128), (120, 90))]
    inputs, output = both_sides(mtmd, prompt("<image>Which one is bigger?"), shown, model)
    assert_alike(mtmd, inputs, output, model)


def test_png_bytes_are_decoded_to_the_same_pixels(mtmd):
    import ctypes

    picture = drawings.draw(scene(size=(97, 61)))
    data = io.BytesIO()
    picture.save(data, "PNG")
    raw = (ctypes.c_uint8 * len(data.getvalue())).from_buffer_copy(data.getvalue())
    wrapper = mtmd.m.mtmd_helper_bitmap_init_from_buf(mtmd.vision, raw, len(raw), False)
    bitmap = getattr(wrapper, "bitmap", wrapper)
    size = mtmd.m.mtmd_bitmap_get_n_bytes(bitmap)
    pixels = ctypes.string_at(mtmd.m.mtmd_bitmap_get_data(bitmap), size)
    mtmd.m.mtmd_bitmap_free(bitmap)
    assert pixels == picture.tobytes()
