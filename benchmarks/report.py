"""`make report`: reports of the guards for SmolLM2 and for the demo vision-language model.

The guards are those of `make demo`, or with `--guard safety` those of `make bench-safety` and
`make bench-safety-multimodal`. Each report is written as HTML and as Markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import CACHE, arguments, finish, open_demo, open_smollm2, progress, splits
from evaluations import asking, compared, every
from guards import PICTURE_GUARDS, TEXT_GUARDS
from steerbridge import SteeringPackage
from steerbridge.evaluation import record, report
from steerbridge_demo.guard import guard_examples

SIDE, PER_KIND = 150, 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--guard", choices=TEXT_GUARDS, default="demo")
    options = parser.parse_args()
    result = {}
    for name, guards, measure in (
        ("smollm2", TEXT_GUARDS, text),
        ("demo-vlm", PICTURE_GUARDS, pictures),
    ):
        guard = guards[options.guard](options.data)
        records = [record.read(measure(guard.package, options.data))]
        result[name] = {"guard": str(guard)}
        for suffix in ("html", "md"):
            path = CACHE / "reports" / f"{name}.{suffix}"
            result[name][suffix] = str(report.write(records, guard.package, path))
    finish(result)


def text(package: SteeringPackage, folder: Path) -> Path:
    """The record of the guard for text."""
    _, test, _ = splits(folder)
    how = asking("hf smollm2 F32", 48, progress())
    return compared(open_smollm2(), package, every(test, SIDE), how, "smollm2")[1]


def pictures(package: SteeringPackage, _: Path) -> Path:
    """The record of the guard for text and pictures."""
    model: Any = open_demo()
    prompts = guard_examples(CACHE / "report-drawings", "test", per_kind=PER_KIND, seed=1)
    how = asking("hf demo-vlm F32", 24, progress())
    return compared(model, package, prompts, how, "demo-vlm")[1]


if __name__ == "__main__":
    main()
