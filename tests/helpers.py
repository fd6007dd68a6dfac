"""Builders that tests share: specs, packages and tiny models."""

from __future__ import annotations

from typing import Any

import numpy as np

from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage, parse
from steerbridge.tensors import Tensor

FACTS = ModelFacts("llama", hidden_size=16, num_layers=4, vocab_size=64, name="tiny")

END = {"type": "prompt_end"}
MEAN = {"type": "prompt_mean"}
IMAGE = {"type": "image_mean"}


def site(text: str) -> dict[str, Any]:
    """'layer_input[2]' -> the site as JSON."""
    stream, _, layer = text.rstrip("]").partition("[")
    return {"stream": stream, **({"layer": int(layer)} if layer else {})}


def reading(at: str, position: dict[str, Any] = END) -> dict[str, Any]:
    return {"site": site(at), "position": position}


def linear_probe(id: str = "p", **fields: Any) -> dict[str, Any]:
    return {
        "id": id,
        "type": "linear",
        "readings": [reading("layer_input[2]")],
        "weight": f"{id}.w",
        "bias": 0.0,
        "link": "identity",
        "comparator": ">",
        "threshold": 0.0,
        **fields,
    }


def head(id: str = "h", **fields: Any) -> dict[str, Any]:
    return {
        "id": id,
        "type": "head_matrix",
        "position": "from_prompt_end",
        "eps": 0.5,
        "weight": {"form": "dense", "matrix": f"{id}.W"},
        **fields,
    }


def rule(probes: list[str] | None, acts: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "id": "r",
        "condition": None if probes is None else {"type": "any", "probes": probes},
        "interventions": acts,
        "strength": {"type": "constant", "value": 1.0},
        **fields,
    }


def raw_spec(facts: ModelFacts = FACTS, **fields: Any) -> dict[str, Any]:
    return {
        "spec_version": "1.0",
        "name": "test",
        "base_model": facts.info().model_dump(exclude_unset=True),
        "probes": [linear_probe()],
        "interventions": [head()],
        "rules": [rule(["p"], ["h"])],
        **fields,
    }


def package(
    facts: ModelFacts = FACTS, seed: int = 0, scale: float = 1.0, free: int = 3, **fields: Any
) -> SteeringPackage:
    """A package with random tensors of the right shapes for every name in the spec.

    `free` is the size of ranks and hidden layers.
    """
    from steerbridge.spec import tensor_shapes

    spec = parse(raw_spec(facts, **fields))
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    sizes_of: dict[str, int] = {}
    for where, name, shape in tensor_shapes(spec):
        sizes = [sizes_of.setdefault(n, free) if isinstance(n, str) else n for n in shape]
        values = rng.normal(size=sizes) * scale
        tensors[name] = Tensor.of(np.abs(values) + 0.1 if "input_scale" in where else values)
    return SteeringPackage(spec, tensors)


TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def vector_after_layer_25() -> dict[str, Any]:
    """A strong `add_vector` late in SmolLM2."""
    return {
        "id": "v",
        "type": "add_vector",
        "position": "from_prompt_end",
        "alpha": 60.0,
        "targets": [{"site": site("layer_output[25]"), "vector": "v"}],
    }


def tiny(kind: str = "llama", seed: int = 0, **fields: Any) -> Any:
    """A random model of 4 blocks and width 16, in float32."""
    import torch
    import transformers

    configs = {
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {}),
        "qwen3": ("Qwen3Config", {"head_dim": 8}),
        "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 8}),
        "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}),
    }
    name, extra = configs[kind]
    config = getattr(transformers, name)(
        **{
            **TINY_TEXT,
            "max_position_embeddings": 128,
            **extra,
            **fields,
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():  # larger than the default initialisation: answers that differ
        torch.nn.init.normal_(p, std=0.4)
    return model
