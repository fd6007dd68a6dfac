"""`make parity`: the same package, prompts and weights in transformers and in llama.cpp.

A guard is trained on the shipped prompts. Its probe, with the threshold at the median of the
scores so that half of the prompts fire, controls four interventions in turn: the head as trained,
the head at low rank, a vector and a projection. Verdicts and 48 greedy tokens are compared with
transformers on the same F32 weights, scores with the numpy reference too. Q4_1 is the model as
shipped: transformers computes with the dequantised weights, llama.cpp with quantised activations;
`calibration` shows how far that moves the scores, and false positives and detection on prompts of
the test split before and after `calibrate`. `multimodal` is the same with pictures (see
parity_multimodal.py); `tokens` is about token readings, with llama-server too (parity_tokens.py);
`vllm` is vLLM on a CPU (parity_vllm.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import parity_multimodal
import parity_tokens
import parity_vllm
from common import arguments, finish, open_smollm2, say, share, smollm2_f32
from compare import at_median, compared, variants
from guards import parity_guard
from steerbridge import Example, SteeringPackage, calibration, corpus_examples, reference, smollm2
from steerbridge_llama_cpp import open_model

NEW = 48


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=104)
    parser.add_argument("--multimodal", action="store_true", help="only the part with pictures")
    parser.add_argument("--tokens", action="store_true", help="only the part about token readings")
    parser.add_argument("--vllm", action="store_true", help="only the part with vLLM")
    options = parser.parse_args()
    if options.multimodal:
        finish({"multimodal": parity_multimodal.measure(options.prompts)})
        return
    if options.tokens:
        finish({"tokens": parity_tokens.measure(options.prompts)})
        return
    hf = open_smollm2()
    prompts = chosen(options.prompts)
    made = parity_guard(hf)
    guard = made.package
    packages = variants(at_median(guard, hf, prompts), hf)
    want = {name: hf.generate(prompts, p, max_new_tokens=NEW) for name, p in packages.items()}
    say("transformers done")
    result: dict[str, Any] = {
        "guard": str(made),
        "prompts": len(prompts),
        "new_tokens": NEW,
    }
    result["fired"] = share(a.outcome.fired for a in want["dense"])
    result["reference"] = {
        "score_max_diff": against_reference(packages["dense"], hf, prompts, want["dense"])
    }
    result["vllm"] = parity_vllm.measure(hf, prompts, packages, want, NEW)
    if options.vllm:
        finish(result)
        return
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
    result["multimodal"] = parity_multimodal.measure(options.prompts)
    result["tokens"] = parity_tokens.measure(options.prompts)
    finish(result)


def chosen(count: int) -> list[Example]:
    """Short prompts of the test split, harmful and harmless in turn."""
    sides = [
        [e for e in corpus_examples("test") if e.harmful == harmful and len(e.text) < 120]
        for harmful in (True, False)
    ]
    half = count // 2
    picked = [[side[i * len(side) // half] for i in range(half)] for side in sides]
    return [e for pair in zip(*picked, strict=True) for e in pair]


def against_reference(
    package: SteeringPackage, hf: Any, prompts: Sequence[Example], answers: Sequence[Any]
) -> float:
    """Largest difference of a score between the HF adapter and the numpy reference."""
    (probe,) = package.spec.probes
    states = np.empty((len(prompts), len(probe.readings), hf.facts.hidden_size), np.float32)
    hf.capture(prompts, probe.readings, states)
    want = reference.score(probe, package.tensors, states.reshape(len(prompts), -1))
    got = [a.outcome.verdicts[0].score for a in answers]
    return float(np.abs(want - got).max())


def recalibrated(guard: SteeringPackage, hf: Any, quantised: Any) -> dict[str, Any]:
    """The guard's threshold fitted for Q4_1 on validation prompts, measured on test prompts."""
    fitting, test = (short(split) for split in ("validation", "test"))
    here = calibration.scores(hf, guard, fitting)
    target = {"*": 0.01, "borderline": 0.02}
    fitted = calibration.fit(quantised, guard, fitting, target, baseline=here)
    after = calibration.with_calibration(guard, fitted).calibrated(
        "llama.cpp", "Q4_1", lambda: quantised.weights_sha256
    )
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
    return [e for e in corpus_examples(split) if len(e.text) < 400]


if __name__ == "__main__":
    main()
