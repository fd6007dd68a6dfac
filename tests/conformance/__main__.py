"""Every runtime through the conformance kit: `make conformance`, or some with RUNTIMES=NAME.

Compares with the pins and prints the counts as one JSON object; `--update` writes the pins of what
was run, and docs/runtimes.md. A change of pins is for a person to accept: read the difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # what tests share
import runtimes
from numpy_driver import MUTANTS, NumpyDriver
from steerbridge.testing import Ground, check_runtime
from steerbridge.testing import pins as pinned
from steerbridge.testing.pins import Pins


def main() -> int:
    """Run the chosen drivers; 1 if anything is not as pinned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtimes", nargs="*", default=list(runtimes.DRIVERS))
    parser.add_argument("--update", action="store_true", help="Write pins and docs/runtimes.md.")
    options = parser.parse_args()
    start = time.monotonic()
    known = pinned.read(runtimes.PINS)
    run: dict[str, Pins] = {}
    differences: list[str] = []
    with tempfile.TemporaryDirectory(prefix="steerbridge-conformance-") as folder:
        ground = Ground(Path(folder))
        for name in options.runtimes:
            begun = time.monotonic()
            driver = runtimes.DRIVERS[name](ground)
            results = check_runtime(driver, ground)
            run[name] = Pins(driver.against, results)
            news = known.get(name, Pins(driver.against)).differences(results)
            differences += [f"{name}: {line}" for line in news]
            _say(f"{name}: {run[name].counts()} in {time.monotonic() - begun:.0f} s")
        caught = [kind for kind in MUTANTS if _caught(kind, ground)]
    for line in differences:
        _say(line)
    if options.update:
        pinned.write(runtimes.PINS, {**known, **run})
        runtimes.PAGE.write_text("\n".join(runtimes.page()) + "\n", "utf-8")
    report = {
        "runtimes": {name: _counted(one) for name, one in run.items()},
        "shapes": max(len(one.shapes) for one in run.values()),
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


def _caught(kind: type, ground: Ground) -> bool:
    """True if a shape whose name says why finds this mutant."""
    results = check_runtime(NumpyDriver(kind.__name__, kind), ground)
    wrong = [name for name, result in results.items() if result.status == "wrong"]
    return any(words in name for name in wrong for words in MUTANTS[kind])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
