"""`make report`: reports of the guards for SmolLM2 and for the demo vision-language model.

The guards are those of `make bench-safety` and `make bench-safety-multimodal`, or else of
`make demo`. Each report is written as HTML and as Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, finish, open_demo, open_smollm2, progress, splits
from evaluations import asking, compared, every
from steerbridge.evaluation import record, report
from steerbridge.package import SteeringPackage, load
from steerbridge_demo.guard import guard_examples

SIDE, PER_KIND = 150, 20


def main() -> None:
    options = arguments(__doc__).parse_args()
    result = {}
    for name, make in (("smollm2", text), ("demo-vlm", pictures)):
        package, path = make(options.data)
        found = [record.read(path)]
        for suffix in (".html", ".md"):
            written = report.write(found, package, CACHE / "reports" / f"{name}{suffix}")
            result[f"{name}{suffix}"] = str(written)
    finish(result)


def guard(*names: str) -> SteeringPackage:
    """The first of some packages that is there."""
    paths = [CACHE / f"{name}.gguf" for name in names]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        sys.exit(f"no package at {' or '.join(map(str, paths))}: run make demo first")
    return load(found)


def text(folder: Path) -> tuple[SteeringPackage, Path]:
    package = guard("smollm2-guard", "smollm2-demo")
    _, test, _ = splits(folder)
    how = asking("hf smollm2 F32", 48, progress())
    return package, compared(open_smollm2(), package, every(test, SIDE), how, "smollm2")[1]


def pictures(_: Path) -> tuple[SteeringPackage, Path]:
    package = guard("demo-vlm-guard", "demo-vlm")
    model: Any = open_demo()
    prompts = guard_examples(CACHE / "report-drawings", "test", per_kind=PER_KIND, seed=1)
    how = asking("hf demo-vlm F32", 24, progress())
    return package, compared(model, package, prompts, how, "demo-vlm")[1]


if __name__ == "__main__":
    main()
