"""How many threads llama.cpp computes with: one for each core that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_CPUS: Final = Path("/sys/devices/system/cpu")
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def physical_cores(cpus: Path = _CPUS, quota: Path = _QUOTA) -> int | None:
    """Physical cores among the processors that the process may run on (`taskset`), no more than a
    container's quota allows; None where that cannot be seen.

    Tokens are computed one by one, and all threads wait for the slowest: two threads on one core,
    or more than there is time for, make an answer slower.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    found = {_core(cpus / f"cpu{number}") for number in os.sched_getaffinity(0)}
    if None in found:
        return None
    return min(len(found), _allowed(quota))


def _core(folder: Path) -> tuple[str, str] | None:
    """The package and number of the core that a processor is a thread of."""
    names = ("physical_package_id", "core_id")
    try:
        package, core = ((folder / "topology" / name).read_text().strip() for name in names)
    except OSError:
        return None
    return package, core


def _allowed(quota: Path) -> int:
    """Cores' worth of time that the control group gives; many without a limit."""
    try:
        time, period = quota.read_text().split()
        return max(1, math.ceil(int(time) / int(period)))
    except (OSError, ValueError):  # no control group, or "max"
        return 1 << 16
