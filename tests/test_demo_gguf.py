"""The demo model as GGUF files."""

from __future__ import annotations

import numpy as np
import pytest

from steerbridge import gguf_file
from steerbridge.runtime import smollm2

Image = pytest.importorskip("PIL.Image", reason="needs the extra `demo`")
torch = pytest.importorskip("torch", reason="needs the extra `demo`")
transformers = pytest.importorskip("transformers", reason="needs the extra `demo`")
from demo_parts import MESSAGES, processor  # noqa: E402
from steerbridge_demo import gguf_files, layout  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.slow]


def test_the_quantised_text_model_is_the_shipped_one_and_eight_rows(demo_files):
    shipped, ours = gguf_file.read(smollm2()), gguf_file.read(demo_files["text_q4_1"])
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


def test_the_f32_text_model_holds_the_embeddings_of_hugging_face(demo_files, demo_model):
    tensor = gguf_file.read(demo_files["text_f32"]).tensors["token_embd.weight"]
    rows = tensor.data.view("<f4").reshape(tensor.shape)
    assert np.array_equal(rows, demo_model.get_input_embeddings().weight.detach().numpy())


def test_both_mmproj_hold_the_trained_values(demo_files):
    single, half = (gguf_file.read(demo_files[k]).tensors for k in ("mmproj_f32", "mmproj_f16"))
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
