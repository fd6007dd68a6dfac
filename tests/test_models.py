"""Types of models in transformers against their pins; `make conformance-models` tries them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).with_name("conformance")))
import models
import steerbridge_hf

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
    pinned = models.read()[1].shapes[name]
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
    pins = models.read()[1]
    assert sorted(pins.shapes) == list(models.TYPES)
    counts = pins.counts()
    assert counts["right"] >= 130
    assert counts["wrong"] == 0
    assert all(r.detail for r in pins.shapes.values() if r.status != "right")


def test_the_page_of_models_is_the_generated_one():
    assert models.PAGE.read_text("utf-8").splitlines() == list(models.page())
