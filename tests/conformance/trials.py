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
from steerbridge.testing import SHAPES, Ground, check_runtime
from steerbridge.testing.pins import Pins


@cache
def _ground(head: int = runtimes.Runtime.head) -> Ground:
    """What the runtimes that one worker tries share, for models with heads of one width."""
    folder = tempfile.mkdtemp(prefix="steerbridge-conformance-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Ground(Path(folder), head=head)


def tried(name: str) -> tuple[Pins, float]:
    """Results of one runtime, and the seconds they took."""
    begun = time.monotonic()
    runtime = runtimes.RUNTIMES[name]
    ground = _ground(runtime.head)
    driver = runtime.driver(ground)
    pins = Pins(driver.against, check_runtime(driver, ground))
    return pins, time.monotonic() - begun


def caught() -> list[str]:
    """The mutants that a shape finds whose name says why."""
    return [kind.__name__ for kind in MUTANTS if is_caught(kind, _ground())]


def is_caught(kind: type, ground: Ground) -> bool:
    """Whether one of the shapes that name what is wrong with a mutant finds it."""
    driver = NumpyDriver(kind.__name__, kind)
    naming = [s for s in SHAPES if any(words in s.name for words in MUTANTS[kind])]
    assert naming, f"no shape names what is wrong with {kind.__name__}"
    return any(
        result.status == "wrong"
        for shape in naming
        for result in check_runtime(driver, ground, [shape]).values()
    )
