"""`make bench-kernels`: what choosing wider instructions at load time gives the native hook.

Seconds of W x by the kernels as shipped (the loader picks AVX-512, AVX2 or plain) and by the
same C without versions (`STEERHOOK_PORTABLE`), in turn; ratios are portable over shipped. `gbps`
is what the shipped ones read of W a second: memory, not arithmetic, bounds a large head.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from common import ROOT, finish

NATIVE = ROOT / "adapters" / "steerbridge_llama_cpp" / "native"
SOURCES = [ROOT / "tests" / "native" / "bench_kernels.c", NATIVE / "kernels.c"]
BYTES = {"f32": 4, "f16": 2, "bf16": 2}
ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for name, flags in (("shipped", []), ("portable", ["-DSTEERHOOK_PORTABLE"])):
            programs[name] = Path(folder) / name
            command = ["cc", "-std=c11", "-O3", *flags, f"-I{NATIVE}", *SOURCES]
            subprocess.run([*map(str, command), "-o", str(programs[name]), "-lm"], check=True)
        best: dict[str, dict[str, float]] = {name: {} for name in programs}
        for _ in range(ROUNDS):
            for name, program in programs.items():
                for key, seconds in run(program).items():
                    best[name][key] = min(seconds, best[name].get(key, seconds))
    finish(
        {
            "speedup": {k: round(best["portable"][k] / s, 2) for k, s in best["shipped"].items()},
            "gbps": {k: round(size(k) / s / 1e9, 1) for k, s in best["shipped"].items()},
            "microseconds": {k: round(1e6 * s, 1) for k, s in best["shipped"].items()},
        }
    )


def run(program: Path) -> dict[str, float]:
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {key: float(value) for key, value in map(str.split, output.splitlines())}


def size(key: str) -> int:
    dtype, width = key.split("_")
    return BYTES[dtype] * int(width) ** 2


if __name__ == "__main__":
    main()
