"""Heads of other tools change the logits as the tool itself does."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

import helpers
from artifacts import SAMPLES, read_as_package, sample
from helpers import LOW_RANK, head, package, rule
from steerbridge.errors import NotRepresentable, WouldLose
from steerbridge_convert import convert

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from tiny_logits import TOKENS, assert_alike, head_inputs, logits  # noqa: E402


def test_lm_steer_s_projectors(artifact_paths, tiny_weights, tiny_llama):
    _, pair, _ = torch.load(artifact_paths["lm-steer"])
    h = head_inputs(tiny_llama)
    moved = h + 0.5 * (h @ pair["projector1"][0]) @ pair["projector2"][0].T
    expected = tiny_llama.lm_head(moved).detach()[-1]
    package = read_as_package("lm-steer", artifact_paths["lm-steer"], tiny_weights)
    assert_alike(logits(tiny_llama, package)[-1], expected)


class HyperParams:
    """Like the object that EasyEdit pickles into the list."""

    def __init__(self):
        self.alg_name = "LM-Steer"


def test_lm_steer_s_list_may_contain_an_object_of_its_tool(artifact_paths, tiny_weights, tmp_path):
    content = torch.load(artifact_paths["lm-steer"])
    path = tmp_path / "lm_steer_vector.pt"
    torch.save([HyperParams(), *content[1:]], path)
    assert (
        read_as_package("lm-steer", path, tiny_weights).tensors
        == read_as_package("lm-steer", artifact_paths["lm-steer"], tiny_weights).tensors
    )


@pytest.mark.parametrize("name", ["lora-gguf", "peft"])
@pytest.mark.parametrize("form", ["dense", "low"])
def test_a_head_as_lora(name, form, tmp_path, tiny_weights, tiny_llama, tiny_facts):
    """delta = B A on lm_head, read from the file without our code."""
    acts = [head(**({"weight": LOW_RANK} if form == "low" else {}))]
    ours = package(tiny_facts, probes=[], interventions=acts, rules=[rule(None, ["h"])], scale=0.3)
    ours.save(tmp_path / "head")
    path = tmp_path / f"lora{SAMPLES[name].suffix}"
    convert(tmp_path / "head", path, to=name, model=tiny_weights)
    if name == "peft":
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(helpers.tiny(), path)
        with torch.no_grad():
            expected = adapted(TOKENS).logits[0, -1]
    else:
        a, b = (torch.from_numpy(np.array(t.data)) for t in GGUFReader(path).tensors)
        h = head_inputs(tiny_llama)[-1]
        expected = tiny_llama.lm_head(h).detach() + b @ (a @ h)
    assert_alike(logits(tiny_llama, ours)[-1], expected)
    restored = read_as_package(name, path, tiny_weights)
    assert_alike(logits(tiny_llama, restored)[-1], expected, 1e-4)


def test_what_peft_saves_is_read(tmp_path, tiny_llama, tiny_weights):
    """An adapter trained elsewhere: with rsLoRA, and with the base head that PEFT adds."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["lm_head"], use_rslora=True, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(helpers.tiny(), config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
        # B in the span of E, so that a head matrix can represent it.
        e = adapted.base_model.model.lm_head.base_layer.weight
        adapted.base_model.model.lm_head.lora_B["default"].weight.copy_(e @ torch.randn(16, 4))
        expected = adapted(TOKENS).logits[0, -1]
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        adapted.save_pretrained(tmp_path / "adapter")
    restored = read_as_package("peft", tmp_path / "adapter", tiny_weights)
    assert_alike(logits(tiny_llama, restored)[-1], expected, 1e-4)


def test_a_change_outside_the_span_is_a_loss(tmp_path, tiny_weights, artifact_paths):
    shutil.copytree(artifact_paths["peft"], tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(k for k in tensors if "lora_B" in k)
    tensors[key] = np.random.default_rng(0).normal(size=tensors[key].shape).astype("f4")
    save_file(tensors, file)
    with pytest.raises(WouldLose, match=r"is not E U: lost"):
        convert(tmp_path / "odd", tmp_path / "out", model=tiny_weights)


def test_tied_models_take_no_lora(tmp_path):
    tied = helpers.tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    sample("peft").save(tmp_path / "head")
    for name in ("peft", "lora-gguf"):
        with pytest.raises(NotRepresentable, match=r"shares model.embed_tokens.weight"):
            convert(tmp_path / "head", tmp_path / "lora.gguf", to=name, model=tmp_path / "tied")


@torch.no_grad()
def test_safeswitch_s_head_replaces_the_embedding(artifact_paths, tiny_weights, tiny_llama):
    new = torch.load(artifact_paths["safeswitch"] / "lm_head.pth")
    restored = read_as_package("safeswitch", artifact_paths["safeswitch"], tiny_weights)
    h = head_inputs(tiny_llama)[-1]
    firing = [p.replace(threshold=-1.0) for p in restored.spec.probes]
    actual = logits(tiny_llama, restored.replace(probes=tuple(firing)))[-1]
    assert_alike(actual, new @ h, 1e-4)
