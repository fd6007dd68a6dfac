"""`make bench-safety`: train on SmolLM2-135M, then measure on prompts never trained on.

A part of the prompts is answered in other ways too (see `steerbridge.evaluation.compare`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, finish, leaking, open_smollm2, progress, say, share, splits
from evaluations import asking, compared, every
from guards import safety_guard
from steerbridge import Example, SteeringPackage, calibration, reference
from steerbridge.evaluation import measure

JUDGED = ("sorry", "alpaca")  # many: verdicts alone


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--compare", type=int, default=150, help="prompts of each label")
    options = parser.parse_args()
    train, test, public = splits(options.data)
    answered = [e for e in test if e.kind not in JUDGED]
    model = open_smollm2()
    tell = progress()
    guard = safety_guard(options.data, rank=options.rank, model=model)
    package = guard.package
    evidence: Any = package.spec.evidence
    say(f"out of fold: {evidence.safety['out_of_fold']}")
    for probe, evidence_of_probe in evidence.probes.items():
        say(f"{probe}: {evidence_of_probe['runners_up']}")
    how = asking("hf smollm2 F32", 48, tell)
    rows = measure.run(model, package, answered, how)
    measure.write_rows(CACHE / "safety-rows.jsonl", rows)
    evaluation, _ = compared(model, package, every(answered, options.compare), how, "smollm2")
    leaks = leaking(test, train)
    figures = {
        **result(rows, package, public),
        "leakage": share(leaks),
        **verdicts(model, package, [e for e in test if e.kind in JUDGED]),
    }
    finish({"guard": str(guard), **figures, "comparison": shown(evaluation.comparison)})


def verdicts(model: Any, package: SteeringPackage, prompts: list[Example]) -> dict[str, Any]:
    """Shares of the prompts that are judged but not answered on which any probe fires."""
    if not prompts:
        return {}
    scores = calibration.scores(model, package, prompts)
    fired = np.any([reference.fires(p, scores[p.id]) for p in package.spec.probes], axis=0)
    kinds = np.array([e.kind for e in prompts])
    return {
        "detection_sorry": share(fired[kinds == "sorry"]),
        "fpr_alpaca": share(fired[kinds == "alpaca"]),
        "judged": {kind: int((kinds == kind).sum()) for kind in JUDGED},
    }


def shown(comparison: Any) -> dict[str, Any]:
    """Attack success and share of identical harmless answers, for every way."""
    ways = {w["way"]: [w["asr"], w["harmless_identical"]] for w in comparison.ways}
    return {"asr_and_harmless_identical": ways, "better_than_the_guard": comparison.better}


def result(rows: list[measure.Row], package: Any, public: bool) -> dict[str, Any]:
    pairs = measure.summary([r for r in rows if r.example.kind == "pair"])
    whole = measure.summary(rows)
    readings = {p.id: [str(r) for r in p.readings] for p in package.spec.probes}
    read = dict.fromkeys(r for names in readings.values() for r in names)
    return {
        "auroc": max(pairs["auroc"].values()),
        "auroc_by_probe": pairs["auroc"],
        "asr_steered": pairs["asr_guard_steered"],
        "asr_judge": [pairs["asr_judge_unsteered"], pairs["asr_judge_steered"]],
        "asr_guard": [pairs["asr_guard_unsteered"], pairs["asr_guard_steered"]],
        "harmless_identical": pairs["harmless_identical"],
        "fpr_general": whole["fpr"].get("general"),
        "fpr_borderline": whole["fpr"].get("borderline"),
        "refusal_wellformed": whole["refusal_wellformed"],
        "layer": readings,
        "sas": {r: package.spec.evidence.sas[r] for r in read},
        "thresholds": {p.id: p.threshold for p in package.spec.probes},
        "public_data": public,
        "prompts": whole["prompts"],
    }


if __name__ == "__main__":
    main()
