"""Every runtime through the conformance kit: `make conformance`, or some with RUNTIMES=NAME.

Compares with the pins and prints the counts as one JSON object; `--update` writes the pins of what
was run, and docs/runtimes.md. A change of pins is for a person to accept: read the difference.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Final

sys.path.append(str(Path(__file__).resolve().parent.parent))  # what tests share
import runtimes
import trials
from numpy_driver import MUTANTS
from steerbridge.testing import SHAPES
from steerbridge.testing import pins as pinned
from steerbridge.testing.pins import Pins

WORKERS: Final = 2  # the tiny models and their programs keep one core busy each


def main() -> int:
    """Run the chosen drivers; 1 if anything is not as pinned."""
    parser = argparse.ArgumentParser(description=__doc__)
    usual = [name for name, runtime in runtimes.RUNTIMES.items() if not runtime.apart]
    parser.add_argument("--runtimes", nargs="*", default=usual)
    parser.add_argument("--update", action="store_true", help="Write pins and docs/runtimes.md.")
    options = parser.parse_args()
    start = time.monotonic()
    known = pinned.read(runtimes.PINS)
    run: dict[str, Pins] = {}
    differences: list[str] = []
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        mutants = pool.submit(trials.caught)
        jobs = {pool.submit(trials.tried, name): name for name in options.runtimes}
        for job in as_completed(jobs):
            name = jobs[job]
            run[name], seconds = job.result()
            news = known.get(name, Pins(run[name].against)).differences(run[name].shapes)
            differences += [f"{name}: {line}" for line in news]
            _say(f"{name}: {run[name].counts()} in {seconds:.0f} s")
        caught = mutants.result()
    for line in differences:
        _say(line)
    if options.update:
        pinned.write(runtimes.PINS, {**known, **run})
        runtimes.PAGE.write_text("\n".join(runtimes.page()) + "\n", "utf-8")
    report = {
        "runtimes": {name: _counted(run[name]) for name in options.runtimes},
        "shapes": len(SHAPES),
        "mutants": {"caught": len(caught), "all": len(MUTANTS)},
        "seconds": round(time.monotonic() - start),
        "as_pinned": not differences,
    }
    print(json.dumps(report))
    return int((bool(differences) and not options.update) or len(caught) < len(MUTANTS))


def _counted(one: Pins) -> dict[str, object]:
    counts = one.counts()
    faults = [name for name, result in one.shapes.items() if result.status == "wrong"]
    # A fault that is pinned is expected; one that is not fails the run by itself.
    return {**counts, "wrong": 0, "expected_failures": faults, "against": one.against}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
