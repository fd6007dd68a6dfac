"""The output head that is trained against is the model's own, and so is the end of its turn."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import helpers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from steerbridge.data import Example  # noqa: E402
from steerbridge.errors import UnsupportedFeature  # noqa: E402
from steerbridge.training.head import HeadLoss  # noqa: E402
from steerbridge_hf.model import HfModel  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("no_grad")]
SIZES = {**helpers.TINY_TEXT, "max_position_embeddings": 64}


def opened(model):
    return HfModel(model, SimpleNamespace(pad_token_id=0, chat_template=None, eos_token_id=2))


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("LlamaConfig", {}),
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
        ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    ],
)
def test_the_loss_is_that_of_the_models_logits(config, more):
    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    ids = torch.tensor([[5, 9, 13, 21]])
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: seen.append(args[0][0])
    )
    logits = model(ids).logits[0]
    handle.remove()
    target = torch.tensor([3, 1, 4, 1])
    want = float(torch.nn.functional.cross_entropy(logits, target))
    loss = HeadLoss(opened(model).output_head())
    assert loss.value(seen[0], target) == pytest.approx(want, abs=1e-4)
    # The gradient is that of the same function.
    with torch.enable_grad():
        h = seen[0].clone().requires_grad_(True)
        loss(h, target).backward()
    step = torch.zeros_like(seen[0])
    step[1, 2] = 1e-2
    slope = (loss.value(seen[0] + step, target) - loss.value(seen[0] - step, target)) / 2e-2
    assert float(h.grad[1, 2]) == pytest.approx(slope, abs=2e-3)


def test_logits_that_are_no_multiple_are_refused():
    model = helpers.tiny()
    model.lm_head.register_forward_hook(lambda _module, _args, output: output)
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits.abs()
        return output

    model.forward = forward
    with pytest.raises(UnsupportedFeature, match="logits"):
        opened(model).output_head()


def test_the_end_of_a_turn_is_the_templates_own(smollm2_hf):
    end = smollm2_hf.end_of_turn()
    assert smollm2_hf.tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    usual = smollm2_hf.model.generation_config.eos_token_id
    smollm2_hf.model.generation_config.eos_token_id = [0, end]  # the smallest is another one
    try:
        assert smollm2_hf.end_of_turn() == end
    finally:
        smollm2_hf.model.generation_config.eos_token_id = usual


def test_a_repetition_penalty_is_no_part_of_a_likelihood(smollm2_hf):
    asked = [Example("Say hello twice.", False)]
    want = smollm2_hf.log_likelihoods(asked, "hello hello hello", None)
    config = smollm2_hf.model.generation_config
    config.repetition_penalty = 2.0
    try:
        got = smollm2_hf.log_likelihoods(asked, "hello hello hello", None)
    finally:
        config.repetition_penalty = 1.0
    np.testing.assert_array_equal(got, want)
