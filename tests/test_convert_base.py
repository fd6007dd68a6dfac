"""The model that an artifact was made for: what its files say, in all the words for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import MODEL_ARCH_NAMES
from safetensors.numpy import save_file

from artifacts import LOW_HEAD
from helpers import package
from steerbridge import gguf_file
from steerbridge.errors import NotRepresentable, UnreadableSource
from steerbridge.fingerprint import ModelFacts
from steerbridge.format import Answers
from steerbridge_convert import base, convert, heads

# As they lie on the hub: what is as the class has it is left out.
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24},
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "vocab_size": 50257}


def test_a_configuration_in_other_words(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    found = base.base_model(tmp_path)
    assert (found.hidden_size, found.num_layers, found.vocab_size) == (768, 12, 50257)


def test_a_configuration_that_leaves_defaults_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAVA))
    found = base.base_model(tmp_path)
    assert (found.model_type, found.architecture) == ("llama", "LlavaForConditionalGeneration")
    assert (found.hidden_size, found.num_layers, found.vocab_size) == (4096, 32, 32064)
    other = LLAVA | {"text_config": {"model_type": "unknown", "vocab_size": 32064}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(UnreadableSource, match="hidden_size"):
        base.base_model(tmp_path)


@pytest.mark.parametrize("model_type", sorted(base._DEFAULTS))
def test_defaults_are_those_of_transformers(model_type):
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    config = transformers.AutoConfig.for_model(model_type)
    found = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    assert found == tuple(base._DEFAULTS[model_type].values())


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("lm_head.weight", False),
        ("language_model.lm_head.weight", False),
        ("embed_out.weight", False),
        ("model.embed_tokens.weight", True),
        ("model.text_model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
    ],
)
def test_the_output_embedding_under_its_names(name, tied, tmp_path):
    rows = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    save_file({name: rows, "model.norm.weight": rows[0]}, tmp_path / "model.safetensors")
    found = heads.output_embedding(Answers("peft", model=tmp_path))
    assert (found.name, found.tied) == (name, tied)
    np.testing.assert_array_equal(np.concatenate([part for _, part in found.rows()]), rows)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("mistral", "llama"),
        ("mixtral", "llama"),
        ("phi", "phi2"),
        ("qwen2_5_vl", "qwen2vl"),
        ("gemma3_text", "gemma3"),
        ("gpt_neox", "gptneox"),
        ("cohere", "command-r"),
        ("deepseek_v3", "deepseek2"),
        ("gpt_oss", "gpt-oss"),
    ],
)
def test_a_lora_names_the_architecture_of_llama_cpp(
    model_type, architecture, tmp_path, tiny_weights
):
    facts = ModelFacts(model_type, 16, 4, 64, name="other")
    source = package(facts, **LOW_HEAD).save(tmp_path / "p.gguf")
    convert(source, tmp_path / "lora.gguf", to="lora-gguf", model=tiny_weights)
    written = gguf_file.read(tmp_path / "lora.gguf").metadata["general.architecture"]
    assert written == architecture
    assert written in MODEL_ARCH_NAMES.values()


def test_a_lora_for_a_model_that_llama_cpp_does_not_know_is_refused(tmp_path, tiny_weights):
    source = package(ModelFacts("opt", 16, 4, 64, name="opt"), **LOW_HEAD).save(tmp_path / "p.gguf")
    with pytest.raises(NotRepresentable, match=r"opt: no architecture of llama\.cpp"):
        convert(source, tmp_path / "lora.gguf", to="lora-gguf", model=tiny_weights)
