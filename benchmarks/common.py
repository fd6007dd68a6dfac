"""What the benchmarks share: data, the model, the one JSON object at the end."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ratios import Times, alternate
from steerbridge import Example, Progress, SteeringPackage, corpus_examples, read_examples, smollm2
from steerbridge.datasets.groups import folds, groups
from steerbridge.low_rank import low_rank as truncated
from steerbridge.spec import DenseMatrix, LowRankMatrix
from steerbridge.tensors import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("STEERBRIDGE_DATA", ROOT.parent / "shared" / "data")),
        help="folder with vlsafe_pairs, benign_general, benign_arena and sorry_pairs (.jsonl)",
    )
    return parser


def splits(folder: Path) -> tuple[list[Example], list[Example], bool]:
    """Training and test prompts: public sets where present, else the shipped prompts alone.

    Test kinds: `pair` (harmful and harmless), `sorry` (harmful), `alpaca`, `general` and `arena`
    (ordinary), and `borderline` (the shipped ones). No training prompt is like a test prompt (see
    `steerbridge.datasets.groups`): those of the shipped corpus that are, are left out.
    """
    train = corpus_examples("train") + corpus_examples("validation")
    test = corpus_examples("test")
    public = (folder / "vlsafe_pairs.jsonl").is_file()
    if public:
        test = [e for e in test if e.kind == "borderline"]
        arena = read_examples(folder / "benign_arena.jsonl", label=False)
        sets = [
            *read_examples(folder / "vlsafe_pairs.jsonl"),
            *read_examples(folder / "benign_general.jsonl", label=False),
            *[replace(e, kind="arena") for e in arena],
            *read_examples(folder / "sorry_pairs.jsonl"),
        ]
        fold = folds(sets, 5, seed=1)
        test += [e for e, held in zip(sets, fold, strict=True) if held == 0]
        train += [e for e, held in zip(sets, fold, strict=True) if held != 0]
    alike = leaking(train, test)
    return [e for e, leaks in zip(train, alike, strict=True) if not leaks], test, public


def leaking(train: Sequence[Example], test: Sequence[Example]) -> list[bool]:
    """Which training prompts are like a test prompt."""
    names = groups([*train, *test])
    held = set(names[len(train) :])
    return [name in held for name in names[: len(train)]]


def every(prompts: Sequence[Example], count: int) -> list[Example]:
    """At most `count` prompts of each label, evenly spaced."""
    chosen = []
    for harmful in (True, False):
        side = [p for p in prompts if p.harmful is harmful]
        kept = min(count, len(side))
        chosen += [side[i * len(side) // kept] for i in range(kept)]
    return chosen


def open_smollm2() -> Any:
    from steerbridge_hf import open_model

    return open_model(smollm2())


def smollm2_f32() -> Path:
    """SmolLM2's weights as an F32 GGUF file, written once."""
    from steerbridge_llama_cpp.dequantise import dequantise

    path = CACHE / "models" / "SmolLM2-135M-Instruct.F32.gguf"
    return path if path.is_file() else dequantise(smollm2(), path)


def open_demo() -> Any:
    """The demo vision-language model in transformers."""
    from steerbridge_demo import open_hf

    return open_hf()


def demo_files() -> dict[str, Path]:
    """The demo model as GGUF files (text and mmproj), written once for its weights."""
    from steerbridge_demo import gguf_files

    return gguf_files.kept(CACHE / "models")


def resident(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no VmRSS")


def share(values: Iterable[bool]) -> float:
    flags = list(values)
    return round(float(sum(flags)) / len(flags), 4)


def with_threshold(package: SteeringPackage, threshold: float) -> SteeringPackage:
    """The package whose every probe has this threshold."""
    return package.replace(
        probes=tuple(p.replace(threshold=threshold) for p in package.spec.probes)
    )


def with_act(package: SteeringPackage, act: Any, tensors: Mapping[str, Tensor]) -> SteeringPackage:
    """The package with this intervention, of the same id, in the place of its own."""
    return package.replace(interventions=(act,), tensors={**package.tensors, **tensors})


def low_rank(package: SteeringPackage, rank: int) -> SteeringPackage:
    """The package with its dense head cut to a rank; as it is if it has none."""
    head: Any = package.spec.interventions[0]
    if not isinstance(getattr(head, "weight", None), DenseMatrix):
        return package
    cut = truncated(package.tensors[head.weight.matrix].float32(), rank)
    act = head.replace(weight=LowRankMatrix(form="low_rank", u="u", v="v"))
    return with_act(package, act, {"u": Tensor.of(cut.u), "v": Tensor.of(cut.v)})


def generation_times(
    round: int, runs: Mapping[str, Callable[[int], float]], new: int
) -> tuple[Times, Times]:
    """Seconds that each run takes to the first of `new` tokens, and for the tokens after it."""
    first = alternate(round, {name: partial(run, 1) for name, run in runs.items()})
    whole = alternate(round, {name: partial(run, new) for name, run in runs.items()})
    return first, {name: whole[name] - first[name] for name in runs}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def progress() -> Progress:
    """Says how far each step is: at most every 20 seconds, and when it is complete."""
    shown: dict[str, float] = {}
    start = time.monotonic()

    def show(step: str, done: int, total: int) -> None:
        if time.monotonic() - shown.get(step, 0) > 20 or done == total:
            shown[step] = time.monotonic()
            say(f"{time.monotonic() - start:6.0f} s  {step} {done}/{total or '?'}")

    return show


def finish(result: dict[str, Any]) -> None:
    """The last line of standard output: one JSON object."""
    print(json.dumps(result))
