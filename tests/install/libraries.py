"""Load the C libraries of the installed steerbridge: for wheels of any platform."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def main() -> None:
    """Raise OSError for a library that is missing or was made for another platform."""
    for package, name in (
        ("steerbridge_llama_cpp", "libsteerhook"),
        ("steerbridge_run", "libsteerpreload"),
    ):
        [folder] = find_spec(package).submodule_search_locations
        ctypes.CDLL(str(Path(folder, name + SUFFIX)))
        print(f"loaded {name}")


if __name__ == "__main__":
    main()
