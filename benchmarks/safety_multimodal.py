"""`make bench-safety-multimodal`: text, image and both together, in transformers and llama.cpp.

A guard is trained on the drawings of the demo model's training split and measured on others:
`test` (other drawings and texts, pairs of colour and object never trained on among them) and
`unseen_stems` (question stems never trained on as well). Texts are public pairs where they are
present (see README.md), else those of the shipped corpus. The package is the same in both
runtimes; llama.cpp reads the F32 GGUF with its mmproj, and answers the same prompts.
`text_head` is the share of prompts that the head of a guard trained on text alone refuses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, demo_files, finish, open_demo, progress, say, share
from steerbridge import data
from steerbridge.evaluation import measure, plots
from steerbridge.evaluation.answers import Asking
from steerbridge.evaluation.judge import refuses
from steerbridge.package import SteeringPackage, load
from steerbridge.training.recipe import TrainSettings, train
from steerbridge_demo.guard import guard_examples
from steerbridge_llama_cpp import open_model

NEW = 24
Pairs = Sequence[tuple[str, str]]
CHANNELS = ("text", "image", "both")
PICTURED = ("image", "both", "general")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train-per-kind", type=int, default=180)
    parser.add_argument("--train-texts", type=int, default=1200, help="pairs of texts")
    parser.add_argument("--per-kind", type=int, default=67)
    parser.add_argument("--llama-cpp-per-kind", type=int, default=67)
    options = parser.parse_args()
    hf = open_demo()
    pairs, unseen = public_pairs(options.data)
    package = trained(hf, options.train_per_kind, options.train_texts, pairs)
    result: dict[str, Any] = {"public_data": pairs is not None}
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
    result["text_head"] = carried_over(hf, package)
    result["layer"] = [str(r) for p in package.spec.probes for r in p.readings]
    finish(result)


def trained(hf: Any, per_kind: int, texts: int, pairs: Pairs | None) -> SteeringPackage:
    """The guard: drawings of the training splits, and ordinary prompts without a picture."""
    folder = CACHE / "multimodal" / f"{per_kind}-{texts}"
    alone = [e for e in data.from_corpus("train") if e.kind == "general"][: per_kind // 2]
    # What is harmful in a text takes more examples than what is in a picture.
    examples = [
        *guard_examples(folder / "drawings", "train", per_kind=per_kind, kinds=PICTURED),
        *guard_examples(folder / "texts", "train", per_kind=texts, kinds=("text",), texts=pairs),
        *guard_examples(folder / "drawings", "validation", per_kind=per_kind // 5, kinds=PICTURED),
        *alone,
    ]
    settings = TrainSettings(name="demo-vlm-guard", target_fpr={"*": 0.02, "text": 0.03})
    package = train(hf, examples, settings, folder, progress())
    package.save(CACHE / "demo-vlm-guard.gguf")
    plots.readings(package, CACHE / "demo-vlm-guard.png")
    evidence: Any = package.spec.evidence
    say(f"out of fold: {evidence.safety['out_of_fold']}")
    return package


def public_pairs(folder: Path) -> tuple[Pairs | None, Pairs | None]:
    """Harmful texts with their harmless mirrors to train on, and others to measure on; None
    where the public set is not present: then the shipped corpus is used."""
    path = folder / "vlsafe_pairs.jsonl"
    if not path.is_file():
        return None, None
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    pairs = [(line["harmful"], line["harmless"]) for line in lines]
    return pairs[:2000], pairs[2000:]


def measured(
    model: Any, package: SteeringPackage, split: str, per_kind: int, pairs: Pairs | None
) -> dict[str, Any]:
    folder = CACHE / "multimodal" / f"test-{per_kind}"
    examples = guard_examples(folder, split, per_kind=per_kind, seed=1, texts=pairs)
    rows = measure.run(model, package, examples, Asking(max_new_tokens=NEW))
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
    always = SteeringPackage(spec, other.tensors).unconditional()
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
