"""`make bench-safety`: train on SmolLM2-135M, then measure on prompts never trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, finish, open_smollm2, progress, say, splits
from steerbridge.evaluation import measure
from steerbridge.training.recipe import TrainSettings, train


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rank", type=int, default=None)
    options = parser.parse_args()
    training, test, public = splits(options.data)
    model = open_smollm2()
    tell = progress()
    settings = TrainSettings(name="smollm2-guard", rank=options.rank)
    workdir = CACHE / ("safety-public" if public else "safety-corpus")
    package = train(model, training, settings, workdir, tell)
    package.save(CACHE / "smollm2-guard.gguf")
    evidence: Any = package.spec.evidence
    say(f"out of fold: {evidence.safety['out_of_fold']}")
    for probe, found in evidence.probes.items():
        say(f"{probe}: {found['runners_up']}")
    rows = measure.run(
        model,
        package,
        test,
        max_new_tokens=48,
        progress=lambda a, b: tell("answers", a, b),
    )
    measure.write_rows(CACHE / "safety-rows.jsonl", rows)
    finish(result(rows, package, public))


def result(rows: list[measure.Row], package: Any, public: bool) -> dict[str, Any]:
    pairs = measure.summary([r for r in rows if r.example.kind == "pair"])
    whole = measure.summary(rows)
    readings = {p.id: [str(r) for r in p.readings] for p in package.spec.probes}
    read = dict.fromkeys(r for found in readings.values() for r in found)
    return {
        "auroc": max(pairs["auroc"].values()),
        "auroc_by_probe": pairs["auroc"],
        "asr_unsteered": pairs["asr_unsteered"],
        "asr_steered": pairs["asr_steered"],
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
