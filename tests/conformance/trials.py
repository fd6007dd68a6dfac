"""What a worker of `make conformance` does: one runtime through the kit, or the wrong ones."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import runtimes
from numpy_driver import MUTANTS, NumpyDriver
from steerbridge.testing import Ground, check_runtime
from steerbridge.testing.pins import Pins


@cache
def _ground() -> Ground:
    """What the runtimes that one worker tries share."""
    folder = tempfile.mkdtemp(prefix="steerbridge-conformance-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Ground(Path(folder))


def tried(name: str) -> tuple[Pins, float]:
    """Results of one runtime, and the seconds they took."""
    begun = time.monotonic()
    driver = runtimes.DRIVERS[name](_ground())
    pins = Pins(driver.against, check_runtime(driver, _ground()))
    return pins, time.monotonic() - begun


def caught() -> list[str]:
    """The mutants that a shape finds whose name says why."""
    found = []
    for kind, named in MUTANTS.items():
        results = check_runtime(NumpyDriver(kind.__name__, kind), _ground())
        wrong = [name for name, result in results.items() if result.status == "wrong"]
        if any(words in name for name in wrong for words in named):
            found.append(kind.__name__)
    return found
