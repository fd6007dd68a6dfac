"""The source distribution and the wheel made from it, and what must be inside the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
LIBRARY_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
LIBRARIES: Final = ("steerbridge_llama_cpp/libsteerhook", "steerbridge_run/libsteerpreload")
URLS: Final = {"Documentation", "Source", "Changelog", "Issues"}
# The header of libsteerhook is for C programs that use it; no other C source belongs in a wheel.
HEADER: Final = "steerbridge_llama_cpp/native/steerhook.h"
STARTS: Final = ("steerbridge_tgi.pth", "steerbridge_vllm.pth")  # read by Python at its start
_SOURCES: Final = (".c", ".h", ".map", ".cmake", "CMakeLists.txt")
_FOREIGN: Final = ("tests/", "benchmarks/", "examples/", "docs/", "requirements/")


def project() -> dict[str, Any]:
    """The tables of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(folder: Path) -> Path:
    """Build both distributions as a release does and return the wheel."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(f"the build failed:\n{(done.stdout + done.stderr)[-3000:]}")
    [wheel] = folder.glob("*.whl")
    return wheel


def check(wheel: Path) -> None:
    """Raise AssertionError for a wheel that misses something or holds too much."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [info] = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    _check_name(wheel)
    _check_contents(names, info)
    _check_entry_points(entry_points, names)
    _check_metadata(metadata)


def _check_name(wheel: Path) -> None:
    """A library loaded with ctypes depends on the platform, but on no version of Python."""
    version = project()["project"]["version"]
    expected = rf"steerbridge-{re.escape(version)}-py3-none-(linux|manylinux|macosx)_[\w.]+\.whl"
    assert re.fullmatch(expected, wheel.name), f"wheel: expected {expected}, found {wheel.name}"


def _check_contents(names: set[str], info: str) -> None:
    packages = [Path(p).name for p in project()["tool"]["scikit-build"]["wheel"]["packages"]]
    needed = {f"{package}/{file}" for package in packages for file in ("__init__.py", "py.typed")}
    needed |= {library + LIBRARY_SUFFIX for library in LIBRARIES}
    needed |= {HEADER, *STARTS, f"{info}/licenses/LICENSE"}
    assert needed <= names, f"the wheel misses {sorted(needed - names)}"
    strangers = {n for n in names if n.startswith(_FOREIGN) or n.endswith(_SOURCES)} - {HEADER}
    strangers |= {n for n in names if n.split("/")[0] not in {*packages, info, *STARTS}}
    assert not strangers, f"the wheel holds {sorted(strangers)}"


def _check_entry_points(text: str, names: set[str]) -> None:
    parser = ConfigParser(delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    for group in parser.sections():
        for name, target in parser[group].items():
            path = target.partition(":")[0].replace(".", "/")
            present = {f"{path}.py", f"{path}/__init__.py"} & names
            assert present, f"entry point {group} {name}: no module for {target}"


def _check_metadata(metadata: Message) -> None:
    urls = {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert urls >= URLS, f"METADATA misses the addresses {sorted(URLS - urls)}"
    assert metadata["License-Expression"] == "Apache-2.0", metadata["License-Expression"]
    extras = set(metadata.get_all("Provides-Extra", []))
    declared = set(project()["project"]["optional-dependencies"])
    assert extras == declared, f"METADATA: expected extras {declared}, found {extras}"


def main() -> int:
    """Check the wheels that are named on the command line."""
    for name in sys.argv[1:]:
        check(Path(name))
        print(f"ok {name}")
    return 0 if sys.argv[1:] else 2


if __name__ == "__main__":
    sys.exit(main())
