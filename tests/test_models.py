"""Types of models in transformers and in llama.cpp against their pins; `make conformance-models`
tries them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import programs

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).with_name("conformance")))
import converting
import models
import models_page
import steerbridge_hf
from steerbridge import gguf_model

pytestmark = [pytest.mark.hf]

SAMPLE = {
    "llama": "dense",
    "mixtral": "mixture of experts",
    "deepseek_v3": "latent attention, mixture of experts",
    "jamba": "hybrid",
    "qwen3_next": "hybrid",
    "mamba": "recurrent",
    "gpt2": "learned positions",
    "bloom": "positions in the attention's bias",
    "mistral": "sliding window",
    "gemma2": "soft cap",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_type_does_what_is_pinned(name):
    pinned = models_page.read()[1].shapes[name]
    assert pinned.status == "right"
    assert models.tried(name) == pinned


def test_an_adapter_that_steers_otherwise_is_found_wrong(monkeypatch):
    def weaker(model, package):
        [head] = package.spec.interventions
        spec = package.spec.replace(interventions=[head.replace(eps=head.eps / 8)])
        return steerbridge_hf.steer(model, package.replace(spec=spec))

    monkeypatch.setattr(models, "steer", weaker)
    assert models.tried("llama").status == "wrong"


def test_every_type_is_pinned_and_none_is_wrong():
    pins = models_page.read()[1]
    assert sorted(pins.shapes) == list(models.TYPES)
    counts = pins.counts()
    assert counts["right"] >= 130
    assert counts["wrong"] == 0
    assert all(r.detail for r in pins.shapes.values() if r.status != "right")


def test_the_page_of_models_is_the_generated_one():
    assert models_page.PAGE.read_text("utf-8").splitlines() == list(models_page.page())


# ---------------------------------------------------------------- llama.cpp

llama = pytest.mark.skipif(programs.converter() is None, reason="python tests/programs.py")
LLAMA = {
    "gemma3_text": "sliding window",
    "gpt_oss": "mixture whose last block holds all rows",
    "granite": "scales",
    "lfm2_moe": "hybrid",
    "mamba2": "recurrent",
    "gemma2": "soft cap",
}


@pytest.fixture(scope="module")
def converter():
    with converting.running(programs.converter()) as running:
        yield running


@llama
@pytest.mark.apps
@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", LLAMA)
def test_an_architecture_does_what_is_pinned(name, converter, tmp_path):
    import llama_models

    pinned = models_page.read_llama().types[name]
    assert pinned.status == "right"
    found = llama_models.tried(name, tmp_path, converter)
    assert (found.architecture, found.status) == (pinned.architecture, pinned.status)


@llama
@pytest.mark.apps
@pytest.mark.llama_cpp
def test_an_adapter_of_llama_cpp_that_steers_wrongly_is_found(converter, monkeypatch, tmp_path):
    import llama_models

    steer = llama_models.steer

    def weaker(llama, package):
        [head] = package.spec.interventions
        spec = package.spec.replace(interventions=[head.replace(eps=head.eps / 8)])
        return steer(llama, package.replace(spec=spec))

    monkeypatch.setattr(llama_models, "steer", weaker)
    assert llama_models.tried("qwen3", tmp_path, converter).status == "wrong"


def test_a_name_of_transformers_stands_for_an_architecture_that_was_steered():
    """Two models of one name take each other's packages, so none is guessed."""
    types = models_page.read_llama().types
    families = {f: name for name, some in models_page.PICTURES.items() for f in some}
    for model_type, architecture in gguf_model._ARCHITECTURES.items():
        family = model_type.removesuffix("_text")
        found = types.get(model_type)
        steered = families.get(family) or (found.status == "right" and found.architecture)
        assert steered == architecture, model_type


def test_architectures_are_pinned_and_none_is_wrong():
    pins = models_page.read_llama()
    assert set(pins.types) == set(models.TYPES)
    statuses = [found.status for found in pins.types.values()]
    assert "wrong" not in statuses
    right = {found.architecture for found in pins.types.values() if found.status == "right"}
    assert len(right) >= 45
    assert right <= set(pins.refused)
    assert all(found.note for found in pins.types.values() if found.status != "right")
