"""What computed a result: versions and machine, for evidence and reports."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

TOOLS: Final = ("steerbridge", "torch", "transformers", "llama-cpp-python", "gguf", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed of `TOOLS`."""
    known = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def now() -> datetime:
    """The time in UTC, or that of `SOURCE_DATE_EPOCH` (seconds): files can be made again."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)


def machine() -> dict[str, Any]:
    """System, architecture and number of processors."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
    }
