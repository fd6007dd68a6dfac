"""What the HF adapter refuses."""

from __future__ import annotations

import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from steerbridge.errors import (  # noqa: E402
    ModelMismatch,
    RowMappingLost,
    UnsupportedFeature,
)
from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402
from tiny_requests import PROMPTS, generate  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]


def test_refusals(tiny_llama):
    package = helpers.package(facts(tiny_llama))
    with steer(tiny_llama, package):
        with pytest.raises(UnsupportedFeature, match="already"):
            steer(tiny_llama, package)
        with pytest.raises(UnsupportedFeature, match="guidance_scale"):
            generate(tiny_llama, guidance_scale=2.0)
        with pytest.raises(UnsupportedFeature, match="continuous batching"):
            tiny_llama.generate_batch([[1, 2]])
        with pytest.raises(RowMappingLost, match="padding only"):
            generate(
                tiny_llama,
                {
                    "input_ids": torch.ones(1, 2, dtype=torch.long),
                    "attention_mask": torch.zeros(1, 2, dtype=torch.long),
                },
            )
        with pytest.raises(RowMappingLost, match="outside a forward pass"):
            tiny_llama.model(torch.tensor([[1, 2]]))
    with pytest.raises(ModelMismatch, match="num_layers"):
        steer(helpers.tiny(num_hidden_layers=3), package)
    with pytest.raises(UnsupportedFeature, match="not a generating model"):
        steer(tiny_llama.model, package)


def test_a_prompt_too_short_for_its_reading_is_unjudged(tiny_llama):
    reading = helpers.reading("layer_input[2]", {"type": "prompt_end", "offset": -2})
    probe = helpers.linear_probe(readings=[reading], threshold=1e9)
    package = helpers.package(facts(tiny_llama), probes=[probe])
    with steer(tiny_llama, package) as session:
        generate(tiny_llama)
    short = [len(p) < 3 for p in PROMPTS]
    assert [bool(o.verdicts[0].unjudged) for o in session.outcomes] == short
    assert [o.fired for o in session.outcomes] == short


def test_an_option_of_llama_cpp_is_refused_by_name(tmp_path):
    """By the opener, so by every command."""
    from steerbridge_hf import open_model

    with pytest.raises(UnsupportedFeature, match="mmproj"):
        open_model(tmp_path, mmproj="vision.gguf")
