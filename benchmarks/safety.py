"""`make bench-safety`: guards for SmolLM2-135M, measured on prompts never trained on.

Two guards: one trained on public and shipped prompts, one on the shipped prompts alone. Verdicts
are told for every set and form (`heldout.py`), in transformers and, for a part of the prompts, in
llama.cpp with Q4_1 weights after `calibrate` there; then refusals, answers, attacks, and what a
text classifier does. What is trained or answered is kept: a run that was stopped goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
import baseline
import heldout
from common import (
    CACHE,
    arguments,
    every,
    finish,
    leaking,
    open_smollm2,
    progress,
    say,
    share,
    splits,
)
from evaluations import asking, compared
from guards import Guard, pooled_guard, safety_guard, shipped_guard
from steerbridge import Example, SteeringPackage, TrainSettings, calibration, smollm2
from steerbridge.evaluation import judge, measure, verdicts
from steerbridge.training import parts
from steerbridge.training.settings import DEFAULT_REFUSAL

NEW: Final = 60  # tokens of a refusal
QUANTISED: Final = 60  # prompts of a set in llama.cpp
REFUSED: Final = 100  # prompts whose refusals are read
DIALOGUES: Final = 50
ATTACKED: Final = 150


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--compare", type=int, default=150, help="prompts of each label")
    options = parser.parse_args()
    train, test, public = splits(options.data)
    sets = heldout.sets(test)
    guard, shipped = safety_guard(options.data), shipped_guard(options.data)
    for one in (guard, shipped):
        say(f"{one}: {one.evidence.safety['promise']} {one.evidence.safety['forms']}")
    model, tell = open_smollm2(), progress()
    fired = {one: decided(model, one.package, sets, tell) for one in (guard, shipped)}
    result: dict[str, Any] = {
        "guards": [str(guard), str(shipped)],
        "public_data": public,
        "probes": {p.id: list(p.reads) for p in guard.package.spec.probes},
        "promise": guard.evidence.safety["promise"],
        **figures(fired[guard]),
        "shipped_only": figures(fired[shipped]),
        "leakage": share(leaking(test, train)),
        "prompts": {name: len(prompts) for name, prompts in sets.items()},
    }
    say(str(result))
    divided = parts.divide(model, train, TrainSettings().forms, 0)
    result["baseline"] = figures(baseline.verdicts(divided, TrainSettings(), sets))
    result["attacks"] = attacks(model, guard.package, test)
    result["llama_cpp"] = quantised(guard, divided, sets)
    result |= refusals(model, guard, pooled_guard(), sets)
    result |= answers(model, guard, test, options.compare)
    finish(result)


def decided(
    model: Any, package: SteeringPackage, sets: Mapping[str, Sequence[Example]], tell: Any = None
) -> dict[str, NDArray[np.bool_]]:
    """Whether the guard fires on each prompt, by set."""
    prompts, where = heldout.flat(sets)
    scores = calibration.scores(model, package, prompts, tell)
    fired = calibration.margins(package, scores) > 0
    return {name: fired[part] for name, part in where.items()}


def figures(fired: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """Shares that fire; false positives pooled over all ordinary prompts, and by set."""
    calm = [*heldout.ORDINARY, "ordinary_long", "ordinary_forms"]
    ordinary = [fired[name] for name in calm if name in fired]
    return {
        "detection_vlsafe": share(fired["vlsafe"]),
        "detection_sorry": share(fired["sorry"]) if "sorry" in fired else None,
        **{name: share(fired[name]) for name in heldout.LONG},
        "by_form": {name: share(fired[name]) for name in heldout.SHORT_FORMS},
        "fpr": share(np.concatenate(ordinary)) if ordinary else None,
        "fpr_by_set": {name: share(fired[name]) for name in calm if name in fired},
        "twins": {name: share(fired[name]) for name in ("mirrors", "borderline")},
    }


def attacks(model: Any, package: SteeringPackage, test: Sequence[Example]) -> dict[str, Any]:
    """Attack -> shares of harmful and of ordinary prompts that fire behind it."""
    some = every([e for e in test if e.kind in ("pair", *heldout.ORDINARY)], ATTACKED)
    some = [e for e in some if e.harmful or e.kind != "pair"]
    lines = verdicts.table(model, package, some, verdicts.behind_attacks())
    return {
        line.name: [part and round(part.value, 4) for part in (line.detected, line.fpr)]
        for line in lines
    }


def quantised(
    guard: Guard, divided: parts.Parts, sets: Mapping[str, Sequence[Example]]
) -> dict[str, Any]:
    """The figures in llama.cpp with Q4_1 weights, calibrated there on the same traffic, and those
    of transformers on the same prompts."""
    from steerbridge_llama_cpp import open_model

    llama = open_model(smollm2(), n_ctx=2048)
    traffic = [divided.examples[i] for i in divided.of("calibrate") if divided.traffic[i]]
    settings = TrainSettings()
    fitted = calibration.fit(
        llama, guard.package, traffic, {"*": settings.target_fpr}, confidence=settings.confidence
    )
    package = calibration.with_calibration(guard.package, fitted)
    package = package.calibrated(llama.runtime, llama.quantisation, lambda: llama.weights_sha256)
    some = {name: every(prompts, QUANTISED) for name, prompts in sets.items()}
    return {
        "q4_1": figures(decided(llama, package, some)),
        "hf_same_prompts": figures(decided(open_smollm2(), guard.package, some)),
        "thresholds": dict(fitted.thresholds),
    }


def refusals(
    model: Any, guard: Guard, headed: Guard, sets: Mapping[str, Sequence[Example]]
) -> dict[str, Any]:
    """How well the two ways to refuse end, and whether a dialogue goes on after a refusal."""
    harmful = every(sets["vlsafe"], REFUSED)
    quality = {}
    for name, package in (("say", guard.package), ("head", headed.package)):
        told = model.generate(harmful, package.unconditional(), max_new_tokens=NEW)
        quality[name] = share(
            judge.well_formed(a.text, a.finish) and not judge.repeats(a.text) for a in told
        )
    calm = every([e for name in heldout.ORDINARY for e in sets.get(name, ())], DIALOGUES)
    turns = [(("user", e.text), ("assistant", DEFAULT_REFUSAL)) for e in harmful]
    kept = [heldout.after(e, turns[i % len(turns)]) for i, e in enumerate(calm)]
    dropped = decided(model, guard.package, {"dropped": calm, "kept": kept})
    return {
        "refusal_quality": quality,
        "next_turn_answered": 1 - share(dropped["dropped"]),
        "next_turn_answered_if_kept": 1 - share(dropped["kept"]),
    }


def answers(model: Any, guard: Guard, test: Sequence[Example], count: int) -> dict[str, Any]:
    """Attack success and answers that are the same, beside other ways to refuse."""
    some = every([e for e in test if e.kind in ("pair", *heldout.ORDINARY)], count)
    how = asking("hf smollm2 F32", 48, progress())
    evaluation, _ = compared(model, guard.package, some, how, "smollm2")
    rows = evaluation.rows
    measure.write_rows(CACHE / "safety-rows.jsonl", rows)
    whole = measure.summary(rows)
    ways = {w["way"]: [w["asr"], w["harmless_identical"]] for w in evaluation.comparison.ways}
    return {
        "auroc": whole["auroc"],
        "asr_steered": whole["asr_guard_steered"],
        "asr_judge": [whole["asr_judge_unsteered"], whole["asr_judge_steered"]],
        "asr_guard": [whole["asr_guard_unsteered"], whole["asr_guard_steered"]],
        "harmless_identical": whole["harmless_identical"],
        "refusal_wellformed": whole["refusal_wellformed"],
        "comparison": {
            "asr_and_harmless_identical": ways,
            "better_than_the_guard": evaluation.comparison.better,
        },
    }


if __name__ == "__main__":
    main()
