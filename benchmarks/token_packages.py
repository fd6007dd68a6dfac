"""What the benchmarks of token readings share: packages with random weights, and long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from steerbridge import Example, SteeringPackage, corpus_examples
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import parse
from steerbridge.spec import SPEC_VERSION, LayerInput, PromptEnd, Reading, tensor_shapes
from steerbridge.tensors import Tensor

LAYERS: Final = (14, 20)
WINDOW: Final = 16
HIDDEN: Final = 256
SENTENCE: Final = "I cannot help with that."


def guard(
    facts: ModelFacts,
    scope: str,
    threshold: float,
    act: Any,
    *,
    hidden: int = HIDDEN,
    standard: Sequence[Any] = (),
    skip: int = 4,
) -> SteeringPackage:
    """An MLP with one hidden layer over two layers of the model, and a rule with one intervention.

    Args:
        hidden: 0: a linear probe.
        standard: mean and deviation of its inputs, as a trained probe has them.
        skip: rows at the start that are not counted.
    """
    reading = {
        "sites": [{"stream": "layer_input", "layer": layer} for layer in LAYERS],
        "scope": scope,
        "window": WINDOW,
        "skip": skip,
        "rows": "all",
    }
    mlp = {
        "type": "mlp",
        "activation": "relu",
        "layers": [{"weight": f"w{i}", "bias": f"b{i}"} for i in range(2)],
        "output": {"type": "sigmoid", "harmful_when": "high"},
    }
    linear = {"type": "linear", "weight": "w0", "bias": 0.0, "link": "sigmoid"}
    names = ("input_mean", "input_scale")
    moments = {name: name for name, _ in zip(names, standard, strict=False)}
    probe = {
        "id": "p",
        **moments,
        "token_reading": reading,
        "comparator": ">",
        "threshold": threshold,
    }
    rule = {"id": "r", "condition": {"type": "any", "probes": ["p"]}, "interventions": ["act"]}
    spec = parse(
        {
            "spec_version": SPEC_VERSION,
            "name": "tokens",
            "base_model": facts.info().model_dump(exclude_unset=True),
            "probes": [probe | (mlp if hidden else linear)],
            "interventions": [act],
            "rules": [rule | {"strength": {"type": "constant", "value": 1.0}}],
        }
    )
    rng = np.random.default_rng(0)
    tensors = {}
    for _, name, shape in tensor_shapes(spec):
        sizes = [(hidden or 8) if isinstance(n, str) else n for n in shape]
        # States of SmolLM2 are some tens long; the logits are to be a few units.
        scale = 0.02 if len(sizes) > 1 and sizes[-1] > hidden else sizes[-1] ** -0.5
        tensors[name] = Tensor.of(rng.normal(size=sizes).astype(np.float32) * scale)
    for name in ("ua", "va"):
        sizes = (facts.hidden_size, 8) if name == "ua" else (8, facts.hidden_size)
        tensors[name] = Tensor.of(rng.normal(size=sizes).astype(np.float32) * 0.2)
    tensors |= {n: Tensor.of(v) for n, v in zip(names, standard, strict=False)}
    if standard:  # inputs of unit deviation
        tensors["w0"] = Tensor.of(tensors["w0"].float32() / 0.02 * len(standard[0]) ** -0.5)
    return SteeringPackage(spec, tensors)


def moments(model: Any) -> tuple[Any, Any]:
    """Mean and deviation of the states at the two layers, over the last rows of some prompts."""
    readings = [
        Reading(
            site=LayerInput(stream="layer_input", layer=layer),
            position=PromptEnd(type="prompt_end", offset=-row),
        )
        for layer in LAYERS
        for row in range(12)
    ]
    prompts = [e for e in corpus_examples("train") if e.kind == "general"][:24]
    states = np.empty((len(prompts), len(readings), model.facts.hidden_size), np.float32)
    model.capture(prompts, readings, states)
    by_layer = states.reshape(len(prompts), len(LAYERS), -1, model.facts.hidden_size)
    rows = by_layer.transpose(0, 2, 1, 3).reshape(-1, len(LAYERS) * model.facts.hidden_size)
    return rows.mean(axis=0), rows.std(axis=0) + 1e-3


def head() -> dict[str, Any]:
    """A head of low rank."""
    weight = {"form": "low_rank", "u": "ua", "v": "va"}
    common = {"id": "act", "position": "from_prompt_end"}
    return {**common, "type": "head_matrix", "eps": 1.0, "weight": weight}


def say(model: Any) -> dict[str, Any]:
    """A forced sentence; `model` is opened in transformers."""
    ids = model.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    return {"id": "act", "type": "say", "text": SENTENCE, "tokens": [*ids, model.end_of_turn()]}


def long_prompts(render: Any, lengths: Sequence[int]) -> list[Example]:
    """Prompts of about these numbers of tokens, no more: harmless ones of the corpus, joined."""
    texts = [e.text for e in corpus_examples("train") if e.kind == "general"]
    made, at = [], 0
    for length in lengths:
        text = texts[at % len(texts)]
        while len(render(Example(text, False))) < length:
            at += 1
            text += "\n\n" + texts[at % len(texts)]
        while len(render(Example(text, False))) > length:
            text = text.rpartition(" ")[0]
        made.append(Example(text, False))
        at += 1
    return made
