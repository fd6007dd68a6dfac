"""`make bench-kernels`: what choosing wider instructions at load time gives the native hook.

Seconds of W x by the kernels as shipped (the loader picks AVX-512, AVX2 or plain) and by the
same C without versions (`STEERHOOK_PORTABLE`), which runs twice in each round. `speedup` is
portable over shipped time by dtype and width; the keys beside it are those of `ratios.py`. `gbps`
is what the shipped kernels read of W per second: memory, not arithmetic, bounds a large head.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import ratios
from common import ROOT, finish

NATIVE = ROOT / "adapters" / "steerbridge_llama_cpp" / "native"
SOURCES = [ROOT / "tests" / "native" / "bench_kernels.c", NATIVE / "kernels.c"]
BYTES = {"f32": 4, "f16": 2, "bf16": 2}
ROUNDS = 12
BUILDS = {"shipped": [], "portable": ["-DSTEERHOOK_PORTABLE"]}
SIDES = {"portable": "portable", "control": "portable", "shipped": "shipped"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for name, flags in BUILDS.items():
            programs[name] = Path(folder) / name
            command = ["cc", "-std=c11", "-O3", *flags, f"-I{NATIVE}", *SOURCES]
            subprocess.run([*map(str, command), "-o", str(programs[name]), "-lm"], check=True)
        rounds = [
            {side: run(programs[SIDES[side]]) for side in ratios.order(i, list(SIDES))}
            for i in range(ROUNDS)
        ]
    kinds = list(rounds[0]["shipped"])
    measured = {kind: speedup([pick(each, kind) for each in rounds]) for kind in kinds}
    figures = {kind: ratio.to_json("speedup") for kind, ratio in measured.items()}
    best = {kind: min(each["shipped"][kind] for each in rounds) for kind in kinds}
    finish(
        {
            **{name: {kind: figures[kind][name] for kind in kinds} for name in figures[kinds[0]]},
            "idle": all(ratio.idle for ratio in measured.values()),
            "gbps": {kind: round(size(kind) / s / 1e9, 1) for kind, s in best.items()},
            "microseconds": {kind: round(1e6 * s, 1) for kind, s in best.items()},
        }
    )


def pick(each: dict[str, dict[str, float]], kind: str) -> ratios.Times:
    """The seconds of each side of a round, for one dtype and width."""
    return {side: seconds[kind] for side, seconds in each.items()}


def speedup(rounds: list[ratios.Times]) -> ratios.Ratio:
    return ratios.of_rounds(rounds, "shipped", plain="portable")


def run(program: Path) -> dict[str, float]:
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {key: float(value) for key, value in map(str.split, output.splitlines())}


def size(kind: str) -> int:
    dtype, width = kind.split("_")
    return BYTES[dtype] * int(width) ** 2


if __name__ == "__main__":
    main()
