"""What both parts of `make parity` share: variants of a guard, and how answers are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common import low_rank, share, with_act, with_threshold
from steerbridge import Example, Generation, SteeringPackage, corpus_examples
from steerbridge.spec import AddVector, LayerOutput, ProjectOut, Target
from steerbridge.tensors import Tensor
from steerbridge.training.states import all_readings

RANK = 32


def at_median(package: SteeringPackage, hf: Any, prompts: Sequence[Example]) -> SteeringPackage:
    """The package with the threshold in the middle of the two median scores."""
    answers = hf.generate(prompts, package, max_new_tokens=1)
    scores = sorted(a.outcome.verdicts[0].score for a in answers)
    middle = float(np.mean(scores[len(scores) // 2 - 1 : len(scores) // 2 + 1]))
    return with_threshold(package, middle)


def variants(package: SteeringPackage, hf: Any) -> dict[str, SteeringPackage]:
    """The package with each kind of intervention in the place of its head."""
    head: Any = package.spec.interventions[0]
    # Where the probe reads last: the earliest place that may be steered by it.
    depth = max(package.spec.depth(r.site) for p in package.spec.probes for r in p.readings)
    direction = mean_difference(hf, depth)
    target = Target(site=LayerOutput(stream="layer_output", layer=depth - 1), vector="direction")
    common: dict[str, Any] = {"position": "from_prompt_end", "targets": (target,), "id": head.id}
    unit = direction / np.linalg.norm(direction)
    return {
        "dense": package,
        "low_rank": low_rank(package, RANK),
        "vector": with_act(
            package,
            AddVector(type="add_vector", alpha=2.0, **common),
            {"direction": Tensor.of(direction)},
        ),
        "projection": with_act(
            package,
            ProjectOut(type="project_out", alpha=1.0, **common),
            {"direction": Tensor.of(unit)},
        ),
    }


def mean_difference(hf: Any, layer: int) -> Any:
    """Mean of harmful minus mean of harmless states at the prompt end of the layer."""
    reading = next(
        r
        for r in all_readings(hf.facts.num_layers)
        if str(r) == f"layer_input[{layer}] @ prompt_end"
    )
    examples = [e for e in corpus_examples("train") if e.kind == "pair"][:200]
    states = np.empty((len(examples), 1, hf.facts.hidden_size), np.float32)
    hf.capture(examples, [reading], states)
    harmful = np.array([e.harmful for e in examples])
    return states[harmful, 0].mean(axis=0) - states[~harmful, 0].mean(axis=0)


def compared(
    want: Mapping[str, Sequence[Generation]], got: Mapping[str, Sequence[Generation]]
) -> dict[str, Any]:
    """Shares over all variants, and the share of equal tokens of each."""
    pairs = {name: list(zip(want[name], got[name], strict=True)) for name in want}
    every = [pair for answers in pairs.values() for pair in answers]
    scores = [[a.outcome.verdicts[0].score for a in pair if a.outcome] for pair in every]
    differences = np.abs(np.diff(np.array(scores), axis=1))
    return {
        "score_max_diff": float(differences.max()),
        "score_mean_diff": float(differences.mean()),
        "verdicts_equal": share(fired(a) == fired(b) for a, b in every),
        "tokens_equal": share(a.tokens == b.tokens for a, b in every),
        "tokens_equal_by_intervention": {
            name: share(a.tokens == b.tokens for a, b in answers) for name, answers in pairs.items()
        },
        "leading_tokens_equal": round(float(np.mean([leading(a, b) for a, b in every])), 4),
    }


def fired(answer: Generation) -> bool:
    return answer.outcome is not None and answer.outcome.fired


def leading(a: Generation, b: Generation) -> float:
    """Share of an answer's tokens before the first one that differs."""
    same = 0
    for x, y in zip(a.tokens, b.tokens, strict=False):
        if x != y:
            break
        same += 1
    return same / max(len(a.tokens), len(b.tokens))
