"""Log-likelihoods of given answers, and system messages, in both runtimes."""

from __future__ import annotations

import pytest

from scripted import GUARD, REFUSAL
from steerbridge.data import Example
from steerbridge.errors import DataError
from steerbridge.package import load


@pytest.mark.slow
def test_forced_answers_are_judged_and_steered(smollm2_hf, held_out_prompts, smollm2_f32_path):
    pytest.importorskip("llama_cpp")
    import torch

    from steerbridge_llama_cpp import open_model

    guard = load(GUARD)
    answers = smollm2_hf.generate(held_out_prompts, guard, max_new_tokens=1)
    fires = next(p for p, a in zip(held_out_prompts, answers, strict=True) if a.outcome.fired)
    quiet = held_out_prompts[-1]
    asked = [fires, quiet]
    plain = smollm2_hf.log_likelihoods(asked, REFUSAL, None)
    steered = smollm2_hf.log_likelihoods(asked, REFUSAL, guard)
    target = smollm2_hf.tokenizer(REFUSAL, add_special_tokens=False)["input_ids"]
    for i, prompt in enumerate(asked):
        ids = torch.tensor([smollm2_hf.render(prompt) + target])
        with torch.inference_mode():
            logits = smollm2_hf.model(ids).logits[0, -len(target) - 1 : -1].double()
        want = logits.log_softmax(-1)[range(len(target)), target]
        assert plain[i] == pytest.approx(want.numpy(), abs=1e-3)
    assert steered[0].mean() > plain[0].mean() + 1  # the head makes its refusal likely
    assert steered[1] == pytest.approx(plain[1], abs=1e-9)
    llama = open_model(smollm2_f32_path, n_ctx=512, type_k=0, type_v=0)
    same_model = replace_base(guard, llama)
    assert llama.log_likelihoods(asked, REFUSAL, None) == pytest.approx(plain, abs=5e-3)
    assert llama.log_likelihoods(asked, REFUSAL, same_model) == pytest.approx(steered, abs=5e-3)
    with pytest.raises(DataError, match="a text with tokens"):
        smollm2_hf.log_likelihoods(asked, "", None)


def replace_base(package, model):
    base = model.facts.info()
    return type(package)(package.spec.replace(base_model=base), package.tensors)


@pytest.mark.slow
def test_a_system_message_comes_before_the_prompt(smollm2_hf, smollm2_f32_path):
    pytest.importorskip("llama_cpp")
    from steerbridge_llama_cpp import open_model

    example = Example("Hello", False, system="Speak like a pirate.")
    tokens = smollm2_hf.render(example)
    text = smollm2_hf.tokenizer.decode(tokens)
    assert text.index("Speak like a pirate.") < text.index("Hello")
    assert open_model(smollm2_f32_path, n_ctx=256).render(example) == tokens
