"""`make bench-safety-multimodal`: text, image and both together, in transformers and llama.cpp.

A guard is trained on the drawings of the demo model's training split and measured on others:
`test` (other drawings and texts, pairs of colour and object never trained on among them) and
`unseen_stems` (question stems never trained on as well). The package is the same in both
runtimes; llama.cpp reads the F32 GGUF with its mmproj, and answers the same prompts.
`text_head` is the share of prompts that the head of a guard trained on text alone refuses.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, demo_files, finish, open_demo, say, share
from steerbridge import data
from steerbridge.data import Example
from steerbridge.evaluation import measure, plots
from steerbridge.evaluation.judge import refuses
from steerbridge.package import SteeringPackage, load
from steerbridge.training.recipe import TrainSettings, train, unconditional
from steerbridge_demo.guard import guard_examples
from steerbridge_llama_cpp import open_model

NEW = 24
CHANNELS = ("text", "image", "both")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train-per-kind", type=int, default=300)
    parser.add_argument("--per-kind", type=int, default=80)
    parser.add_argument("--llama-cpp-per-kind", type=int, default=30)
    options = parser.parse_args()
    hf = open_demo()
    package = trained(hf, options.train_per_kind)
    result: dict[str, Any] = {}
    for name, model, count in (
        ("hf", hf, options.per_kind),
        ("llama_cpp", None, options.llama_cpp_per_kind),
    ):
        files = demo_files()
        model = model or open_model(
            files["text_f32"], mmproj=files["mmproj_f32"], n_ctx=512, type_k=0, type_v=0
        )
        result[name] = {
            **measured(model, package, "test", count),
            "unseen_stems": measured(model, package, "unseen_stems", count),
        }
        say(f"{name}: {result[name]}")
    result["text_head"] = carried_over(hf, package)
    result["layer"] = [str(r) for p in package.spec.probes for r in p.readings]
    finish(result)


def trained(hf: Any, per_kind: int) -> SteeringPackage:
    """The guard: drawings of the training splits, and texts of the shipped corpus alone."""
    folder = CACHE / "multimodal" / str(per_kind)
    examples = [
        *guard_examples(folder / "drawings", "train", per_kind=per_kind),
        *guard_examples(folder / "drawings", "validation", per_kind=per_kind // 3),
        *texts("train", per_kind),
    ]
    shown: dict[str, float] = {}
    start = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        if time.monotonic() - shown.get(what, 0) > 20 or done == total:
            shown[what] = time.monotonic()
            say(f"{time.monotonic() - start:6.0f} s  {what} {done}/{total or '?'}")

    settings = TrainSettings(name="demo-vlm-guard")
    package = train(hf, examples, settings, folder, progress)
    package.save(CACHE / "demo-vlm-guard.gguf")
    plots.readings(package, CACHE / "demo-vlm-guard.png")
    evidence: Any = package.spec.evidence
    say(f"out of fold: {evidence.safety['out_of_fold']}")
    return package


def texts(split: str, count: int) -> list[Example]:
    """Prompts of the shipped corpus, without a picture: both sides of pairs, ordinary ones."""
    found = data.from_corpus(split)
    pairs = [e for e in found if e.kind == "pair"][: 2 * count]
    return [*pairs, *[e for e in found if e.kind == "general"][:count]]


def measured(model: Any, package: SteeringPackage, split: str, per_kind: int) -> dict[str, Any]:
    folder = CACHE / "multimodal" / f"test-{per_kind}"
    examples = guard_examples(folder, split, per_kind=per_kind, seed=1)
    rows = measure.run(model, package, examples, max_new_tokens=NEW)
    found = measure.summary(rows)
    measure.write_rows(folder / f"{split}-{type(model).__name__}.jsonl", rows)
    return {
        **{kind: found["kinds"][kind] for kind in CHANNELS},
        "harmless_identical": found["harmless_identical"],
        "fpr_general": found["fpr"]["general"],
        "refusal_wellformed": found["refusal_wellformed"],
        "prompts": len(examples),
    }


def carried_over(hf: Any, package: SteeringPackage) -> dict[str, float] | None:
    """Refusals by channel with the head of the text guard, acting on every prompt."""
    path = CACHE / "smollm2-guard.gguf"
    if not path.is_file():
        return None
    other = load(path)
    spec = other.spec.model_copy(update={"base_model": package.spec.base_model})
    always = unconditional(SteeringPackage(spec, other.tensors))
    folder = CACHE / "multimodal" / "test-40"
    found = {}
    for kind in CHANNELS:
        examples = [
            e
            for e in guard_examples(folder, "test", per_kind=40, seed=1, kinds=(kind,))
            if e.harmful
        ]
        answers: Sequence[Any] = hf.generate(examples, always, max_new_tokens=NEW)
        found[kind] = share(refuses(a.text) for a in answers)
    return found


if __name__ == "__main__":
    main()
