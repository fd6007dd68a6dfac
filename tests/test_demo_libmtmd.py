"""The demo model in libmtmd, compared with Hugging Face."""

from __future__ import annotations

import io

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="needs the extra `demo`")
torch = pytest.importorskip("torch", reason="needs the extra `demo`")
transformers = pytest.importorskip("transformers", reason="needs the extra `demo`")
from demo_parts import SIZES, TALL, processor, prompt, scene  # noqa: E402
from steerbridge_demo import drawings, pictures  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]


@pytest.fixture(scope="session")
def mtmd(demo_files):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    from mtmd import Mtmd

    opened = Mtmd(demo_files["text_f32"], demo_files["mmproj_f32"], LAYERS)
    yield opened
    opened.close()


LAYERS = (1, 8, 18, 29)


@torch.inference_mode()
def both_sides(mtmd, text, shown, demo_model, resized=None):
    """Inputs and outputs of Hugging Face, after `mtmd` has evaluated the same prompt.

    Hugging Face reads `resized` instead of `shown` if there are any.
    """
    images = resized or shown
    inputs = processor()(text=[text], images=[images] if images else None, return_tensors="pt")
    mtmd.evaluate(text, shown)
    return inputs, demo_model(**inputs, output_hidden_states=True)


def assert_alike(mtmd, inputs, output, demo_model):
    ids = inputs["input_ids"][0].tolist()
    image = demo_model.config.image_token_id
    assert mtmd.tokens == [-1 if i == image else i for i in ids]
    for layer, rows in mtmd.hidden.items():
        want = output.hidden_states[layer][0].numpy()
        # The first token's stream has values around 1e4, so the bound goes with each row.
        scale = np.abs(want).max(-1, keepdims=True).clip(1)
        assert (np.abs(rows - want) / scale).max() < 1e-4, layer
    assert np.abs(mtmd.logits - output.logits[0, -1].numpy()).max() < 2e-3


def horizontally_first(picture):
    """Resizes an upright picture in libmtmd's order, which Pillow's may differ from."""
    width = pictures._even(pictures.LONGEST_EDGE * picture.width / picture.height)
    for size in ((width, picture.height), (width, pictures.LONGEST_EDGE)):
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


@pytest.mark.parametrize("size", [*SIZES, TALL])
@torch.inference_mode()
def test_libmtmd_sees_a_picture_as_hugging_face_does(mtmd, size, demo_model):
    drawn = scene(size, seed=str(size))
    picture = drawings.draw(drawn)
    resized = [horizontally_first(picture)] if size == TALL else None
    inputs, output = both_sides(mtmd, prompt(), [picture], demo_model, resized)
    features = demo_model.get_image_features(
        inputs["pixel_values"], inputs["pixel_attention_mask"]
    ).pooler_output
    want = torch.cat(list(features)).numpy()
    assert np.abs(mtmd.embeddings - want).max() < 2e-5
    assert_alike(mtmd, inputs, output, demo_model)
    answer = demo_model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = answer[0, inputs["input_ids"].shape[1] :].tolist()
    assert mtmd.greedy(16) == [i for i in answer if i != processor().tokenizer.eos_token_id]


def test_libmtmd_reads_text_and_several_pictures_as_hugging_face_does(mtmd, demo_model):
    inputs, output = both_sides(mtmd, prompt("Hi")[:-1].replace("<image>", ""), [], demo_model)
    assert_alike(mtmd, inputs, output, demo_model)
    shown = [drawings.draw(scene(size=size, seed=7)) for size in ((128, 128), (120, 90))]
    inputs, output = both_sides(mtmd, prompt("<image>Which one is bigger?"), shown, demo_model)
    assert_alike(mtmd, inputs, output, demo_model)


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
