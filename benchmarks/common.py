"""What the benchmarks share: data, the model, the one JSON object at the end."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from steerbridge import data
from steerbridge.cli.common import smollm2
from steerbridge.data import Example
from steerbridge.low_rank import low_rank as truncated
from steerbridge.package import SteeringPackage
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
        help="folder with vlsafe_pairs.jsonl, benign_general.jsonl, benign_arena.jsonl",
    )
    return parser


def splits(folder: Path) -> tuple[list[Example], list[Example], bool]:
    """Training and test prompts: public sets where present, else the shipped prompts alone.

    Test kinds: `pair` (harmful and harmless), `general` and `borderline`, none trained on.
    """
    train = data.from_corpus("train") + data.from_corpus("validation")
    held = data.from_corpus("test")
    borderline = [e for e in held if e.kind == "borderline"]
    if not (folder / "vlsafe_pairs.jsonl").is_file():
        return train, held, False
    pairs = data.read_jsonl(folder / "vlsafe_pairs.jsonl")
    general = data.read_jsonl(folder / "benign_general.jsonl")
    arena = data.read_jsonl(folder / "benign_arena.jsonl")
    half = len(general) // 2
    return (
        [*pairs[:4000], *general[:half], *arena[:350], *train],
        [*pairs[4000:], *general[half:], *borderline],
        True,
    )


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
    found = list(values)
    return round(sum(found) / len(found), 4)


def with_threshold(package: SteeringPackage, threshold: float) -> SteeringPackage:
    """The package whose every probe has this threshold."""
    probes = tuple(p.model_copy(update={"threshold": threshold}) for p in package.spec.probes)
    return SteeringPackage(package.spec.model_copy(update={"probes": probes}), package.tensors)


def with_act(package: SteeringPackage, act: Any, tensors: Mapping[str, Tensor]) -> SteeringPackage:
    """The package with this intervention, of the same id, in the place of its own."""
    spec = package.spec.model_copy(update={"interventions": (act,)})
    return SteeringPackage(spec, {**package.tensors, **tensors})


def low_rank(package: SteeringPackage, rank: int) -> SteeringPackage:
    """The package with its dense head cut to a rank; as it is if its head is of low rank."""
    head: Any = package.spec.interventions[0]
    if not isinstance(head.weight, DenseMatrix):
        return package
    cut = truncated(package.tensors[head.weight.matrix].float32(), rank)
    act = head.model_copy(update={"weight": LowRankMatrix(form="low_rank", u="u", v="v")})
    return with_act(package, act, {"u": Tensor.of(cut.u), "v": Tensor.of(cut.v)})


def alternate(round: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Seconds of each run: the fastest of three, the runs taking turns in who goes first."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(3):
        turn = (round + k) % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(runs[name]())
    return {name: min(found) for name, found in times.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def progress() -> Callable[[str, int, int], None]:
    """Says what is done, at most every 20 seconds a task and when it is complete."""
    shown: dict[str, float] = {}
    start = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        if time.monotonic() - shown.get(what, 0) > 20 or done == total:
            shown[what] = time.monotonic()
            say(f"{time.monotonic() - start:6.0f} s  {what} {done}/{total or '?'}")

    return tell


def finish(result: dict[str, Any]) -> None:
    """The last line of standard output: one JSON object."""
    print(json.dumps(result))
