"""`make fuzz`: strangers' packages through the reader, random use of llama.cpp under the preload.

Both run under the address and undefined-behaviour sanitizers, the C tests under the thread
sanitizer too. The last line is one JSON object: how many inputs and steps ran, what was found (told
on standard error), and how many lines of the C sources the tests and a part of these steps reach.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fuzz_sessions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NATIVE = ROOT / "adapters" / "steerbridge_llama_cpp" / "native"
PRELOAD = ROOT / "plugins" / "steerbridge_run" / "native"
WORKERS = os.cpu_count() or 1
STEPS = {"stub": 20_000, "real": 3_000}  # of one program
SANITIZERS = "-fsanitize=address,undefined"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=1_000_000, help="Of sessions, in all.")
    parser.add_argument("--real", type=int, default=60_000, help="Of these, on the real libllama.")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        golden = folder / "golden"
        golden.mkdir()
        run(sys.executable, HERE / "make_golden.py", golden)
        inputs = packages(folder, golden, options.packages, options.seed)
        findings = threads(folder, golden)
        steps = {}
        for kind, count in (("stub", options.steps - options.real), ("real", options.real)):
            steps[kind], found = sessions(folder, kind, count, options.seed)
            findings += found
        covered = coverage(folder, golden)
    print(*findings, sep="\n", file=sys.stderr)
    result = {
        "package_inputs": inputs,
        "session_steps": sum(steps.values()),
        "session_steps_real": steps["real"],
        "findings": len(findings),
        "line_coverage": covered,
        "seed": options.seed,
    }
    print(json.dumps(result))
    return 1 if findings else 0


def packages(folder: Path, golden: Path, count: int, seed: int) -> int:
    """Mutants of sound packages through the reader; a finding ends the program with its report."""
    build = folder / "packages"
    run("cmake", "-S", NATIVE, "-B", build, "-DSTEERHOOK_TESTS=ON")
    run("cmake", "--build", build, "--target", "fuzz_short")
    seeds = sorted((golden / "seeds").glob("*.gguf"))
    share = -(-count // WORKERS)
    jobs = [(build / "fuzz_short", share, seed + i, *seeds) for i in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda job: run(*job), jobs))
    return share * WORKERS


def threads(folder: Path, golden: Path) -> list[str]:
    """The C tests, which use sessions on several threads, under the thread sanitizer."""
    build = tests(folder / "threads", golden, "-fsanitize=thread -g")
    done = subprocess.run([build / "test_steerhook", golden], capture_output=True, text=True)
    return [done.stderr[-4000:]] if done.returncode else []


def tests(build: Path, golden: Path, flags: str) -> Path:
    """The C tests, built with these flags."""
    options = ["-DSTEERHOOK_TESTS=ON", "-DSTEERHOOK_SANITIZE=OFF", f"-DSTEERHOOK_GOLDEN={golden}"]
    options += [f"-DCMAKE_C_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=Debug"]
    run("cmake", "-S", NATIVE, "-B", build, *options)
    run("cmake", "--build", build, "--parallel", WORKERS, "--target", "test_steerhook")
    return build


def sessions(folder: Path, kind: str, steps: int, seed: int) -> tuple[int, list[str]]:
    """Programs that use llama.cpp at random; how many steps, and what was found."""
    preload = fuzz_sessions.library(folder / "sanitized", SANITIZERS, "-fno-omit-frame-pointer")
    first = [run("cc", f"-print-file-name=lib{name}.so").strip() for name in ("asan", "ubsan")]
    return programs(folder, kind, steps, seed, preload, first)


def programs(
    folder: Path, kind: str, steps: int, seed: int, preload: Path, first: Sequence[str] = ()
) -> tuple[int, list[str]]:
    place = folder / kind
    place.mkdir(exist_ok=True)
    backend = {"real": fuzz_sessions.real, "stub": fuzz_sessions.stub}[kind](place)
    seeds = range(1000 * seed, 1000 * seed + -(-steps // STEPS[kind]))

    def one(number: int) -> tuple[int, list[str]]:
        return fuzz_sessions.run(backend, number, STEPS[kind], preload, place, first)

    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(one, seeds))
    return sum(ran for ran, _ in results), [f for _, found in results for f in found]


def coverage(folder: Path, golden: Path) -> float:
    """The share of lines that the C tests and some programs reach."""
    build = tests(folder / "covered", golden, "--coverage -O0")
    run(build / "test_steerhook", golden)
    preload = fuzz_sessions.library(folder / "preload", "--coverage", "-O0")
    for kind in STEPS:
        programs(folder, kind, 4 * STEPS[kind], 1, preload)
    lines: dict[tuple[str, int], bool] = {}
    for counts in (*build.rglob("*.gcda"), *preload.parent.rglob("*.gcda")):
        for file in json.loads(run("gcov", "--json-format", "--stdout", counts))["files"]:
            if Path(file["file"]).resolve().parent in (NATIVE, PRELOAD):
                note(lines, file["file"], file["lines"])
    return round(sum(lines.values()) / len(lines), 4)


def note(lines: dict[tuple[str, int], bool], file: str, counted: Iterable[Any]) -> None:
    for line in counted:
        key = (str(Path(file).resolve()), line["line_number"])
        lines[key] = lines.get(key, False) or line["count"] > 0


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
