"""`make fuzz`: many mutants of sound packages through the reader, under sanitizers.

The last line is one JSON object: how many inputs ran, and that none was a finding (a finding
aborts the run with the sanitizer's report).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "adapters" / "steerbridge_llama_cpp" / "native"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        build, golden = Path(folder) / "build", Path(folder) / "golden"
        golden.mkdir()
        run(sys.executable, HERE / "make_golden.py", golden)
        run("cmake", "-S", NATIVE, "-B", build, "-DSTEERHOOK_TESTS=ON")
        run("cmake", "--build", build, "--target", "fuzz_short")
        seeds = sorted((golden / "seeds").glob("*.gguf"))
        share = -(-options.runs // workers)
        jobs = [(build / "fuzz_short", share, options.seed + i, *seeds) for i in range(workers)]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda job: run(*job), jobs))
    print(json.dumps({"fuzz": {"inputs": share * workers, "findings": 0, "seed": options.seed}}))


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


if __name__ == "__main__":
    main()
