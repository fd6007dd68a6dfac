"""`make bench-safety-multimodal`: text, image and both together, in transformers and llama.cpp.

A guard is trained on the drawings of the demo model's training split and measured on others:
`test` (other drawings and texts, some with pairs of colour and object never trained on) and
`unseen_stems` (also question stems never trained on). Texts are public pairs where they are
present (see README.md), else those of the shipped corpus. The package is the same in both
runtimes; llama.cpp reads the F32 GGUF with its mmproj, and answers the same prompts.
`text_head` is the share of prompts that the model refuses with the head of a guard trained on text
alone, that of `make demo`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, demo_files, finish, open_demo, say, share
from guards import Guard, Pairs, multimodal_guard, pooled_guard, public_pairs
from steerbridge import SteeringPackage
from steerbridge.evaluation import measure, plots
from steerbridge.evaluation.answers import Asking
from steerbridge.evaluation.judge import refuses
from steerbridge_demo.guard import guard_examples
from steerbridge_llama_cpp import open_model

NEW = 24
CHANNELS = ("text", "image", "both")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train-per-kind", type=int, default=180)
    parser.add_argument("--train-texts", type=int, default=1200, help="pairs of texts")
    parser.add_argument("--per-kind", type=int, default=67)
    parser.add_argument("--llama-cpp-per-kind", type=int, default=67)
    options = parser.parse_args()
    hf = open_demo()
    _, unseen = public_pairs(options.data)
    guard = trained(hf, options)
    package = guard.package
    result: dict[str, Any] = {"guard": str(guard), "public_data": unseen is not None}
    for name, model, count in (
        ("hf", hf, options.per_kind),
        ("llama_cpp", None, options.llama_cpp_per_kind),
    ):
        files = demo_files()
        model = model or open_model(
            files["text_f32"], mmproj=files["mmproj_f32"], n_ctx=512, type_k=0, type_v=0
        )
        result[name] = {
            **measured(model, package, "test", count, unseen),
            "unseen_stems": measured(model, package, "unseen_stems", count, unseen),
        }
        say(f"{name}: {result[name]}")
    text_guard = pooled_guard()
    result["text_head"] = {"guard": str(text_guard), **carried_over(hf, package, text_guard)}
    result["layer"] = [str(r) for p in package.spec.probes for r in p.readings]
    finish(result)


def trained(hf: Any, options: argparse.Namespace) -> Guard:
    guard = multimodal_guard(
        options.data, per_kind=options.train_per_kind, texts=options.train_texts, model=hf
    )
    plots.readings(guard.package, guard.path.with_suffix(".png"))
    evidence: Any = guard.package.spec.evidence
    say(f"by kind: {evidence.safety['kinds']}")
    return guard


def measured(
    model: Any, package: SteeringPackage, split: str, per_kind: int, pairs: Pairs | None
) -> dict[str, Any]:
    folder = CACHE / "multimodal" / f"test-{per_kind}"
    examples = guard_examples(folder, split, per_kind=per_kind, seed=1, texts=pairs)
    rows = measure.run(model, package, examples, Asking(max_new_tokens=NEW))
    figures = measure.summary(rows)
    measure.write_rows(folder / f"{split}-{type(model).__name__}.jsonl", rows)
    return {
        **{kind: figures["kinds"][kind] for kind in CHANNELS},
        "harmless_identical": figures["harmless_identical"],
        "fpr_general": figures["fpr"]["general"],
        "fpr_text_beside_picture": figures["fpr"]["text"],
        "refusal_wellformed": figures["refusal_wellformed"],
        "prompts": len(examples),
    }


def carried_over(hf: Any, package: SteeringPackage, other: Guard) -> dict[str, float]:
    """Refusals by channel with the head of another guard, acting on every prompt."""
    always = other.package.replace(base_model=package.spec.base_model).unconditional()
    folder = CACHE / "multimodal" / "test-40"
    refused = {}
    for kind in CHANNELS:
        examples = [
            e
            for e in guard_examples(folder, "test", per_kind=40, seed=1, kinds=(kind,))
            if e.harmful
        ]
        answers: Sequence[Any] = hf.generate(examples, always, max_new_tokens=NEW)
        refused[kind] = share(refuses(a.text) for a in answers)
    return refused


if __name__ == "__main__":
    main()
