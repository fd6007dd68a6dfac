"""Prompts, packages and greedy answers for the tiny random models in transformers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import transformers

import helpers
from oracle import oracle
from steerbridge.package import SteeringPackage
from steerbridge_hf.sites import facts

PROMPTS = [[5, 9, 13, 21, 8], [7, 3, 11], [40, 41, 42, 43, 44, 45, 46], [30, 31]]
NEW = 8  # tokens of an answer
PARAMETERS = inspect.signature(transformers.LlamaModel.forward).parameters
CACHE = "cache" if "cache" in PARAMETERS else "past_key_values"  # renamed in transformers 5.24

ADD = helpers.add_vector(2, 3, alpha=3.0)
OUT = {**ADD, "id": "o", "type": "project_out", "alpha": 0.3}
PROBE = helpers.linear_probe(
    readings=[
        helpers.reading("layer_input[2]"),
        helpers.reading("layer_input[1]", helpers.MEAN),
        helpers.reading("layer_output[2]", {"type": "prompt_end", "offset": -1}),
    ]
)


def batch(prompts: list[list[int]] = PROMPTS, side: str = "left") -> dict[str, torch.Tensor]:
    """Prompts padded to one length on a side."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, p in enumerate(prompts):
        part = slice(width - len(p), width) if side == "left" else slice(0, len(p))
        ids[i, part], mask[i, part] = torch.tensor(p), 1
    return {"input_ids": ids, "attention_mask": mask}


def half_fired(model: Any, **fields: Any) -> tuple[SteeringPackage, list[bool]]:
    """A package whose first probe fires on half of PROMPTS, and which those are."""
    fields = {"probes": [PROBE], **fields}
    probe = helpers.package(facts(model), **fields)
    scores = [oracle(model, probe, p, new=0)[0][0].score for p in PROMPTS]
    limit = float(np.mean(sorted(scores)[1:3]))
    fields["probes"] = [{**fields["probes"][0], "threshold": limit}, *fields["probes"][1:]]
    return helpers.package(facts(model), **fields), [s > limit for s in scores]


def generate(model: Any, inputs: Any = None, **options: Any) -> list[list[int]]:
    """Greedy answers to a batch, PROMPTS if none is given."""
    inputs = batch() if inputs is None else inputs
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    output = model.generate(**inputs, **options)
    return [trim(row) for row in output[:, inputs["input_ids"].shape[1] :].tolist()]


def trim(tokens: list[int]) -> list[int]:
    """Up to the end token."""
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


def forward(session, model, inputs):
    """One forward call as a batch of requests."""
    ids = inputs["input_ids"]
    with session.request(inputs.get("attention_mask", torch.ones_like(ids))):
        return model(**inputs)
