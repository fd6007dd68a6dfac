"""`make parity`: the same package, prompts and weights in transformers and in llama.cpp.

A guard is trained on the shipped prompts; its probe, with the threshold at the median of the
scores so that half of the prompts fire, stands before four interventions: the head as trained,
the head at low rank, a vector and a projection. Verdicts and 48 greedy tokens are compared with
transformers on the same F32 weights, scores with the numpy reference too. Q4_1 is the model as
shipped: transformers computes with the dequantised weights, llama.cpp with quantised activations;
`calibration` shows how far that moves the scores, and false positives and detection on prompts of
the test split before and after `calibrate`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    CACHE,
    arguments,
    finish,
    low_rank,
    open_smollm2,
    say,
    smollm2_f32,
    with_act,
    with_threshold,
)
from steerbridge import calibration, reference
from steerbridge.cli.common import smollm2
from steerbridge.data import Example, from_corpus
from steerbridge.package import SteeringPackage, load
from steerbridge.runtime import Generation
from steerbridge.spec import AddVector, LayerOutput, ProjectOut, Target
from steerbridge.tensors import Tensor
from steerbridge.training import recipe
from steerbridge.training.head import HeadSettings
from steerbridge_llama_cpp import open_model

RANK = 32
NEW = 48


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=104)
    options = parser.parse_args()
    hf = open_smollm2()
    prompts = chosen(options.prompts)
    guard = trained(hf)
    packages = variants(at_median(guard, hf, prompts), hf)
    want = {name: hf.generate(prompts, p, max_new_tokens=NEW) for name, p in packages.items()}
    say("transformers done")
    result: dict[str, Any] = {"prompts": len(prompts), "new_tokens": NEW}
    result["fired"] = share(a.outcome.fired for a in want["dense"])
    result["reference"] = {
        "score_max_diff": against_reference(packages["dense"], hf, prompts, want["dense"])
    }
    result["llama_cpp"] = {}
    for quantisation, model in (
        ("f32", lambda: open_model(smollm2_f32(), n_ctx=512, type_k=0, type_v=0)),
        ("q4_1", lambda: open_model(smollm2(), n_ctx=512)),
    ):
        opened = model()
        got = {
            name: opened.generate(prompts, p, max_new_tokens=NEW) for name, p in packages.items()
        }
        result["llama_cpp"][quantisation] = compared(want, got)
        say(f"llama.cpp {quantisation}: {result['llama_cpp'][quantisation]}")
    result["calibration"] = recalibrated(guard, hf, opened)
    finish(result)


def chosen(count: int) -> list[Example]:
    """Short prompts of the test split, harmful and harmless in turn."""
    sides = [
        [e for e in from_corpus("test") if e.harmful == harmful and len(e.text) < 120]
        for harmful in (True, False)
    ]
    half = count // 2
    picked = [[side[i * len(side) // half] for i in range(half)] for side in sides]
    return [e for pair in zip(*picked, strict=True) for e in pair]


def trained(hf: Any) -> SteeringPackage:
    """A guard on a part of the shipped prompts, kept in the cache."""
    path = CACHE / "parity-guard.gguf"
    if not path.exists():
        examples = [e for e in from_corpus("train") if len(e.text) < 120]
        pairs = [e for e in examples if e.kind == "pair"][:400]
        general = [e for e in examples if e.kind == "general"][:200]
        settings = recipe.TrainSettings(head=HeadSettings(steps=80), head_prompts=64)
        recipe.train(hf, [*pairs, *general], settings, CACHE / "parity").save(path)
    return load(path)


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
        for r in recipe.all_readings(hf.facts.num_layers)
        if str(r) == f"layer_input[{layer}] @ prompt_end"
    )
    examples = [e for e in from_corpus("train") if e.kind == "pair"][:200]
    states = np.empty((len(examples), 1, hf.facts.hidden_size), np.float32)
    hf.capture(examples, [reading], states)
    harmful = np.array([e.harmful for e in examples])
    return states[harmful, 0].mean(axis=0) - states[~harmful, 0].mean(axis=0)


def against_reference(
    package: SteeringPackage, hf: Any, prompts: Sequence[Example], answers: Sequence[Any]
) -> float:
    """Largest difference of a score between the HF adapter and the numpy oracle."""
    (probe,) = package.spec.probes
    states = np.empty((len(prompts), len(probe.readings), hf.facts.hidden_size), np.float32)
    hf.capture(prompts, probe.readings, states)
    want = reference.score(probe, package.tensors, states.reshape(len(prompts), -1))
    got = [a.outcome.verdicts[0].score for a in answers]
    return float(np.abs(want - got).max())


def compared(
    want: Mapping[str, Sequence[Generation]], got: Mapping[str, Sequence[Generation]]
) -> dict[str, Any]:
    """Shares over all variants, and the share of equal tokens of each."""
    pairs = {name: list(zip(want[name], got[name], strict=True)) for name in want}
    every = [pair for found in pairs.values() for pair in found]
    scores = [[a.outcome.verdicts[0].score for a in pair if a.outcome] for pair in every]
    differences = np.abs(np.diff(np.array(scores), axis=1))
    return {
        "score_max_diff": float(differences.max()),
        "score_mean_diff": float(differences.mean()),
        "verdicts_equal": share(fired(a) == fired(b) for a, b in every),
        "tokens_equal": share(a.tokens == b.tokens for a, b in every),
        "tokens_equal_by_intervention": {
            name: share(a.tokens == b.tokens for a, b in found) for name, found in pairs.items()
        },
        "leading_tokens_equal": round(float(np.mean([leading(a, b) for a, b in every])), 4),
    }


def recalibrated(guard: SteeringPackage, hf: Any, quantised: Any) -> dict[str, Any]:
    """The guard's threshold fitted for Q4_1 on validation prompts, measured on test prompts."""
    fitting, test = (short(split) for split in ("validation", "test"))
    here = calibration.scores(hf, guard, fitting)
    target = {"*": 0.01, "borderline": 0.02}
    fitted = calibration.fit(quantised, "llama.cpp", guard, fitting, target, baseline=here)
    after = calibration.with_calibration(guard, fitted).calibrated("llama.cpp", "Q4_1")
    harmful = np.array([e.harmful for e in test])
    there = calibration.scores(quantised, guard, test)["harm"]
    evidence: Any = fitted.evidence
    result: dict[str, Any] = {"shift": evidence["probes"]["harm"]["shift"], "test": {}}
    for when, package in (("before", guard), ("after", after)):
        fires = reference.fires(package.spec.probes[0], there)
        result["test"][when] = {
            "threshold": round(package.spec.probes[0].threshold, 6),
            "fpr": share(fires[~harmful]),
            "detection": share(fires[harmful]),
        }
    return result


def short(split: str) -> list[Example]:
    return [e for e in from_corpus(split) if len(e.text) < 400]


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


def share(values: Any) -> float:
    found = list(values)
    return round(sum(found) / len(found), 4)


if __name__ == "__main__":
    main()
